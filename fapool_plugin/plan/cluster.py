"""A cluster's profile: what one rank of a base of GPUs takes beside a pool of GPUs, for the planner that also runs.

The base is b GPUs that share each layer's heads and FFN (tensor parallelism, two all-reduces a layer); all take the
same time, so one of them is planned. It gives part of its own heads' attention to each of p pool ranks. A pool rank
works for b base ranks in turn, so it is 1/b as fast for each.

    base rank   1 .. b   each to p pool ranks:   its NIC carries p messages at a time
    pool rank   1 .. p   each from b base ranks: its NIC carries b of them (incast)

Flows share NICs fairly, so a flow has 1 / max(p, b) of a link; between leaf switches less, by the oversubscription.
Collisions inside a fabric, lost packets and Python are not known here; ``ask_s`` is the place for the latter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any

from fapool_plugin.plan.clocks import Cores, Prefill, Way
from fapool_plugin.plan.forecast import choose_decode, choose_prefill, first_length
from fapool_plugin.plan.hardware import ELEMENT_BYTES, Cost, Hardware, Kind, Link
from fapool_plugin.plan.line import Row
from fapool_plugin.plan.profile import AttentionCost, CallCost, Fit, LinearCost, LinkCost, Machine, Profile, Shape
from fapool_plugin.plan.shares import MOST_BLOCKS
from fapool_plugin.plan.step import Decode, turns_s

_BASE, _RANK = 2, 1
"""Numbers of "threads" in the profile: here they only tell a base rank's attention from a pool rank's."""
_CORES = Cores(_BASE, _RANK, spare=1 << 30)
"""Ranks have devices of their own: none takes from the base."""
_HELD = 1 << 62
"""Keys are where they are needed."""
_SHARES = 50


@dataclass(frozen=True)
class Model:
    """A decoder with equal layers, by its numbers; ``gated``: the FFN has three matrices, not two."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    gated: bool

    @property
    def parameters(self) -> int:
        """Of all matrices; embedding and head are not tied."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        ffn = self.hidden * self.intermediate * (3 if self.gated else 2)
        return self.layers * (attention + ffn) + 2 * self.vocab * self.hidden


@dataclass(frozen=True)
class Pooled:
    """The best way found for one forward with so many pool ranks."""

    seconds: float
    whole_s: float
    """The batch in one part (decode); a prompt has one."""
    base_share: float
    blocks: int
    """Blocks of a prompt in flight, or parts of a batch in turns."""


@dataclass(frozen=True)
class Cluster:
    """A base of ``base`` GPUs, and the link that pool ranks have with it.

    Raises:
        ValueError: heads or FFN cannot be shared by so many ranks, or there is no such link or table.
    """

    hardware: Hardware
    model: Model
    base: int
    link: str
    ask_s: float = 0.0
    """What asking one pool rank costs the base, beside bytes."""
    oversubscription: float = 1.0
    """How many NICs share one link out of a leaf switch: flows between leaves get so much less when all send."""
    _linear: dict[tuple[float, float, int], tuple[float, float]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        model = self.model
        uneven = [name for name in ("heads", "intermediate") if getattr(model, name) % self.base]
        if uneven or (model.kv_heads % self.base and self.base % model.kv_heads):
            raise ValueError(
                f"{model.heads} heads, {model.kv_heads} KV heads and an FFN of {model.intermediate} cannot be shared "
                f"by {self.base} base ranks; give a number that divides them"
            )
        if self.link not in self.hardware.links:
            known = ", ".join(self.hardware.links)
            raise ValueError(f"{self.hardware.name} has no link {self.link!r}; give one of {known}")
        if not 1 <= self.oversubscription < inf:
            raise ValueError(f"an oversubscription of {self.oversubscription} is none; give 1 or more")
        self.hardware.all_reduce_s(self.base, 1)

    @property
    def wire(self) -> Link:
        """As fast as it is between leaves, if there is oversubscription."""
        link = self.hardware.links[self.link]
        return link.model_copy(update={"bytes_per_s": link.bytes_per_s / self.oversubscription})

    def shape(self, gpus: int | None = None) -> Shape:
        """One base rank's part of the model. Fewer KV heads than ranks are copied."""
        model, ranks = self.model, gpus or self.base
        return Shape(
            hidden=model.hidden,
            layers=model.layers,
            heads=model.heads // ranks,
            kv_heads=max(1, model.kv_heads // ranks),
            head_dim=model.head_dim,
            v_head_dim=model.head_dim,
            dtype="bfloat16",
            parameters=model.parameters // ranks,
        )

    def linear_s(self, tokens: float, sequences: float, gpus: int | None = None, products: float = 1.0) -> float:
        """All layers without attention, and the head for one position of each sequence. ``products``: how often what
        is multiplied and moved is, a backward pass twice; all-reduces are two a layer either way."""
        ranks = gpus or self.base
        key = tokens, sequences, ranks
        if key not in self._linear:
            model, gpu, shape = self.model, self.hardware, self.shape(ranks)
            width, ffn = shape.heads * model.head_dim, model.intermediate // ranks
            qkv = width + 2 * shape.kv_heads * model.head_dim
            first = 2 * ffn if model.gated else ffn
            sides = ((qkv, model.hidden), (model.hidden, width), (first, model.hidden), (model.hidden, ffn))
            layer = sum(gpu.gemm_s(tokens, n, k) for n, k in sides)
            # Two norms with their residual, rotary embedding of q and k, activation: numbers read and written.
            moved = (4 * model.hidden, 4 * model.hidden, 2 * qkv, first + ffn)
            layer += sum(gpu.moving_s(tokens * numbers * ELEMENT_BYTES) for numbers in moved)
            head = gpu.gemm_s(sequences, model.vocab / ranks, model.hidden)
            reduced = 2 * gpu.all_reduce_s(ranks, tokens * model.hidden * ELEMENT_BYTES)
            self._linear[key] = model.layers * layer + head, model.layers * reduced
        computed, reduced = self._linear[key]
        return products * computed + reduced

    def attention(self, kind: Kind, batch: float, tokens: float, gpus: int | None = None) -> Cost:
        """One layer's attention of one base rank's heads, for lengths about ``tokens``."""
        shape = self.shape(gpus)
        return self.hardware.attention_cost(kind, shape.heads, shape.kv_heads, shape.head_dim, batch, tokens)

    def profile(self, kind: Kind, batch: int, tokens: int, ranks: int, gpus: int | None = None) -> Profile:
        """The planner's profile of one base rank and ``ranks`` pool ranks, for forwards of about this size.

        Tables have steps, fits have none: all goes through this size and half of it.
        """
        base, shape = gpus or self.base, self.shape(gpus)
        sequences = 1 if kind == "prefill" else batch
        new = batch * tokens if kind == "prefill" else batch
        line = _secant(new, self.linear_s(new, sequences, base), self.linear_s(new / 2, sequences / 2, base))
        # A request of one base rank is a part of its lanes, and a kernel is slower on few of them.
        asked = max(1.0, batch / (base + ranks))
        costs = [(who, self.attention(kind, rows, tokens, base)) for who, rows in ((_BASE, batch), (_RANK, asked))]
        group = shape.heads // shape.kv_heads
        # A step sends new keys and values with its queries; in a prompt they are counted by the planner.
        with_keys = 1 + 2 / group if kind == "decode" else 1.0
        a_byte = max(ranks, base) / self.wire.bytes_per_s
        return Profile(
            date=self.hardware.date,
            quick=False,
            machine=Machine(processor=self.hardware.device, cores=1 << 30, torch="", fapool=""),
            shape=shape,
            attention=tuple(
                AttentionCost(kernel="", dtype=shape.dtype, threads=who, prefill=fit, decode=fit)
                for who, cost in costs
                for fit in [Fit(a=cost.a, b=cost.b, c=cost.c)]
            ),
            linear=(LinearCost(threads=_BASE, prefill=line, decode=line),),
            link=LinkCost(
                to_rank=Fit(a=self.wire.latency_s, b=a_byte * with_keys), to_base=Fit(a=self.wire.latency_s, b=a_byte)
            ),
            # Before a base rank's request those of all others are computed, each a call.
            call=CallCost(ask_s=self.ask_s, rank_s=(base - 1) * costs[1][1].a),
            activation_s=0.0,
        )

    def alone_s(self, kind: Kind, batch: int, tokens: int, gpus: int | None = None) -> float:
        """Seconds of a forward on base ranks alone: one prompt of so many tokens each, or one step."""
        return _forward(self.profile(kind, batch, tokens, 0, gpus), kind, batch, tokens).alone_s

    def pooled(self, kind: Kind, batch: int, tokens: int, ranks: int) -> Pooled:
        """The best way that uses all of ``ranks`` pool ranks."""
        profile = self.profile(kind, batch, tokens, ranks)
        slow: dict[str, Any] = {"ranks": ranks, "fewest": ranks, "cores": _CORES, "alone": False}
        slow["slowdown"] = [self.base] * ranks
        if kind == "prefill":
            found = choose_prefill(profile, _rows(kind, batch, tokens), max_blocks=MOST_BLOCKS, **slow)
            return Pooled(found.seconds, found.seconds, found.base_share, found.blocks)
        whole = choose_decode(profile, _rows(kind, batch, tokens), resident=[_HELD] * ranks, **slow)
        best = Pooled(whole.seconds, whole.seconds, whole.base_share, 1)
        if batch < 2:
            return best
        halves = [
            Decode(self.profile(kind, rows, tokens, ranks), _rows(kind, rows, tokens), _CORES, [_HELD] * ranks,
                   slowdown=[self.base] * ranks)
            for rows in (batch - batch // 2, batch // 2)
        ]  # fmt: skip
        for share in (step / _SHARES for step in range(_SHARES)):
            seconds = turns_s(halves, Way(ranks, 1, share))
            if seconds < best.seconds:
                best = Pooled(seconds, whole.seconds, share, 2)
        return best

    def threshold(self, kind: Kind, batch: int, ranks: int, longest: int) -> int | None:
        """The paper's: the smallest length t, in multiples of 64, with Attention_Time(t) > FFN_Time(t) + Overhead(t);
        None: not up to ``longest``. FFN_Time is all but attention, Overhead what the messages of equal shares take."""

        def rules(tokens: int) -> bool:
            alone, new = self.alone_s(kind, batch, tokens), batch * tokens if kind == "prefill" else batch
            linear = self.linear_s(new, 1 if kind == "prefill" else batch)
            link, shape = self.profile(kind, batch, tokens, ranks).link, self.shape()
            numbers = new / (self.base + ranks) * shape.heads * shape.head_dim * ELEMENT_BYTES
            return alone - linear > linear + shape.layers * (link.to_rank.at(numbers) + link.to_base.at(numbers))

        return first_length(rules, longest)


def _forward(profile: Profile, kind: Kind, batch: int, tokens: int) -> Prefill | Decode:
    rows = _rows(kind, batch, tokens)
    return Prefill(profile, rows, _CORES) if kind == "prefill" else Decode(profile, rows, _CORES, ())


def _rows(kind: Kind, batch: int, tokens: int) -> Sequence[Row]:
    return [Row(0 if kind == "prefill" else tokens - 1, tokens, tokens, batch)]


def _secant(n: float, seconds: float, half_s: float) -> Fit:
    """The line through (n, seconds) and (n / 2, half_s), neither falling nor below 0 at 0."""
    slope = min(max(0.0, seconds - half_s) / (n / 2), seconds / n)
    return Fit(a=max(0.0, seconds - slope * n), b=slope)
