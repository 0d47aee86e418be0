"""Packs the small wheels that an image for GPUs may lack, for a machine without a network: a folder to bring.

python -m tests.gpu.wheels FOLDER [--python 3.12] [--also xformers==0.0.35 --also fa3-fwd==0.0.3]
pip install --no-index --no-deps --target SITE FOLDER/*.whl      # there
"""

from __future__ import annotations

import argparse
import importlib.metadata
import subprocess
import sys
from pathlib import Path

from tests.gpu.machine import NEEDED


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.wheels", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12", help="the version of Python there")
    parser.add_argument("--also", action="append", default=[], metavar="NAME==VERSION", help="of what may be missing")
    options = parser.parse_args(arguments)
    pins = [f"{name}=={importlib.metadata.version(name)}" for name in NEEDED]
    pins += options.also
    platforms = [part for tag in ("2_28", "2_17", "2_5") for part in ("--platform", f"manylinux_{tag}_x86_64")]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", options.python, "--implementation", "cp", *platforms]
    subprocess.run([*command, "--platform", "manylinux2014_x86_64", "-d", str(options.folder), *pins], check=True)
    wheels = sorted(options.folder.glob("*.whl"))
    print(f"{len(wheels)} wheels, {sum(wheel.stat().st_size for wheel in wheels) / 2**20:.1f} MiB in {options.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
