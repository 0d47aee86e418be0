"""Several base ranks of one model decide alike: the first of them says how, the others follow.

Knows process groups and two numbers; not what they mean, nor when they are asked for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed

from fapool_plugin.config import FAPoolConfigError
from fapool_plugin.resource_manager import Agree


def agree_over(group: distributed.ProcessGroup | None = None) -> Agree:
    """What a :class:`ResourceManager` calls to have every rank of ``group`` decide like the group's first rank.

    One broadcast of two int64 per long forward; every rank of the group must make the same forwards. Copies share
    the group. Pickles find the default group again; those of another group are refused, since it does not exist
    elsewhere.

    Args:
        group: the ranks that hold one model, its tensor-parallel group; None: the default group.

    Raises:
        RuntimeError: from torch.distributed, when called before it is initialized, or when a rank is gone.
    """
    return _Broadcast(group)


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


class _Broadcast:
    """Keeps the group, so that it can be copied; a closure could not refuse to be pickled."""

    def __init__(self, group: distributed.ProcessGroup | None) -> None:
        self.group = group

    def __call__(self, decision: tuple[int, int]) -> tuple[int, int]:
        # NCCL (untried here) moves nothing that is not on a GPU.
        device = "cuda" if distributed.get_backend(self.group) == "nccl" else "cpu"
        agreed_2 = torch.tensor(decision, dtype=torch.int64, device=device)
        distributed.broadcast(agreed_2, group=self.group, group_src=0)
        mode, blocks = agreed_2.tolist()
        return mode, blocks

    def __deepcopy__(self, memo: dict[int, Any]) -> _Broadcast:
        return _Broadcast(self.group)

    def __reduce__(self) -> tuple[type[_Broadcast], tuple[None]]:
        if self.group is not None:
            raise TypeError(
                "an agreement over a process group of its own cannot be pickled: another process does not have that "
                "group. Pickle the model before it is pooled, or agree over the default group: agree_over()"
            )
        return _Broadcast, (None,)
