"""One command that turns ten minutes of a GPU into figures, and says what failed:

    python -m tests.gpu.check [--json FILE] [--steps NAME,NAME] [--rehearse]

    parent   step 1 ........ | step 2 .......... | step 3 ... | table, JSON
    child    lines of JSON ──┘ killed at its limit┘

Each step runs in a process of its own with a time limit: one that hangs or loses the device costs only itself, and what
it had said before counts. It needs no network. With ``--rehearse`` the same code runs on the CPU at a hundredth of
the size: that finds mistakes of the check and proves nothing about a GPU.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests.gpu.machine import missing
from tests.gpu.report import Report


class Step(NamedTuple):
    """A step of the check: a function of a module beside this, and the seconds that it may take."""

    module: str
    function: str
    limit_s: int


STEPS = {
    "machine": Step("machine", "run", 40),
    "pytest": Step("machine", "run_pytest", 120),
    "operators": Step("operators", "run", 90),
    "ceilings": Step("ceilings", "run", 90),
    "links": Step("links", "run", 90),
    "pooled": Step("pooled", "run", 200),
    "overlap": Step("overlap", "run", 60),
    "predictions": Step("pooled", "run_predictions", 120),
}
MOST_S = 590
"""Seconds of all steps together; one that would begin later is skipped."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.check", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write everything there, too")
    parser.add_argument("--steps", help=f"only these, separated by commas: {', '.join(STEPS)}")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, at small sizes")
    parser.add_argument("--only", choices=STEPS, help=argparse.SUPPRESS)  # the child's
    options = parser.parse_args(arguments)
    if options.only:
        _child(STEPS[options.only], options.rehearse)
        return 0
    names = options.steps.split(",") if options.steps else list(STEPS)
    if unknown := [name for name in names if name not in STEPS]:
        parser.error(f"--steps {unknown[0]}: there is no such step; give {', '.join(STEPS)}")
    if not options.rehearse and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --rehearse runs the steps on the CPU")
    if lacking := missing():
        parser.error(f"not installed: {', '.join(lacking)}; bring their wheels (python -m tests.gpu.wheels FOLDER)")
    began, found = time.monotonic(), list[dict[str, Any]]()
    for name in names:
        left = MOST_S - (time.monotonic() - began)
        lines = _run(name, min(STEPS[name].limit_s, left), options.rehearse) if left > 10 else _no_time()
        found += [{"step": name} | line for line in lines]
        for line in lines:
            _show(name, line)
    failed = sum(line["kind"] == "FAIL" for line in found)
    counts = {kind: sum(line["kind"] == kind for line in found) for kind in ("PASS", "FAIL", "SKIP", "FIGURE")}
    print(f"\n{counts} in {time.monotonic() - began:.0f} s" + (" (rehearsal on the CPU)" if options.rehearse else ""))
    for line in found:
        if line["kind"] == "FAIL":
            _show(line["step"], line)
    if options.json is not None:
        options.json.write_text(json.dumps({"rehearsal": options.rehearse, "found": found}, indent=1), encoding="utf-8")
    return int(bool(failed))


def _run(name: str, limit_s: float, rehearse: bool) -> list[dict[str, Any]]:
    """What a step said; that it did not end well counts as a failure."""
    command = [sys.executable, "-m", "tests.gpu.check", "--only", name, *(["--rehearse"] if rehearse else [])]
    began = time.monotonic()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        text, _ = child.communicate(timeout=limit_s)
        ended = "" if child.returncode == 0 else f"ended with code {child.returncode}"
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        text, _ = child.communicate()
        ended = f"killed at its limit of {limit_s:.0f} s"
    lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    if ended:
        lines.append({"kind": "FAIL", "name": "the step itself", "detail": ended})
    return [*lines, {"kind": "FIGURE", "name": "the whole step", "detail": "s", "value": time.monotonic() - began}]


def _child(step: Step, rehearse: bool) -> None:
    device = torch.device("cpu" if rehearse else "cuda:0")
    if rehearse:
        torch.set_num_threads(1)
    report = Report(os.fdopen(os.dup(1), "w"), device, rehearse)
    os.dup2(2, 1)  # what libraries print is not for the parent
    with report.part("the step itself"):
        getattr(importlib.import_module(f"tests.gpu.{step.module}"), step.function)(report)


def _no_time() -> list[dict[str, Any]]:
    return [{"kind": "SKIP", "name": "the step itself", "detail": f"no time left of {MOST_S} s"}]


def _show(step: str, line: dict[str, Any]) -> None:
    value = f"{line['value']:.4g} " if "value" in line else ""
    print(f"{line['kind']:6} {step:11} {line['name']}: {value}{line['detail']}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
