"""Tensors of messages are real ones, whatever torch is told to make of others in the middle of which they come."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

_AS_THEY_ARE = nullcontext()


def real_tensors() -> AbstractContextManager[Any]:
    """Messages have memory in the middle of anything: a sequence may end while a mode makes all other tensors fake,
    and what arrives while some caller is in inference mode may be another's."""
    faked, in_inference = torch._C._len_torch_dispatch_stack(), torch.is_inference_mode_enabled()
    if not faked and not in_inference:
        return _AS_THEY_ARE
    modes = ExitStack()
    if in_inference:
        modes.enter_context(torch.inference_mode(False))
    if faked:
        modes.enter_context(_disable_current_modes())
    return modes
