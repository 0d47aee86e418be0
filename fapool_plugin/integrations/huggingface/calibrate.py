"""Hugging Face: measures a profile of a model on this machine, and knows where profiles are kept.

Puts together what measure.calibrate and linear measure; starts a pool rank for it. Knows nothing of plans.
"""

from __future__ import annotations

import math
import os
import secrets
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from platformdirs import user_cache_dir
from transformers import AutoConfig, AutoModelForCausalLM

from fapool_plugin.base.lease import PoolRank
from fapool_plugin.config import FAPoolConfig
from fapool_plugin.integrations.huggingface.linear import full_layers, look, measure_beside, measure_linear, shape_of
from fapool_plugin.measure.attention import measure_attention
from fapool_plugin.measure.calibrate import Progress, check_effort, machine, measure_link, silent
from fapool_plugin.measure.calls import kept_busy, measure_calls
from fapool_plugin.observe.metrics import RankCounters
from fapool_plugin.plan.profile import Machine, Profile, Shape
from fapool_plugin.ranks.local import LocalPool
from fapool_plugin.wire.messages import Op

QUICK_S, FULL_S = 1.5, 50.0
"""Default budgets, in seconds; starting a pool rank and loading a model are not part of them."""
MOST_S = 3.0
"""Of a quick profile, with all that its budget does not bound."""


def shape_of_path(path: str | os.PathLike[str], dtype: str) -> Shape:
    """``shape_of`` the model in a folder, read without its weights.

    Args:
        path: a folder or name that from_pretrained takes.
        dtype: a name in torch; what the model would be loaded in.

    Raises:
        ValueError: the model cannot be pooled, or looks at values before its first such layer.
    """
    config = AutoConfig.from_pretrained(path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    try:
        return shape_of(model)
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(
            f"{type(model).__name__} does not run without its weights ({error}): load it, and ask shape_of"
        ) from error


def make_profile(
    model: Any,
    rank: PoolRank,
    *,
    threads: Sequence[int],
    budget_s: float,
    quick: bool,
    start_s: float,
    activation_s: float,
    progress: Progress = silent,
) -> Profile:
    """Measures all of a profile.

    Args:
        model: pooled or not; left exactly as it was.
        rank: a leased pool rank, of this machine or another: a link cannot be measured without one.
        threads: numbers of CPU threads to measure with.
        budget_s: about how long all of it may take, in seconds.
        quick: fewer sizes, only the best kernel and the model's own dtype.
        start_s: seconds to start pool ranks the first time, as measured.
        activation_s: seconds to lease ranks that run, as measured.
        progress: told what is being measured.

    Raises:
        ValueError: no threads, no time, or a model that cannot be pooled.
        LinkLost: the rank is gone.
    """
    check_effort(threads, budget_s)
    threads = threads[:1] if model.device.type == "cuda" else threads  # a GPU's host has nothing to compute
    began = time.perf_counter()
    # A quick profile ends in time, whatever the model: then single runs have to do.
    linear_end, attention_end, end = (began + part * MOST_S if quick else math.inf for part in (0.4, 0.6, 0.75))
    shape, softcap = look(model)
    link = measure_link(rank, progress, quick=quick, device=model.device)
    linear = measure_linear(model, threads, budget_s / 2, progress, quick=quick, until=linear_end)
    attention = measure_attention(
        shape, threads, budget_s * 0.4, progress, quick=quick, softcap=softcap, device=model.device, until=attention_end
    )
    beside = measure_beside(model, lambda seconds: kept_busy(rank, shape, seconds), quick=quick, until=end)
    profile = Profile(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        quick=quick,
        machine=machine(model.device),
        shape=shape,
        attention=attention,
        linear=linear,
        link=link,
        beside=beside,
        on_devices=model.device.type == "cuda" and rank.gpu != 0,
        activation_s=activation_s,
        start_s=start_s,
    )
    return profile.model_copy(update={"call": measure_calls(rank, profile, softcap=softcap, device=model.device)})


def calibrate_model(
    model_or_path: Any,
    *,
    threads: Sequence[int] = (),
    threads_per_rank: int = 1,
    dtype: str = "float32",
    quick: bool = False,
    budget_s: float | None = None,
    progress: Progress = silent,
) -> Profile:
    """Starts one local pool rank, measures a profile with it, and ends it again.

    Args:
        model_or_path: a loaded model, pooled or not, or what from_pretrained takes.
        threads: numbers of CPU threads to measure with; none: those of a pool rank, half of torch's and all of them.
        threads_per_rank: CPU threads of the pool rank.
        dtype: a name in torch, for a model that is loaded here.
        quick: fewer sizes, only the best kernel and the model's own dtype.
        budget_s: about how long measuring may take, in seconds; None: ``QUICK_S`` or ``FULL_S``.
        progress: told what is being done.

    Raises:
        ValueError: no threads, no time, or a model that cannot be pooled.
        RuntimeError: no pool rank can be started, or it is lost (LinkLost).
    """
    config = FAPoolConfig(pool_ranks=1, threads_per_rank=threads_per_rank)
    all_threads = torch.get_num_threads()
    counts = sorted({*threads} or {threads_per_rank, max(1, all_threads // 2), all_threads})
    budget = (QUICK_S if quick else FULL_S) if budget_s is None else budget_s
    check_effort(counts, budget)
    model = model_or_path
    if isinstance(model, str | os.PathLike):
        progress("loading the model", 0, None)
        model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
    full_layers(model)
    progress("starting a pool rank", 0, None)
    pool = LocalPool(config)
    try:
        rank, start_s = _lease(pool, model.device)
        rank.tell(Op.RELEASE)
        rank, activation_s = _lease(pool, model.device)
        return make_profile(
            model,
            rank,
            threads=counts,
            budget_s=budget,
            quick=quick,
            start_s=start_s,
            activation_s=activation_s,
            progress=progress,
        )
    finally:
        pool.close()


def _lease(pool: LocalPool, base: torch.device) -> tuple[PoolRank, float]:
    """The pool's only rank, leased, and the seconds that it took."""
    began = time.perf_counter()
    links = pool.acquire(lambda text: None, base)
    rank = PoolRank(0, links[0], secrets.randbits(62), RankCounters(0))
    rank.open(device=base, carrier=pool.config.carrier)
    return rank, time.perf_counter() - began


def default_path(on: Machine, shape: Shape) -> Path:
    """Where the profile of this machine and this model is kept, whether it is there or not."""
    # Not to the last parameter: adapters come and go.
    about = shape.model_copy(update={"parameters": round(shape.parameters, 2 - len(str(shape.parameters)))})
    key = sha256(f"{on.model_dump_json()}{about.model_dump_json()}".encode()).hexdigest()
    return Path(user_cache_dir("fapool_plugin")) / "profiles" / f"{key[:16]}.json"


def keep(profile: Profile) -> Path:
    """Saves a profile where :func:`default_path` says; returns that path."""
    path = default_path(profile.machine, profile.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    profile.save(path)
    return path
