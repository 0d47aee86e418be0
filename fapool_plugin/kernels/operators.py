"""Which operator computes what: a table in order of choice, each with what it is able to do.

All answer with (out, lse) and take fewer KV heads than query heads; sinks are no operator's, they are counted in after
the last merge. The order is what is expected, and not measured: nothing for GPUs has run. What such an operator is said
to be able to do was read in its sources (`flash_attn`, `torch_cuda`). Asks the device of the tensors.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from fapool_plugin.kernels import dense, flash_attn, torch_cuda, torch_flash
from fapool_plugin.kernels.band import Band, Given, Gradients, OutAndLse

_HALVES = (torch.float16, torch.bfloat16)


class Case(NamedTuple):
    """What an operator is asked for, as far as the choice depends on it."""

    device_type: str
    capability: tuple[int, int]
    """Of a CUDA device; (0, 0) elsewhere."""
    dtype: torch.dtype
    head_dim: int
    v_head_dim: int
    left_window: bool = False
    softcap: bool = False
    backward: bool = False
    decode: bool = False
    """One query, whose keys are worth cutting for all multiprocessors."""

    @property
    def _on_cuda(self) -> bool:
        return self.device_type == "cuda"

    @property
    def _flash(self) -> bool:
        """What all flash operators need, with head dims that are made one."""
        largest = max(self.head_dim, self.v_head_dim)
        return self._on_cuda and self.dtype in _HALVES and largest <= 256 and self.capability >= (8, 0)


@dataclass(frozen=True)
class Operator:
    """An operator, forward and backward, of trimmed rectangles, and which cases it can do."""

    name: str
    can: Callable[[Case], bool]
    attend: Callable[[Tensor, Tensor, Tensor, float, Band, float], OutAndLse]
    attend_backward: Callable[[Given, float, Band, float], Gradients]
    own_v_dim: bool = False
    """Whether values may have a head dim of their own; others are given padded ones, and cost more."""
    attend_lanes: Callable[..., OutAndLse] | None = None
    """Of lanes with keys of unequal number (`lanes`), if it can."""


def _can_flash_3(case: Case) -> bool:
    needs = ["BACKWARD"] * case.backward + ["LOCAL"] * case.left_window + ["SOFTCAP"] * case.softcap
    on_hopper = case._flash and case.capability[0] == 9
    return on_hopper and flash_attn.has_flash_3() and all(map(flash_attn.flash_3_can, needs))


def _can_flash_4(case: Case) -> bool:
    dims, major = (case.head_dim, case.v_head_dim), case.capability[0]
    # `_validate_head_dims` of flash_attn/cute/interface.py, once dims are multiples of 8.
    fits = max(dims) <= (256 if major == 9 else 128) or (major in (10, 11) and dims in ((192, 128), (256, 256)))
    # It cuts no keys unless told how often; its softcap is a score function that is compiled, and it is untried.
    able = case._flash and major in (9, 10, 11) and fits and not case.decode and not case.softcap
    return able and flash_attn.function(flash_attn.FLASH_4) is not None


def _can_flash_2(case: Case) -> bool:
    return case._flash and flash_attn.function(flash_attn.FLASH_2) is not None


def _can_flash_cuda(case: Case) -> bool:
    return case._flash and not case.softcap


def _can_efficient(case: Case) -> bool:
    able = case._on_cuda and case.dtype in (*_HALVES, torch.float32) and case.capability >= (8, 0)
    return able and not case.left_window and not case.softcap


def _can_flash_cpu(case: Case) -> bool:
    return case.device_type == "cpu" and not case.left_window and not case.softcap


OPERATORS = (
    Operator("flash_attn_3", _can_flash_3, flash_attn.flash_3, flash_attn.flash_3_backward),
    Operator("flash_attn_4", _can_flash_4, flash_attn.flash_4, flash_attn.flash_4_backward, own_v_dim=True),
    Operator("flash_attn_2", _can_flash_2, flash_attn.flash_2, flash_attn.flash_2_backward),
    Operator(
        "torch_flash", _can_flash_cuda, torch_cuda.flash, torch_cuda.flash_backward, attend_lanes=torch_cuda.flash_lanes
    ),
    Operator("torch_efficient", _can_efficient, torch_cuda.efficient, torch_cuda.efficient_backward, own_v_dim=True),
    Operator("torch_flash", _can_flash_cpu, torch_flash.attend, torch_flash.attend_backward),
    Operator("dense", lambda _: True, dense.attend, dense.attend_backward),
)


def able(case: Case) -> list[Operator]:
    """The operators that can do it, best first. Those that take values of another head dim go first where there are."""
    found = [operator for operator in OPERATORS if operator.can(case)]
    if case.head_dim != case.v_head_dim:
        found.sort(key=lambda operator: not operator.own_v_dim)
    return found


def named(name: str, case: Case) -> Operator:
    """The operator of this name that can do it."""
    return next(operator for operator in OPERATORS if operator.name == name and operator.can(case))


def capability(device: torch.device) -> tuple[int, int]:
    """Of a CUDA device, the current one if it has no number; else (0, 0), for ROCm too: its kernels are others."""
    if device.type != "cuda" or not torch.cuda.is_available() or torch.version.hip:
        return 0, 0
    return _capability(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)
