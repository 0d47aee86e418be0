"""The GPU check, rehearsed on the CPU: its steps run, one that hangs or dies costs itself, and what failed is told."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path

import pytest
import torch

from tests.gpu import check
from tests.gpu.overlap import Span, busy_and_both
from tests.gpu.report import Missing, Report

pytestmark = [pytest.mark.processes, pytest.mark.timeout(150)]


def rehearsed(tmp_path: Path, steps: str) -> tuple[int, list[dict]]:
    file = tmp_path / "found.json"
    code = check.main(["--rehearse", "--steps", steps, "--json", str(file)])
    told = json.loads(file.read_text())
    assert told["rehearsal"]
    return code, told["found"]


def test_what_needs_a_gpu_is_skipped_and_never_passes(tmp_path: Path) -> None:
    code, found = rehearsed(tmp_path, "machine,pytest,operators")
    assert code == 0, found
    kinds = {(line["step"], line["kind"]) for line in found}
    assert {("pytest", "SKIP"), ("operators", "SKIP")} <= kinds
    assert ("pytest", "PASS") not in kinds
    passed = {line["name"] for line in found if (line["step"], line["kind"]) == ("operators", "PASS")}
    assert all(name.startswith(("torch_flash", "dense")) for name in passed), passed  # the CPU's own


@pytest.mark.full
@pytest.mark.parametrize("step", ["ceilings", "links", "overlap", "pooled", "predictions"])
def test_a_step_runs(tmp_path: Path, step: str) -> None:
    code, found = rehearsed(tmp_path, step)
    assert code == 0, found
    assert len([line for line in found if line["kind"] == "FIGURE"]) > 1, found


def test_what_is_busy_at_a_time() -> None:
    """Against a clock that looks at each microsecond. Spans of a lane may lie in each other."""
    spans = [Span(1, 2, 10), Span(1, 4, 6), Span(2, 8, 12), Span(3, 9, 11), Span(2, 20, 23), Span(1, 23, 25)]
    lanes = [{span.lane for span in spans if span.start <= at < span.stop} for at in range(30)]
    expected = sum(len(now) > 0 for now in lanes), sum(len(now) > 1 for now in lanes)
    assert busy_and_both(spans) == expected == (15, 3)


def test_a_step_that_hangs_is_killed_and_fails() -> None:
    began = time.monotonic()
    found = check._run("machine", 1, True)
    assert time.monotonic() - began < 20, "it was not killed"
    assert [line["detail"] for line in found if line["kind"] == "FAIL"] == ["killed at its limit of 1 s"], found


def test_what_raises_or_differs_fails_and_the_step_goes_on() -> None:
    told = io.StringIO()
    report = Report(told, torch.device("cpu"), rehearsal=True)
    with report.part("raises"):
        raise RuntimeError("no such kernel")
    with report.part("lacks"):
        raise Missing("no wheel")
    one = torch.ones(3)
    report.close("differs", one * 1.1, one, 0.01)
    report.close("is nan", one * torch.nan, one, 0.01)
    report.close("is nothing", one * 0, one * 0, 0.01)
    report.close("is close", one * 1.001, one, 0.01)
    kinds = {line["name"]: line["kind"] for line in map(json.loads, told.getvalue().splitlines())}
    assert kinds == {
        "raises": "FAIL", "lacks": "SKIP", "differs": "FAIL", "is nan": "FAIL", "is nothing": "FAIL",
        "is close": "PASS",
    }  # fmt: skip
