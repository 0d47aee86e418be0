"""Hugging Face: what a forward of any module was given: tokens, a cache, documents, switches.

Knows modules' signatures and configurations; nothing of how a forward is decided.
"""

from __future__ import annotations

import inspect
import sys
from types import CodeType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import FunctionCtx
from torch.utils import checkpoint
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from fapool_plugin.base.record import Given, moved
from fapool_plugin.integrations.huggingface.cache import PooledCache
from fapool_plugin.integrations.huggingface.config_view import local_name
from fapool_plugin.integrations.huggingface.masks import documents_between, packed_documents

_MAKE_NO_KEYS = {
    "past_key_values", "use_cache", "labels", "logits_to_keep", "cache_position", "output_hidden_states", "return_dict",
    "output_attentions", "num_items_in_batch",
}  # fmt: skip


def tokens_of(given: dict[str, Any]) -> Tensor | None:
    tokens = given.get("input_ids")
    tokens = given.get("inputs_embeds") if tokens is None else tokens
    return tokens if isinstance(tokens, Tensor) else None


def past_columns(cache: Any, mask: Any, new: int) -> int:
    """Columns before a forward's own; of a cache of another kind, as its layers or the mask say."""
    if isinstance(cache, PooledCache) or (isinstance(cache, Cache) and not hasattr(cache, "layers")):
        return int(cache.get_seq_length())
    if isinstance(cache, Cache):
        # Layers of models with caches of their own kind may be empty, the first one, too.
        lengths = (layer.get_seq_length() for layer in cache.layers if hasattr(layer, "get_seq_length"))
        return max(map(int, lengths), default=0)
    return max(0, mask.shape[1] - new) if cache is not None and isinstance(mask, Tensor) and mask.ndim == 2 else 0


def decoder_of(owner: Any) -> Any:
    """The module whose forward may run in blocks; None if there is none in ``owner``."""
    if owner.fapool_in_rounds:
        return owner
    return next((module for module in owner.modules() if getattr(module, "fapool_in_rounds", False)), None)


def wants_cache(owner: Any, decoder: Any, given: dict[str, Any]) -> bool:
    """Whether a cache is to be made: as the call says, or else the configuration of the module that makes it."""
    value = given.get("use_cache")
    if value is None and getattr(owner.config, "use_cache", None) is not False:
        value = getattr((decoder or owner).config.get_text_config(decoder=True), "use_cache", False)
    return bool(value)


def wants_last_only(owner: Any, given: dict[str, Any]) -> bool:
    """Whether a model, transformers' own, makes logits of the last position and nothing of any other, as generate()
    asks."""
    kind = type(owner)
    own = kind.__module__.startswith("transformers.models.") and kind.__name__.endswith("ForCausalLM")
    own = own and "forward" not in vars(owner)
    keep = given.get("logits_to_keep")
    asked = any(given.get(name) for name in ("output_hidden_states", "output_attentions"))
    hidden = getattr(owner.config, "output_hidden_states", False)
    return own and type(keep) is int and keep == 1 and given.get("labels") is None and not asked and not hidden


def traced_reason(tokens: Tensor) -> str | None:
    """Why tensors of this call are not for pool ranks."""
    if torch.compiler.is_exporting() or isinstance(tokens, FakeTensor) or tokens.is_meta:
        return "the model is exported, or run without values"
    if torch.jit.is_tracing():
        return "the model is traced"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a transform of torch.func (grad, vmap, jvp) is at work"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode derivatives"
    return None


def in_checkpoint() -> bool:
    """Whether torch.utils.checkpoint runs what runs now a second time, be it later. Its reentrant kind does not show
    here: see :func:`in_function`."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and getattr(hooks[0], "__module__", "") == checkpoint.__name__


def in_function() -> bool:
    """Whether the forward of an autograd function is under way, in which gradients are off, as in a reentrant
    checkpoint's; else the model itself has them off for some layers."""
    frame = sys._getframe()
    while (back := frame.f_back) is not None:
        frame, code = back, back.f_code
        first = code.co_varnames[0] if code.co_name == "forward" and code.co_argcount else ""
        if first and isinstance(frame.f_locals.get(first), FunctionCtx):
            return True
    return False


def attention_dropout(owner: Any) -> float:
    """The attention dropout of a model in training mode."""
    config = owner.config.get_text_config(decoder=True)
    names = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
    return max(float(getattr(config, name, 0.0) or 0.0) for name in names)


def documents_in(decoder: Any, given: dict[str, Any], new: int) -> tuple[int, ...]:
    """Lengths of the documents packed into one row, as its local attention would tell them apart; () if it is one
    sequence: flash attention by cu_seq_lens_q, others by positions that begin anew."""
    positions, edges = given.get("position_ids"), given.get("cu_seq_lens_q")
    if isinstance(edges, Tensor) and "flash" in (local_name(decoder.config if decoder is not None else None) or ""):
        return documents_between(edges, new)
    return packed_documents(positions, new) if isinstance(positions, Tensor) and positions.ndim == 2 else ()


def by_name(owner: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All of a forward's arguments under their names."""
    if not args:
        return kwargs
    return dict(zip(inspect.signature(owner.forward).parameters, args, strict=False)) | kwargs


def strings_in(code: CodeType | None) -> frozenset[str]:
    """All strings that stand in a function's code."""
    constants = list(code.co_consts) if code is not None else []
    found = {item for item in constants if isinstance(item, str)}
    found.update(x for item in constants if isinstance(item, tuple) for x in item if isinstance(x, str))
    return frozenset(found).union(*(strings_in(item) for item in constants if isinstance(item, CodeType)))


def with_cache(
    owner: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], cache: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A caller's arguments with another cache; hooks see all others as they were given."""
    names = list(inspect.signature(owner.forward).parameters)[: len(args)]
    if "past_key_values" in names:
        at = names.index("past_key_values")
        return (*args[:at], cache, *args[at + 1 :]), kwargs
    return args, kwargs | {"past_key_values": cache}


def making_keys(given: dict[str, Any]) -> Given:
    """Those arguments that a replay needs."""
    return {name: value for name, value in given.items() if name not in _MAKE_NO_KEYS}


def once_more(owner: PreTrainedModel, given: Given, cache: Any) -> dict[str, Any]:
    """Arguments of a forward that makes keys once more, and as little else as the model allows."""
    again = moved(given, next(owner.parameters()).device)
    if "logits_to_keep" in inspect.signature(owner.forward).parameters:
        again["logits_to_keep"] = 1
    return again | {"past_key_values": cache, "use_cache": True}
