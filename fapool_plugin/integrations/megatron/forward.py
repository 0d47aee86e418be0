"""Megatron-core: one forward of a whole model, decided before its first layer and ended after its last.

Reads lengths from masks, packs and inference contexts, and remembers what pool ranks hold of a context's cache. What
happens in a layer is in attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fapool_plugin.base.resource_manager import ResourceManager
from fapool_plugin.base.sequence import SequenceState
from fapool_plugin.integrations.megatron.attention import SCOPE, Scope, documents
from fapool_plugin.observe.metrics import Phase
from fapool_plugin.plan.shares import Geometry

_ROWS_AT_ONCE = 1024
"""Of a mask, compared with the one that is expected: a second mask of its size would be large."""
_KEPT = "fapool_kept"


@dataclass(eq=False)
class Kept:
    """What is known of an inference context's cache; its attribute, so that both end together.

    Megatron's contexts are compared by value and have no hash, so that no table can be keyed by them.
    """

    manager: ResourceManager
    rows: tuple[int, int]
    """The first of the cache's rows, and how many."""
    state: SequenceState = field(default_factory=SequenceState)
    columns: int = 0
    memory: Any = None
    """The first layer's keys, to see them exchanged."""


@contextmanager
def one_forward(model: Any, manager: ResourceManager, given: Mapping[str, Any]) -> Iterator[None]:
    """Decides a model's forward from the arguments it was given, and ends it, after errors and interrupts, too.

    Raises ValueError for arguments that no layer could compute exactly.
    """
    scope, kept = _decide(model, manager, given)
    before, completed = SCOPE.set(scope), False
    try:
        yield
        completed = True
    finally:
        SCOPE.reset(before)
        manager.end(scope.decided, completed=completed)
        if kept is not None:
            kept.memory = _memory(given["inference_context"])


def _decide(model: Any, manager: ResourceManager, given: Mapping[str, Any]) -> tuple[Scope, Kept | None]:
    context, packed, mask = (given.get(name) for name in ("inference_context", "packed_seq_params", "attention_mask"))
    if context is not None and not context.is_static_batching():
        raise ValueError(
            f"{type(context).__name__} has a paged cache and an attention of its own, which fa_pool does not pool: "
            "use StaticInferenceContext, or Megatron's own layer spec"
        )
    if context is not None and packed is not None:
        raise ValueError("packed_seq_params beside an inference context: give each document a row of its own")
    batch, new = _shape(model, given)
    past = int(context.sequence_len_offset) if context is not None else 0
    columns = past + new
    kept = _kept(context, manager, batch, past, columns, model) if context is not None else None
    state = kept.state if kept is not None else SequenceState()
    whole = documents(packed, new) if packed is not None else None
    # A document at or under the threshold stays with the base, as it would alone.
    pooled = tuple(one for one in whole or () if one.tokens > manager.threshold)
    if whole is not None:
        columns = max((one.tokens for one in whole), default=0)

    def look() -> Geometry | str:
        if whole is not None:
            lengths = tuple(one.tokens for one in pooled)
            return Geometry((0,) * len(pooled), lengths, 0, max(lengths))
        return positions(mask, batch, past, columns)

    grads = torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters())
    training = grads or model.training
    reason = None
    if training and context is not None:
        reason = "gradients through a cache: pass none while training"
    elif model.training and model.config.attention_dropout:
        reason = (
            f"attention dropout {model.config.attention_dropout:g}: its random numbers are the model's own; set it to "
            "0 to train pooled"
        )
    elif torch.is_autocast_enabled(next(model.parameters()).device.type):
        reason = "autocast: q, k and v have dtypes of their own; build the model in that dtype"
    phase: Phase = "prefill" if past == 0 or new > manager.config.kv_block else "decode"
    phase = "training" if training else phase
    decided = manager.begin(
        phase,
        columns,
        look,
        state,
        must_be_local=reason,
        lasting=context is not None or training,
        one_block="decode" if phase == "decode" else "Megatron's own models run a prompt in one piece",
        device=next(model.parameters()).device,
    )
    if training and decided.pooled:
        decided = decided.in_graph(manager.watch)
    return Scope(manager, decided, whole, pooled), kept


