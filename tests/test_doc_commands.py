"""Commands and snippets that documents show, run as they stand there.

How a block is marked is told in CONTRIBUTING.md. A block runs in a fresh folder that holds what it mentions: the files
that its document shows before it, and of ``THERE`` what stands for the reader's own. What would take too long is made
smaller by ``CASES``, which also says what has to be printed.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.doc_blocks import Block, blocks, files, problems, run
from tests.models import save_model, save_tokenizer, words

DOCS = Path(__file__).resolve().parent.parent / "docs"
DOCUMENTS = [
    path for name in ("huggingface", "deepspeed", "megatron", "multi_node") if (path := DOCS / f"{name}.md").exists()
]
TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Case:
    """What one block needs, beyond what stands in its document."""

    instead: dict[str, str] = field(default_factory=dict)
    """Texts of the block, or of files before it, and what takes their place."""
    prints: tuple[str, ...] = ()
    """Patterns to be found in what it prints."""


_SMALLER = {'"threshold": 4096': '"threshold": 16, "memory_limit_mib": 64'}
_SHORTER = {"repeat(64)": "repeat(1)"}
_POOLED = (r"prefill: [1-9]\d* attention calls pooled, 0 local", r"decode: [1-9]\d* attention calls pooled, 0 local")
CASES: dict[str, Case] = {
    "deepspeed": Case(_SMALLER | _SHORTER, ("replaced in 2 of 2 attention layers", r"answer: \[\d+, \d+, \d+, \d+\]")),
    "torchrun": Case(_SMALLER | _SHORTER, ("replaced in 2 of 2 attention layers", r"answer: \[\d+, \d+, \d+, \d+\]")),
    "setup": Case(_SMALLER | _SHORTER, (r"pooled: [1-9]",)),
    "divided by megatron": Case(_SMALLER, _POOLED),
    "accelerate": Case(_SMALLER, ("replaced in 2 of 2 attention layers",)),
    "accelerate without deepspeed": Case(_SMALLER, ("idle",)),
    "own models, whole program": Case({"--nproc_per_node 3": "--nproc_per_node 1"}, ("prefill: 0 pooled calls",)),
    "divided": Case(_SMALLER | _SHORTER, (r"answer: \[.*\] pooled: [1-9]",)),
    "scaled down": Case(prints=_POOLED),
    "two nodes": Case(_SMALLER | {"--prompt-tokens 6000": "--prompt-tokens 200 --max-new-tokens 4"}, _POOLED),
    "loading": Case(prints=(r"pooled: True True",)),
    "generate": Case(
        instead={'"threshold": 4096': '"threshold": 16, "memory_limit_mib": 64'},
        prints=(r"'pooled_calls': [1-9]", "draining: the last long sequence ended"),
    ),
    "command line": Case(
        instead={"--activation length": "--activation length --threshold 16"},
        prints=("tokens identical *│ *yes", r"decode calls, pooled / local *│ *[1-9]\d* / 0"),
    ),
}


def _model(path: Path) -> None:
    shutil.copytree(save_tokenizer(save_model("llama", path.parent / "made")), path)


THERE: dict[str, Callable[[Path], object]] = {
    "MODEL_FOLDER": _model,
    "PROMPT.txt": lambda path: path.write_text(words(60)),
    "examples/": lambda path: path.symlink_to(DOCS.parent / "examples"),
    "configs/": lambda path: path.symlink_to(DOCS.parent / "configs"),
    "accelerated.py": lambda path: shutil.copy(DOCS.parent / "tests" / "scripts" / "accelerated.py", path),
}
"""What documents call the reader's own: made where a block mentions it, so that the block runs unchanged."""


def prepared(document: str, block: Block, folder: Path) -> str:
    """Puts into the folder what the block mentions; returns its text, made smaller."""
    case, there = CASES.get(block.said, Case()), files(document, block)
    texts = {"": block.text, **there}
    for old, new in case.instead.items():
        assert any(old in text for text in texts.values()), f"{block.said}: {old!r} stands nowhere in it any more"
        texts = {name: text.replace(old, new) for name, text in texts.items()}
    for name, make in THERE.items():
        if any(name in text for text in texts.values()):
            make(folder / name)
    for name in there:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(texts[name], encoding="utf-8")
    return texts[""]


def check(document: str, block: Block, folder: Path, timeout_s: float = TIMEOUT_S) -> None:
    """Runs a block; it has to end well and print what its case says."""
    done = run(block.language, prepared(document, block, folder), folder, timeout_s)
    assert done.returncode == 0, f"exit code {done.returncode} of\n{block.text}\nprinted:\n{done.stdout}"
    for pattern in CASES.get(block.said, Case()).prints:
        assert re.search(pattern, done.stdout), f"{pattern!r} is not printed:\n{done.stdout}"


RUN: dict[str, tuple[str, Block]] = {
    f"{path.stem}: {block.said}": (text, block)
    for path in DOCUMENTS
    for text in [path.read_text(encoding="utf-8")]
    for block in blocks(text)
    if block.marker == "run"
}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_block_says_whether_it_is_run(path: Path) -> None:
    found = list(problems(path.read_text(encoding="utf-8")))
    assert not found, f"{path.name}: {found}; CONTRIBUTING.md tells of markers"


