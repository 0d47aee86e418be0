"""What all commands do with what was typed: check it before any work, and tell every error in one line.

Knows options by name only; what they mean is the commands' to say.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path

import typer


class KVHome(StrEnum):
    """Where keys live, ``kv_home`` in the settings."""

    base = "base"
    pool = "pool"


_PICTURES = (".png", ".svg", ".pdf")


@contextmanager
def one_line_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Turns an error of the user's, and of these ``kinds``, into one line and exit code 2."""
    users: tuple[type[Exception], ...] = (ValueError, OSError, *kinds)
    try:
        yield
    except users as error:
        typer.echo(f"fapool: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from None


def check_counts(options: Mapping[str, int | None]) -> None:
    """Raises ValueError for a number below one."""
    for option, value in options.items():
        if value is not None and value < 1:
            raise ValueError(f"{option} is {value}; give at least 1")


def numbers(option: str, text: str, least: int = 1) -> list[int]:
    """Counts separated by commas, ascending, each once."""
    parts = [part.strip() for part in text.split(",")]
    wrong = [part for part in parts if not (part.isascii() and part.isdigit() and int(part) >= least)]
    if wrong:
        raise ValueError(f"{option} {text}: {wrong[0]!r} is no whole number of at least {least}; give such as 1,2,4")
    return sorted({int(part) for part in parts})


def check_output(path: Path | None, option: str = "--json") -> None:
    """Raises OSError for a file that cannot be written."""
    if path is None:
        return
    if path.is_dir():
        raise IsADirectoryError(f"{option} {path} is a folder; give a file's name")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{option} {path}: there is no folder {path.parent}; make it first")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PermissionError(f"{option} {path} cannot be written; give another file")


def check_picture(path: Path | None) -> None:
    """Raises OSError for a picture that cannot be written, ValueError for one that cannot be drawn."""
    check_output(path, "--plot")
    if path is None:
        return
    if path.suffix.lower() not in _PICTURES:
        raise ValueError(f"--plot {path} is no picture that can be drawn; give one of {', '.join(_PICTURES)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install fapool-plugin[plot], or leave it out")
