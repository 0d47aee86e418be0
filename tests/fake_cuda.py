"""CUDA tensors without numbers on a machine without CUDA: shapes, dtypes and devices are right, and what would wait for
the device raises.

torch's FakeTensorMode runs operators' shape functions only. On a build for CPUs ``x[...]`` asks for a CUDA device
before it comes to any operator, as do a few other methods; here operators are called instead. Speed, streams and
results cannot be seen.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fapool_plugin.kernels import forward

aten = torch.ops.aten


class Waits(RuntimeError):
    """The CPU would wait for the device here."""


class _Views(TorchFunctionMode):
    """Indexing and copying by operators."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.contiguous and args[0].is_cuda:
            return args[0] if args[0].is_contiguous() else args[0].clone(memory_format=torch.contiguous_format)
        if func is Tensor.copy_ and args[0].is_cuda:
            return aten.copy_(*args, **(kwargs or {}))
        if func is Tensor.to and args[0].is_cpu and len(args) == 2 and str(args[1]).startswith("cuda"):
            return aten._to_copy(args[0], device=args[1], **(kwargs or {}))
        if func in (Tensor.nonzero, torch.nonzero) and args[0].is_cuda:
            raise Waits("the size of what is not zero is on the device")
        if func in (Tensor.__getitem__, Tensor.__setitem__) and args[0].is_cuda:
            found = _indexed(args[0], args[1])
            return found if func is Tensor.__getitem__ else _put(found, args[2])
        return func(*args, **(kwargs or {}))


def _indexed(x: Tensor, at: Any) -> Tensor:
    at, dim = at if isinstance(at, tuple) else (at,), 0
    for place, part in enumerate(at):
        if isinstance(part, slice):
            x = aten.slice(x, dim, *part.indices(x.shape[dim]))
            dim += 1
        elif isinstance(part, int):
            x = aten.select(x, dim, part)
        elif part is None:
            x, dim = x.unsqueeze(dim), dim + 1
        elif part is Ellipsis:
            dim = x.dim() - sum(rest is not None for rest in at[place + 1 :])
        elif isinstance(part, Tensor) and part.dtype == torch.bool:
            raise Waits("a mask as an index: the size of what it picks is on the device")
        elif isinstance(part, Tensor):
            if part.is_cpu:
                raise Waits("an index of the host: it is brought to the device at once")
            x, dim = aten.index_select(x, dim, part), dim + 1
        else:
            raise NotImplementedError(f"index {part!r}")
    return x


def _put(place: Tensor, value: Any) -> None:
    if isinstance(value, Tensor):
        aten.copy_(place, value)
    else:
        place.fill_(value)


class _Waiting(TorchDispatchMode):
    """Raises where numbers come from the device, other than into memory that was made for it. Notes what is called."""

    def __init__(self) -> None:
        super().__init__()
        self.called: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.called.add(str(func.overloadpacket))
        if func is aten._local_scalar_dense.default and args[0].is_cuda:
            raise Waits("a number of the device is asked for")
        if func is aten._to_copy.default and args[0].is_cuda and str(kwargs.get("device", "cuda")).startswith("cpu"):
            raise Waits("a tensor is taken from the device at once")
        brought = func is aten._to_copy.default and args[0].is_cpu and str(kwargs.get("device")).startswith("cuda")
        if brought and not kwargs.get("non_blocking"):
            raise Waits("a tensor is brought to the device at once: the host waits for all that was launched there")
        if func is aten._efficient_attention_backward.default:
            # torch 2.13's own shape function lacks the parameter bias_requires_grad.
            return *(aten.empty_like(x, memory_format=torch.contiguous_format) for x in args[1:4]), args[0].new_empty(
                ()
            )
        return func(*args, **kwargs)


@contextmanager
def fake_cuda(capability: tuple[int, int] = (9, 0)) -> Iterator[set[str]]:
    """Tensors that are made inside with ``device="cuda"`` are of a device of this capability. Gives the names of the
    operators that are called."""
    asked = mock.patch.object(forward, "capability", lambda device: capability if device.type == "cuda" else (0, 0))
    with asked, FakeTensorMode(), _Waiting() as waiting, _Views():
        yield waiting.called
