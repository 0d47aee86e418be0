"""Megatron-core: one forward of a whole model, decided before its first layer and ended after its last.

Reads lengths from masks, packs and inference contexts. What is known of a context is in contexts, what happens in a
layer in attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fapool_plugin.base.owned import KeysLost
from fapool_plugin.base.resource_manager import ResourceManager
from fapool_plugin.base.sequence import SequenceState
from fapool_plugin.integrations.megatron.attention import SCOPE, Scope, documents
from fapool_plugin.integrations.megatron.contexts import Kept, Keys, inputs, kept_of, recover, remember
from fapool_plugin.observe.metrics import Phase
from fapool_plugin.plan.shares import Geometry

_ROWS_AT_ONCE = 1024
"""Of a mask, compared with the one that is expected: a second mask of its size would be large."""


def run(model: Any, manager: ResourceManager, given: Mapping[str, Any], enter: Callable[[], Tensor]) -> Tensor:
    """A model's forward with these arguments, which ``enter`` makes; once more, if keys are lost on the way.

    Raises ValueError as :func:`one_forward` does, PoolMemoryError if keys do not fit, RuntimeError if lost ones cannot
    be computed once more.
    """
    context = given.get("inference_context")
    for _ in range(manager.config.pool_ranks + 2):
        if context is not None and context.is_static_batching():
            recover(context, manager, _shape(model, given)[0])
        with suppress(KeysLost), one_forward(model, manager, given):
            return enter()
    raise RuntimeError("fa_pool: keys on the pool are lost again and again; see stats()['events']")


@contextmanager
def one_forward(model: Any, manager: ResourceManager, given: Mapping[str, Any]) -> Iterator[None]:
    """Decides a model's forward from the arguments it was given, and ends it, after errors and interrupts, too.

    Raises ValueError for arguments that no layer could compute exactly, KeysLost if all is as it was before.
    """
    scope, kept = _decide(model, manager, given)
    keys, decided = scope.keys, scope.decided
    before, completed = SCOPE.set(scope), False
    try:
        if keys is not None:
            keys.prepare(_past(given), decided.geometry if decided.pooled else None)
        yield
        if keys is not None and kept is not None:
            keys.complete()
            _record(model, given, kept, keys, decided.geometry)
        completed = True
    except BaseException as error:
        if keys is not None:
            keys.undo(error)
        raise
    finally:
        SCOPE.reset(before)
        manager.end(decided, completed=completed)
        if kept is not None:
            remember(kept, given["inference_context"])


def _record(model: Any, given: Mapping[str, Any], kept: Kept, keys: Keys, geometry: Geometry | None) -> None:
    """Remembers what a complete forward was given."""
    (batch, new), past, mask = _shape(model, given), _past(given), given.get("attention_mask")
    kept.columns = past + new
    plain = mask is not None and mask.ndim == 4 and mask.shape[1:] == (1, new, kept.columns)
    seen = geometry or (positions(mask, batch, past, kept.columns) if plain else "broadcast")
    keys.record.add(model, inputs(given, None if mask is None else seen), past, kept.columns, away=keys.owning)


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
    past = _past(given)
    columns = past + new
    kept = keys = None
    if context is not None:
        kept = kept_of(context, manager, batch, past, columns, model.config.num_layers)
        keys = kept.keys
        if keys is not None:
            keys.refuse_seen(mask, kept.rows[0])
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
        seen = positions(mask, batch, past, columns)
        if keys is None or isinstance(seen, str):
            return seen
        # What comes behind a row's tokens is seen by none of them, and perhaps by steps: its keys are kept, too.
        return replace(seen, stops=(columns,) * batch)

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
    return Scope(manager, decided, whole, pooled, keys), kept


def _past(given: Mapping[str, Any]) -> int:
    """Columns before a forward's own."""
    context = given.get("inference_context")
    return int(context.sequence_len_offset) if context is not None else 0


def _shape(model: Any, given: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and new columns of a forward."""
    hidden_SBH, ids_BS = given.get("decoder_input"), given.get("input_ids")
    if hidden_SBH is None and ids_BS is not None:
        return int(ids_BS.shape[0]), int(ids_BS.shape[1])
    if hidden_SBH is None:
        raise ValueError("neither input_ids nor decoder_input was given")
    parts = model.pg_collection.tp.size() if model.config.sequence_parallel else 1
    return int(hidden_SBH.shape[1]), int(hidden_SBH.shape[0]) * parts


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
