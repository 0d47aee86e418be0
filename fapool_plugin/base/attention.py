"""One attention call of one layer: pool ranks are asked, the base computes its share, all parts are merged.

Whatever a rank does not deliver is computed here, so a call always returns the exact result. What is asked is in
asking, the loop around it in requests, the result in result. Knows no model framework; how a forward was decided is
given to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fapool_plugin.base.admission import place_keys
from fapool_plugin.base.asking import AttentionRequests
from fapool_plugin.base.autograd import with_gradients, without_autocast
from fapool_plugin.base.forward import Forward
from fapool_plugin.base.gradients import Shares
from fapool_plugin.base.kept_calls import keeping_step
from fapool_plugin.base.owned import OwnedKeys
from fapool_plugin.base.requests import Requests
from fapool_plugin.base.resource_manager import ResourceManager
from fapool_plugin.base.result import Result
from fapool_plugin.observe.timeline import ATTENTION, LINEAR, MERGE, SEND
from fapool_plugin.plan.line import Tile


class FAPoolAttention(nn.Module):
    """Stands in for standard attention in one layer; has no parameters.

    Args:
        manager: decides and counts; shared by all layers of a model.
        layer: the layer's number.
        layers: attention layers in the model.
        stands_for: the host's name for the attention of calls that are not pooled.
    """

    def __init__(self, manager: ResourceManager, layer: int, layers: int, stands_for: str) -> None:
        super().__init__()
        self.manager, self.layer, self.layers, self.stands_for = manager, layer, layers, stands_for
        self.bypassed = False
        """Whether the host was seen to compute this layer's attention without it."""

    def extra_repr(self) -> str:
        config = self.manager.config
        return f"pool_ranks={config.pool_ranks}, threshold={config.threshold}, stands_for={self.stands_for!r}"

    def forward(
        self,
        q_BHSD: Tensor,
        k_BKTD: Tensor,
        v_BKTE: Tensor,
        *,
        decided: Forward,
        local: Callable[[], Any] | None = None,
        resident: bool = False,
        owned: bool = False,
        softmax_scale: float = 1.0,
        softcap: float = 0.0,
        sinks_H: Tensor | None = None,
    ) -> Any:
        """Causal attention of the new queries against all keys.

        Args:
            q_BHSD: new queries, heads first as models hand them over; any strides.
            k_BKTD: keys, the past included.
            v_BKTE: values, the past included.
            decided: this forward's decision.
            local: what the model would do without the plugin; its result is returned as it is when the forward is
                local. None: the layer takes part in a pooled forward.
            resident: whether the keys live in the sequence's storage, so that pool ranks may keep them.
            softmax_scale: factor of the scores.
            softcap: tanh cap of the scores, 0 for none.
            sinks_H: attention sinks' logits, one per query head.

        Returns:
            (B, S, H, E) contiguous, in q's dtype; 0 at padded queries.
        """
        if local is not None:
            decided.counters.phase(decided.phase).local_calls += 1
            return local()
        self.manager.grow(decided)
        call = _Call(self, decided, q_BHSD, k_BKTD, v_BKTE, resident, softmax_scale, softcap, owned)
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q_BHSD, k_BKTD, v_BKTE)):
            return with_gradients(call, sinks_H)
        with without_autocast(q_BHSD):
            call.post()
        if decided.hand_over is not None:
            decided.hand_over()
        with without_autocast(q_BHSD):
            return call.finish(sinks_H)[0]


