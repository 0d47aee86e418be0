"""Tiny random models of every family, and the questions that tests ask of one with and one without the plugin.

Knows nothing of how calls are shared out: references are transformers' own models, claims are numbers of the caller.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from fapool_plugin.integrations.huggingface import FAPoolForCausalLM

THRESHOLD = 16
VOCABULARY = 99
PAD = 0
TOLERANCE = 1e-5
"""Of fp32 logits and gradients, relative to the largest one."""

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "intermediate_size": 64,
    "head_dim": 8,
    "initializer_range": 0.3,
    "max_position_embeddings": 256,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_MIXED = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
_HALF_WINDOW = {
    "use_sliding_window": True,
    "max_window_layers": 1,
    "sliding_window": 8,
    "layer_types": ["full_attention", "sliding_attention"],
}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_LATENT = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "num_key_value_heads": 6,
}


@dataclass(frozen=True)
class Family:
    """A model type, what its configuration needs beyond the common part, and what it must not be given."""

    model_type: str
    settings: dict[str, Any] = field(default_factory=dict)
    full_layers: int = 2
    """Layers of full attention among the two: those that may be pooled."""
    without: tuple[str, ...] = ()
    seed: int = 0
    """Of the weights; chosen so that no test's choices of tokens are near-ties."""


FAMILIES = {
    "llama": Family("llama"),
    "qwen2": Family("qwen2"),
    "qwen2_mixed": Family("qwen2", _HALF_WINDOW, full_layers=1, seed=1),
    "qwen3": Family("qwen3"),
    "mistral": Family("mistral", {"sliding_window": None}),
    "mistral_window": Family("mistral", {"sliding_window": 8}, full_layers=0),
    "mixtral": Family("mixtral", {"sliding_window": None, **_EXPERTS}),
    "phi3": Family("phi3", {"sliding_window": None}, without=("head_dim",)),
    "gemma2": Family("gemma2", _MIXED, full_layers=1),
    "gemma3_text": Family("gemma3_text", _MIXED, full_layers=1),
    "gpt2": Family("gpt2", {"n_embd": 48, "n_head": 6, "n_layer": 2, "n_positions": 256, "n_inner": 64}),
    "gpt_neox": Family("gpt_neox"),
    "opt": Family("opt", {"ffn_dim": 64, "word_embed_proj_dim": 48}),
    "stablelm": Family("stablelm"),
    "olmo2": Family("olmo2"),
    "starcoder2": Family("starcoder2", {"sliding_window": None}),
    "cohere2": Family("cohere2", _MIXED, full_layers=1),
    "glm4": Family("glm4"),
    "smollm3": Family("smollm3"),
    "granite": Family("granite"),
    "deepseek_v3": Family("deepseek_v3", _LATENT, without=("head_dim",)),
    "gpt_oss": Family("gpt_oss", _MIXED | _EXPERTS, full_layers=1, seed=2),
}


def save_config(config: Any, folder: Path, seed: int = 0) -> Path:
    """Saves a random model of this configuration; the same one for the same seed."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if "sink" in name:  # zero at birth, where a missing sink would hardly be seen
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return folder


def save_model(name: str, folder: Path, seed: int | None = None, **settings: Any) -> Path:
    """Saves a random model of family ``name``; ``settings`` change its configuration."""
    family = FAMILIES[name]
    values = {**_COMMON, **family.settings, **settings}
    values = {key: value for key, value in values.items() if key not in family.without}
    return save_config(AutoConfig.for_model(family.model_type, **values), folder, family.seed if seed is None else seed)


def save_tokenizer(folder: Path) -> Path:
    """Saves a tokenizer beside a model: one token for each word, "w3" is token 3, whatever it does not know token 0."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w0").save_pretrained(folder)
    return folder


def words(count: int) -> str:
    """A text of so many tokens, none of them special."""
    return " ".join(f"w{3 + i % 90}" for i in range(count))


def tiny_config(model_type: str, without: tuple[str, ...] = (), **settings: Any) -> Any:
    """A configuration of any model type, tiny; ``without`` names common settings that this type does not take."""
    values = {key: value for key, value in {**_COMMON, **settings}.items() if key not in without}
    return AutoConfig.for_model(model_type, **values)


def plain(folder: Path, **arguments: Any) -> Any:
    """The model without the plugin, in transformers' default attention."""
    return AutoModelForCausalLM.from_pretrained(folder, **arguments).eval()


def eager(folder: Path, **arguments: Any) -> Any:
    """The reference: the model's own eager attention, without the plugin."""
    return plain(folder, attn_implementation="eager", **arguments)


def load_pooled(folder: Path, arguments: dict[str, Any] | None = None, **settings: Any) -> Any:
    """The model with the plugin: threshold 16, two pool ranks, blocks of 4, prompts in one piece and every long
    call pooled, unless ``settings`` say otherwise."""
    ours: dict[str, Any] = {"threshold": THRESHOLD, "pool_ranks": 2, "kv_block": 4, "memory_limit_mib": 64}
    ours |= {"blocks": 1, "activation": "length", "warm_start": False}
    fa_pool = ours | settings
    return FAPoolForCausalLM.from_pretrained(folder, fa_pool=fa_pool, **(arguments or {})).eval()


@contextmanager
def pooled(folder: Path, arguments: dict[str, Any] | None = None, **settings: Any) -> Iterator[Any]:
    """``load_pooled`` for a while; closed at the end, when none of its pool ranks may be left."""
    before = workers()
    model = load_pooled(folder, arguments, **settings)
    with model.fa_pool:
        yield model
    assert not workers() - before, f"close() left pool ranks behind: {workers() - before}"


