"""Hugging Face: the way into a pooled model's forward: modules that may be given tokens have a class of their own.

Knows copies and compilers; not how a forward is decided or run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fapool_plugin.integrations.huggingface.attention import NAME
from fapool_plugin.integrations.huggingface.config_view import view_configs
from fapool_plugin.integrations.huggingface.forward import Forwards


class EntryModule:
    """Mixed into the classes of a pooled model's modules that may be given tokens: the way into a forward."""

    fapool_forwards: Forwards | None = None
    fapool_in_rounds = False
    """Whether this module holds all layers and no other such module does: its forward may run in blocks."""
    fapool_depth = 0
    """How many modules of its kind hold it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        enter: Callable[..., Any] = super().__call__  # type: ignore[misc]
        forwards = self.fapool_forwards
        if forwards is None:
            return enter(*args, **kwargs)
        if torch.compiler.is_compiling():
            # A trace of a short forward is the plain model's. A long one is computed as it is without a compiler.
            if torch.compiler.is_exporting() or not forwards.is_long(self, args, kwargs):
                return enter(*args, **kwargs)
            return _uncompiled(forwards, self, enter, args, kwargs)
        return forwards.run(self, enter, args, kwargs)

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        # Copies and pickles have the plain configuration.
        module: Any = self
        attentions = {inside for inside in module.modules() if getattr(inside, "fa_pool", None) is not None}
        if self.fapool_forwards is not None:
            view_configs(module, attentions, NAME, own=not holds_decoder(module))


def holds_decoder(module: Any) -> bool:
    """Whether a module holds the one whose forward runs in blocks, without being it."""
    inside = any(getattr(other, "fapool_in_rounds", False) for other in module.modules() if other is not module)
    return inside and not module.fapool_in_rounds


@torch.compiler.disable(
    reason="fa_pool computes forwards above its threshold outside of compiled graphs: no fullgraph there"
)
def _uncompiled(forwards: Forwards, owner: Any, enter: Any, args: Any, kwargs: Any) -> Any:
    return forwards.run(owner, enter, args, kwargs, compiled=True)
