"""`fapool bench` called by tests, and its reports read back.

Knows what every report must hold, not what a benchmark measures.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from typer.testing import CliRunner

from fapool_plugin.tools.bench import command as bench

LIMIT_S = 120


def run(*words: str) -> Any:
    return CliRunner().invoke(bench.app, list(words))


def complete(path: Path, runs: int) -> dict[str, Any]:
    """A report's JSON, whose numbers agree with each other. By label."""
    report = json.loads(path.read_text())
    assert report["machine"]["cores"] == os.cpu_count()
    assert report["machine"]["versions"]["torch"] == torch.__version__
    found = {}
    for contender in report["contenders"]:
        found[contender["label"]] = contender
        if contender["refused"] is None:
            seconds, speedup = contender["seconds"], contender["speedup"]
            assert len(seconds["turns"]) == len(contender["facts"]) == runs
            assert 0 < seconds["min"] <= seconds["median"] <= seconds["max"]
            assert 0 < speedup["min"] <= speedup["median"] <= speedup["max"]
    first = report["contenders"][0]
    assert first["speedup"] == {"median": 1.0, "min": 1.0, "max": 1.0}
    return found
