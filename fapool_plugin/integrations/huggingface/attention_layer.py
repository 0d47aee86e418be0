"""Hugging Face: a model's own attention layers, watched from outside: what has no mask has to ask for attention here.

Knows that attention functions leave a sign; not what they compute.
"""

from __future__ import annotations

from typing import Any

import torch

from fapool_plugin.base.forward import CannotPool
from fapool_plugin.integrations.huggingface.attention import SCOPE


class AttentionLayer:
    """Mixed into the classes of a pooled model's attention layers. A layer whose mask was left out has to come to our
    attention function, whatever was made of its forward: else it has attended to what is to come, and no other module
    may see its output.

    Raises CannotPool then.
    """

    fapool_unmasked = False
    """Whether pooled forwards leave its mask out."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = super().__call__(*args, **kwargs)  # type: ignore[misc]
        if self.fapool_unmasked and not torch.compiler.is_compiling():
            _refuse_bypass(self)
        return output


def _refuse_bypass(module: Any) -> None:
    scope, core = SCOPE.get(), module.fa_pool
    if scope is None or not scope.decided.is_pooled or scope.manager is not core.manager:
        return
    if module in scope.asking:
        scope.asking.remove(module)
        return
    core.bypassed = True
    raise CannotPool(bypass_reason(module), ever=False)


def bypass_reason(module: Any) -> str:
    """Why a layer that was seen to compute attention by itself is not pooled."""
    return (
        f"{type(module).__name__} {module.layer_idx} computes attention by itself (a forward that was patched?): have "
        "it call ALL_ATTENTION_FUNCTIONS[config._attn_implementation], and pool the model anew"
    )
