"""Hugging Face: one forward of a pooled model, from the outermost module that is given tokens to its end.

Decides pooled or local before any mask is built, hands the model a cache of ours, and runs a long prompt's blocks
in flight. What happens at an attention call is in attention.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from fapool_plugin.base.advisor import Profiler
from fapool_plugin.base.forward import CannotPool
from fapool_plugin.base.resource_manager import ResourceManager
from fapool_plugin.base.sequence import SequenceState
from fapool_plugin.integrations.huggingface.attention import NAME, SCOPE, Scope
from fapool_plugin.integrations.huggingface.blocks import asked, collector_reason, not_in_pieces, run_blocks, run_parts
from fapool_plugin.integrations.huggingface.cache import GraphCache, PooledCache
from fapool_plugin.integrations.huggingface.config_view import local_name, view_configs
from fapool_plugin.integrations.huggingface.masks import documents_between, packed_documents, padding
from fapool_plugin.integrations.huggingface.pieces import (
    beyond_trial,
    hook_reason,
    is_checkpointed,
    is_compiled,
    may_try,
    one_block_reason,
    structure,
    untried_reason,
)
from fapool_plugin.integrations.huggingface.probe import LENGTH, Probe
from fapool_plugin.observe.metrics import Phase
from fapool_plugin.plan.line import round_up
from fapool_plugin.plan.shares import Geometry


class EntryModule:
    """Mixed into the classes of a pooled model's modules that may be given tokens: the way into a forward."""

    fapool_forwards: Forwards | None = None
    fapool_in_rounds = False
    """Whether this module holds all layers and no other such module does: its forward may run in blocks."""

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


