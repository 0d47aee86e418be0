"""The random numbers to come, made to come again where a forward is run once more.

Knows generators of a process; no forwards.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor


@dataclass
class RandomNumbers:
    """Those to come of torch, Python and numpy."""

    torch_states: list[Tensor]
    own: Any
    numpy_state: Any

    @classmethod
    def now(cls) -> RandomNumbers:
        """As they are."""
        on_cuda = torch.cuda.is_initialized() and not torch.cuda.is_current_stream_capturing()
        devices = torch.cuda.get_rng_state_all() if on_cuda else []
        return cls([torch.get_rng_state(), *devices], random.getstate(), numpy.random.get_state(legacy=True))

    def set(self) -> None:
        """Makes them come again."""
        torch.set_rng_state(self.torch_states[0])
        if len(self.torch_states) > 1:
            torch.cuda.set_rng_state_all(self.torch_states[1:])
        random.setstate(self.own)
        numpy.random.set_state(self.numpy_state)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RandomNumbers):
            return False
        mine, its = (
            [(x.numpy() if isinstance(x, Tensor) else x).tobytes() for x in (*y.torch_states, y.numpy_state[1])]
            for y in (self, other)
        )
        return mine == its and self.own == other.own and self.numpy_state[2:] == other.numpy_state[2:]
