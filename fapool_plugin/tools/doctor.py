"""What is on this machine, what of it is usable, and if not, why.

Everything is looked up or tried when asked. It imports no framework that is slow or has side effects, and
knows nothing of any model.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from fapool_plugin.config import FAPoolConfig, FAPoolConfigError, check_machine
from fapool_plugin.observe.available_memory import left_for_job
from fapool_plugin.ranks import directory

_NEEDED = ("torch", "links", "transformers")
_PATIENCE_S = 10.0


@dataclass(frozen=True)
class Check:
    """One line of the table."""

    name: str
    version: str
    usable: bool
    why: str


def examine() -> list[Check]:
    """Looks at everything; no check's failure stops another."""
    return [
        Check("Python", platform.python_version(), True, sys.executable),
        _torch(),
        _gpus(),
        _tried("links", "", "two ends exchanged tensors over a pair of sockets", _exchange),
        _nccl(),
        _installed("flash-attn", "flash_attn", "flash", needs_cuda=True),
        _installed("deepspeed", "deepspeed", "deepspeed"),
        _installed("megatron-core", "megatron.core", "megatron"),
        _transformers(),
        _installed("accelerate", "accelerate", "hf"),
        _installed("gguf", "gguf", "hf"),
        _installed("ray", "ray", "ray"),
        _pools(),
        _memory(),
        _cores(),
        _shared_memory(),
    ]


def is_healthy(checks: list[Check]) -> bool:
    """Whether all that the plugin cannot do without is usable."""
    return all(check.usable for check in checks if check.name in _NEEDED)


def show(checks: list[Check], *, as_json: bool) -> None:
    """Prints the checks to stdout, as a table or as JSON."""
    if as_json:
        print(json.dumps({"healthy": is_healthy(checks), "checks": [asdict(check) for check in checks]}, indent=1))
        return
    table = Table("", "version", "usable", "why")
    for check in checks:
        # Brackets, as in an extra's name, are markup to rich.
        cells = (
            check.name,
            check.version or "-",
            "yes" if check.usable else "no",
            check.why.replace("[", "\\["),
        )
        table.add_row(*cells)
    Console().print(table)


def _tried(name: str, version: str, success: str, attempt: Callable[[], object]) -> Check:
    try:
        attempt()
    except Exception as error:  # whatever it is, it is the answer
        text = str(error).strip().splitlines()
        return Check(name, version, False, f"{type(error).__name__}: {text[0][:160] if text else 'no message'}")
    return Check(name, version, True, success)


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _cuda_devices() -> int:
    try:
        import torch
    except (ImportError, OSError):
        return 0
    return torch.cuda.device_count()


def _torch() -> Check:
    try:
        import torch
    except (ImportError, OSError) as error:
        return Check("torch", _version("torch"), False, f"cannot be imported: {error}")
    devices = torch.cuda.device_count()
    why = f"{torch.get_num_threads()} CPU threads, {devices} CUDA devices"
    return Check("torch", torch.__version__, True, why)


def _gpus() -> Check:
    devices = _cuda_devices()
    if not devices:
        return Check("GPUs", "", False, "none: models compute on the CPU, and so do their pool ranks")
    import torch

    names = ", ".join(dict.fromkeys(torch.cuda.get_device_name(number) for number in range(devices)))
    where = "share it with the base" if devices == 1 else "get the next ones after the base's"
    return Check("GPUs", "", True, f"{devices} x {names}; local pool ranks of a model on a GPU {where}")