@dataclass
class Forwards:
    """What a model's forwards pass through. Holds no model, so that models die as they would without it.

    Args:
        manager: decides.
        full_layers: how many layers attend to everything before them; only those are pooled.
        makes_cache: whether the model takes a cache of ours, rather than one of its own kind.
        one_block: why this model's prompts cannot be cut into blocks in flight; None if they can.
        profiler: makes what knows or measures a module's costs.
    """

    manager: ResourceManager
    full_layers: int
    makes_cache: bool
    one_block: str | None
    profiler: Callable[[Any], Profiler | None]
    probe: Probe = field(default_factory=Probe)
    never: str | None = None
    """Why none of its forwards is pooled, as a layer of it showed."""

    def is_long(self, owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a forward is above the threshold, padding included."""
        given = _by_name(owner, args, kwargs)
        tokens, cache = _tokens(given), given.get("past_key_values")
        past = cache.get_seq_length() if isinstance(cache, Cache) else 0
        return tokens is not None and past + tokens.shape[1] > self.manager.threshold

    def run(
        self, owner: Any, enter: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *,
        compiled: bool = False,
    ) -> Any:  # fmt: skip
        """Runs ``enter``, which is ``owner``'s own forward with its hooks, as it is decided."""
        scope = SCOPE.get()
        if scope is not None and scope.manager is self.manager:
            return self._inside(owner, enter, args, kwargs, scope)
        given = _by_name(owner, args, kwargs)
        tokens = _tokens(given)
        if tokens is None:
            return enter(*args, **kwargs)
        scope = self._decide(owner, given, tokens, compiled)
        before, completed = SCOPE.set(scope), False
        try:
            if scope.cache is not given.get("past_key_values"):
                args, kwargs = _with_cache(owner, args, kwargs, scope.cache)
            # What is compiled inside was traced without a pool.
            eager = scope.decided.pooled and is_compiled(owner)
            rewind = _Rewind(scope) if scope.decided.pooled else None
            with torch.compiler.set_stance("force_eager") if eager else nullcontext():
                try:
                    output = self._inside(owner, enter, args, kwargs, scope)
                except CannotPool as error:
                    assert rewind is not None
                    rewind()
                    self.never = str(error)
                    scope.decided.abandon(self.never)
                    output = self._inside(owner, enter, args, kwargs, scope)
            completed = True
            return output
        finally:
            SCOPE.reset(before)
            self.manager.end(scope.decided, completed=completed)

    def _decide(self, owner: Any, given: dict[str, Any], tokens: Tensor, compiled: bool) -> Scope:
        cache, mask = given.get("past_key_values"), given.get("attention_mask")
        decoder = _decoder(owner)
        grads = torch.is_grad_enabled() and (tokens.requires_grad or any(p.requires_grad for p in owner.parameters()))
        training = grads or owner.training
        traced, wants_cache = _traced(tokens), _wants_cache(owner, decoder, given)
        if cache is None and self.makes_cache and wants_cache and not (training or traced):
            cache = PooledCache(owner.config.get_text_config(decoder=True), self.manager, SequenceState())
        state = cache.state if isinstance(cache, PooledCache) else SequenceState()
        batch, new = tokens.shape[:2]
        past = _past(cache, mask, new)
        # As transformers does, which looks for documents where it has neither mask nor cache.
        one_row = cache is None and mask is None and not wants_cache and batch == 1
        documents = _documents(decoder, given, new) if one_row else ()
        columns = max(documents, default=past + new)
        in_prompt = columns <= state.prompt_columns
        phase: Phase = "prefill" if past == 0 or in_prompt or new > self.manager.config.kv_block else "decode"
        phase = "training" if training else phase
        one_block = "decode" if phase == "decode" else self.one_block
        # Looking at all modules is for forwards that may be pooled.
        if one_block is None and columns > self.manager.threshold:
            one_block = one_block_reason(owner, given, training=training)
            one_block = one_block or (hook_reason(decoder) if decoder is not None else None)
            one_block = one_block or untried_reason(decoder, training=training, base_ranks=self.manager.base_ranks)
        if documents:
            one_block = one_block or "sequences are packed"
        if compiled:
            one_block = "the model is compiled"
        decided = self.manager.begin(
            phase,
            state.prompt_columns if in_prompt else columns,
            lambda: (
                Geometry((0,) * len(documents), documents, 0, columns)
                if documents
                else padding(mask, batch, past, columns)
            ),
            state,
            must_be_local=traced or self._local_reason(owner, given, cache, training),
            lasting=cache is not None or training,
            one_block=one_block,
            profiler=self.profiler(owner),
        )
        if training and decided.pooled:
            decided = decided.in_graph(self.manager.watch)
        if decided.pooled and isinstance(cache, PooledCache):
            cache.reserve(max(state.capacity, round_up(columns, self.manager.config.kv_block)))
        return Scope(self.manager, decided, cache, documents, recomputed=training and is_checkpointed(owner))

    def _local_reason(self, owner: Any, given: dict[str, Any], cache: Any, training: bool) -> str | None:
        """Why a forward is local, whatever its length."""
        if training and cache is not None:
            return "gradients through a cache: pass none while training, or decode under torch.no_grad()"
        if owner.training and (rate := _attention_dropout(owner)):
            return f"attention dropout {rate:g}: its random numbers are the model's own; set it to 0 to train pooled"
        if asked(owner, given, "output_attentions"):
            return "output_attentions: pool ranks return no attention weights; ask for none"
        if cache is not None and not isinstance(cache, PooledCache):
            return f"a cache of type {type(cache).__name__} is not pooled: pass none, and get the plugin's"
        if self.never is not None:
            return self.never
        if not self.full_layers:
            return "no layer has full attention: load the model without fa_pool"
        return None

    def _inside(
        self, owner: Any, enter: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], scope: Scope
    ) -> Any:
        decided, began = scope.decided, time.perf_counter()
        if not owner.fapool_in_rounds or decided.blocks == 1:
            output = enter(*args, **kwargs)
        else:
            output = self._in_pieces(owner, enter, args, kwargs, scope)
        if owner.fapool_in_rounds and decided.phase == "prefill":
            # A head over every position, and a loss, are not the plan's.
            decided.took_s = time.perf_counter() - began - decided.apart_s
        return output

    def _in_pieces(
        self, owner: Any, enter: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], scope: Scope
    ) -> Any:
        """A decoder's forward, cut if nothing speaks against it."""
        decided, given = scope.decided, _by_name(owner, args, kwargs)
        rows = decided.phase == "training" and decided.geometry is not None and len(decided.geometry.starts) > 1
        reason = collector_reason() or not_in_pieces(owner, given, scope, rows=rows)
        reason = reason or self._shown(owner, enter, given, scope, rows)
        if not reason:
            try:
                if rows:
                    return run_parts(owner, enter, given, scope)
                return run_blocks(owner, enter, given, scope, self._keys(owner, given, scope))
            except CannotPool as error:
                reason = str(error)
                decided.abandon(reason)
        self.manager.counters.not_overlapped(reason)
        decided.blocks, decided.choice = 1, None
        return enter(*args, **kwargs)

    def _keys(self, owner: Any, given: dict[str, Any], scope: Scope) -> PooledCache | GraphCache:
        """The cache by which keys come from block to block; ends with the forward if the caller has none."""
        decided, config = scope.decided, owner.config.get_text_config(decoder=True)
        if decided.phase == "training":
            return GraphCache(config, decided.geometry.columns if decided.geometry is not None else 0)
        cache = given.get("past_key_values")
        if isinstance(cache, PooledCache):
            return cache
        cache = PooledCache(config, self.manager, decided.sequence or SequenceState())
        columns = decided.geometry.columns if decided.geometry is not None else 0
        cache.reserve(round_up(columns, self.manager.config.kv_block))
        decided.lasting = True
        return cache

    def _shown(
        self, owner: Any, enter: Callable[..., Any], given: dict[str, Any], scope: Scope, rows: bool
    ) -> str | None:
        """Why pieces would differ from the whole, as a trial showed; None if they do not."""
        decided, manager, geometry = scope.decided, self.manager, scope.decided.geometry
        assert geometry is not None
        padded = (any(geometry.starts), any(stop < geometry.columns for stop in geometry.stops))
        if not may_try(training=decided.phase == "training", base_ranks=manager.base_ranks):
            if any(padded) and not rows:
                return "a padded row is trained by several processes, where no trial is made"
            return None
        device = owner.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        mode = (decided.phase == "training", torch.is_grad_enabled(), autocast, owner.dtype)
        key = ("rows" if rows else "positions", *mode, padded, structure(owner))
        known = key in self.probe.verdicts
        if manager.base_ranks > 1:
            # Trials of base ranks that share a model belong together, as all that they compute.
            known = bool(manager.agree((int(known), 0))[0])
        verdict = self.probe.verdicts.get(key, "")
        if not known:
            began = time.perf_counter()
            verdict = self.probe.run(key, owner, enter, given, scope)
            decided.apart_s = time.perf_counter() - began
        if manager.base_ranks > 1:
            agreed = bool(manager.agree((int(not verdict), 0))[0])
            verdict = verdict if agreed or verdict else "another base rank's trial differs"
        if verdict:
            return f"a trial showed that pieces differ from the whole: {verdict}"
        return beyond_trial(owner, LENGTH, geometry, self.probe.windows.get(key, ()))


