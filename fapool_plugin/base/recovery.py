"""What base ranks of one model agree on where keys have owners: that all have theirs, or that none goes on.

A rank that replays alone would pair its collectives with other layers of the others, so each question here is asked by
all of them, at the same place. Knows ranks and keys; not how a host's forward is run once more.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from fapool_plugin.base.admission import PoolMemoryError, base_room
from fapool_plugin.base.owned import KeysLost, NoRoom, OwnedKeys, names
from fapool_plugin.base.resource_manager import ResourceManager
from fapool_plugin.config import MIB, FAPoolConfig
from fapool_plugin.wire.messages import Op

_ANOTHERS = "another base rank lost keys"


def agreed_loss(manager: ResourceManager, lost: str) -> str:
    """Why keys are lost, here (``lost``) or for another base rank; empty if they are lost nowhere."""
    if manager.base_ranks > 1 and not manager.agree((int(not lost), 0))[0]:
        return lost or _ANOTHERS
    return lost


def known_loss(manager: ResourceManager, owned: OwnedKeys) -> str:
    """Before a forward: why keys are lost that earlier ones made; empty if they are not."""
    manager.heed()
    return agreed_loss(manager, owned.gone(manager.ranks))


def check_complete(manager: ResourceManager, owned: OwnedKeys | None) -> None:
    """At the end of a forward whose keys go to owners. Raises KeysLost or NoRoom, on all base ranks or on none."""
    broken, full = (owned.broken, owned.full) if owned is not None else ("", "")
    if manager.base_ranks == 1:
        return  # what was lost, or had no room, was raised where it was found
    whole, room = manager.agree((int(not broken), int(not full)))
    if not room:
        raise NoRoom(full or "a pool rank of another base rank has no room for more keys")
    if not whole:
        raise KeysLost(broken or _ANOTHERS)


def no_room(error: NoRoom, config: FAPoolConfig, columns: int) -> PoolMemoryError:
    """What a user is told of keys that no owner has room for."""
    limit = config.memory_limit_mib or "null"
    return PoolMemoryError(
        f"fa_pool: {error} at {columns} tokens a sequence (memory_limit_mib {limit}): raise memory_limit_mib "
        "or pool_ranks, or generate less; the cache is as it was before this forward"
    )


@contextmanager
def replaying(manager: ResourceManager, owned: OwnedKeys, columns: int, why: str) -> Iterator[None]:
    """Counts what is computed once more within it. What is left of the lost keys leaves its owners first: it is worth
    nothing, and they need the room.

    Raises PoolMemoryError if no rank is to be had, and the base has not the room.
    """
    began, need = time.perf_counter(), sum(owned.held_bytes())
    manager.counters.log("replay", f"{columns} columns are computed once more: {why}")
    owned.give_back(why)
    for rank in list(manager.ranks):
        for name in names(owned.sequence, manager.config.kv_redundancy):
            with manager.guard(rank):
                rank.tell(Op.FREE, name)
    # Held by the name of those that are lost, which end when others have taken their place.
    if not manager.borrow(columns, owned.sequence) and manager.base_ranks == 1:
        _refuse_alone(manager, owned, columns, need)
    yield
    manager.counters.replays += 1
    manager.counters.replayed_tokens += columns
    manager.counters.log("replay", f"took {time.perf_counter() - began:.1f} s")


def _refuse_alone(manager: ResourceManager, owned: OwnedKeys, columns: int, need: int) -> None:
    """Raises PoolMemoryError if the base has no room for all keys. (Base ranks that share a model ask their owners, of
    which they are the only ones then.)"""
    device = next(device for _, device, *_ in owned.kinds.values())
    room, rows = base_room(device, (), (), local=False), len(owned.geometry.starts)
    if need > room:
        raise PoolMemoryError(
            f"fa_pool: the keys of {rows} sequence{'s' * (rows > 1)} of {columns} tokens were lost with every pool "
            f"rank, and none was to be had in their place; to be computed once more at the base they need "
            f"{need / MIB:.0f} MiB, and it has {room / MIB:.0f}: start pool ranks or give the base more memory, and go "
            "on, or begin again with fewer sequences"
        )
