"""Hugging Face: masks and attention of one forward, as it was decided.

A mask function and an attention function, registered with transformers, find the forward they belong to in a context
variable. What they cannot compute exactly is transformers' own: a whole forward, if its masks are found to be more than
causal, or a layer. Knows transformers' contracts, not how a forward is decided, nor how work is shared out.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface
from transformers.cache_utils import Cache
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    AttentionMaskInterface,
    bidirectional_mask_function,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fapool_plugin.base.forward import CannotPool, Forward, Misjudged
from fapool_plugin.base.resource_manager import ResourceManager
from fapool_plugin.integrations.huggingface.arguments import in_checkpoint, in_function, strings_in
from fapool_plugin.integrations.huggingface.config_view import local_name
from fapool_plugin.integrations.huggingface.layer import owned_dtype
from fapool_plugin.integrations.huggingface.masks import not_causal, window_of
from fapool_plugin.integrations.huggingface.stored import is_given_away, is_resident, is_taken, refuse_partial
from fapool_plugin.plan.shares import Geometry

NAME = "fapool"
"""How the attention and the mask function are registered; transformers looks for "flash" in such names."""

_ACCOUNTED_FOR = {
    *("query", "key", "value", "attention_mask", "module", "scaling", "softcap", "s_aux", "is_causal", "dropout"),
    *("sliding_window", "position_ids", "cache_position", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q"),
    *("max_length_k", "num_items_in_batch", "output_attentions", "use_cache", "cache"),
}
"""Arguments of attention functions that a forward's decision, or this module, has looked at."""


_OTHER_MASK = "the model, or a hook of it, masks other columns than it was given a mask for"
NESTED = "it is called from inside of a pooled forward of the same model"
"""Why a forward is local that a hook, say, has begun: it waits for no pool rank, since the other one has them."""


class _FullMask:
    """The mask of full attention, which pooled layers do without: made if a layer that is not pooled needs it."""

    def __init__(self) -> None:
        self.make: Callable[[], Any] | None = None
        self._made: list[Any] = []

    def __call__(self) -> Any:
        if not self._made and self.make is not None:
            self._made.append(self.make())
        return self._made[0] if self._made else None


@dataclass(frozen=True)
class Scope:
    """One forward of one model, or one block of it."""

    manager: ResourceManager
    decided: Forward
    cache: Cache | None
    documents: tuple[int, ...] = ()
    """Lengths of the documents that are packed into the one row, if they are."""
    owning: bool = False
    """Its new keys go to owners, and those of before are there."""
    last_only: bool = False
    """Of the decoder's output only the last position is looked at."""
    recomputed: bool = False
    """Layers run once more in backward (gradient checkpointing), when no forward is open."""
    grads: bool = False
    """Gradients are on outside of its layers."""
    full_mask: _FullMask = field(default_factory=_FullMask)
    windows: set[int] = field(default_factory=set)
    """Windows that masks and layers have asked for."""
    made: list[tuple[Any, dict[str, Any]]] = field(default_factory=list)
    """Masks that were made, or left out, and what for."""
    under_way: list[int] = field(default_factory=list)
    """How deep in their model the entry modules lie whose forwards are under way, the innermost last."""
    asking: set[nn.Module] = field(default_factory=set)
    """Layers under way that have come to our attention function."""

    def has_part(self, depth: int) -> bool:
        """Whether an entry module that is called now, so deep in its model, is a part of this forward: what is called
        from inside of it and holds it is another."""
        return not self.under_way or self.under_way[-1] < depth


SCOPE: ContextVar[Scope | None] = ContextVar("fapool_scope", default=None)
"""transformers hands masks and attention only its own arguments: the forward they belong to travels beside them."""


_OF_TICKETS = {"__get__", "__set__", "to", "detach", "numel", "untyped_storage"}


