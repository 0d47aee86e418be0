"""Hugging Face: what an error means in a forward that was given new keys only.

Memory has ended, a user's hook failed, or the model's own code did, for want of the other keys perhaps. Knows errors
and hooks; not what is done about them.
"""

from __future__ import annotations

import functools
import inspect
import traceback
from typing import Any

import torch
from torch import nn

from fapool_plugin.integrations.huggingface.pieces import is_own_hook

_OF_THE_CPU = "can't allocate memory"
"""torch has a class for devices that are out of memory, and a RuntimeError for the CPU."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: of Python's, of a device, or of torch on the CPU."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and _OF_THE_CPU in str(error)
    )


def is_of_a_hook(error: BaseException, owner: nn.Module) -> bool:
    """Whether an error came through a user's hook on a module of a model: it sees what modules do, not keys."""
    codes = {
        _code_of(hook)
        for module in owner.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks)
        for hook in hooks.values()
        if not is_own_hook(hook)
    } - {None}
    return bool(codes) and any(frame.f_code in codes for frame, _ in traceback.walk_tb(error.__traceback__))


def let_go(error: BaseException) -> None:
    """Gives back what a failed forward's frames hold: the handler of an error may need the memory."""
    traceback.clear_frames(error.__traceback__)


def _code_of(hook: Any) -> Any:
    """Of the function that a hook is, beneath decorators: models share these."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    hook = inspect.unwrap(hook)
    if not inspect.isroutine(hook):
        hook = inspect.unwrap(type(hook).__call__)
    return getattr(hook, "__code__", None)