class _Call:
    """What is under way between asking and waiting."""

    def __init__(
        self, module: FAPoolAttention, decided: Forward, q: Tensor, k: Tensor, v: Tensor, resident: bool, scale: float,
        softcap: float, owned: bool,
    ) -> None:  # fmt: skip
        if decided.geometry is None or decided.sequence is None:
            raise ValueError("a pooled forward needs a geometry and a sequence")
        self.decided, self.module, self.manager, self.sequence = decided, module, module.manager, decided.sequence
        self.q, self.k, self.v = q, k, v
        self.result = Result(q, k, v, decided.geometry, scale, softcap)
        resident = resident and decided.lasting
        if resident:
            self.sequence.send_as(module.layer, k.dtype, v.dtype)
        keeping = None
        if decided.keeps_calls and not resident:
            keeping = keeping_step(self.sequence.kept, module.layer, decided.hand_over is not None, q, k, v)
        self.owned = place_keys(decided, self.manager, k, v, module.layers) if owned else None
        self.asking = AttentionRequests(
            self.manager, decided, self.sequence, module.layer, self.result, resident, keeping, self.owned
        )
        self.requests = Requests(self.manager)
        self._mine: list[Tile] = []

    def post(self) -> None:
        """Asks the pool ranks for their shares, and computes the base's."""
        self.manager.timeline.switch(SEND)
        if self.owned is not None:
            self._post_to_owners(self.owned)
            return
        position = (self.k.shape[3] + self.v.shape[3]) * self.k.element_size()
        plan = self.decided.plan(self.k.shape[1], position, self.module.layers)
        self.result.disjoint = plan.axis == "queries"
        requests, mine, columns = self.asking.shared_out(plan)
        if launched := self.requests.stage(self.asking, requests):
            self.manager.timeline.switch(ATTENTION)
            self.result.compute_in_columns(columns)
            self.manager.timeline.switch(SEND)
        given_back = self.requests.post(self.asking, requests)
        self._mine = mine + given_back
        self.manager.timeline.switch(ATTENTION)
        self.result.compute_in_columns([] if launched else columns)
        self.result.compute(given_back)
        self.manager.timeline.switch(LINEAR)

    def _post_to_owners(self, owned: OwnedKeys) -> None:
        """Asks the owners of keys, the base among them."""
        self.result.disjoint = owned.owners.disjoint
        requests, mine = self.asking.of_owners(owned)
        at_once = self.manager.base_ranks == 1
        if launched := self.requests.stage(self.asking, requests):
            self.manager.timeline.switch(ATTENTION)
            owned.compute(mine, self.module.layer, self.result, at_once=at_once)
            self.manager.timeline.switch(SEND)
        self.requests.post(self.asking, requests)
        ranks = self.manager.ranks
        for request in requests:
            while request.call is None and (other := owned.instead_of(request.rank, request.notes.owner, ranks)):
                request.rank = other
                self.requests.again(self.asking, request)
            if request.call is None and request.above is None:
                owned.give_up("an owner could not be asked", at_once=at_once)
        self.asking.copy_to_peers(requests, owned)
        self.manager.timeline.switch(ATTENTION)
        owned.compute([] if launched else mine, self.module.layer, self.result, at_once=at_once)
        owned.sent(self.module.layer, self.result.geometry, self.k, self.v)
        self.manager.timeline.switch(LINEAR)

    def finish(self, sinks_H: Tensor | None) -> tuple[Tensor, Tensor]:
        """(out, lse) with the pool ranks' parts and with sinks; out contiguous, in q's dtype."""
        pooled = self.requests.wait(self.asking, self._compute)
        self.manager.timeline.switch(MERGE)
        final = self.result.final(sinks_H)
        self.manager.timeline.switch(LINEAR)
        counters = self.decided.counters.phase(self.decided.phase)
        counters.pooled_calls += pooled
        counters.local_calls += not pooled
        return final

    def shares(self) -> Shares:
        """Who computed what, for the call's backward."""
        result = self.result
        return Shares(
            self.manager, result.geometry, self.decided.keeper, self.sequence, self.module.layer,
            result.softmax_scale, result.softcap, self._mine, self.requests.tiles_asked(),
            {one.rank.number: (one.rank.key, one.kept) for one in self.requests.asked if one.kept},
        )  # fmt: skip

    def _compute(self, tiles: Iterable[Tile]) -> None:
        if self.owned is not None:  # keys are lost, and this forward's result with them
            return
        self.manager.timeline.switch(ATTENTION)
        self.result.compute(tiles)