def workers(parent: int | None = None) -> set[int]:
    """Process ids of the pool ranks that were started by ``parent``, by default this process, or by its fork server."""
    base = os.getpid() if parent is None else parent
    makers, ranks = {base}, list[psutil.Process]()
    for process in psutil.process_iter(["pid", "ppid", "name", "cmdline"]):
        if process.info["name"] == "fapool rank":
            ranks.append(process)
        elif process.info["ppid"] == base and "fapool_plugin.pool.fork_server" in (process.info["cmdline"] or []):
            makers.add(process.info["pid"])
    return {process.info["pid"] for process in ranks if process.info["ppid"] in makers}


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch with one thread: tiny models are slower with more, and pool ranks need cores too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_ids(batch: int, length: int, seed: int = 0) -> Tensor:
    """Token ids (batch, length), none of them special."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def padding_mask(lengths: list[int], *, left: bool = True) -> Tensor:
    """The 2-D mask of sequences of these lengths, padded to the longest."""
    columns = torch.arange(max(lengths)).expand(len(lengths), -1)
    count = torch.tensor(lengths)[:, None]
    return (columns >= max(lengths) - count if left else columns < count).long()


def assert_close(actual: Tensor, expected: Tensor, *, tolerance: float = TOLERANCE, what: str = "logits") -> None:
    """Finite, not all zero, and alike; ``tolerance`` is relative to the largest expected value."""
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)} is not {tuple(expected.shape)}"
    actual, expected = actual.double(), expected.double()
    scale = expected.abs().max().item()
    assert actual.isfinite().all(), f"{what}: not finite"
    assert expected.isfinite().all(), f"{what}: the reference is not finite"
    assert scale > 0, f"{what}: the reference is all zero"
    worst = (actual - expected).abs().max().item()
    assert worst <= tolerance * scale, f"{what}: largest difference {worst:.3g}, {tolerance * scale:.3g} allowed"


def assert_same_tokens(actual: Tensor, expected: Tensor) -> None:
    """Token ids are equal; else says where they part."""
    assert actual.shape == expected.shape, f"tokens: {tuple(actual.shape)} is not {tuple(expected.shape)}"
    apart = (actual != expected).nonzero()
    assert not len(apart), f"{len(apart)} of {actual.numel()} tokens differ, first at (row, column) {apart[0].tolist()}"


def assert_clear_choices(logits: tuple[Tensor, ...]) -> None:
    """The reference's choices are no near-ties, so equal tokens may be asked for; another seed mends it."""
    for step, logits_BV in enumerate(logits):
        first, second = logits_BV.topk(2).values.unbind(-1)
        margin, needed = (first - second).min().item(), 10 * TOLERANCE * logits_BV.abs().max().item()
        assert margin > needed, (
            f"near-tie at step {step}: margin {margin:.3g}, {needed:.3g} needed; choose another seed"
        )


@contextmanager
def pools(model: Any, *, prefill: int, decode: int) -> Iterator[None]:
    """What runs inside makes exactly these pooled calls (one layer in one forward is one), and no rank fails."""
    before = model.fa_pool.stats()
    yield
    after = model.fa_pool.stats()
    made = {phase: after[phase]["pooled_calls"] - before[phase]["pooled_calls"] for phase in ("prefill", "decode")}
    claimed = {"prefill": prefill, "decode": decode}
    assert made == claimed, f"pooled calls {made}, claimed {claimed}; local: {after['local_reasons']}"
    assert (after["faults"], after["stale"]) == (before["faults"], before["stale"]), after["events"]


def greedily(new_tokens: int, mask: Tensor | None = None, **others: Any) -> dict[str, Any]:
    """Arguments of a greedy generate(); ``others`` are added, or take their place."""
    padded = {} if mask is None else {"attention_mask": mask}
    return {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": PAD} | padded | others


def logits_too() -> dict[str, bool]:
    """More arguments of generate(): return logits beside tokens."""
    return {"output_logits": True, "return_dict_in_generate": True}


def padded_batch(lengths: list[int], *, left: bool = True) -> tuple[Tensor, Tensor]:
    """Random ids, padded, and their mask."""
    mask = padding_mask(lengths, left=left)
    return random_ids(*mask.shape).masked_fill(mask == 0, PAD), mask


def logits_equal(model: Any, reference: Any, ids: Tensor, mask: Tensor | None = None, **others: Any) -> None:
    """One forward of each gives the same logits where there are tokens."""
    with torch.no_grad():
        logits, expected = (net(ids, attention_mask=mask, **others).logits for net in (model, reference))
    real = torch.ones_like(ids) if mask is None else mask
    assert_close(logits[real == 1], expected[real == 1])


@dataclass
class Pair:
    """The same weights twice: ``reference`` in its own eager attention, ``model`` with pool ranks."""

    folder: Path
    reference: Any
    model: Any
    layers: int = 2

    @classmethod
    @contextmanager
    def of(cls, folder: Path, **settings: Any) -> Iterator[Pair]:
        """Loads both; ``settings`` are the plugin's."""
        with pooled(folder, **settings) as model:
            yield cls(folder, eager(folder), model)

    @contextmanager
    def forwards(self, *, prefill: int = 0, decode: int = 0) -> Iterator[None]:
        """What runs inside makes exactly so many forwards of which every layer is pooled."""
        with pools(self.model, prefill=self.layers * prefill, decode=self.layers * decode):
            yield

    def generate(self, ids: Tensor, *, prefill: int, decode: int, **arguments: Any) -> tuple[Any, Any]:
        """generate() by the model, in so many pooled forwards, and by the reference, from the same seed."""
        torch.manual_seed(7)
        expected = self.reference.generate(ids, **arguments)
        torch.manual_seed(7)
        with self.forwards(prefill=prefill, decode=decode):
            return self.model.generate(ids, **arguments), expected
