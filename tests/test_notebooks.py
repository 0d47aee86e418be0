"""The notebooks: they run, with smaller numbers than a reader's, and what is committed is worth looking at.

A new notebook needs a line in ``REDUCED``. Kernels are other processes: a profile that a notebook measures must go
into its temporary folder, where the kernel works, and not to the user's.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError, CellTimeoutError
from platformdirs import user_cache_dir

from examples.notebooks.execute import HERE, execute, problems, tidied, with_parameters
from tests.conftest import child_processes

REDUCED: dict[str, dict[str, Any]] = {
    "01_quickstart.ipynb": {"TOKENS": 300, "SHORT": 20, "NEW_TOKENS": 4, "THRESHOLD": 200},
    "02_threshold_and_plan.ipynb": {
        "LENGTHS": [512, 1024],
        "POOL_RANKS": [1],
        "CHECKED": [300],
        "RUNS": 1,
        "QUICK": True,
    },
    "03_deepspeed_and_megatron.ipynb": {"TOKENS": 300, "NEW_TOKENS": 4, "THRESHOLD": 200, "LAYOUTS": [(1, 0), (2, 1)]},
    "04_long_finetuning.ipynb": {"TOKENS": 300, "STEPS": 2, "THRESHOLD": 200, "QUICK": True},
    "05_keys_on_the_pool.ipynb": {"ROWS": 3, "TOKENS": 200, "NEW_TOKENS": 4},
    "06_shared_pool.ipynb": {"SPLIT": "1,1", "SECONDS": 3, "TOKENS": 400, "PAUSE_S": 0.2},
}
BY_DEFAULT = ("01_quickstart.ipynb", "05_keys_on_the_pool.ipynb")
"""What the others do beside has tests of its own."""
EXPECTED: dict[str, tuple[str, ...]] = {
    "01_quickstart.ipynb": (
        "prefill: 0 pooled calls, 30 local ones",  # of the short prompt
        r"prefill: [1-9]\d* pooled calls, 30 local ones",
        "decode: 90 pooled calls, 90 local ones",
        "lease: 1 taken, 1 given back",
        "active - 1 pool rank",
        "pool rank 0: computes [1-9]",
        "tokens are identical",
    ),
    "02_threshold_and_plan.ipynb": (
        "profile written to profile.json",
        r"Prefill of one sequence, up to 1 pool rank\(s\), predicted",
        r"\n +512 ",
        r"on this machine, 1 pool rank\(s\): {'auto'",
        r"pooled: [1-9]\d* calls pooled, 0 local",
        r"300 ( +\d+\.\d\d){4}\n",
    ),
    "03_deepspeed_and_megatron.ipynb": (
        r"base 1 \+ pool 0: .* pooled calls {'prefill': 0, 'decode': 0}",
        r"base 2 \+ pool 1: .* pooled calls {'prefill': [1-9]\d*, 'decode': 90}",
        "tokens are identical",
        "active - 1 pool rank",
        r"prefill: \d+ pooled calls",
    ),
    "04_long_finetuning.ipynb": (
        "measured profile.json",
        "without the pool, step 2 of 2: loss",
        "with the pool, step 2 of 2: loss",
        "losses are the same within",
        r"training: [1-9]\d* calls pooled, 0 local",
        r"backward: [1-9]\d* calls pooled, 0 local",
        r"pool rank 0: computed",
    ),
    "05_keys_on_the_pool.ipynb": (
        r"keys at the pool: [1-9]\d* pooled calls",
        r"keys at the base: [1-9]\d* pooled calls",
        "tokens are identical",
        r"fault - pool rank 0 .* lost",
        r"replay - \d+ columns are computed once more",
        "replays: 1",
        "tokens are identical",
    ),
    "06_shared_pool.ipynb": (
        "2 jobs on a shared pool of 2 ranks: tokens are equal, 0 faults",
        "each with ranks of its own .*: tokens are equal, 0 faults",
        r"times those of own pools",
        r"one pool for all: [1-9]\d* long tokens a second",
        r"a pool for each: [1-9]\d* long tokens a second",
    ),
}
"""What a run has to print, as patterns, in this order."""


def notebook(*sources: str, tags: tuple[str, ...] = ()) -> Any:
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    if tags:
        cells[0].metadata["tags"] = list(tags)
    return nbformat.v4.new_notebook(cells=cells)


def printed(ran: Any) -> str:
    outputs = [output for cell in ran.cells for output in cell.get("outputs", ())]
    return "".join(output.get("text", "") for output in outputs)


@pytest.fixture
def nothing_left() -> Any:
    """Fails a test after which a process is left, and whatever the kernels keep at home."""
    kept = Path(user_cache_dir("fapool_plugin")) / "profiles"
    before = set(child_processes()), set(kept.glob("*"))
    yield
    assert (set(child_processes()), set(kept.glob("*"))) == before


def test_every_notebook_has_reduced_parameters() -> None:
    assert {path.name for path in HERE.glob("*.ipynb")} == REDUCED.keys() == EXPECTED.keys()


@pytest.mark.processes
@pytest.mark.timeout(400)
@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize(
    "name", [name if name in BY_DEFAULT else pytest.param(name, marks=pytest.mark.full) for name in REDUCED]
)
def test_it_runs_with_smaller_numbers(name: str) -> None:
    ran = with_parameters(nbformat.read(HERE / name, as_version=4), REDUCED[name])
    execute(ran, cell_timeout_s=150)
    told = printed(ran)
    at = 0
    for pattern in EXPECTED[name]:
        match = re.compile(pattern).search(told, at)
        assert match, f"{pattern!r} is not printed, or not in this place:\n{told}"
        at = match.end()
    found = list(problems(nbformat.writes(tidied(ran))))
    assert not found, found


@pytest.mark.parametrize("name", REDUCED)
def test_what_is_committed_is_complete(name: str) -> None:
    found = list(problems((HERE / name).read_text(encoding="utf-8")))
    assert not found, f"{name}: {found}; run examples/notebooks/execute.py {name}"


def test_parameters_are_replaced_where_they_are_assigned() -> None:
    changed = with_parameters(notebook("A = 1  # one\nB = None", "A + 1", tags=("parameters",)), {"B": [2, "x"]})
    values: dict[str, Any] = {}
    exec(changed.cells[0].source, values)
    assert (values["A"], values["B"]) == (1, [2, "x"])
    with pytest.raises(ValueError, match="does not assign C, only A, B"):
        with_parameters(changed, {"C": 1})
    with pytest.raises(ValueError, match="0 cells have the tag"):
        with_parameters(notebook("A = 1"), {"A": 2})


@pytest.mark.processes
@pytest.mark.timeout(120)
@pytest.mark.usefixtures("nothing_left")
def test_errors_and_time_limits_end_the_kernel() -> None:
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        execute(notebook("1 / 0"))
    with pytest.raises(CellTimeoutError):
        execute(notebook("import time\ntime.sleep(60)"), cell_timeout_s=2)


PICTURE = nbformat.v4.new_output("display_data", {"image/png": "aGVsbG8=", "text/plain": "<Figure size 900x280>"})


def committed(*outputs: Any, source: str = "1 + 1") -> str:
    """The text of a notebook of one cell that was run and had these outputs."""
    ran = notebook(source)
    ran.cells[0].execution_count, ran.cells[0].outputs = 1, [PICTURE, *outputs]
    return nbformat.writes(tidied(ran))


def stream(text: str, name: str = "stdout") -> Any:
    return nbformat.v4.new_output("stream", name=name, text=text)


def test_a_good_notebook_has_no_problems() -> None:
    assert not list(problems(committed(stream("1/2 of 5 MB/s, https://host/tmp/x, see src/tmp/x and <b>/</b>\n"))))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (committed().replace("image/png", "text/html"), "it has no picture"),
        (committed().replace('"execution_count": 1', '"execution_count": 2'), "not run from the first"),
        (committed().replace("1 + 1", "1 + 2"), "outputs are those of other cells"),
        (committed(stream("x" * 400_000)), "400000 or more"),
        (committed(stream("careful", "stderr")), "output on stderr: 'careful'"),
        (committed(nbformat.v4.new_output("error", ename="E", evalue="no", traceback=[])), "ended with E: no"),
        (committed(stream("\x1b[2Kmoving")), "a terminal's cursor"),
        (committed(stream("in /home/someone/x.py")), "a path of the machine: /home/someone/x.py"),
        (committed(stream("'/root'")), "a path of the machine: /root"),
        (committed(nbformat.v4.new_output("execute_result", {"text/html": "<b>/tmp/x"})), "machine: /tmp/x"),
        (committed(source="open('/data/models/x')"), "machine: /data/models/x"),
        (committed(stream("C:\\Users\\x")), "machine: C:"),
    ],
)
def test_what_should_not_be_committed_is_told(text: str, told: str) -> None:
    found = list(problems(text))
    assert any(told in problem for problem in found), found