def test_every_document_has_a_block_that_runs() -> None:
    shown = [block.said for _, block in RUN.values()]
    assert len(shown) == len(set(shown)), "a name stands in two documents"
    assert CASES.keys() <= set(shown), f"{sorted(CASES.keys() - set(shown))} stand in no document"
    silent = [path.name for path in DOCUMENTS if "<!-- run: " not in path.read_text(encoding="utf-8")]
    assert not silent, f"{silent} have no block that is run"


@pytest.mark.processes
@pytest.mark.timeout(TIMEOUT_S + 60)
# The paper's setting, scaled down in the same way, is started by a test of its own, which looks at the tokens.
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.full if name.endswith(": scaled down") else ()) for name in RUN]
)
def test_it_runs(name: str, tmp_path: Path) -> None:
    check(*RUN[name], tmp_path)


GOOD = """Text `<!-- run: x -->` in text.

<!-- run: one -->
```bash
echo a
echo b
```

- in a list

  <!-- file: settings.json -->
  ```json
  {"a": 1}
  ```

<!-- not run: it needs ten machines -->

    ssh other
    uptime

```json
{}
```

more

    ls

<!-- run: two -->
```python
print(open("settings.json").read())
```
"""


def test_blocks_are_found_with_their_markers() -> None:
    found = [(b.line, b.language, b.text, b.marker, b.said) for b in blocks(GOOD)]
    assert found == [
        (4, "bash", "echo a\necho b\n", "run", "one"),
        (12, "json", '{"a": 1}\n', "file", "settings.json"),
        (18, "", "ssh other\nuptime\n", "not run", "it needs ten machines"),
        (21, "json", "{}\n", "", ""),
        (27, "", "ls\n", "", ""),
        (30, "python", 'print(open("settings.json").read())\n', "run", "two"),
    ]
    assert list(problems(GOOD)) == ["line 27: neither run, nor a file, nor is there a reason why not: 'ls\\n'"]
    assert files(GOOD, next(blocks(GOOD))) == {}
    assert files(GOOD, list(blocks(GOOD))[-1]) == {"settings.json": '{"a": 1}\n'}


@pytest.mark.parametrize(
    ("document", "told"),
    [
        ("```bash\nls\n```\n", "line 1: neither run"),
        ("```python\n1\n```\n", "line 1: neither run"),
        ("```\nls\n```\n", "line 1: neither run"),
        ("text\n\n    ls\n", "line 3: neither run"),
        ("```console\n$ ls\n```\n", "'console' is none of"),
        ("<!-- run: a -->\ntext\n\n```bash\nls\n```\n", "do not stand right before a block"),
        ("<!-- run: a -->\n", "do not stand right before a block"),
        ("<!-- run a -->\n```bash\nls\n```\n", "<!-- run a --> is no marker"),
        ("<!-- not-run: a -->\n```bash\nls\n```\n", "is no marker"),
        ("<!-- run: a -->\n```json\n{}\n```\n", "json cannot be run"),
        (2 * "<!-- run: a -->\n```bash\nls\n```\n", "2 blocks have the name 'a'"),
    ],
)
def test_wrong_markers_are_told(document: str, told: str) -> None:
    found = list(problems(document))
    assert any(told in problem for problem in found), found


def one(document: str) -> Block:
    return next(block for block in blocks(document) if block.marker == "run")


@pytest.mark.processes
@pytest.mark.parametrize(
    ("document", "told"),
    [
        ("<!-- run: a -->\n```bash\nfalse\necho done\n```\n", "exit code 1"),
        ("<!-- run: a -->\n```bash\nfalse | cat\n```\n", "exit code 1"),
        ("<!-- run: a -->\n\n    echo $NOTHING\n", "NOTHING: unbound"),
        ("<!-- run: a -->\n```python\nraise SystemExit(3)\n```\n", "exit code 3"),
        ("<!-- run: a -->\n```bash\nsleep 60\n```\n", "not done after 1 s"),
        ("<!-- run: a -->\n```bash\nsetsid sleep 60 &\n```\n", "left behind by"),
        ("<!-- run: a -->\n```bash\necho b\n```\n", "'c' is not printed"),
        ("<!-- run: b -->\n```bash\necho c\n```\n", "'old' stands nowhere"),
    ],
)
def test_what_does_not_run_fails(document: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CASES, "a", Case(prints=("c",)))
    monkeypatch.setitem(CASES, "b", Case(instead={"old": "new"}))
    monkeypatch.setattr("tests.doc_blocks.GRACE_S", 0.5)
    with pytest.raises(AssertionError, match=re.escape(told)):
        check(document, one(document), tmp_path, timeout_s=1 if "60" in document and "setsid" not in document else 30)


@pytest.mark.processes
def test_files_and_what_is_the_readers_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CASES, "a", Case(instead={"1000": "10"}, prints=("N = 10\nconfig.json\n60 words", "fapool")))
    document = """<!-- file: settings.py -->
```python
N = 1000
```

<!-- run: a -->
```bash
cat settings.py
ls MODEL_FOLDER | grep '^config.json'
echo $(wc -w < PROMPT.txt) words
fapool --version
```
"""
    check(document, one(document), tmp_path)
