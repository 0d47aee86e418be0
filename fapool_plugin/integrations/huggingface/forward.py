"""Hugging Face: one forward of a pooled model, from the outermost module that is given tokens to its end.

Decides pooled or local before any mask is built, hands the model a cache of ours, and runs a long prompt's blocks
in flight. What happens at an attention call is in attention.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from fapool_plugin.base.advisor import Profiler
from fapool_plugin.base.forward import CannotPool, Misjudged, StaysHome
from fapool_plugin.base.owned import FailedWithout, KeysLost
from fapool_plugin.base.resource_manager import ResourceManager
from fapool_plugin.base.sequence import SequenceState
from fapool_plugin.integrations.huggingface.arguments import (
    attention_dropout,
    by_name,
    decoder_of,
    documents_in,
    past_columns,
    tokens_of,
    traced_reason,
    wants_cache,
    wants_last_only,
    with_cache,
)
from fapool_plugin.integrations.huggingface.attention import NESTED, SCOPE, Scope
from fapool_plugin.integrations.huggingface.blocks import (
    Wave,
    asked,
    collector_reason,
    not_in_pieces,
    run_blocks,
    run_parts,
    run_turns,
)
from fapool_plugin.integrations.huggingface.cache import PooledCache
from fapool_plugin.integrations.huggingface.homes import Homes
from fapool_plugin.integrations.huggingface.masks import padding
from fapool_plugin.integrations.huggingface.pieces import (
    beyond_trial,
    hook_reason,
    is_compiled,
    may_try,
    one_block_reason,
    runs_again,
    structure,
    untried_reason,
    values,
)
from fapool_plugin.integrations.huggingface.probe import LENGTH, Probe
from fapool_plugin.integrations.huggingface.rewind import Rewind
from fapool_plugin.integrations.huggingface.supported import changed_reason
from fapool_plugin.integrations.huggingface.training_cache import GraphCache
from fapool_plugin.observe.metrics import Phase
from fapool_plugin.plan.line import round_up
from fapool_plugin.plan.shares import Geometry


@dataclass
class Forwards:
    """What a model's forwards pass through. Holds no model, so that models die as they would without it.

    Args:
        manager: decides.
        full_layers: how many layers attend to everything before them; only those are pooled.
        makes_cache: whether the model takes a cache of ours, rather than one of its own kind.
        one_block: why this model's prompts cannot be cut into blocks in flight; None if they can.
        profiler: makes what knows or measures a module's costs.
        homes: puts keys where a forward looks for them.
    """

    manager: ResourceManager
    full_layers: int
    makes_cache: bool
    one_block: str | None
    profiler: Callable[[Any], Profiler | None]
    homes: Homes
    probe: Probe = field(default_factory=Probe)
    never: str | None = None
    """Why none of its forwards is pooled, as a layer of it showed."""
    recomputes: bool = False
    """Whether layers run a second time in backward, as one of them showed."""

    def is_long(self, owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a forward is above the threshold, padding included."""
        given = by_name(owner, args, kwargs)
        tokens, cache = tokens_of(given), given.get("past_key_values")
        past = cache.get_seq_length() if isinstance(cache, Cache) else 0
        return tokens is not None and past + tokens.shape[1] > self.manager.threshold

    def run(
        self, owner: Any, enter: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *,
        compiled: bool = False,
    ) -> Any:  # fmt: skip
        """Runs ``enter``, which is ``owner``'s own forward with its hooks, as it is decided."""
        outer = SCOPE.get()
        if outer is not None and outer.manager is not self.manager:
            outer = None
        if outer is not None and outer.has_part(owner.fapool_depth):
            return self._inside(owner, enter, args, kwargs, outer)
        given = by_name(owner, args, kwargs)
        if (tokens := tokens_of(given)) is None:
            return enter(*args, **kwargs)
        alone = compiled, outer is not None and outer.decided.pooled
        # Ranks may be lost, and layers' keys turn out to stay here; without a cache of theirs each try makes one.
        given_cache = cache if isinstance(cache := given.get("past_key_values"), PooledCache) else None
        training = False
        for _ in range(self.manager.config.pool_ranks + self.full_layers + 4):
            if given_cache is not None:
                self.homes.recover(given_cache)
            try:
                scope = self._decide(owner, given, tokens, *alone, training)
                return self._decided(owner, enter, args, kwargs, given, scope)
            except Misjudged as error:
                training, self.recomputes = training or error.gradients, self.recomputes or not error.gradients
            except StaysHome as error:
                self.homes.keep_home(error, given_cache)
            except KeysLost as error:
                self.homes.lose(given_cache, error)
            except FailedWithout as failed:
                assert given_cache is not None
                with self.homes.all_home(given_cache, failed.error):
                    return self.run(owner, enter, args, kwargs, compiled=compiled)
        raise RuntimeError("fa_pool: keys on the pool are lost again and again; see stats()['events']")

    def _decided(
        self, owner: Any, enter: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any],
        given: dict[str, Any], scope: Scope,
    ) -> Any:  # fmt: skip
        """A forward as it was decided. Raises Misjudged, KeysLost, StaysHome or FailedWithout: all is as before."""
        cache, rewind = scope.cache, None
        mine = cache if isinstance(cache, PooledCache) else None
        before, completed = SCOPE.set(scope), False
        try:
            if mine is not None:
                self.homes.prepare(mine, scope)
            if cache is not given.get("past_key_values"):
                args, kwargs = with_cache(owner, args, kwargs, cache)
            # What is compiled inside was traced without a pool.
            eager = scope.decided.pooled and is_compiled(owner)
            rewind = Rewind(scope) if scope.decided.pooled or mine is not None else None
            start = mine.get_seq_length() if mine is not None else 0
            watching = self.homes.watching(owner, mine)
            with torch.compiler.set_stance("force_eager") if eager else nullcontext(), watching as odd:
                try:
                    output = self._inside(owner, enter, args, kwargs, scope)
                    if scope.owning and mine is not None:
                        self.homes.complete(mine)
                except CannotPool as error:
                    assert rewind is not None
                    rewind()
                    self.never = str(error) if error.ever else self.never
                    if not scope.decided.abandoned:
                        scope.decided.abandon(str(error))
                    scope = replace(scope, owning=False)
                    SCOPE.set(scope)
                    if mine is not None:
                        self.homes.prepare(mine, scope)
                    output = self._inside(owner, enter, args, kwargs, scope)
            completed = True
            if mine is not None:
                self.homes.note(owner, mine, given, start, scope, odd)
            return output
        except BaseException as error:
            if rewind is not None:
                # Layers are at different lengths, and keys may be with owners.
                rewind(random=scope.owning or isinstance(error, Misjudged))
            if scope.owning:
                self.homes.explain(error, owner, mine, scope)
            raise
        finally:
            SCOPE.reset(before)
            if mine is not None:
                mine.state.owning = mine.state.under_way = False
            self.manager.end(scope.decided, completed=completed)

    def _decide(
        self, owner: Any, given: dict[str, Any], tokens: Tensor, compiled: bool, nested: bool, training: bool
    ) -> Scope:
        cache, mask = given.get("past_key_values"), given.get("attention_mask")
        decoder = decoder_of(owner)
        grads = torch.is_grad_enabled() and (tokens.requires_grad or any(p.requires_grad for p in owner.parameters()))
        training = training or grads or owner.training
        traced, caching = traced_reason(tokens), wants_cache(owner, decoder, given)
        if cache is None and self.makes_cache and caching and not (training or traced):
            cache = self.homes.new_cache(owner.config.get_text_config(decoder=True), SequenceState())
        state = cache.state if isinstance(cache, PooledCache) else SequenceState()
        batch, new = tokens.shape[:2]
        past = past_columns(cache, mask, new)
        if isinstance(cache, PooledCache):
            cache.refuse_blank(mask, past)
        # As transformers does, which looks for documents where it has neither mask nor cache.
        one_row = cache is None and mask is None and not caching and batch == 1
        documents = documents_in(decoder, given, new) if one_row else ()
        columns = max(documents, default=past + new)
        in_prompt = columns <= state.prompt_columns
        phase: Phase = "prefill" if past == 0 or in_prompt or new > self.manager.config.kv_block else "decode"
        phase = "training" if training else phase
        again = runs_again(owner, training=training, shown=self.recomputes)
        one_block = "decode" if phase == "decode" else self.one_block
        # Looking at all modules is for forwards that may be pooled.
        if one_block is None and columns > self.manager.threshold:
            one_block = self._one_block(owner, decoder, given, training=training, again=again)
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
            must_be_local=traced
            or (NESTED if nested else None)
            or self._local_reason(owner, given, cache, training=training, long=columns > self.manager.threshold),
            lasting=cache is not None or training,
            one_block=one_block,
            profiler=self.profiler(owner),
            device=tokens.device,
        )
        if training and decided.pooled:
            decided = decided.in_graph(self.manager.watch)
        if decided.pooled and isinstance(cache, PooledCache):
            cache.reserve(max(state.capacity, round_up(columns, self.manager.config.kv_block)))
        owning = decided.pooled and not training and not documents and isinstance(cache, PooledCache)
        owning = owning and bool(self.homes.ownable)
        return Scope(
            self.manager,
            decided,
            cache,
            documents,
            owning=owning,
            last_only=owning and owner is not decoder and wants_last_only(owner, given),
            recomputed=again,
            grads=torch.is_grad_enabled(),
        )

    def _one_block(
        self, owner: Any, decoder: Any, given: dict[str, Any], *, training: bool, again: bool = False
    ) -> str | None:
        """Why a long forward cannot be cut; None if it can."""
        reason = self.one_block or one_block_reason(owner, given, training=training, again=again)
        reason = reason or (hook_reason(decoder) if decoder is not None else None)
        return reason or untried_reason(decoder, training=training, base_ranks=self.manager.base_ranks)

    def _local_reason(self, owner: Any, given: dict[str, Any], cache: Any, *, training: bool, long: bool) -> str | None:
        """Why a forward is local, whatever its length."""
        if training and cache is not None:
            return "gradients through a cache: pass none while training, or decode under torch.no_grad()"
        if owner.training and (rate := attention_dropout(owner)):
            return f"attention dropout {rate:g}: its random numbers are the model's own; set it to 0 to train pooled"
        if asked(owner, given, "output_attentions"):
            return "output_attentions: pool ranks return no attention weights; ask for none"
        if cache is not None and not isinstance(cache, PooledCache):
            return f"a cache of type {type(cache).__name__} is not pooled: pass none, and get the plugin's"
        if self.never is not None:
            return self.never
        if not self.full_layers:
            return "no layer has full attention: load the model without fa_pool"
        return changed_reason(owner, self.manager) if long else None

    def _inside(self, owner: Any, enter: Callable[..., Any], args: Any, kwargs: dict[str, Any], scope: Scope) -> Any:
        scope.under_way.append(owner.fapool_depth)
        try:
            return self._entered(owner, enter, args, kwargs, scope)
        finally:
            scope.under_way.pop()

    def _entered(self, owner: Any, enter: Callable[..., Any], args: Any, kwargs: dict[str, Any], scope: Scope) -> Any:
        decided, began = scope.decided, self.manager.clock.now()
        wave = self.homes.wave(owner, scope) if owner.fapool_in_rounds else None
        given = by_name(owner, args, kwargs)
        if wave is not None and (reason := self._one_block(owner, owner, given, training=False)):
            self.manager.counters.not_overlapped(reason)
            wave = None
        if owner.fapool_in_rounds and (turns := self.homes.turns(owner, given, scope)) > 1:
            output = run_turns(owner, enter, given, scope, turns)
        elif not owner.fapool_in_rounds or (decided.blocks == 1 and wave is None):
            output = enter(*args, **kwargs)
        else:
            output = self._in_pieces(owner, enter, args, kwargs, scope, wave)
        if owner.fapool_in_rounds and decided.phase == "prefill":
            # A head over every position, and a loss, are not the plan's.
            decided.took = began, self.manager.clock.now()
        return output

    def _in_pieces(
        self, owner: Any, enter: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], scope: Scope,
        wave: Wave | None,
    ) -> Any:  # fmt: skip
        """A decoder's forward, cut if nothing speaks against it."""
        decided, given = scope.decided, by_name(owner, args, kwargs)
        rows = decided.phase == "training" and decided.geometry is not None and len(decided.geometry.starts) > 1
        reason = collector_reason() or not_in_pieces(owner, given, scope, rows=rows)
        reason = reason or self._shown(owner, enter, given, scope, rows)
        if not reason:
            try:
                if rows:
                    return run_parts(owner, enter, given, scope)
                return run_blocks(owner, enter, given, scope, self._keys(owner, given, scope), wave=wave)
            except CannotPool as error:
                if scope.owning:
                    raise  # keys of before are away
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
        now = values(owner)
        known = self.probe.knows(key, now)
        if manager.base_ranks > 1:
            # Trials of base ranks that share a model belong together, as all that they compute.
            known = bool(manager.agree((int(known), 0))[0])
        verdict = self.probe.verdicts.get(key, "")
        if not known:
            began = time.perf_counter()
            verdict = self.probe.run(key, now, owner, enter, given, scope)
            decided.apart_s = time.perf_counter() - began  # on a device, too: what it finds is looked at here
        if manager.base_ranks > 1:
            agreed = bool(manager.agree((int(not verdict), 0))[0])
            verdict = verdict if agreed or verdict else "another base rank's trial differs"
        if verdict:
            return f"a trial showed that pieces differ from the whole: {verdict}"
        return beyond_trial(owner, LENGTH, geometry, self.probe.windows.get(key, ()))
