"""Ray Train's workers as jobs on a standing pool: losses are those of the model without the plugin."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launches import SCRIPTS
from tests.models import save_model

pytest.importorskip("ray")
pytest.importorskip("ray.train.torch", reason="needs ray[train]", exc_type=ImportError)
pytestmark = [pytest.mark.processes, pytest.mark.full, pytest.mark.timeout(300)]


def test_workers_of_ray_train_share_a_pool(tmp_path: Path) -> None:
    folder, path = save_model("llama", tmp_path / "model"), os.environ.get("PYTHONPATH", "")
    command = [sys.executable, str(SCRIPTS / "ray_train.py"), str(folder), str(tmp_path), path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    pooled = [int((tmp_path / str(rank)).read_text()) for rank in range(2)]
    assert min(pooled) > 0, f"pooled calls of the workers: {pooled}"
