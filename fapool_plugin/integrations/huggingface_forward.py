"""Hugging Face: one forward of a pooled model, from the outermost module that is given tokens to its end.

Decides pooled or local before any mask is built, hands the model a cache of ours, and runs a long prompt's blocks
in flight. What happens at an attention call is in huggingface_attention.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from fapool_plugin.advisor import Profiler
from fapool_plugin.integrations.huggingface_attention import SCOPE, Scope
from fapool_plugin.integrations.huggingface_blocks import asked, collector_reason, not_in_blocks, run_blocks, run_parts
from fapool_plugin.integrations.huggingface_cache import GraphCache, PooledCache
from fapool_plugin.kv_cache import SequenceState, round_up
from fapool_plugin.metrics import Phase
from fapool_plugin.plan import Geometry
from fapool_plugin.resource_manager import ResourceManager

_DROPOUTS = ("dropout", "activation_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "layerdrop")
_LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}


class Entrance:
    """Mixed into the classes of a pooled model's modules that may be given tokens: the way into a forward."""

    fapool_forwards: Forwards | None = None
    fapool_in_rounds = False
    """Whether this module holds all layers and no other such module does: its forward may run in blocks."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        enter: Callable[..., Any] = super().__call__  # type: ignore[misc]
        if self.fapool_forwards is None:
            return enter(*args, **kwargs)
        return self.fapool_forwards.run(self, enter, args, kwargs)


@dataclass
class Forwards:
    """What a model's forwards pass through. Holds no model, so that models die as they would without it.

    Args:
        manager: decides.
        local: the attention implementation of calls that are not pooled, by its name in transformers.
        full_layers: how many layers attend to everything before them; only those are pooled.
        makes_cache: whether the model takes a cache of ours, rather than one of its own kind.
        one_block: why this model's prompts cannot be cut into blocks in flight; None if they can.
        profiler: makes what knows or measures a module's costs.
    """

    manager: ResourceManager
    local: str
    full_layers: int
    makes_cache: bool
    one_block: str | None
    profiler: Callable[[Any], Profiler | None]

    def run(self, owner: Any, enter: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs ``enter``, which is ``owner``'s own forward with its hooks, as it is decided."""
        scope = SCOPE.get()
        if scope is not None and scope.manager is self.manager:
            return self._inside(owner, enter, args, kwargs, scope)
        given = _by_name(owner, args, kwargs)
        tokens = given.get("input_ids")
        tokens = given.get("inputs_embeds") if tokens is None else tokens
        if not isinstance(tokens, Tensor):
            return enter(*args, **kwargs)
        given, scope = self._decide(owner, given, tokens)
        before, completed = SCOPE.set(scope), False
        try:
            output = self._inside(owner, enter, (), given, scope)
            completed = True
            return output
        finally:
            SCOPE.reset(before)
            self.manager.end(scope.decided, completed=completed)

    def _decide(self, owner: Any, given: dict[str, Any], tokens: Tensor) -> tuple[dict[str, Any], Scope]:
        cache, mask = given.get("past_key_values"), given.get("attention_mask")
        grads = torch.is_grad_enabled() and (tokens.requires_grad or any(p.requires_grad for p in owner.parameters()))
        training = grads or owner.training
        ours = self.makes_cache and not training
        if cache is None and ours and asked(owner, given, "use_cache"):
            cache = PooledCache(owner.config.get_text_config(decoder=True), self.manager, SequenceState())
            given = given | {"past_key_values": cache}
        state = cache.state if isinstance(cache, PooledCache) else SequenceState()
        past = int(cache.get_seq_length()) if isinstance(cache, Cache) else 0
        batch, new = tokens.shape[:2]
        columns = past + new
        reason = None
        if training and isinstance(cache, PooledCache):
            reason = "gradients through a cache: pass none while training"
        elif owner.training and (rate := _attention_dropout(owner)):
            reason = f"attention dropout {rate:g}: its random numbers are the model's own; set it to 0 to train pooled"
        elif torch.is_autocast_enabled(tokens.device.type) and not training:
            reason = "autocast: q, k and v have dtypes of their own; load the model in that dtype"
        elif asked(owner, given, "output_attentions"):
            reason = "output_attentions: pool ranks return no attention weights; ask for none"
        elif cache is not None and not isinstance(cache, PooledCache):
            reason = f"a cache of type {type(cache).__name__} is not pooled: pass none, and get the plugin's"
        elif not self.full_layers:
            reason = "no layer has full attention: load the model without fa_pool"
        # As transformers does, which looks for documents where it has neither mask nor cache.
        one_row = cache is None and mask is None and not asked(owner, given, "use_cache")
        documents = _documents(given, batch, new) if one_row else ()
        columns = max(documents, default=columns)
        in_prompt = columns <= state.prompt_columns
        phase: Phase = "prefill" if past == 0 or in_prompt or new > self.manager.config.kv_block else "decode"
        phase = "training" if training else phase
        one_block = "decode" if phase == "decode" else self.one_block or one_block_reason(owner, given)
        if documents:
            one_block = one_block or "sequences are packed"
        if phase == "training":
            one_block = one_block or _one_piece_reason(owner, given)
        decided = self.manager.begin(
            phase,
            state.prompt_columns if in_prompt else columns,
            lambda: (
                Geometry((0,) * len(documents), documents, 0, columns)
                if documents
                else _padding(mask, batch, past, columns)
            ),
            state,
            must_be_local=reason,
            lasting=cache is not None or training,
            one_block=one_block,
            profiler=self.profiler(owner),
        )
        if training and decided.pooled:
            decided = decided.in_graph(self.manager.watch)
        elif decided.blocks > 1 and cache is None:
            # Later blocks need the keys of earlier ones; this cache ends with the forward.
            cache = PooledCache(owner.config.get_text_config(decoder=True), self.manager, state)
            decided = replace(decided, lasting=True)
        if decided.pooled and isinstance(cache, PooledCache):
            cache.reserve(max(state.capacity, round_up(columns, self.manager.config.kv_block)))
        return given, Scope(
            self.manager, decided, cache, self.local, documents, recomputed=training and _is_checkpointed(owner)
        )

    def _inside(
        self, owner: Any, enter: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], scope: Scope
    ) -> Any:
        decided, began = scope.decided, time.perf_counter()
        output = self._run(owner, enter, args, kwargs, scope)
        if owner.fapool_in_rounds and decided.phase == "prefill":
            # A head over every position, and a loss, are not the plan's.
            decided.took_s = time.perf_counter() - began
        return output

    def _run(
        self, owner: Any, enter: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], scope: Scope
    ) -> Any:
        decided, cache = scope.decided, scope.cache
        if not owner.fapool_in_rounds or decided.blocks == 1:
            return enter(*args, **kwargs)
        given, training = _by_name(owner, args, kwargs), decided.phase == "training"
        in_parts = training and decided.geometry is not None and len(decided.geometry.starts) > 1
        reason = collector_reason() or (None if in_parts else not_in_blocks(given))
        if reason:
            self.manager.counters.not_overlapped(reason)
            decided.blocks, decided.choice = 1, None
            return enter(*args, **kwargs)
        if in_parts:
            return run_parts(owner, enter, given, scope)
        if training:
            positions = decided.geometry.columns if decided.geometry is not None else 0
            keys = GraphCache(owner.config.get_text_config(decoder=True), positions)
            return run_blocks(owner, enter, given, scope, keys)
        if not isinstance(cache, PooledCache):
            return enter(*args, **kwargs)
        return run_blocks(owner, enter, given, scope, cache)


