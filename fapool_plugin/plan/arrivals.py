"""Requests that come to a cluster: drawn in the shape of public traces. Knows nothing of who serves them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Request(NamedTuple):
    """A prompt of ``prompt`` tokens that comes at ``at_s``; ``new`` tokens are generated."""

    at_s: float
    prompt: int
    new: int


def arrivals(rate: float, seconds: float, seed: int, *, long_part: float = 0.05, bursts: float = 1.0) -> list[Request]:
    """Poisson arrivals in the shape of public traces: mostly short prompts, a tail of long ones.

    Short prompts are log-normal about 800 tokens, long ones even in logarithms from 16,384 to 131,072; answers are
    log-normal about 150.

    Args:
        rate: requests a second.
        seconds: how long they come.
        seed: the same gives the same.
        long_part: part of them that is long.
        bursts: requests that come at once, in the mean of a geometric distribution.
    """
    draw = np.random.default_rng(seed)
    times = np.cumsum(draw.exponential(bursts / rate, size=max(1, int(2 * rate * seconds / bursts) + 20)))
    times = np.repeat(times, draw.geometric(1 / bursts, size=len(times)))
    times = times[times < seconds]
    prompts = np.clip(draw.lognormal(np.log(800), 1.0, len(times)), 16, 16_384)
    long = draw.random(len(times)) < long_part
    prompts[long] = 2 ** draw.uniform(14, 17, int(long.sum()))
    new = np.clip(draw.lognormal(np.log(150), 0.8, len(times)), 1, 2048)
    return [Request(float(t), int(p), int(n)) for t, p, n in zip(times, prompts, new, strict=True)]
