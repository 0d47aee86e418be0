"""The documents, checked against the code: tables, links, commands and snippets.

What they say in prose is not checked.
"""

from __future__ import annotations

import ast
import configparser
import json
import re
import shlex
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import typer

from fapool_plugin.base.resource_manager import ResourceManager
from fapool_plugin.config import FAPoolConfig
from fapool_plugin.observe import timeline
from fapool_plugin.observe.metrics import PhaseCounters, RankCounters
from fapool_plugin.observe.prometheus import serve
from fapool_plugin.plan.forecast import Choice, Thresholds
from fapool_plugin.plan.line import Tile
from fapool_plugin.plan.shares import TileWithKeys
from fapool_plugin.ranks.local import LocalPool
from fapool_plugin.tools import planning
from fapool_plugin.tools.bench import command as bench
from fapool_plugin.tools.cli import app
from fapool_plugin.wire.messages import TILE_FIELDS, Header, Op, Status
from tests.test_architecture import ROOMS, modules

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


def subcommand(arguments: list[str]) -> tuple[Any, list[str]]:
    """The command that these arguments name, one of a group's too, and its own arguments."""
    found: Any = typer.main.get_command(app)
    while hasattr(found, "commands") and arguments:
        name, *arguments = arguments
        assert name in found.commands, f"fapool has no command {name!r}, only {list(found.commands)}"
        found = found.commands[name]
    return found, arguments


