"""The launcher's entry: ``deepspeed --module fapool_plugin.run SCRIPT ...`` runs an ordinary script with a pool.

Finds the "fa_pool" section in the DeepSpeed config that the script is given, lets the last ranks of the launch serve as
pool ranks, and runs the script on the others. Without a section, or with ``"enabled": false``, it only runs the script.
It knows what a command line looks like, and nothing of models.
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from fapool_plugin.config import SECTION, FAPoolConfigError, section_of

_OPTIONS = ("--deepspeed_config", "--deepspeed-config", "--deepspeed")
_ACCELERATE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"
_USAGE = (
    "usage: python -m fapool_plugin.run SCRIPT.py [ARGUMENTS ...]   (under deepspeed, torchrun or accelerate: --module)"
)


def config_file(arguments: Sequence[str]) -> str | None:
    """The DeepSpeed config that a script's arguments name, or accelerate's environment; None if there is none."""
    for at, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if option in _OPTIONS:
            value = value if equals else "".join(arguments[at + 1 : at + 2])
            # --deepspeed is DeepSpeed's own switch, too, without a file.
            if value.endswith(".json"):
                return value
    return os.environ.get(_ACCELERATE)


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], str, list[str]]:
    """What the launcher put first (--local_rank=N), the script, and the script's own arguments.

    Raises:
        FAPoolConfigError: there is no script, or it is no file.
    """
    own = [argument for argument in arguments if argument.startswith(("--local_rank", "--local-rank"))]
    script, *rest = [argument for argument in arguments if argument not in own] or [""]
    if not script or script.startswith("-"):
        raise FAPoolConfigError(f"no script to run. {_USAGE}")
    if not Path(script).is_file():
        raise FAPoolConfigError(f"the script {script} is no file. {_USAGE}")
    return own, script, rest


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a script. Exit code 2 if a setting is wrong; else the script's own."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        own, script, rest = split_arguments(given)
    except FAPoolConfigError as error:
        raise SystemExit(f"fa_pool: {error}") from None
    _enter(config_file(rest))
    # What a script sees that the launcher started itself.
    sys.argv = [script, *own, *rest]
    sys.path[0] = str(Path(script).resolve().parent)
    runpy.run_path(script, run_name="__main__")


def _enter(path: str | None) -> None:
    """Does what the config's section asks for. Without one nothing is loaded, and a file that is none is left to
    the script."""
    try:
        settings = section_of(path) if path is not None and SECTION in Path(path).read_text(encoding="utf-8") else None
    except (OSError, UnicodeDecodeError):
        return
    except FAPoolConfigError as error:
        from fapool_plugin.ranks.roles import say_once

        say_once(error, None)
        raise SystemExit(2) from None
    if settings is None:
        return
    if settings.enabled:
        from fapool_plugin.ranks.roles import take_role

        take_role(settings)
    if importlib.util.find_spec("deepspeed") is not None:
        from fapool_plugin.integrations.deepspeed import install

        install(settings)


if __name__ == "__main__":
    main()