def one_block_model(model: Any, decoder: Any, kinds: set[str]) -> str | None:
    """Why prompts of this model cannot be cut into blocks in flight, beforehand; None if they can."""
    config = model.config.get_text_config(decoder=True)
    across = sorted(kinds - {"full_attention", "sliding_attention"})
    mixing = {type(m).__name__ for m in model.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.RNNBase))}
    rope = getattr(config, "rope_parameters", None) or {}
    tables = [rope, *(table for table in rope.values() if isinstance(table, dict))]
    if decoder is None or decoder is model:
        return "the decoder is not a module of its own"
    if across or mixing:
        return f"layers of kind {', '.join(across or sorted(mixing))} carry something from position to position"
    if any(table.get("rope_type") in _LENGTH_DEPENDENT_ROPE for table in tables):
        return "its position encoding depends on the length of the whole forward"
    return None


def one_block_reason(owner: Any, given: dict[str, Any]) -> str | None:
    """Why this forward cannot be cut into blocks in flight; None if it can."""
    if torch.compiler.is_compiling() or any(module._compiled_call_impl is not None for module in owner.modules()):
        return "the model is compiled"
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured"
    for module in owner.modules():
        if hasattr(module, "_hf_hook"):
            return "its weights are moved in and out by hooks (offload)"
    if any(hasattr(parameter, "ds_id") for parameter in owner.parameters()):
        return "its weights are partitioned (ZeRO-3)"
    if asked(owner, given, "output_router_logits"):
        return "output_router_logits was asked for"
    return None