def anchors(document: Path) -> set[str]:
    """Its headings, as links name them."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(document: Path) -> list[str]:
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        name, _, anchor = target.partition("#")
        other = document.parent / name if name else document
        if "://" not in target and (not other.exists() or (anchor and anchor not in anchors(other))):
            broken.append(target)
    return broken


def test_the_documented_configuration_is_the_codes() -> None:
    rows = table(read("docs/configuration.md"), "key")
    expected = [
        [f"`{name}`", f"`{json.dumps(FAPoolConfig().to_dict()[name])}`", field.description or ""]
        for name, field in FAPoolConfig.model_fields.items()
    ]
    assert rows == expected
    defaults = {name: default for name, default, _ in expected}
    for name, default, _ in table(read("README.md"), "key"):
        assert defaults[name] == default, f"README says {name} is {default}, it is {defaults[name]}"


def test_the_protocols_tables_are_the_codes() -> None:
    text = read("docs/protocol.md")
    assert names(table(text, "field")) == list(Header._fields)
    assert [(row[0], int(row[1])) for row in table(text, "op")] == [(op.name, op.value) for op in Op]
    assert [(row[0], int(row[1])) for row in table(text, "status")] == [(one.name, one.value) for one in Status]
    columns = [*Tile._fields, *(name for name in TileWithKeys._fields if name != "tile")]
    assert names(table(text, "column")) == columns
    assert len(columns) == TILE_FIELDS


def test_every_key_of_stats_is_explained() -> None:
    stats, text = ResourceManager(FAPoolConfig(), LocalPool).stats(), read("docs/huggingface.md")
    assert names(table(text.split("## stats()")[1], "key")) == list(stats)
    assert names(table(text, "counter")) == list(asdict(PhaseCounters()))
    assert names(table(text, "of a rank")) == list(asdict(RankCounters(0)))


def test_every_kind_of_event_is_explained() -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in modules(ROOT).values())
    written = set(re.findall(r"\bcounters\.log\(\s*\"([^\"]*)\"", sources))
    assert sorted(names(table(read("docs/huggingface.md"), "kind"))) == sorted(written)


def returned(path: Path, functions: set[str]) -> Iterator[str]:
    """Texts that these functions of a file return, with "..." for what is filled in."""
    for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(function, ast.FunctionDef) and function.name in functions:
            for node in ast.walk(function):
                value = node.value if isinstance(node, ast.Return) else None
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield value.value
                elif isinstance(value, ast.JoinedStr):
                    parts = (part.value if isinstance(part, ast.Constant) else "..." for part in value.values)
                    yield "".join(map(str, parts))


def test_every_reason_for_one_block_is_explained() -> None:
    home = ROOT / "fapool_plugin" / "integrations"
    asked = {"one_block_model", "one_block_reason", "hook_reason", "untried_reason", "beyond_trial"}
    asked |= {"collector_reason", "not_in_pieces", "_shown"}
    files = [home / "huggingface" / f"{name}.py" for name in ("forward", "blocks", "pieces")]
    reasons = {text for file in files for text in returned(file, asked)}
    shown = names(table(read("docs/huggingface.md").split("## Blocks")[1], "reason"))
    # This one is given where the model is wrapped, in an expression.
    elsewhere = "it takes a cache of its own kind only"
    assert f'"{elsewhere}"' in (home / "huggingface/model.py").read_text(encoding="utf-8")
    assert sorted(shown) == sorted(reasons | {elsewhere})


def test_every_reason_for_a_local_forward_is_explained() -> None:
    home = ROOT / "fapool_plugin" / "integrations"
    reasons = {*returned(home / "huggingface/forward.py", {"_local_reason"})}
    reasons |= {*returned(home / "huggingface/arguments.py", {"traced_reason"})}
    reasons |= {*returned(home / "huggingface/masks.py", {"not_causal"})}
    reasons |= {*returned(home / "huggingface/supported.py", {"foreign_reason"})}
    reasons |= {*returned(home / "huggingface/attention_layer.py", {"bypass_reason"})}
    nested = "it is called from inside of a pooled forward of the same model"
    assert f'"{nested}"' in (home / "huggingface/attention.py").read_text(encoding="utf-8")
    reasons.add(nested)
    raised = {"... makes a mask of its own", "a layer computes with a mask that only attention functions may look at"}
    source = (home / "huggingface/attention.py").read_text(encoding="utf-8")
    assert all(text.removeprefix("...") in source for text in raised)
    reasons |= raised
    shown = names(table(read("docs/huggingface.md").split("## Blocks")[0], "reason"))
    patterns = [re.escape(text).replace(re.escape("..."), ".*") for text in shown]
    found = [[text for text in reasons if re.fullmatch(pattern, text)] for pattern in patterns]
    assert all(len(texts) == 1 for texts in found), list(zip(shown, found, strict=True))
    assert {text for texts in found for text in texts} == reasons


def test_the_rooms_are_the_codes() -> None:
    there: dict[str, set[str]] = {}
    for module in modules(ROOT).keys() - {"__init__"}:
        room, *inside = module.split(".")
        if inside:
            there.setdefault(room, set()).add(inside[0])
        elif (ROOT / "fapool_plugin" / f"{room}.py").exists():
            there.setdefault("the top", set()).add(room)
    shown = {
        room: set(re.findall(r"`(\w+)`", mentioned))
        for room, mentioned, _ in table(read("docs/architecture.md"), "room")
    }
    assert shown == there
    assert [room for room in shown if room != "the top"] == [room for room in ROOMS if room in there]


def test_metrics_and_spans_are_explained() -> None:
    pytest.importorskip("prometheus_client")
    from prometheus_client.parser import text_string_to_metric_families

    manager = ResourceManager(FAPoolConfig(), LocalPool)
    manager.counters.rank(0)
    with serve(manager.stats, 0) as server:
        url = f"http://127.0.0.1:{server.port}/metrics"
        families = text_string_to_metric_families(urllib.request.urlopen(url, timeout=10).read().decode())
        served = {
            family.name.removesuffix("_total"): {label for one in family.samples for label in one.labels}
            for family in families
        }
    text = read("docs/planning.md")
    shown = {row[0].strip("`"): set(re.findall(r"`(\w+)`", row[1])) for row in table(text, "metric")}
    assert shown == served
    spans = [timeline.LINEAR, timeline.SEND, timeline.ATTENTION, timeline.WAIT, timeline.MERGE]
    assert names(table(text, "span")) == spans


def test_columns_and_benchmarks_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    text = read("docs/planning.md")
    choice = Choice(1, 0.5, 1, 1.0, 2.0, 0.5, 1.0, 1.0)
    planning.show_plan([planning.Outlook(1, {4096: choice}, {4096: (10**9, 10**9)}, Thresholds(None, None))])
    header = r"\s+".join(map(re.escape, names(table(text, "column"))))
    shown = capsys.readouterr().out
    assert re.search(rf"^\s*{header}\s*$", shown, re.MULTILINE), f"no header with these columns in {shown}"
    group: Any = typer.main.get_command(bench.app)
    assert names(table(text, "benchmark")) == list(group.commands)


def test_every_extra_is_explained() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    assert sorted(names(table(read("README.md"), "extra"))) == sorted(setup["options.extras_require"])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_relative_links_lead_somewhere(document: Path) -> None:
    assert not broken_links(document)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_are_understood(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for arguments in commands(text):
        # Parses and converts, raises what the user would see, runs nothing.
        command, rest = subcommand(arguments)
        command.make_context(command.name, rest)
    for arguments in mentions(text):
        known = {option for parameter in subcommand(arguments)[0].params for option in parameter.opts} | {"--help"}
        unknown = [word for word in arguments if word.startswith("-") and word not in known]
        assert not unknown, f"fapool {' '.join(arguments)}: no option {unknown}"


def test_there_are_commands_to_check() -> None:
    shown = {arguments[0] for document in DOCUMENTS for arguments in commands(document.read_text(encoding="utf-8"))}
    assert shown == {"demo", "generate", "calibrate", "plan", "simulate", "bench", "doctor", "pool"}


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
        shown[-1].append([row, row + 1, head, head + 1, q_start, q_stop, k_start, k_stop])
    assert shown == shares
