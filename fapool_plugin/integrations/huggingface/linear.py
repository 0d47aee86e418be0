"""Hugging Face: a model without its attention, timed.

While it is measured, every layer of full attention answers zeros at once: what is left of the model's own forward is
the linear part. Knows nothing of kernels, links and plans.
"""

from __future__ import annotations

import inspect
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import get_layer_types_and_kwargs
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fapool_plugin.integrations.huggingface.config_view import LOCAL, local_name
from fapool_plugin.integrations.huggingface.entry import EntryModule
from fapool_plugin.integrations.huggingface.supported import FULL_LAYERS, attention_modules, refuse_model, refuse_object
from fapool_plugin.measure.calibrate import REPEATS, Progress, ascend, check_effort, fitted, silent, threads_restored
from fapool_plugin.plan.profile import LinearCost, Shape

NAME = "fapool_calibrate"
"""How the attention and the mask function are registered; transformers looks for "flash" in such names."""

_TOKENS = (64, 256, 1024, 4096)
_QUICK_TOKENS = (64, 384)
_BESIDE = 1024, 5
_QUICK_BESIDE = 256, 3
"""Tokens, and pairs of runs."""
_SEQUENCES = (1, 2, 4, 8, 16)
_QUICK_SEQUENCES = (1, 4)
_FEWEST_CALLS = 3
"""Attention calls that a forward must have seen before it may be broken off: two whole layers between them."""


class _Enough(Exception):
    """The layers seen so far tell what the others will take."""


@dataclass
class _Clock:
    """Times one forward at its calls of full attention.

    Args:
        local: the attention implementation of sliding-window layers, by its name in transformers; None: they answer
            zeros as well, and are not counted.
        limit_s: seconds after which the forward is broken off, once it has seen enough.
    """

    local: str | None
    limit_s: float
    began: float = field(default_factory=lambda: time.perf_counter())
    entered: list[float] = field(default_factory=list)
    left: list[float] = field(default_factory=list)
    seen: tuple[int, int, int, int] = (0, 0, 0, 0)
    """Query heads, KV heads, head dim and V head dim of the first call."""
    softcap: float = 0.0

    def attend(self, query: Tensor, key: Tensor, value: Tensor, softcap: float) -> Tensor:
        """What attention answers. Raises _Enough instead of taking longer."""
        self.entered.append(time.perf_counter())
        if not self.left:
            self.seen = (query.shape[1], key.shape[1], query.shape[3], value.shape[3])
            self.softcap = softcap
        if len(self.entered) >= _FEWEST_CALLS and self.entered[-1] - self.began > self.limit_s:
            raise _Enough
        out_BSHE = _zeros(query, value)
        self.left.append(time.perf_counter())
        return out_BSHE

    def whole_s(self, ended: float) -> float:
        """Seconds of a forward that ended: all but those inside attention calls."""
        return ended - self.began - sum(self.left) + sum(self.entered)

    def extrapolated_s(self, layers: int) -> float:
        """Seconds that a forward of so many layers would have taken: as many as its mean layer each, after what
        comes before the first attention call. The head for one position is left out."""
        between = [entered - left for left, entered in zip(self.left, self.entered[1:], strict=True)]
        return self.entered[0] - self.began + layers * statistics.fmean(between)


_CLOCK: ContextVar[_Clock | None] = ContextVar("fapool_calibrate_clock", default=None)
"""transformers hands masks and attention only its own arguments: the forward they belong to travels beside them."""


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention function: zeros at once, except for sliding-window layers, which are never pooled."""
    clock = _CLOCK.get()
    slides = attention_mask is not None or kwargs.get("sliding_window") is not None
    if clock is not None and not slides:
        return clock.attend(query, key, value, float(kwargs.get("softcap") or 0.0)), None
    if clock is not None and clock.local is None:
        return _zeros(query, value), None
    own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    function = ALL_ATTENTION_FUNCTIONS.get_interface((clock and clock.local) or "sdpa", own)
    return function(module, query, key, value, attention_mask, **kwargs)


def _mask(*args: Any, **kwargs: Any) -> Any:
    """Mask function: none for layers that answer zeros."""
    clock = _CLOCK.get()
    if clock is not None and (kwargs.get("local_size") is None or clock.local is None):
        return None
    return ALL_MASK_ATTENTION_FUNCTIONS[(clock and clock.local) or "sdpa"](*args, **kwargs)


def _zeros(query: Tensor, value: Tensor) -> Tensor:
    """In place of attention's output, (B, S, H, E)."""
    batch, heads, queries, _ = query.shape
    return query.new_zeros(batch, queries, heads, value.shape[3])


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)


