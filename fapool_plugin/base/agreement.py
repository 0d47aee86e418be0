"""Several base ranks of one model decide alike: as the most careful of them would.

Knows process groups and numbers; not what they mean, nor when they are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import distributed

from fapool_plugin.config import FAPoolConfigError

Agree = Callable[[tuple[int, ...]], tuple[int, ...]]
"""Makes all base ranks of a job decide alike, as their collectives need it: called by each once in every forward above
the threshold with (mode, blocks), and with as many numbers as all call it with where ranks of a shared pool come or go;
returns the least of what they said, number by number."""


def unasked(decision: tuple[int, ...]) -> tuple[int, ...]:
    """One base rank agrees with itself."""
    return decision


def least_of_each(agree: Agree, said: Mapping[int, int], unsaid: int) -> dict[int, int]:
    """The least that base ranks say of each number. Called by all of them at once.

    Args:
        agree: as for decisions.
        said: numbers from 0 on, and what this base rank says of them.
        unsaid: what it says of all others.
    """
    most = -agree((-max(said, default=-1),))[0]
    return dict(enumerate(agree(tuple(said.get(number, unsaid) for number in range(most + 1))))) if most >= 0 else {}


def agree_over(group: distributed.ProcessGroup | None = None) -> Agree:
    """What a :class:`ResourceManager` calls to have every rank of ``group`` decide alike: by the least of each number.

    One all-reduce of two int64 per long forward, two more where it is cut into pieces, and some where ranks of a shared
    pool come or go; every rank of the group must make the same forwards. Copies share the group. Pickles find the
    default group again; those of another group are refused, since it does not exist elsewhere.

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
        self._hosts: Any = None

    def __call__(self, decision: tuple[int, ...]) -> tuple[int, ...]:
        agreed = torch.tensor(decision, dtype=torch.int64, device="cpu")
        if self._hosts is None and "cpu" not in distributed.get_backend_config(self.group):
            self._hosts = _hosts_of(self.group or distributed.group.WORLD)
        if self._hosts is None:
            distributed.all_reduce(agreed, op=distributed.ReduceOp.MIN, group=self.group)
        else:
            options: Any = distributed.AllreduceOptions()
            options.reduceOp = distributed.ReduceOp.MIN
            self._hosts.allreduce([agreed], options).wait()
        return tuple(agreed.tolist())

    def __deepcopy__(self, memo: dict[int, Any]) -> _Least:
        return _Least(self.group)

    def __reduce__(self) -> tuple[type[_Least], tuple[None]]:
        if self.group is not None:
            raise TypeError(
                "an agreement over a process group of its own cannot be pickled: another process does not have that "
                "group. Pickle the model before it is pooled, or agree over the default group: agree_over()"
            )
        return _Least, (None,)


def _hosts_of(group: Any) -> Any:
    """The same ranks over gloo, for a group that moves nothing but what is on devices: there the host would wait, in
    every decode step, for all that it has launched. Called by each rank of the group, at its first long forward.

    No group that torch knows: the names of those that only some ranks make depend on how many each has made.
    """
    store, rank = distributed.distributed_c10d._get_default_store(), distributed.get_rank(group)
    name = f"fapool/agree/{group.group_name}"
    name += f"/{store.add(f'{name}/{rank}', 1)}"  # of several models: made in the same order by all
    return distributed.ProcessGroupGloo(
        distributed.PrefixStore(name, store), rank, group.size(), distributed.default_pg_timeout
    )
