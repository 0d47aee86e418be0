"""What is called of torch.cuda and of CUDA's runtime is there, under these names and with these parameters. torch has
the names without CUDA, too; the library itself is asked where torch is built for it, with or without a GPU."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fapool_plugin.devices import cudart
from fapool_plugin.devices.cudart import HANDLE_BYTES, CudaError, Cudart, library

ROOT = Path(__file__).parents[2]
PARAMETERS: dict[Any, tuple[str, ...]] = {
    torch.cuda.Event.__new__: ("enable_timing",),
    torch.cuda.Event.record: ("stream",),
    torch.cuda.Event.elapsed_time: ("end_event",),
    torch.cuda.Event.query: (),
    torch.cuda.Event.synchronize: (),
    torch.cuda.Stream.__new__: ("device", "priority"),
    torch.cuda.Stream.wait_event: ("event",),
    torch.cuda.Stream.wait_stream: ("stream",),
    torch.cuda.Stream.synchronize: (),
    torch.cuda.current_stream: ("device",),
    torch.cuda.mem_get_info: ("device",),
    torch.cuda.memory_reserved: ("device",),
    torch.cuda.memory_allocated: ("device",),
    torch.cuda.get_device_properties: ("device",),
    torch.cuda.get_device_capability: ("device",),
    torch.cuda.synchronize: ("device",),
}


def names() -> Iterator[tuple[str, str]]:
    """(name, where it is used) of all that is asked of torch.cuda."""
    for path in (*ROOT.glob("fapool_plugin/**/*.py"), *ROOT.glob("tests/gpu/*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch.cuda":
                yield node.attr, f"{path.relative_to(ROOT)}:{node.lineno}"


def test_torch_has_what_is_called() -> None:
    found = list(names())
    assert len({name for name, _ in found}) > 20, "nothing was looked at"
    lacking = [where for name, where in found if not hasattr(torch.cuda, name)]
    assert not lacking, lacking
    assert callable(torch.Tensor.record_stream)
    for function, wanted in PARAMETERS.items():
        has = inspect.signature(function).parameters
        assert set(wanted) <= set(has), f"{function.__qualname__}{inspect.signature(function)} lacks {wanted}"


class Here(Cudart):
    """Of the device that is current."""

    def _current(self) -> AbstractContextManager[Any]:
        return nullcontext()


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch is built without CUDA")
def test_the_runtime_has_what_is_called() -> None:
    """And takes it as it is given: without a GPU each call says that there is none."""
    asked = set(re.findall(r'"(cuda[A-Z]\w+)"', inspect.getsource(cudart))) | {"cudaGetLastError"}
    assert len(asked) > 9, "nothing was looked at"
    real = library()
    lacking = [name for name in asked if not hasattr(real, name)]
    assert not lacking, lacking
    if torch.cuda.is_available():
        return
    device = Here(torch.device("cuda:0"), library, lambda device: SimpleNamespace(cuda_stream=0))
    x = torch.zeros(4096, dtype=torch.uint8)
    for call in (
        lambda: device.allocate(64),
        lambda: device.free(x.data_ptr()),
        lambda: device.handle(x.data_ptr()),
        lambda: device.open(bytes(HANDLE_BYTES)),
        lambda: device.shut(x.data_ptr()),
        lambda: device.register(x.data_ptr(), 4096),
        lambda: device.unregister(x.data_ptr()),
        lambda: device.copy(x.data_ptr(), x.data_ptr() + 64, 64),
        device.wait,
    ):
        with pytest.raises(CudaError, match=r"cuda\w+ failed with error \d+"):
            call()
