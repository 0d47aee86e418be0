"""How many operators a merge calls, which on a GPU are kernels launched one by one; views are none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fapool_plugin.kernels.merge import fold_sinks, merge_

VIEWS = ("transpose", "unsqueeze", "slice", "expand", "view", "detach", "alias")


class Launches(TorchDispatchMode):
    """Names of operators that compute, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func.overloadpacket).removeprefix("aten.")
        self.names += [] if name in VIEWS else [name]
        return func(*args, **(kwargs or {}))


def launched(work: Callable[[], object]) -> list[str]:
    with Launches() as launches:
        work()
    return launches.names


@pytest.mark.parametrize(("dtype", "casts"), [(torch.float32, []), (torch.bfloat16, ["_to_copy"])])
def test_a_merge_is_five_launches_and_a_cast(dtype: torch.dtype, casts: list[str]) -> None:
    out, lse = torch.randn(2, 5, 4, 8), torch.randn(2, 4, 5)
    part = out.to(dtype), lse.clone()
    names = launched(lambda: merge_(out, lse, *part))
    assert names == ["clamp", "sub", "sigmoid_", *casts, "lerp_", "logaddexp"]


def test_sinks_are_counted_in_by_five() -> None:
    out, lse, sinks_H = torch.randn(2, 5, 4, 8), torch.randn(2, 4, 5), torch.randn(4)
    assert launched(lambda: fold_sinks(out, lse, sinks_H)) == ["logaddexp", "clamp", "sub", "exp_", "mul"]