class _Model:
    """A model whose attention answers zeros, while ``opened``."""

    def __init__(self, model: Any, layers: int) -> None:
        self.model, self.layers = model, layers
        self.local = local_name(model.config.get_text_config(decoder=True))
        self.vocabulary = model.config.get_text_config(decoder=True).vocab_size
        last_only = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._arguments = {"use_cache": False} | ({"logits_to_keep": 1} if last_only else {})

    @classmethod
    @contextmanager
    def opened(cls, model: Any) -> Iterator[_Model]:
        """Changes the model, and leaves it exactly as it was. Pooled models decide nothing meanwhile."""
        refuse_object(model)
        attentions = list(attention_modules(model))
        refuse_model(model, attentions)
        layers = full_layers(model)
        names = {id(module.config): vars(module.config) for module in attentions}.values()
        before = [values[LOCAL] for values in names]
        training = {module: module.training for module in model.modules()}
        entries = {
            module: module.fapool_forwards
            for module in model.modules()
            if isinstance(module, EntryModule) and module.fapool_forwards is not None
        }
        opened = cls(model, layers)
        try:
            model.eval()
            for module in entries:
                module.fapool_forwards = None
            for values in names:
                values[LOCAL] = NAME
            with threads_restored(), torch.no_grad():
                yield opened
        finally:
            for values, name in zip(names, before, strict=True):
                values[LOCAL] = name
            for module, forwards in entries.items():
                module.fapool_forwards = forwards
            for module, was_training in training.items():
                module.training = was_training

    def timed(self, sequences: int, tokens: int, limit_s: float) -> Callable[[], float]:
        """A function that runs one forward, and returns its seconds without attention. On CUDA the forward is always
        run to its end: there layers are over before they are computed."""
        ids_BS = torch.randint(self.vocabulary, (sequences, tokens), device=self.model.device)
        on_cuda = ids_BS.is_cuda

        def forward() -> float:
            clock = self.run(ids_BS, float("inf") if on_cuda else limit_s, self.local)
            if on_cuda:
                torch.cuda.synchronize()
            if len(clock.left) < len(clock.entered):
                return clock.extrapolated_s(self.layers)
            return clock.whole_s(time.perf_counter())

        return forward

    def run(self, ids_BS: Tensor, limit_s: float, local: str | None) -> _Clock:
        """One forward, or its beginning; see :class:`_Clock`."""
        clock = _Clock(local, limit_s)
        token = _CLOCK.set(clock)
        try:
            # A mask keeps transformers from looking for packed sequences, which the meta device cannot.
            self.model(input_ids=ids_BS, attention_mask=torch.ones_like(ids_BS), **self._arguments)
        except _Enough:
            pass
        finally:
            _CLOCK.reset(token)
        return clock


def full_layers(model: Any) -> int:
    """Layers of full attention. Raises ValueError if there is none."""
    kinds, _ = get_layer_types_and_kwargs(model.config.get_text_config(decoder=True))
    layers = sum(kind in FULL_LAYERS for kind in kinds)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no layer of full attention, only {', '.join(sorted(set(kinds)))}: nothing of "
            "it would be pooled, so there is no profile to measure. Use it without fa_pool"
        )
    return layers


def shape_of(model: Any) -> Shape:
    """What of a model its costs depend on, as its first layer of full attention says it.

    Runs that much of a forward of one token. Weights on the meta device do.

    Raises:
        ValueError: the model cannot be pooled, or no layer has full attention.
    """
    return look(model)[0]