class _Ticket(Tensor):
    """In place of a mask that was left out. It may be handed on; to compute with it ends pooling."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ not in _OF_TICKETS:
            raise CannotPool("a layer computes with a mask that only attention functions may look at")
        return super().__torch_function__(func, types, args, kwargs or {})


def _mask(*args: Any, **kwargs: Any) -> Any:
    """Mask function: the local implementation's own, except for full attention of a pooled forward, whose padding
    is known already. A pattern that is not plain causal ends pooling for this forward, before any layer has run."""
    local = functools.partial(ALL_MASK_ATTENTION_FUNCTIONS[local_name(kwargs.get("config")) or "sdpa"], *args)
    # A trace sees no context variables, and pooled forwards are not traced.
    scope = None if torch.compiler.is_compiling() else SCOPE.get()
    if scope is None:
        return local(**kwargs)
    window = window_of(kwargs)
    if window is not None:
        scope.windows.add(window)
    if not scope.decided.is_pooled:
        return local(**kwargs)
    # A mask in both directions is for attention to an encoder, even where there is none.
    aside = kwargs.get("mask_function") is bidirectional_mask_function
    sizes = {} if scope.decided.hand_over is None or aside else _block_sizes(scope.decided, window, kwargs)
    if window is not None or aside:
        made = local(**kwargs | sizes)
        scope.made.append((made, kwargs))
        return made
    if (reason := not_causal(kwargs, scope.documents)) is not None:
        scope.decided.abandon(reason)
        return local(**kwargs)
    if not scope.documents and not _is_decided_by(kwargs.get("attention_mask"), scope.decided.geometry):
        if scope.decided.hand_over is not None:
            raise CannotPool(_OTHER_MASK, ever=False)
        scope.decided.abandon(_OTHER_MASK)
        return local(**kwargs)
    scope.full_mask.make = functools.partial(local, **kwargs | sizes)
    if not scope.recomputed:
        scope.made.append((None, kwargs))
        if scope.decided.keeper is not None:
            scope.manager.without_masks.add(scope.decided.keeper)
        return None
    # Layers keep their arguments for the second time: the mask, empty as it is, says which forward it is of. Its
    # storage does, since reentrant checkpoints detach what they keep; no dtype that is cast with hidden states.
    ticket = torch.empty(0, dtype=torch.bool, device="cpu").as_subclass(_Ticket)
    ticket.untyped_storage().fapool_scope = scope  # type: ignore[attr-defined]
    return ticket


def _scope_on(mask: Any) -> Scope | None:
    """The forward that an empty mask is of, whatever became of the mask on the way."""
    empty = isinstance(mask, Tensor) and not mask.numel()
    return getattr(mask.untyped_storage(), "fapool_scope", None) if empty else None


def _is_decided_by(mask: Any, geometry: Geometry | None) -> bool:
    """Whether a padding mask is the one that its forward was decided by, or of another kind."""
    if geometry is None or (mask is not None and (mask.ndim != 2 or len(mask) != len(geometry.starts))):
        return True
    starts, stops = geometry.starts, geometry.stops
    if mask is None:
        return not any(starts) and min(stops) == geometry.columns
    at = torch.arange(geometry.columns, device=mask.device)
    first, after = (torch.tensor(x, device=mask.device)[:, None] for x in (starts, stops))
    return torch.equal(mask[:, : geometry.columns] != 0, (at >= first) & (at < after))


def mask_again(kwargs: dict[str, Any]) -> Any:
    """A mask for what another was made for, in the scope that is open now: that of a piece."""
    return _mask(**kwargs)


def _block_sizes(decided: Forward, window: int | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Where a block's queries and keys lie. The cache cannot say: other blocks are at other layers."""
    assert decided.geometry is not None
    start, stop = decided.geometry.q_column, decided.geometry.columns
    kept = start if window is None else min(start, window - 1)
    padding = kwargs.get("attention_mask")
    sizes = {"q_length": stop - start, "q_offset": start, "kv_length": kept + stop - start, "kv_offset": start - kept}
    return sizes | ({} if padding is None else {"attention_mask": padding[:, :stop]})


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention function: transformers' own for local calls and sliding-window layers, the pool for the others.

    query (B, H, S, D), key (B, K, T, D) and value (B, K, T, E) with the past; returns (B, S, H, E) and no weights.
    """
    core, function = getattr(module, "fa_pool", None), local_function(module)
    if core is None or torch.compiler.is_compiling():
        return function(module, query, key, value, attention_mask, **kwargs)
    scope = SCOPE.get()
    if scope is not None and scope.manager is not core.manager:
        scope = None  # a layer of another model, called by itself
    again = False
    if (ticket := _scope_on(attention_mask)) is not None:
        again = scope is None
        scope, attention_mask = scope or ticket, None
    if scope is None and core.manager.in_pooled_forward:
        raise RuntimeError(
            f"{type(module).__name__} was called outside its model's forward while that is pooled, in another thread "
            "perhaps: the masks of a pooled forward do not hold there. Call the whole model, from one thread"
        )
    if scope is None:
        if attention_mask is None and core.manager.without_masks and torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                f"{type(module).__name__} runs a second time, in backward, in a way that its pooled forward did not "
                "see, and has no mask there. Use model.gradient_checkpointing_enable()"
            )
        return function(module, query, key, value, attention_mask, **kwargs)
    scope.asking.add(module)
    reason, serious = "", False
    if scope.decided.is_pooled and scope.grads and not again:
        _refuse_misjudged(module, scope, query, key, value)
    if not scope.decided.is_pooled:
        if scope.owning:  # keys of before may be away
            raise CannotPool(next(iter(scope.decided.notes), "masks of this forward"), ever=False)
    elif again and (scope.cache is not None or _are_there_twice(key, scope)):
        name = type(module).__name__
        raise RuntimeError(f"{name} runs a second time, in backward, and its keys are cached: pass use_cache=False")
    elif again and scope.decided.phase != "training":
        # Its forward has ended; gradients are asked of its input alone.
        reason = f"{type(module).__name__} runs a second time, for gradients of its input"
    elif attention_mask is None:
        reason, serious = _local_reason(module, query, key, scope, function, kwargs)
    else:
        _refuse_strange_mask(module, attention_mask, scope)
        reason = f"{type(module).__name__} has a mask of its own"

    def local() -> Any:
        # Where full attention's mask was left out, it is missing here.
        mask = scope.full_mask() if attention_mask is None else attention_mask
        return function(module, query, key, value, mask, **kwargs)

    if reason:
        if scope.owning:
            refuse_partial(scope.cache, scope.decided, module, key, reason)
        scope.decided.note(reason, serious)
    if not scope.decided.is_pooled or reason:
        return core(query, key, value, decided=scope.decided, local=local)
    scaling, device, lengths = kwargs.get("scaling"), query.device.type, scope.documents
    owned = scope.owning and is_taken(scope.cache, module, key, value)
    resident = not scope.owning and is_resident(scope.cache, scope.decided, module, key, value)
    if lengths:
        query, key, value = (_unpacked(x, lengths) for x in (query, key, value))
    wanted = query.dtype
    if owned:
        # Owners keep keys as they are cached, whatever a call computes in.
        wanted = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else wanted
        query, key, value = (x.to(owned_dtype(key, value)) for x in (query, key, value))
    elif torch.is_autocast_enabled(device):
        # As transformers' sdpa attention is cast.
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    out = core(
        query,
        key,
        value,
        decided=scope.decided,
        resident=resident,
        owned=owned,
        softmax_scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        softcap=float(kwargs.get("softcap") or 0.0),
        sinks_H=kwargs.get("s_aux"),
    )
    if lengths:
        out = torch.cat([row[:length] for row, length in zip(out, lengths, strict=True)])[None]
    return (out.to(wanted) if owned else out), None


def _are_there_twice(key: Tensor, scope: Scope) -> bool:
    geometry = scope.decided.geometry
    return not scope.documents and geometry is not None and key.shape[2] != geometry.columns


def _refuse_misjudged(module: nn.Module, scope: Scope, *qkv: Tensor) -> None:
    """Raises Misjudged, of the first call that shows it."""
    checkpointed, name = in_checkpoint(), type(module).__name__
    if not scope.recomputed and (checkpointed or (not torch.is_grad_enabled() and in_function())):
        raise Misjudged(f"{name} is checkpointed")
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in qkv)
    if wanted and (checkpointed or scope.owning) and scope.decided.phase != "training":
        # Only in training the lease lasts until a second time, and owners give no gradients back.
        raise Misjudged(f"{name} is given hidden states that want gradients", gradients=True)


def _refuse_strange_mask(module: nn.Module, mask: Tensor, scope: Scope) -> None:
    """Raises CannotPool for a mask that a layer has made by itself: of the one that it was not given, perhaps."""
    known = {made.untyped_storage().data_ptr() for made, _ in scope.made if isinstance(made, Tensor)}
    if scope.full_mask.make is not None and mask.untyped_storage().data_ptr() not in known:
        raise CannotPool(f"{type(module).__name__} makes a mask of its own")


def local_function(module: nn.Module) -> Any:
    """What computes this layer's attention without us."""
    name = local_name(getattr(module, "config", None)) or "sdpa"
    if name in ALL_ATTENTION_FUNCTIONS:
        return ALL_ATTENTION_FUNCTIONS[name]
    return own_eager(module)