def _shape(model: Any, given: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and new columns of a forward."""
    hidden_SBH, ids_BS = given.get("decoder_input"), given.get("input_ids")
    if hidden_SBH is None and ids_BS is not None:
        return int(ids_BS.shape[0]), int(ids_BS.shape[1])
    if hidden_SBH is None:
        raise ValueError("neither input_ids nor decoder_input was given")
    parts = model.pg_collection.tp.size() if model.config.sequence_parallel else 1
    return int(hidden_SBH.shape[1]), int(hidden_SBH.shape[0]) * parts


def _kept(context: Any, manager: ResourceManager, batch: int, past: int, columns: int, model: Any) -> Kept:
    """What is known of a context's cache, as far as it is still true."""
    kept, rows = getattr(context, _KEPT, None), (int(context.batch_size_offset), batch)
    known = isinstance(kept, Kept) and kept.manager is manager and kept.rows == rows and past > 0
    if not isinstance(kept, Kept) or not known or kept.memory is not _memory(context):
        kept = Kept(manager, rows, SequenceState(capacity=context.max_sequence_length))
        manager.watch(kept, kept.state)
        # The sequence that was here before ends with what was known of it.
        setattr(context, _KEPT, kept)
    elif past < kept.columns:
        for layer in range(model.config.num_layers):
            kept.state.crop(layer, past)
    kept.columns = columns
    return kept


def _memory(context: Any) -> Any:
    return next((k for k, _ in context.key_value_memory_dict.values()), None)


def positions(mask: Tensor | None, batch: int, past: int, columns: int) -> Geometry | str:
    """Where the real tokens lie that a mask of Megatron's lets see each other; text if it does more than to hide
    padding and the future.

    Args:
        mask: (1 or B, 1, S, T), True where a query does not see a key; None: causal.
        batch: rows.
        past: keys before the first query.
        columns: keys.

    Raises:
        ValueError: the mask has another shape.
    """
    if mask is None:
        return Geometry((0,) * batch, (columns,) * batch, past, columns)
    if mask.ndim != 4 or mask.shape[0] not in (1, batch) or mask.shape[1:] != (1, columns - past, columns):
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}, {columns - past} queries of {batch} rows see {columns} "
            f"keys: pass ({batch} or 1, 1, {columns - past}, {columns}), or None for causal attention"
        )
    ends = [_ends(masked_ST, past) for masked_ST in mask[:, 0].bool()]
    ends = ends * batch if len(ends) < batch else ends
    bounds = [one for one in ends if one is not None]
    if len(bounds) < len(ends):
        return "attention_mask hides more than padding and the future"
    return Geometry(tuple(start for start, _ in bounds), tuple(stop for _, stop in bounds), past, columns)


def _ends(masked_ST: Tensor, past: int) -> tuple[int, int] | None:
    """First and last column, plus one, of a row's tokens; None if this is no causal mask of them."""
    columns = masked_ST.shape[1]
    seen = (~masked_ST.all(0)).nonzero()
    if not len(seen):
        return columns, columns
    start, stop = int(seen[0]), int(seen[-1]) + 1
    first, keys_T = max(0, start - past), torch.arange(columns, device=masked_ST.device)
    if not bool(masked_ST[:first].all()):
        return None
    for at in range(first, stop - past, _ROWS_AT_ONCE):
        until = min(at + _ROWS_AT_ONCE, stop - past)
        queries_S1 = torch.arange(past + at, past + until, device=masked_ST.device)[:, None]
        if not torch.equal(masked_ST[at:until], (keys_T > queries_S1) | (keys_T < start)):
            return None
    return start, stop
