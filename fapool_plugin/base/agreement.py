"""Several base ranks of one model decide alike: as the most careful of them would.

Knows process groups and two numbers; not what they mean, nor when they are asked for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed

from fapool_plugin.base.resource_manager import Agree
from fapool_plugin.config import FAPoolConfigError


def agree_over(group: distributed.ProcessGroup | None = None) -> Agree:
    """What a :class:`ResourceManager` calls to have every rank of ``group`` decide alike: by the least of each number.

    One all-reduce of two int64 per long forward, and two more where it is cut into pieces; every rank of the group must
    make the same forwards. Copies share the group. Pickles find the default group again; those of another group are
    refused, since it does not exist elsewhere.

    Args:
        group: the ranks that hold one model, its tensor-parallel group; None: the default group.

    Raises:
        RuntimeError: from torch.distributed, when called before it is initialized, or when a rank is gone.
    """
    return _Least(group)


def neighbours(size: int) -> distributed.ProcessGroup:
    """This rank's group among groups of ``size`` neighbouring base ranks, which share one model. Called by all ranks.

    Raises:
        FAPoolConfigError: ``size`` does not divide the base ranks.
    """
    rank, world = distributed.get_rank(), distributed.get_world_size()
    if size > world or world % size:
        raise FAPoolConfigError(
            f"tensor_parallel_size is {size}, and there are {world} base ranks: it must divide them. Start more ranks, "
            "or make it smaller"
        )
    made = [distributed.new_group(list(range(first, first + size))) for first in range(0, world, size)]
    return made[rank // size]


class _Least:
    """Keeps the group, so that it can be copied; a closure could not refuse to be pickled."""

    def __init__(self, group: distributed.ProcessGroup | None) -> None:
        self.group = group

    def __call__(self, decision: tuple[int, int]) -> tuple[int, int]:
        # NCCL (untried here) moves nothing that is not on a GPU.
        device = "cuda" if distributed.get_backend(self.group) == "nccl" else "cpu"
        agreed_2 = torch.tensor(decision, dtype=torch.int64, device=device)
        distributed.all_reduce(agreed_2, op=distributed.ReduceOp.MIN, group=self.group)
        mode, blocks = agreed_2.tolist()
        return mode, blocks

    def __deepcopy__(self, memo: dict[int, Any]) -> _Least:
        return _Least(self.group)

    def __reduce__(self) -> tuple[type[_Least], tuple[None]]:
        if self.group is not None:
            raise TypeError(
                "an agreement over a process group of its own cannot be pickled: another process does not have that "
                "group. Pickle the model before it is pooled, or agree over the default group: agree_over()"
            )
        return _Least, (None,)
