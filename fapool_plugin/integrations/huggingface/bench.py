"""Hugging Face: what a benchmark's contenders do in their turns, a prefill or a few decode steps of one model.

Every maker loads its model, runs once untimed, and returns a function that does the work once and answers
(seconds, logits, facts). What is compared with what is not known here.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, LlamaConfig
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fapool_plugin.base.resource_manager import ResourceManager
from fapool_plugin.base.sequence import SequenceState
from fapool_plugin.integrations.huggingface import FAPoolForCausalLM
from fapool_plugin.integrations.huggingface.cache import PooledCache
from fapool_plugin.integrations.huggingface.runs import _without_bars, demo_prompt, prepare
from fapool_plugin.plan.shares import Geometry

Turn = tuple[float, Tensor | None, dict[str, Any]]
Make = Callable[[], Turn]

_VOCABULARY = 4096
_SEED_TOKENS = 1000
"""A long cache is filled with copies of a prompt of so many tokens."""
_WARM_STEPS = 2


def random_model(folder: Path) -> Path:
    """Saves a small Llama with random weights, the same ones each time, whose sizes every peer can divide by two."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=1 << 20,
        # Large enough that no two logits are alike by accident.
        initializer_range=0.1,
        tie_word_embeddings=False,
    )
    with _without_bars():
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def prompt(model: Path, tokens: int, rows: int = 1, *, is_random: bool) -> list[int]:
    """Token ids of real text, or random ones for the random model, which has no tokenizer. Several rows stand end to
    end, each from a piece of the text.

    Raises ValueError or FileNotFoundError as :func:`prepare` does, and where the text is too short.
    """
    if is_random:
        return torch.randint(_VOCABULARY, (rows * tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    text = demo_prompt()
    ids: list[int] = []
    piece = len(text) // rows
    for row in range(rows):
        part = text[row * piece : (row + 1) * piece]
        job = prepare(str(model), part, max_new_tokens=0, max_prompt_tokens=tokens, dtype="float32", threads=1)
        if len(job.prompt_S) < tokens:
            raise ValueError(
                f"the text has only {len(job.prompt_S)} tokens for each of {rows} row(s); give --tokens of at most that"
            )
        ids += job.prompt_S
    return ids


def plain_prefill(model: str, ids: list[int], warm: int, time_attention: bool = False) -> Make:
    """transformers' sdpa attention and its stock cache, without the plugin."""
    return timed_prefill(plain_model(model), ids, warm, _AttentionClock() if time_attention else None)


def pooled_prefill(model: str, ids: list[int], warm: int, fa_pool: dict[str, Any]) -> Make:
    """The plugin; its pool ranks run already when the first turn comes if ``warm`` is above the threshold."""
    return timed_prefill(_pooled(model, fa_pool), ids, warm)


def plain_decode(model: str, ids: list[int], lengths: list[int], steps: int, time_attention: bool = False) -> Make:
    """Decode steps in transformers' sdpa attention, on its stock cache. Each row has its length, padded on the left."""
    loaded = plain_model(model)
    clock = _AttentionClock() if time_attention else None
    return _decode(loaded, DynamicCache(config=loaded.config), ids, lengths, steps, clock)


def pooled_decode(model: str, ids: list[int], lengths: list[int], steps: int, fa_pool: dict[str, Any]) -> Make:
    """Decode steps with the plugin, on its own cache; pool ranks have got their keys before the first turn."""
    loaded = _pooled(model, fa_pool)
    cache = _own_cache(loaded, max(lengths), steps)
    turn, least_s = _decode(loaded, cache, ids, lengths, steps), _least_s(loaded.fa_pool, lengths)

    def bounded() -> Turn:
        seconds, logits, facts = turn()
        return seconds, logits, facts | ({"least_s": least_s} if least_s else {})

    return bounded


def alone_decode(model: str, ids: list[int], lengths: list[int], steps: int, fa_pool: dict[str, Any]) -> Make:
    """Decode steps of the base alone, with the plugin's kernel, on its cache."""

    def agree(decision: tuple[int, ...]) -> tuple[int, ...]:
        return min(decision[0], 1), decision[1]  # as if another base rank's plan did without ranks

    loaded = FAPoolForCausalLM.wrap(plain_model(model), fa_pool | {"kv_home": "base"}, agree=agree)
    return _decode(loaded, _own_cache(loaded, max(lengths), steps), ids, lengths, steps)


def _own_cache(model: Any, tokens: int, steps: int) -> PooledCache:
    state = SequenceState(prompt_columns=tokens, capacity=tokens + steps + 1)
    return model.fapool_forwards.homes.new_cache(model.config.get_text_config(decoder=True), state)


def _least_s(manager: ResourceManager, lengths: list[int]) -> float | None:
    """What no plan's step can be faster than, by the profile. The stock cache, copied in every step, says nothing of
    ours."""
    advisor, tokens = manager.advisor, max(lengths)
    if advisor.profile is None:
        return None
    cores = advisor.cores(torch.get_num_threads())
    held = [sum(length + 1 for length in lengths) * advisor.profile.shape.kv_heads] * manager.config.pool_ranks
    starts, stops = tuple(tokens - length for length in lengths), (tokens + 1,) * len(lengths)
    return advisor.decode(Geometry(starts, stops, tokens, tokens + 1), cores, held).ceiling_s


def plain_training(model: str, ids: list[int], batch: int, warm: int, time_attention: bool = False) -> Make:
    """Forward and backward of one batch in transformers' sdpa attention."""
    return _training(plain_model(model), ids, batch, warm, _AttentionClock() if time_attention else None)


def pooled_training(model: str, ids: list[int], batch: int, warm: int, fa_pool: dict[str, Any]) -> Make:
    """The same with the plugin."""
    return _training(_pooled(model, fa_pool), ids, batch, warm)


def _training(model: Any, ids: list[int], batch: int, warm: int, clock: _AttentionClock | None = None) -> Make:
    """A step of training without its optimizer: the rows are pieces of one text. Answers with some gradients."""
    model.train()
    ids_BS = torch.tensor(ids).view(batch, -1)
    shown = [model.get_input_embeddings().weight, *(p for name, p in model.named_parameters() if "layers.0." in name)]

    def step(ids_BS: Tensor) -> Tensor:
        model.zero_grad()
        model(ids_BS, labels=ids_BS, use_cache=False).loss.backward()
        return torch.cat([p.grad.flatten() for p in shown if p.grad is not None])

    def turn() -> Turn:
        before = _stats(model)
        if clock:
            clock.seconds = 0.0
        began = time.perf_counter()
        gradients = step(ids_BS)
        seconds = time.perf_counter() - began
        return seconds, gradients, _facts(model, before) | ({"attention_s": clock.seconds} if clock else {})

    if warm:
        step(ids_BS[:, :warm])
    return turn


class _AttentionClock:
    """How much of a turn was attention: reads the clock around every call of transformers' sdpa function, and around
    its backward."""

    def __init__(self) -> None:
        self.seconds = 0.0
        original: Any = ALL_ATTENTION_FUNCTIONS["sdpa"]

        def timed(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            query, key, value = _Reading.apply(self, 1, query, key, value)
            out, weights = original(module, query, key, value, *args, **kwargs)
            (out,) = _Reading.apply(self, -1, out)
            self.seconds += time.perf_counter() - began
            return out, weights

        AttentionInterface.register("sdpa", timed)
        AttentionMaskInterface.register("sdpa", sdpa_mask)


class _Reading(torch.autograd.Function):
    """Its inputs as they are. Where backward comes by, the clock is read: from the output's to the inputs' autograd
    does nothing but attention, since nodes made later come first."""

    @staticmethod
    def forward(ctx: Any, clock: _AttentionClock, sign: int, *given: Tensor) -> tuple[Tensor, ...]:
        ctx.clock, ctx.sign = clock, sign
        return tuple(x.view_as(x) for x in given)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        ctx.clock.seconds += ctx.sign * time.perf_counter()
        return None, None, *gradients


def plain_model(model: str, **kwargs: Any) -> Any:
    """The model without the plugin, in fp32."""
    kwargs |= {"dtype": torch.float32, "attn_implementation": "sdpa"}
    return AutoModelForCausalLM.from_pretrained(model, **kwargs).eval()


def _pooled(model: str, fa_pool: dict[str, Any]) -> Any:
    arguments = {"dtype": torch.float32, "attn_implementation": "sdpa"}
    return FAPoolForCausalLM.from_pretrained(model, fa_pool=fa_pool, **arguments).eval()


def timed_prefill(
    model: Any, ids: list[int], warm: int, clock: _AttentionClock | None = None, first_position: int = 0
) -> Make:
    """Prefill of a loaded model, by all ranks of the process group if there is one."""
    ids_BS = torch.tensor([ids])
    positions_BS = torch.arange(first_position, first_position + len(ids))[None]

    @torch.no_grad()
    def forward(length: int) -> Tensor:
        places = {"position_ids": positions_BS[:, :length]} if first_position else {}
        return model(ids_BS[:, :length], use_cache=True, logits_to_keep=1, **places).logits

    def turn() -> Turn:
        before = _stats(model)
        if clock:
            clock.seconds = 0.0
        if dist.is_initialized():
            dist.barrier()
        began = time.perf_counter()
        logits = forward(len(ids))
        seconds = time.perf_counter() - began
        return seconds, logits, _facts(model, before) | ({"attention_s": clock.seconds} if clock else {})

    if warm:
        forward(warm)
    return turn


def _decode(
    model: Any, cache: Cache, ids: list[int], lengths: list[int], steps: int, clock: _AttentionClock | None = None
) -> Make:
    """Every turn takes one untimed and ``steps`` timed steps from the same cache, and takes them back. The fed tokens
    are given, so that no choice of a model changes the work. Its seconds are the median of its steps."""
    tokens, batch = max(lengths), len(lengths)
    starts_B1 = tokens - torch.tensor(lengths)[:, None]
    # As generate() does, which gives none where no row is padded.
    mask = torch.arange(tokens + max(steps, _WARM_STEPS) + 1) >= starts_B1 if min(lengths) < tokens else None
    _fill(model, cache, ids, tokens, batch)
    fed_S = torch.tensor([ids[step % len(ids)] for step in range(max(steps, _WARM_STEPS) + 1)])

    @torch.no_grad()
    def take(count: int) -> tuple[list[tuple[float, float]], Tensor]:
        times, logits = [], fed_S
        for step in range(count):
            if clock:
                clock.seconds = 0.0
            token_BS = fed_S[step].expand(batch, 1)
            position_BS = tokens + step - starts_B1
            seen = {"attention_mask": mask[:, : tokens + step + 1]} if mask is not None else {}
            began = time.perf_counter()
            logits = model(token_BS, past_key_values=cache, position_ids=position_BS, logits_to_keep=1, **seen).logits
            times.append((time.perf_counter() - began, clock.seconds if clock else 0.0))
        cache.crop(-count)
        return times, logits

    def turn() -> Turn:
        before = _stats(model)
        times, logits = take(steps + 1)
        seconds = [whole for whole, _ in times[1:]]
        facts = _facts(model, before) | {"step_seconds": seconds}
        if clock:
            facts["attention_s"] = statistics.median(attention for _, attention in times[1:])
        return statistics.median(seconds), logits, facts

    take(_WARM_STEPS)
    return turn


@torch.no_grad()
def _fill(model: Any, cache: Cache, ids: list[int], tokens: int, batch: int) -> None:
    """Gives every layer ``tokens`` keys and values: those of a short real prompt, over and over."""
    seed = DynamicCache(config=model.config)
    ids_BS = torch.tensor([ids[: min(_SEED_TOKENS, tokens)]])
    model(ids_BS, past_key_values=seed, use_cache=True, logits_to_keep=1)
    at_T = torch.arange(tokens) % ids_BS.shape[1]
    for index, layer in enumerate(seed.layers):
        k_1KTD, v_1KTD = (x[:, :, at_T].expand(batch, -1, -1, -1) for x in (layer.keys, layer.values))
        cache.update(k_1KTD, v_1KTD, index)


def _stats(model: Any) -> dict[str, Any]:
    manager = getattr(model, "fa_pool", None)
    return manager.stats() if manager is not None else {}


def _facts(model: Any, before: dict[str, Any]) -> dict[str, Any]:
    """What the plugin counted since ``before``."""
    after = _stats(model)
    facts: dict[str, Any] = {
        key: after[key] - before[key] for key in ("bytes_sent", "bytes_received", "faults") if key in after
    }
    for key in ("pooled_calls", "local_calls") if after else ():
        facts[key] = sum(
            after[phase][key] - before[phase][key] for phase in ("prefill", "decode", "training", "backward")
        )
    return facts