def look(model: Any) -> tuple[Shape, float]:
    """``shape_of`` a model, and the softcap of its scores, 0 for none."""
    with _Model.opened(model) as opened:
        # Nothing is timed, and the first call is enough.
        ids_BS = torch.zeros((1, 1), dtype=torch.int64, device=model.device)
        clock = opened.run(ids_BS, limit_s=0.0, local=None)
    heads, kv_heads, head_dim, v_head_dim = clock.seen
    shape = Shape(
        hidden=model.config.get_text_config(decoder=True).hidden_size,
        layers=opened.layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        v_head_dim=v_head_dim,
        dtype=str(model.dtype).removeprefix("torch."),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )
    return shape, clock.softcap


def measure_linear(
    model: Any,
    threads: Sequence[int],
    budget_s: float,
    progress: Progress = silent,
    *,
    quick: bool = False,
    until: float = math.inf,
) -> tuple[LinearCost, ...]:
    """The model without full attention: prefill of one sequence, and decode steps of one token a sequence.

    Forwards that would take too long are broken off after a few layers and extrapolated to all.

    Args:
        model: pooled or not; left exactly as it was.
        threads: numbers of CPU threads to measure with.
        budget_s: about how long all of it may take, in seconds.
        progress: told after every number of threads.
        quick: at fewer sizes.
        until: by the performance counter, when to be content with what there is.

    Raises:
        ValueError: no threads, no time, or a model that cannot be pooled.
    """
    check_effort(threads, budget_s)
    config, costs = model.config.get_text_config(decoder=True), []
    longest = getattr(config, "max_position_embeddings", None) or max(_TOKENS)
    tokens = sorted({min(size, longest) for size in (_QUICK_TOKENS if quick else _TOKENS)})
    sequences = _QUICK_SEQUENCES if quick else _SEQUENCES
    each_s = budget_s / len(threads) / 2
    # Forwards of every length are broken off at about the same layer, if at all.
    token_s = 0.7 * each_s / sum(tokens) / (REPEATS + 1)
    with _Model.opened(model) as opened:
        for done, count in enumerate(threads):
            progress(f"linear: {count} thread(s)", done, len(threads))
            torch.set_num_threads(count)
            prefill = ascend(
                tokens, lambda size: opened.timed(1, size, token_s * size), each_s, at_least=2, until=until
            )
            # A step is run to its end where that can be: of its time the head is a large part, and a few layers alone
            # would find their weights in the processor's cache.
            decode = ascend(sequences, lambda size: opened.timed(size, 1, each_s), each_s, at_least=2, until=until)
            # One sequence is a product with a vector, two are one with a matrix: no line goes through both.
            fits = fitted(prefill, (0, 1)), fitted(decode, (0, 1), steps=True)
            costs.append(LinearCost(threads=count, prefill=fits[0], decode=fits[1]))
        progress("linear", len(threads), len(threads))
    return tuple(costs)


def measure_beside(
    model: Any,
    busy: Callable[[float], AbstractContextManager[None]],
    *,
    quick: bool = False,
    until: float = math.inf,
) -> float:
    """How much longer the linear part takes, with one thread, while another process of this machine is ``busy`` for
    the seconds that it is told; at least 1.

    Both are timed in turns, over a few layers. On devices of their own they do not meet.
    """
    if model.device.type != "cpu":
        return 1.0
    with _Model.opened(model) as opened:
        torch.set_num_threads(1)
        tokens, pairs = _QUICK_BESIDE if quick else _BESIDE
        timed = opened.timed(1, tokens, limit_s=0.0)
        timed()
        ratios = []
        for pair in range(pairs):
            if pair and time.perf_counter() > until:
                break
            began = time.perf_counter()
            alone_s = timed()
            with busy(time.perf_counter() - began):
                ratios.append(timed() / alone_s)
    return max(1.0, statistics.median(ratios))