def _one_piece_reason(owner: Any, given: dict[str, Any]) -> str | None:
    """Why a training forward cannot be cut into pieces in flight; None if it can."""
    if _is_checkpointed(owner):
        return "gradient checkpointing runs layers by themselves"
    if given.get("use_cache"):
        return "use_cache was asked for while training"
    config = owner.config.get_text_config(decoder=True)
    rates = [module.p for module in owner.modules() if isinstance(module, nn.Dropout)]
    if owner.training and any([*rates, *(getattr(config, name, None) for name in _DROPOUTS)]):
        return "dropout: pieces would draw other random numbers than the whole"
    return None


def _is_checkpointed(owner: Any) -> bool:
    return owner.training and any(getattr(module, "gradient_checkpointing", False) for module in owner.modules())


def _attention_dropout(owner: Any) -> float:
    """The attention dropout of a model in training mode."""
    config = owner.config.get_text_config(decoder=True)
    names = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
    return max(float(getattr(config, name, 0.0) or 0.0) for name in names)


def _documents(given: dict[str, Any], batch: int, new: int) -> tuple[int, ...]:
    """Lengths of the documents packed into one row, as positions that begin anew or cu_seq_lens_q tell; () if it is
    one sequence."""
    positions, edges = given.get("position_ids"), given.get("cu_seq_lens_q")
    if batch != 1:
        return ()
    if not isinstance(positions, Tensor) and isinstance(edges, Tensor):
        lengths = edges.diff().tolist()
    elif isinstance(positions, Tensor) and positions.ndim == 2:
        starts = (positions[0].diff() != 1).nonzero().flatten() + 1
        lengths = torch.diff(starts, prepend=starts.new_zeros(1), append=starts.new_full((1,), new)).tolist()
    else:
        return ()
    return tuple(lengths) if len(lengths) > 1 and sum(lengths) == new and min(lengths) > 0 else ()


def _padding(mask: Tensor | None, batch: int, past: int, columns: int) -> Geometry:
    """Where the real tokens lie. Raises ValueError for masks that are more than padding on either side."""
    if mask is None:
        return Geometry((0,) * batch, (columns,) * batch, past, columns)
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        kind = f"{mask.ndim}-dimensional" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"fa_pool cannot pool a call with a custom attention mask ({kind}): pass the 2-D padding mask, or raise "
            f"threshold above {columns} to compute it without the pool"
        )
    if mask.shape[1] < columns:
        raise ValueError(f"attention_mask has {mask.shape[1]} columns, the sequences have {columns} with their past")
    real = mask[:, :columns] != 0
    counts = real.sum(1)
    starts = torch.where(counts > 0, real.int().argmax(1), columns)
    stops = torch.where(counts > 0, columns - real.flip(1).int().argmax(1), columns)
    holes = ((stops - starts) != counts).nonzero()
    if holes.numel():
        row = int(holes[0])
        raise ValueError(
            f"attention_mask has a hole: row {row} has {int(counts[row])} tokens between columns {int(starts[row])} "
            f"and {int(stops[row])}. Pad on one side only, or raise threshold above {columns}"
        )
    return Geometry(tuple(starts.tolist()), tuple(stops.tolist()), past, columns)


def _by_name(owner: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All of a forward's arguments under their names."""
    if not args:
        return kwargs
    return dict(zip(inspect.signature(owner.forward).parameters, args, strict=False)) | kwargs
