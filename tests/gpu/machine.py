"""Which machine, which versions, and what is missing."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys

import torch

from tests.gpu.report import Report

NEEDED = ("greenlet", "pydantic", "pydantic_core", "annotated_types", "typing_inspection", "platformdirs", "psutil")
"""Packages of small wheels that an image for GPUs may lack; the check stops without them."""
OPTIONAL = ("triton", "xformers", "flash_attn", "fa3-fwd", "nixl", "cryptography")
SEEN = ("torch", "transformers", "numpy", *NEEDED, *OPTIONAL)


def missing() -> list[str]:
    """Needed packages that are not installed."""
    return [name for name in NEEDED if _version(name) is None]


def run(report: Report) -> None:
    """Versions as figures of text: they pass, since they only have to be known."""
    report.passed("python", True, f"{platform.python_version()} {platform.machine()}")
    for name in SEEN:
        found = _version(name)
        if found is None and name in OPTIONAL:
            report.skipped(name, "not installed: what needs it is skipped")
        else:
            report.passed(name, found is not None, found or "not installed: bring its wheel")
    if report.device.type != "cuda":
        report.skipped("device", "no CUDA device")
        return
    about = torch.cuda.get_device_properties(report.device)
    report.passed("device", True, f"{about.name}, {about.multi_processor_count} SMs, {about.major}.{about.minor}")
    report.figure("device memory", about.total_memory / 2**30, "GiB")
    report.figure("device memory, free", torch.cuda.mem_get_info(report.device)[0] / 2**30, "GiB")
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True, text=True, check=False, timeout=30,
    )  # fmt: skip
    report.passed("driver", driver.returncode == 0, driver.stdout.strip() or driver.stderr.strip()[:200])


def run_pytest(report: Report) -> None:
    """The tests that are marked for a GPU."""
    if report.device.type != "cuda":
        report.skipped("pytest -m gpu", "no CUDA device")
        return
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/kernels"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = ran.stdout.strip().splitlines()
    for line in lines:
        if line.startswith("FAILED"):
            report.passed(line.removeprefix("FAILED ")[:120], False)
    report.passed("pytest -m gpu", ran.returncode == 0, lines[-1] if lines else ran.stderr[-300:])


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
