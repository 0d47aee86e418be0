"""Hugging Face: a cache's keys, where the next forward looks for them: with their owners, or here.

What an owner took with it is computed once more from what forwards were given, over the ranks that are left:

    forward ─ KeysLost ─▶ all layers go back ─▶ recorded inputs fill another cache ─▶ its keys taken ─▶ forward

Knows caches and forwards' decisions; not how a forward is computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fapool_plugin.base.admission import PoolMemoryError
from fapool_plugin.base.forward import Misjudged, StaysHome
from fapool_plugin.base.owned import FailedWithout, KeysLost, NoRoom
from fapool_plugin.base.record import Record, autocast_of
from fapool_plugin.base.recovery import agreed_loss, check_complete, known_loss, no_room, replaying
from fapool_plugin.base.resource_manager import ResourceManager
from fapool_plugin.base.sequence import SequenceState
from fapool_plugin.base.unrecorded import unseen, watched
from fapool_plugin.config import MIB
from fapool_plugin.integrations.huggingface.arguments import making_keys, once_more
from fapool_plugin.integrations.huggingface.attention import Scope
from fapool_plugin.integrations.huggingface.blocks import Wave, collector_reason
from fapool_plugin.integrations.huggingface.cache import PooledCache
from fapool_plugin.integrations.huggingface.config_view import local_name
from fapool_plugin.integrations.huggingface.failures import is_of_a_hook, is_out_of_memory, let_go
from fapool_plugin.integrations.huggingface.pieces import hook_reason, is_own_hook, is_surveyed, is_surveyed_alone
from fapool_plugin.observe.available_memory import left_for_job, left_for_process
from fapool_plugin.plan.line import GRANULE
from fapool_plugin.wire.link import first_line


@dataclass
class Homes:
    """Of one model's caches.

    Args:
        manager: has the ranks.
        ownable: layers whose keys may live on the pool; none, unless the configuration asks for it.
        joins: whether inputs of forwards may be joined to one.
    """

    manager: ResourceManager
    ownable: frozenset[int] = frozenset()
    joins: bool = False

    def new_cache(self, config: Any, state: SequenceState) -> PooledCache:
        """A cache whose keys may live on the pool, if they are to."""
        record = Record(joins=self.joins) if self.ownable else None
        return PooledCache(config, self.manager, state, self.ownable, record)

    def prepare(self, cache: PooledCache, scope: Scope) -> None:
        """Before a forward. Raises KeysLost."""
        owned, geometry = cache.state.owned, scope.decided.geometry
        moved = owned is not None and geometry is not None and owned.geometry.starts != geometry.starts
        uneven = cache.uneven() if scope.owning else []
        for layer in uneven:
            layer.ownable = False
        all_home = owned is not None and (not scope.owning or moved or not cache.get_seq_length())
        if all_home or (owned is not None and uneven):
            lost = ""
            try:
                if all_home:
                    cache.come_home()
                for layer in uneven:
                    layer.come_home()
            except KeysLost as error:
                lost = str(error)
            if lost := agreed_loss(self.manager, lost):
                cache.state.owned = owned
                raise KeysLost(lost)
            if all_home and scope.decided.ranks:
                # Another sequence for them now, and the forward has begun as the old one, with which the lease ended.
                self.manager.leases.sequences.add(cache.state.id)
        if cache.state.owned is not None:
            cache.state.owned.full = ""  # it may have been cut since
            rows, mine = (len(x.starts) if x is not None else 0 for x in (geometry, cache.state.owned.geometry))
            if rows != mine:
                raise ValueError(f"a cache of {mine} rows is given tokens of {rows}: go on with all rows of its batch")
        cache.watch()
        cache.state.edited = cache.state.edited and bool(cache.get_seq_length())
        cache.state.owning, cache.state.under_way = scope.owning, True
        cache.state.recorded = scope.decided.phase == "training"

    def watching(self, owner: Any, cache: PooledCache | None) -> AbstractContextManager[list[str]]:
        """Within it a forward of a cache is made; what it did that its inputs do not tell is in the list afterwards."""
        if cache is None or cache.record is None:
            return nullcontext([])
        return watched(owner, is_own_hook, is_surveyed_alone)

    def note(
        self, owner: Any, cache: PooledCache, given: dict[str, Any], start: int, scope: Scope, odd: list[str]
    ) -> None:
        """A forward of a cache is complete."""
        if scope.decided.is_pooled and scope.decided.geometry is not None:
            # transformers' sdpa attention is 0 as well where a query sees nothing.
            left = local_name(owner.config.get_text_config(decoder=True)) != "sdpa"
            cache.leave_blank(scope.decided.geometry, left=left)
        if cache.record is not None:
            odd_one = next(iter(odd), "")
            cache.record.add(owner, making_keys(given), start, cache.get_seq_length(), away=scope.owning, odd=odd_one)

    def complete(self, cache: PooledCache) -> None:
        """At the end of a forward whose keys go to owners: all base ranks have theirs, or none goes on.

        Raises KeysLost, NoRoom, or StaysHome if keys did not reach their owners.
        """
        check_complete(self.manager, cache.state.owned)
        cache.settle()

    def wave(self, decoder: Any, scope: Scope) -> Wave | None:
        """The blocks of a prompt whose activations are more than ``wave_mib``; None: they are not."""
        geometry = scope.decided.geometry
        if not scope.owning or geometry is None or geometry.columns - geometry.q_column == 1:
            return None
        config, hidden = decoder.config.get_text_config(decoder=True), decoder.get_input_embeddings().weight.shape[1]
        wide = getattr(config, "intermediate_size", None) or 4 * hidden
        # Each block in flight has hidden states, q, k, v and out of a layer; one of them is in an FFN.
        ffn = 3 * (wide if isinstance(wide, int) else max(wide))
        elements = self.manager.config.wave_mib * MIB // (decoder.dtype.itemsize * len(geometry.starts))
        most, new = scope.decided.blocks, geometry.columns - geometry.q_column
        if new <= most * (elements // (6 * hidden * most + ffn)):
            return None
        flight = min(2, most)
        columns = elements // (6 * hidden * flight + ffn)
        return Wave(flight, max(1, columns // GRANULE * GRANULE or columns))

    def turns(self, decoder: Any, given: dict[str, Any], scope: Scope) -> int:
        """Parts of a decode step that take turns; 1: none do."""
        cache, decided, mask = scope.cache, scope.decided, given.get("attention_mask")
        geometry, step = decided.geometry, decided.phase == "decode" and scope.owning
        plain = mask is None or (isinstance(mask, Tensor) and mask.ndim == 2)
        if not step or geometry is None or not plain or not isinstance(cache, PooledCache) or cache.state.owned is None:
            return 1
        if self.manager.base_ranks > 1 and self.manager.config.turns is None:
            return 1  # profiles of base ranks differ
        owned = cache.state.owned
        turns = self.manager.advisor.turns(geometry, len(owned.holders), owned.base_share)
        if turns == 1 or not cache.may_take_turns or collector_reason():
            return 1
        # Tests have tried that rows of these models know nothing of each other.
        if not is_surveyed(decoder) or hook_reason(decoder):
            return 1
        return turns

    def keep_home(self, error: StaysHome, cache: PooledCache | None) -> None:
        """A layer's keys stay with the base from now on, in this cache and in those to come."""
        self.ownable -= {error.layer}
        self.manager.counters.log("home", str(error))
        if cache is not None:
            try:
                cache.keep_home(error.layer)
            except KeysLost as lost:
                self.lose(cache, lost)

    @contextmanager
    def all_home(self, cache: PooledCache, error: Exception) -> Iterator[None]:
        """A forward once more with all keys here. If it succeeds this is how the model's are made from now on; if not,
        ``error`` had another reason, and is raised."""
        ownable, layers = self.ownable, [layer for layer in cache.pooled_layers if layer.ownable]
        try:
            cache.come_home()
        except KeysLost as lost:
            self.lose(cache, lost)
            raise error from None
        except (RuntimeError, MemoryError) as full:
            # Layers that are here by now are dealt anew by the next forward.
            raise (error if is_out_of_memory(full) else full) from None
        rewind, self.ownable = cache.rewinder(), frozenset()
        for layer in layers:
            layer.ownable = False
        try:
            yield
        except Exception:
            rewind()
            self.ownable = ownable
            for layer in layers:
                layer.ownable = True
            raise error from None
        self.manager.counters.log("home", f"this model needs all keys here: {first_line(error)}")

    def lose(self, cache: PooledCache | None, error: KeysLost) -> None:
        """Keys of a cache are lost: they are computed once more before its next forward."""
        if cache is not None and cache.state.owned is not None:
            cache.state.owned.broken = cache.state.owned.broken or str(error)

    def recover(self, cache: PooledCache) -> None:
        """Computes a cache's keys once more, if they are lost for any base rank."""
        if cache.manager is not self.manager:
            self._take_over(cache)
        owned, manager = cache.state.owned, self.manager
        if owned is None:
            return
        if not (gone := known_loss(manager, owned)):
            return
        past = cache.get_seq_length()
        if not past:
            cache.start_anew()
            return
        assert cache.record is not None
        owner = cache.record.owner(edited=cache.state.edited)
        scratch = self.new_cache(owner.config.get_text_config(decoder=True), cache.state.anew())
        with replaying(manager, owned, past, gone), unseen(owner, is_own_hook):
            for given in cache.record.forwards(past):
                with autocast_of(given), torch.no_grad():
                    owner(**once_more(owner, given, scratch))
            cache.adopt(scratch)

    def _take_over(self, cache: PooledCache) -> None:
        """Another model's cache, or one that was pickled, is ours to go on with."""
        try:
            cache.move_to(self.manager)
        except KeysLost as lost:
            raise RuntimeError(
                f"fa_pool: keys of this cache were with another model's pool, and are lost ({lost}): begin this "
                "sequence again, with a new cache"
            ) from None

    def explain(self, error: BaseException, owner: Any, cache: PooledCache | None, scope: Scope) -> None:
        """Raises what is to be known in place of an error of a forward that was given new keys only, once all layers
        have gone back, if that is not the error itself.

        It is raised here so that no frame has it in a name of its own: that would keep the frame, and with it keys.
        """
        if isinstance(error, PoolMemoryError | KeysLost | Misjudged | StaysHome) or not isinstance(error, Exception):
            return
        if isinstance(error, NoRoom) or is_out_of_memory(error):
            raise self._refusal(error, scope) from None
        if cache is not None and cache.get_seq_length() and not is_of_a_hook(error, owner):
            raise FailedWithout(error) from None

    def _refusal(self, error: Exception, scope: Scope) -> PoolMemoryError:
        """What a user is told of keys, or a forward, that memory does not suffice for."""
        config, geometry = self.manager.config, scope.decided.geometry
        rows, columns = (len(geometry.starts), geometry.columns) if geometry is not None else (0, 0)
        if isinstance(error, NoRoom):
            return no_room(error, config, columns)
        told = first_line(error)
        let_go(error)
        return PoolMemoryError(
            f"fa_pool: the base's memory ended in a forward of {rows} sequence{'s' * (rows != 1)} of {columns} tokens "
            f"({told}); {min(left_for_job(), left_for_process()) / MIB:.0f} MiB are free now that it is undone, "
            f"wave_mib is {config.wave_mib} and base_share {config.base_share}: give the base a smaller share (0: no "
            "keys) or wave_mib, raise its limit, or give fewer sequences; the cache is as it was before this forward"
        )
