"""GPUs as the processes of a machine share them: which a rank gets, how others know it, what memory keys may have.

    base on cuda:1 of 4:  rank 0 on cuda:2 | 1 on cuda:3 | 2 on cuda:0 | 3 on cuda:1, beside the base | 4 on cuda:2 ...
    base on the CPU:      all ranks on the CPU

Knows devices and bytes; not what is computed. Has run with stand-ins only, never on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b
from typing import Any

import torch

from fapool_plugin.config import CPU_LIMIT_MIB, MIB

CPU = torch.device("cpu")
_KEYS_PART = 0.8
"""Of memory that is free when a rank starts: the rest is for queries, results and what kernels need."""


def rank_device(base: torch.device, rank: int, gpus: int) -> torch.device:
    """Where local pool rank number ``rank`` computes, for a base that computes on ``base``, with so many GPUs: on the
    next ones, the base's own last."""
    if base.type != "cuda":
        return CPU
    return torch.device("cuda", ((base.index or 0) + 1 + rank) % max(1, gpus))


def sharers(base: torch.device, rank: int, ranks: int, gpus: int) -> int:
    """How many processes compute where this rank does, itself and the base included."""
    mine = rank_device(base, rank, gpus)
    together = sum(rank_device(base, other, gpus) == mine for other in range(ranks))
    return together + (mine.type == "cuda" and mine.index == (base.index or 0))


def identity(device: torch.device, properties: Callable[[torch.device], Any] | None = None) -> int:
    """A number by which processes know whether they compute on the same GPU, whatever each calls it; 0 for a CPU.

    Args:
        properties: tells of a device; None: torch.
    """
    if device.type != "cuda":
        return 0
    about = (properties or torch.cuda.get_device_properties)(device)
    return int.from_bytes(blake2b(str(about.uuid).encode(), digest_size=8).digest(), "little") >> 1 or 1


def keys_limit(
    device: torch.device,
    asked: int,
    together: int = 1,
    memory: Callable[[torch.device], tuple[int, int]] | None = None,
) -> int:
    """Bytes of keys that a rank may hold.

    Args:
        device: where it computes.
        asked: what the configuration says; 0: nothing. A GPU gives no more than it has.
        together: processes that share the device.
        memory: (free, all) bytes of a device; None: torch.
    """
    if device.type != "cuda":
        return asked or CPU_LIMIT_MIB * MIB
    free, _ = (memory or torch.cuda.mem_get_info)(device)
    most = int(free * _KEYS_PART)
    return min(asked, most) if asked else most // max(1, together)


def free_bytes(device: torch.device) -> int:
    """Bytes that this process may take of a GPU: what is free there, and what torch keeps unused."""
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def is_capturing() -> bool:
    """Whether a CUDA graph is being captured here: the host may wait for nothing then, nor ask what is done."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def warm_up(device: torch.device, cuda: Any = None) -> None:
    """Makes a device this process's own, and does there what takes long the first time: context, libraries, a kernel.

    Args:
        cuda: what chooses a device and waits for it; None: ``torch.cuda``.
    """
    if device.type != "cuda":
        torch.zeros(1, device=device)
        return
    cuda = cuda or torch.cuda
    cuda.set_device(device)
    x = torch.ones(64, 64, dtype=torch.bfloat16, device=device)
    (x @ x).softmax(-1)
    cuda.synchronize(device)
