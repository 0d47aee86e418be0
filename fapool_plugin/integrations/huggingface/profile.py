"""Hugging Face: where a running model's profile comes from: a file of the user's, the one kept, or a quick measurement.

Knows files and when they hold; how to measure is in calibrate.
"""

from __future__ import annotations

import sys
import warnings
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fapool_plugin.base.lease import PoolRank
from fapool_plugin.config import FAPoolConfig
from fapool_plugin.integrations.huggingface.calibrate import (
    MOST_S,
    QUICK_S,
    calibrate_model,
    default_path,
    keep,
    make_profile,
)
from fapool_plugin.integrations.huggingface.linear import shape_of
from fapool_plugin.measure.calibrate import machine
from fapool_plugin.plan.profile import Profile, ProfileError

_DISTURBED = 0.5
"""Spread of a measurement, in parts of its median, above which it is good for this run at best."""


@dataclass(frozen=True)
class ModelProfiler:
    """Knows or measures what ``model`` costs on this machine."""

    model: Any
    config: FAPoolConfig

    def known(self) -> Profile | None:
        """The user's profile, or the one kept; None, with a warning, if it is of something else."""
        on, shape = machine(self.model.device), shape_of(self.model)
        path = Path(self.config.profile) if self.config.profile else default_path(on, shape)
        if not self.config.profile and not path.exists():
            return None
        try:
            profile = Profile.load(path)
        except ProfileError as error:
            warnings.warn(f"fa_pool: {error}; it is measured anew", RuntimeWarning, stacklevel=2)
            return None
        misfit = profile.misfit(on, shape)
        if misfit:
            warnings.warn(
                f"fa_pool: the profile {path} does not hold here ({misfit}); it is measured anew",
                RuntimeWarning,
                stacklevel=2,
            )
            return None
        return profile

    def measure(self, rank: PoolRank, start_s: float, activation_s: float) -> Profile:
        """A quick profile with a leased rank."""
        with self._own_random_numbers(), _Shown() as shown:
            profile = make_profile(
                self.model,
                rank,
                threads=self._threads(),
                budget_s=QUICK_S,
                quick=True,
                start_s=start_s,
                activation_s=activation_s,
                progress=shown,
            )
        return self._kept(profile)

    def measure_alone(self) -> Profile:
        """A quick profile with a rank started for it."""
        per_rank = self.config.threads_per_rank
        with self._own_random_numbers(), _Shown() as shown:
            profile = calibrate_model(
                self.model, threads=self._threads(), threads_per_rank=per_rank, quick=True, progress=shown
            )
        return self._kept(profile)

    def _own_random_numbers(self) -> AbstractContextManager[None]:
        """For what comes in the middle of a step or a generation, whose random numbers go on as if it had not."""
        device = self.model.device
        return torch.random.fork_rng([device] if device.type == "cuda" else [])

    def _kept(self, profile: Profile) -> Profile:
        """Keeps a profile for later, unless it was disturbed."""
        if profile.spread <= _DISTURBED:
            keep(profile)
        return profile

    def _threads(self) -> list[int]:
        total, per_rank = torch.get_num_threads(), self.config.threads_per_rank
        return sorted({total, max(1, total - self.config.pool_ranks * per_rank), per_rank})


class _Shown:
    """Progress on stderr, in one line: what is measured, as it is begun."""

    def __init__(self) -> None:
        self._stage = ""

    def __enter__(self) -> _Shown:
        self._say(f"fa_pool: measuring this machine once, about {MOST_S:g} seconds:")
        return self

    def __exit__(self, *exc: object) -> None:
        self._say("\n")

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        if done != total and stage != self._stage:
            self._say(f" {stage},")
            self._stage = stage

    def _say(self, text: str) -> None:
        print(text, end="", file=sys.stderr, flush=True)