def _exchange() -> None:
    """Opens a link within this process and sends one tensor there and back."""
    import torch

    from fapool_plugin.wire.link import Link
    from fapool_plugin.wire.loop import Loop
    from fapool_plugin.wire.messages import TILE_FIELDS, Header, Op
    from fapool_plugin.wire.sockets import pair

    loop = Loop()
    base, rank = (
        Link(end, loop, name="doctor", timeout_s=_PATIENCE_S, asks=asks)
        for end, asks in zip(pair(), (True, False), strict=True)
    )
    try:
        base.wait_until_heard(_PATIENCE_S)
        sent, none, header = torch.full((4,), 2.0), torch.zeros(0), Header(op=Op.ATTEND, q_elements=4)
        for one, other in ((base, rank), (rank, base)):
            one.send(header, [torch.zeros((0, TILE_FIELDS), dtype=torch.int64), sent, none, none])
            sent = other.receive(_PATIENCE_S).tensors[1] * 2
        if sent.tolist() != [8.0] * 4:
            raise RuntimeError(f"{sent.tolist()} came back, not {[8.0] * 4}")
    finally:
        for end in (base, rank):
            end.close()
        loop.close()


def _nccl() -> Check:
    if not _cuda_devices():
        return Check("NCCL", "", False, "needs CUDA; links use sockets")
    import torch
    import torch.distributed as dist

    if not dist.is_nccl_available():
        return Check("NCCL", "", False, "this torch is built without it; links use sockets")
    version = ".".join(str(part) for part in torch.cuda.nccl.version())
    return Check("NCCL", version, True, "available, not tried; links use sockets")


def _installed(name: str, module: str, extra: str, *, needs_cuda: bool = False) -> Check:
    """Only looks for the package: importing some of these is slow, or builds and starts things."""
    version = _version(name)
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        found = False
    if needs_cuda and not _cuda_devices():
        return Check(name, version, False, "needs CUDA")
    if not found:
        return Check(name, version, False, f"not installed: pip install fapool-plugin[{extra}]")
    return Check(name, version, True, "installed, not tried")


def _pools() -> Check:
    """Asks the Ray cluster of this machine, as a driver of it."""
    if importlib.util.find_spec("ray") is None:
        return Check("standing pools", "", False, "need Ray")
    try:
        ray = directory.library()
        was_in = ray.is_initialized()
        directory.join(None)
        try:
            found = [_standing(ray, name) for name in directory.pools(ray)]
        finally:
            if not was_in:
                ray.shutdown()
    except FAPoolConfigError as error:
        return Check("standing pools", "", False, str(error))
    except Exception as error:  # whatever Ray raises, it is the answer
        return Check(
            "standing pools", "", False, f"the Ray cluster does not answer: {str(error).splitlines()[0][:160]}"
        )
    if not found:
        return Check("standing pools", "", False, "none on the Ray cluster that is here: fapool pool up makes one")
    return Check("standing pools", "", True, ", ".join(found))


def _standing(ray: Any, name: str) -> str:
    actors = directory.standing(ray, name)
    said = directory.told(ray, actors, _PATIENCE_S)
    up = sum(one["state"] in ("free", "leased") for one in said.values())
    return f"{name} ({up} of {len(actors)} ranks stand)"


def _transformers() -> Check:
    version = _version("transformers")
    if importlib.util.find_spec("transformers") is None:
        return Check("transformers", version, False, "not installed: pip install fapool-plugin[hf]")

    def load() -> None:
        import fapool_plugin.integrations.huggingface  # noqa: F401

    return _tried("transformers", version, "the integration loads", load)


def _memory() -> Check:
    left = left_for_job()
    text = f"{decimal(left)} of {decimal(psutil.virtual_memory().total)} available to this job"
    try:
        check_machine(FAPoolConfig(), left)
    except FAPoolConfigError as error:
        return Check("memory", "", False, f"{text}; {error}")
    return Check("memory", "", True, text)


def _cores() -> Check:
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    text = f"{allowed} usable by this process, {os.cpu_count()} in the machine"
    if allowed < 2:
        return Check("cores", "", False, f"{text}; a local pool rank would only take time from the base")
    return Check("cores", "", True, text)


def _shared_memory() -> Check:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return Check("/dev/shm", "", False, "not on this system; only DeepSpeed's CPU kernels use it")
    return Check("/dev/shm", "", True, f"{decimal(shutil.disk_usage(folder).free)} free")