def own_eager(module: nn.Module) -> Any:
    """The eager attention function beside a layer's class; None if there is none."""
    return getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)


def _unpacked(x_1HSD: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """One row of documents as a padded batch, (documents, H, longest, D)."""
    documents = x_1HSD[0].transpose(0, 1).split(lengths)
    return pad_sequence(documents, batch_first=True).transpose(1, 2)


def _local_reason(
    module: nn.Module, query: Tensor, key: Tensor, scope: Scope, function: Any, kwargs: dict[str, Any]
) -> tuple[str, bool]:
    """Why this call of a pooled forward is transformers' own; "" if it need not be. And whether it is to be counted
    even if other layers were pooled."""
    name = type(module).__name__
    if (window := kwargs.get("sliding_window")) is not None:
        scope.windows.add(int(window))
        return f"{name} hands sliding_window = {window} to its attention", False
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    used = _arguments_of(function) | _arguments_of(own_eager(module))
    asked = [name for name in kwargs if name in used and name not in _ACCOUNTED_FOR]
    unknown = [name for name in asked if isinstance(kwargs[name], Tensor) or kwargs[name]]
    if not causal:
        unknown.append("is_causal=False")
    if kwargs.get("dropout"):
        unknown.append("dropout")
    if unknown:
        return f"{name} is given {', '.join(unknown)}, which pool ranks cannot compute with", True
    geometry = scope.decided.geometry
    shape = (key.shape[0], key.shape[2], query.shape[2])
    if scope.owning and geometry is not None and is_given_away(scope.cache, module, key):
        shape = (key.shape[0], geometry.columns, query.shape[2])
    if scope.documents:
        shape = (len(scope.documents), max(scope.documents), max(scope.documents))
    if geometry is None or (len(geometry.starts), geometry.columns, geometry.columns - geometry.q_column) != shape:
        reason = (
            f"{name} has {shape[2]} queries for {shape[0]} rows of {shape[1]} keys, which is not what its forward "
            "was decided for"
        )
        if scope.decided.hand_over is not None:
            raise CannotPool(reason)
        return reason, True
    return "", False


@functools.cache
def _arguments_of(function: Any) -> frozenset[str]:
    """The arguments that a function names: its parameters, and all strings in its code, by which it may look others
    up."""
    if function is None:
        return frozenset()
    function = inspect.unwrap(function)
    return frozenset(inspect.signature(function).parameters) | strings_in(getattr(function, "__code__", None))


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
