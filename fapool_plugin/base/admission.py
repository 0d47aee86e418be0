"""Whether a batch's keys fit their owners, before any of them is computed, and how they are shared out then.

The owners' parts follow their speeds, and give way where memory is short. Knows bytes and ranks; what is asked of
owners, and what becomes of keys, is in owned.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fapool_plugin.base.forward import Forward
from fapool_plugin.base.lease import PoolRank
from fapool_plugin.base.owned import Holder, OwnedKeys, copy_name
from fapool_plugin.base.resource_manager import ResourceManager
from fapool_plugin.config import MIB
from fapool_plugin.devices.gpu import free_bytes, identity
from fapool_plugin.observe.available_memory import left_for_job, left_for_process
from fapool_plugin.plan.memory import TIGHT, parts_within
from fapool_plugin.plan.owners import Owners
from fapool_plugin.plan.shares import speeds

_WAVES = 3
"""Times the activations of a wave that the base must have left beside its keys: 1.2 of them live, and up to 2.0 were
measured, since the C library keeps holes of what was freed."""


class PoolMemoryError(MemoryError):
    """The keys of a batch fit neither the pool nor the base."""


def place_keys(decided: Forward, manager: ResourceManager, k_BKTD: Tensor, v_BKTE: Tensor, layers: int) -> OwnedKeys:
    """The owners of a sequence's keys; they are found at its first call, from its keys and values there.

    Raises:
        PoolMemoryError: they do not fit. Nothing has been sent then.
    """
    state = decided.sequence
    assert state is not None
    assert decided.geometry is not None
    if state.owned is not None:
        return state.owned
    whole, config = decided.whole or decided.geometry, manager.config
    ranks = tuple(rank for rank in decided.ranks if not rank.lost)
    columns = max(state.capacity, whole.columns)
    block = 1 if columns == state.capacity else config.kv_block  # storage of a known length has that length
    position = (k_BKTD.shape[3] + v_BKTE.shape[3]) * k_BKTD.element_size() * layers
    taken = manager.batches.taken(ranks)
    # Base ranks that share a model use every pool rank at the same time.
    room = [max(0, rank.memory_limit // manager.base_ranks - taken[number]) for number, rank in enumerate(ranks)]
    spare = base_room(k_BKTD.device, ranks, room, config.pool == "local") - _WAVES * config.wave_mib * MIB
    room.append(max(0, spare) if config.base_share != 0 or not ranks else 0)
    copied = config.kv_redundancy == "peer" and len(ranks) > 1
    copies = state.copies if state.copies > 1 else 1

    def owned_by(parts: Sequence[float]) -> tuple[Owners, list[int]]:
        owners = Owners(whole.rows, k_BKTD.shape[1], parts, mode=config.partition, copies=copies)
        return owners, [positions * position for positions in owners.needs(columns, block)]

    def needs(parts: Sequence[float]) -> list[int]:
        *pool, own = owned_by(parts)[1]
        return [mine + copied * pool[number - 1] for number, mine in enumerate(pool)] + [own]

    parts, need, fits = parts_within(room, speeds(len(ranks), decided.base_share), needs)
    if not manager.agree((int(fits), 0))[0]:
        raise PoolMemoryError(_refusal(len(whole.starts), columns, sum(need), room, ranks, config.memory_limit_mib))
    owners, (*pool, _) = owned_by(parts)
    holders = [Holder(rank, state.id) for rank in ranks]
    # The next rank's copy has a name of its own there.
    peers: list[Holder | None] = [Holder(rank, copy_name(state.id)) for rank in (*ranks[1:], *ranks[:1])]
    state.owned = OwnedKeys(
        owners, holders, whole, state.id, config.kv_block, parts[-1], state.capacity,
        peers if copied else [],
    )  # fmt: skip
    state.owned.reserved = pool
    manager.batches.add(state.owned)
    return state.owned


def base_room(device: torch.device, ranks: Sequence[PoolRank], room: Sequence[int], local: bool) -> int:
    """Bytes that the base has for keys: ranks will take theirs of the same memory, where that is one."""
    if device.type == "cuda":
        mine = identity(device)
        return free_bytes(device) - sum(have for rank, have in zip(ranks, room, strict=True) if rank.gpu == mine)
    beside = sum(have for rank, have in zip(ranks, room, strict=True) if local and not rank.gpu)
    return min(left_for_job() - beside, left_for_process())


def _refusal(
    rows: int, columns: int, need: int, room: Sequence[int], ranks: Sequence[object], limit_mib: int | None
) -> str:
    *pool, base = room
    limit = limit_mib or "null"
    fitting = int(TIGHT * rows * sum(room)) // max(1, need)
    return (
        f"fa_pool: the keys of {rows} sequence{'s' * (rows > 1)} of up to {columns} tokens need {need / MIB:.0f} MiB; "
        f"{len(ranks)} pool ranks have {sum(pool) / MIB:.0f} MiB free (memory_limit_mib {limit}) and the base "
        f"{base / MIB:.0f}. Raise pool_ranks or memory_limit_mib, or give about {fitting} sequences of this length"
    )