class _Rewind:
    """Takes a forward back to its beginning, to be run once more: what it drew and what its cache was given."""

    def __init__(self, scope: Scope) -> None:
        on_cuda = torch.cuda.is_initialized() and not torch.cuda.is_current_stream_capturing()
        self._random = torch.get_rng_state(), torch.cuda.get_rng_state_all() if on_cuda else []
        self._cache = scope.cache.rewinder() if isinstance(scope.cache, PooledCache) else None

    def __call__(self) -> None:
        cpu, cuda = self._random
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
        if self._cache is not None:
            self._cache()


def _tokens(given: dict[str, Any]) -> Tensor | None:
    tokens = given.get("input_ids")
    tokens = given.get("inputs_embeds") if tokens is None else tokens
    return tokens if isinstance(tokens, Tensor) else None


def _past(cache: Any, mask: Any, new: int) -> int:
    """Columns before a forward's own; of a cache of another kind, as its layers or the mask say."""
    if isinstance(cache, PooledCache) or (isinstance(cache, Cache) and not hasattr(cache, "layers")):
        return int(cache.get_seq_length())
    if isinstance(cache, Cache):
        # Layers of models with caches of their own kind may be empty, the first one, too.
        lengths = (layer.get_seq_length() for layer in cache.layers if hasattr(layer, "get_seq_length"))
        return max(map(int, lengths), default=0)
    return max(0, mask.shape[1] - new) if cache is not None and isinstance(mask, Tensor) and mask.ndim == 2 else 0


def _decoder(owner: Any) -> Any:
    """The module whose forward may run in blocks; None if there is none in ``owner``."""
    if owner.fapool_in_rounds:
        return owner
    return next((module for module in owner.modules() if getattr(module, "fapool_in_rounds", False)), None)


def _wants_cache(owner: Any, decoder: Any, given: dict[str, Any]) -> bool:
    """Whether a cache is to be made: as the call says, or else the configuration of the module that makes it."""
    value = given.get("use_cache")
    if value is None and getattr(owner.config, "use_cache", None) is not False:
        value = getattr((decoder or owner).config.get_text_config(decoder=True), "use_cache", False)
    return bool(value)


def _traced(tokens: Tensor) -> str | None:
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


def _attention_dropout(owner: Any) -> float:
    """The attention dropout of a model in training mode."""
    config = owner.config.get_text_config(decoder=True)
    names = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
    return max(float(getattr(config, name, 0.0) or 0.0) for name in names)


def _documents(decoder: Any, given: dict[str, Any], new: int) -> tuple[int, ...]:
    """Lengths of the documents packed into one row, as its local attention would tell them apart; () if it is one
    sequence: flash attention by cu_seq_lens_q, others by positions that begin anew."""
    positions, edges = given.get("position_ids"), given.get("cu_seq_lens_q")
    if isinstance(edges, Tensor) and "flash" in (local_name(decoder.config if decoder is not None else None) or ""):
        return documents_between(edges, new)
    return packed_documents(positions, new) if isinstance(positions, Tensor) and positions.ndim == 2 else ()


def _by_name(owner: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All of a forward's arguments under their names."""
    if not args:
        return kwargs
    return dict(zip(inspect.signature(owner.forward).parameters, args, strict=False)) | kwargs


def _with_cache(
    owner: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], cache: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A caller's arguments with another cache; hooks see all others as they were given."""
    names = list(inspect.signature(owner.forward).parameters)[: len(args)]
    if "past_key_values" in names:
        at = names.index("past_key_values")
        return (*args[:at], cache, *args[at + 1 :]), kwargs
    return args, kwargs | {"past_key_values": cache}
