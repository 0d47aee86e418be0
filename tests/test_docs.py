"""The documents, checked against the code: tables, links, commands and snippets.

What they say in prose is not checked.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import typer

from fapool_plugin.cli import app
from fapool_plugin.config import FAPoolConfig
from fapool_plugin.local_pool import LocalPool
from fapool_plugin.metrics import PhaseCounters, RankCounters
from fapool_plugin.partition import Tile
from fapool_plugin.plan import Request
from fapool_plugin.resource_manager import ResourceManager
from fapool_plugin.transport import TILE_FIELDS, Header, Op, Status

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *ROOT.glob("docs/*.md")])


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def table(text: str, first_column: str) -> list[list[str]]:
    """The cells of every row of the one table whose header begins with ``first_column``."""
    found = re.findall(rf"^\| {re.escape(first_column)} \|.*\n\|[-|]+\|\n((?:\|.*\n?)*)", text, re.MULTILINE)
    assert len(found) == 1, f"{len(found)} tables begin with the column {first_column!r}, not 1"
    return [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in found[0].splitlines()]


def names(rows: list[list[str]]) -> list[str]:
    return [row[0].strip("`") for row in rows]


def code_lines(text: str) -> Iterator[str]:
    """Lines of fenced and indented code, continued lines joined."""
    fenced = False
    for line in text.replace("\\\n", " ").splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            yield line.strip()


def commands(text: str) -> Iterator[list[str]]:
    """Arguments of every ``fapool ...`` that is shown as a line of code, without its comment."""
    for line in code_lines(text):
        words = shlex.split(line, comments=True) if line.startswith("fapool ") else []
        if words:
            yield words[1:]


def mentions(text: str) -> Iterator[list[str]]:
    """Arguments of every `fapool ...` in running text: fragments, not whole commands."""
    for quoted in re.findall(r"`fapool ([^`]+)`", text):
        yield quoted.split()


def subcommand(arguments: list[str]) -> Any:
    group: Any = typer.main.get_command(app)
    assert arguments[0] in group.commands, f"fapool has no command {arguments[0]!r}, only {list(group.commands)}"
    return group.commands[arguments[0]]


def broken_links(document: Path) -> list[str]:
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    return [target for target in targets if target and not (document.parent / target).exists()]


def test_the_readmes_configuration_is_the_codes() -> None:
    rows = table(read("README.md"), "key")
    expected = [
        [f"`{name}`", f"`{json.dumps(field.default)}`", field.description or ""]
        for name, field in FAPoolConfig.model_fields.items()
    ]
    assert rows == expected


def test_the_protocols_tables_are_the_codes() -> None:
    text = read("docs/protocol.md")
    assert names(table(text, "field")) == list(Header._fields)
    assert [(row[0], int(row[1])) for row in table(text, "op")] == [(op.name, op.value) for op in Op]
    assert [(row[0], int(row[1])) for row in table(text, "status")] == [(one.name, one.value) for one in Status]
    columns = [*Tile._fields, *(name for name in Request._fields if name != "tile")]
    assert names(table(text, "column")) == columns
    assert len(columns) == TILE_FIELDS


def test_every_key_of_stats_is_explained() -> None:
    stats, text = ResourceManager(FAPoolConfig(), LocalPool).stats(), read("docs/huggingface.md")
    assert names(table(text.split("## stats()")[1], "key")) == list(stats)
    for key in (*asdict(RankCounters(0)), *asdict(PhaseCounters())):
        assert f"`{key}`" in text, f"{key} is not explained"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_relative_links_lead_somewhere(document: Path) -> None:
    assert not broken_links(document)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_are_understood(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for arguments in commands(text):
        # Parses and converts, raises what the user would see, runs nothing.
        subcommand(arguments).make_context(arguments[0], arguments[1:])
    for arguments in mentions(text):
        known = {option for parameter in subcommand(arguments).params for option in parameter.opts} | {"--help"}
        unknown = [word for word in arguments if word.startswith("-") and word not in known]
        assert not unknown, f"fapool {' '.join(arguments)}: no option {unknown}"


def test_there_are_commands_to_check() -> None:
    shown = {arguments[0] for document in DOCUMENTS for arguments in commands(document.read_text(encoding="utf-8"))}
    assert shown == {"demo", "generate", "doctor"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_make_targets_exist(document: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):(?!=)", read("Makefile"), re.MULTILINE))
    lines = code_lines(document.read_text(encoding="utf-8"))
    shown = {line.split()[1] for line in lines if re.match("make [a-z]", line)}
    assert shown <= targets, f"make has no {shown - targets}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_python_is_python(document: Path) -> None:
    for snippet in re.findall(r"```python\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL):
        compile(snippet, document.name, "exec")


def test_the_worked_example_is_what_the_code_prints(capsys: pytest.CaptureFixture[str]) -> None:
    text = read("docs/architecture.md")
    (snippet,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(snippet, "architecture.md", "exec"), {})
    shares = [json.loads(line.replace("(", "[").replace(")", "]")) for line in capsys.readouterr().out.splitlines()]
    shown: list[list[list[int]]] = []
    for rank, lane, queries, keys, pairs in table(text, "rank"):
        if rank:
            shown.append([])
        row, head = (int(number) for number in re.findall(r"\d+", lane))
        (q_start, q_stop), (k_start, k_stop) = (
            (int(both[0]), int(both[-1]) + 1) for both in (queries.split("-"), keys.split("-"))
        )
        allowed = sum(min(query + 1, k_stop) - k_start for query in range(q_start, q_stop))
        assert allowed == int(pairs), f"{rank} {lane}: {allowed} pairs, not {pairs}"
        shown[-1].append([row, head, head + 1, q_start, q_stop, k_start, k_stop])
    assert shown == shares
