"""A prompt cut into blocks gives the model's own results; one that cannot be cut is computed in one piece, and why.

References are the models' own eager attention. Pool ranks are threads; ranks that die are in test_rounds_faults.
"""

from __future__ import annotations

import copy
import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from transformers import masking_utils
from transformers.utils.output_capturing import _active_collector

from fapool_plugin.integrations.huggingface import blocks as cutting
from tests.blocks import LONG, in_blocks, overlaps, save_long
from tests.models import (
    FAMILIES,
    assert_clear_choices,
    assert_close,
    assert_same_tokens,
    eager,
    greedily,
    logits_too,
    padded_batch,
    random_ids,
    save_config,
    tiny_config,
)

pytestmark = pytest.mark.usefixtures("one_thread_each")

NEW = 4
LENGTHS = [530, 433, 501]


def through_pickle(model: Any) -> Any:
    """The model, pickled and back."""
    return pickle.loads(pickle.dumps(model))


SETS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "gemma2": ("gemma2", {}),
    "gemma3": ("gemma3_text", {"sliding_window": 40}),
    "gpt_oss": ("gpt_oss", {"sliding_window": 40}),
    "qwen2_narrow": ("qwen2_mixed", {"sliding_window": 40}),
    "qwen2_wide": ("qwen2_mixed", {"sliding_window": 300}),
    "mixtral": ("mixtral", {}),
    "opt": ("opt", {}),
    "gpt2": ("gpt2", {}),
    "deepseek_v3": ("deepseek_v3", {}),
}
COVERING = {
    *[("llama", blocks, ranks) for blocks in (2, 3, 8) for ranks in (1, 2)],
    *[("gemma2", 3, 2), ("gemma3", 8, 2), ("gpt_oss", 3, 1), ("qwen2_narrow", 3, 2), ("qwen2_wide", 8, 1)],
    *[("mixtral", 2, 2), ("opt", 8, 2), ("gpt2", 3, 1), ("deepseek_v3", 3, 2)],
}
CASES = [
    pytest.param(*case, marks=() if case in COVERING else pytest.mark.full, id="-".join(map(str, case)))
    for case in ((name, blocks, ranks) for name in SETS for blocks in (2, 3, 8) for ranks in (1, 2))
]


@pytest.mark.parametrize(("name", "blocks", "ranks"), CASES)
def test_families_equal_eager(tmp_path: Path, name: str, blocks: int, ranks: int) -> None:
    family, changes = SETS[name]
    folder, full = save_long(family, tmp_path, **changes), FAMILIES[family].full_layers
    reference, (ids, mask) = eager(folder), padded_batch(LENGTHS)
    right_ids, right = padded_batch(LENGTHS, left=False)
    with torch.no_grad():
        expected = reference(ids, attention_mask=mask).logits
        expected_right = reference(right_ids, attention_mask=right).logits
    greedy = reference.generate(ids, **greedily(NEW, mask, **logits_too()))
    assert_clear_choices(greedy.logits)
    with in_blocks(folder, blocks, pool_ranks=ranks) as model, torch.no_grad():
        with overlaps(model, blocks, full):
            logits = model(ids, attention_mask=mask).logits
        assert_close(logits[mask == 1], expected[mask == 1])
        with overlaps(model, blocks, full):
            logits = model(right_ids, attention_mask=right).logits
        assert_close(logits[right == 1], expected_right[right == 1], what="logits, padded on the right")
        with overlaps(model, blocks, full, decode=NEW - 1):
            result = model.generate(ids, **greedily(NEW, mask, **logits_too()))
        assert_same_tokens(result.sequences, greedy.sequences)
        assert_close(torch.stack(result.logits), torch.stack(greedy.logits), what="logits of generate()")
        stats = model.fa_pool.stats()
        assert stats["prefill"]["local_calls"] == (2 - full) * blocks * 3, "sliding layers"
        assert stats["not_overlapped_reasons"] == stats["local_reasons"] == {}
        assert all(rank["calls"] for rank in stats["ranks"]), stats["ranks"]


class Twins:
    """A reference and a model of three blocks; both are asked the same."""

    def __init__(self, folder: Path, model: Any, full: int) -> None:
        self.folder, self.reference, self.model, self.full = folder, eager(folder), model, full

    def overlaps(self, blocks: int = 3, **counts: int) -> Any:
        return overlaps(self.model, blocks, self.full, **counts)

    def keys_are_gone(self) -> bool:
        """Whether the pool ranks soon hold nothing: they are told, and do not answer."""
        deadline = time.monotonic() + 5.0
        while (held := [w.prefixes.nbytes for w in self.model.fa_pool.leases.pool.workers.values()]) and any(held):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True


@pytest.fixture(scope="module", params=["llama", "gemma3_text"])
def twins(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Twins]:
    folder = save_long(request.param, tmp_path_factory.mktemp(request.param))
    with in_blocks(folder, 3) as model:
        yield Twins(folder, model, FAMILIES[request.param].full_layers)


IDS, MASK = padded_batch([260, 201, 245])
EMBEDS = torch.randn(3, 260, 48, generator=torch.Generator().manual_seed(1))
ARGUMENTS: dict[str, dict[str, Any]] = {
    "labels": {"input_ids": IDS, "attention_mask": MASK, "labels": IDS.masked_fill(MASK.cumsum(1) < 2, -100)},
    "hidden states": {"input_ids": IDS, "attention_mask": MASK, "output_hidden_states": True},
    "some logits": {"input_ids": IDS, "attention_mask": MASK, "logits_to_keep": 5},
    "no cache": {"input_ids": IDS, "attention_mask": MASK, "use_cache": False},
    "no mask": {"input_ids": IDS},
    "positions": {"input_ids": IDS, "attention_mask": MASK, "position_ids": (MASK.cumsum(1) - 1).clamp(min=0)},
    "shared positions": {"input_ids": IDS, "position_ids": torch.arange(7, 267)[None]},
    "embeddings": {"inputs_embeds": EMBEDS, "attention_mask": MASK},
    "a tuple": {"input_ids": IDS, "attention_mask": MASK, "return_dict": False, "use_cache": False},
}


FOR_THE_HEAD = ("labels", "some logits")


@torch.no_grad()
@pytest.mark.parametrize(
    ("case", "direct"),
    [(case, direct) for case in ARGUMENTS for direct in (False, True) if not (direct and case in FOR_THE_HEAD)],
)
def test_arguments(twins: Twins, case: str, direct: bool) -> None:
    """Of the model, or of the decoder inside it."""
    given = ARGUMENTS[case]
    model, reference = (net.model if direct else net for net in (twins.model, twins.reference))
    expected = reference(**given)
    with twins.overlaps():
        output = model(**given)
    assert type(output) is type(expected)
    fields = expected.items() if isinstance(expected, dict) else enumerate(expected)
    real = MASK == 1 if "attention_mask" in given else torch.ones_like(MASK, dtype=torch.bool)
    assert len(output) == len(expected), "fields are missing"
    for name, wanted in fields:
        if name == "past_key_values":
            assert output[name].get_seq_length() == 260
        elif name == "hidden_states":
            for states, wanted_states in zip(output[name], wanted, strict=True):
                assert_close(states[real], wanted_states[real], what="hidden states")
        elif name == "loss":
            assert_close(output[name], wanted, what="loss")
        else:
            kept = real[:, -wanted.shape[1] :]
            assert_close(output[name][kept], wanted[kept], what=str(name))
    if case == "no cache":
        assert output.past_key_values is None
    del output
    assert twins.keys_are_gone(), "keys of an ended forward are left on the pool ranks"


@torch.no_grad()
def test_tuples_when_the_configuration_says_so(twins: Twins) -> None:
    for net in (twins.model, twins.reference):
        net.config.return_dict = False
    try:
        expected = twins.reference.model(IDS, use_cache=False)
        output = twins.model.model(IDS, use_cache=False)
    finally:
        for net in (twins.model, twins.reference):
            net.config.return_dict = True
    assert type(output) is type(expected) is tuple
    assert_close(output[0], expected[0])


def test_prefill_in_chunks_of_two_blocks(twins: Twins) -> None:
    arguments = greedily(NEW, MASK, prefill_chunk_size=130)
    expected = twins.reference.generate(IDS, **arguments)
    with twins.overlaps(blocks=2, forwards=2, decode=NEW - 1):
        tokens = twins.model.generate(IDS, **arguments)
    assert_same_tokens(tokens, expected)


@torch.no_grad()
def test_a_returned_cache_goes_on(twins: Twins) -> None:
    """Blocks begin where the cache ends, at no multiple of anything."""
    parts = [IDS[:, :33], random_ids(3, 200, seed=3), random_ids(3, 5, seed=4), random_ids(3, 195, seed=5)]
    columns, cache = 0, None
    expected = twins.reference(torch.cat(parts, 1)).logits
    for part, blocks in zip(parts, (1, 3, 1, 3), strict=True):
        with twins.overlaps(blocks=blocks):
            output = twins.model(part, past_key_values=cache, use_cache=True)
        cache, columns = output.past_key_values, columns + part.shape[1]
        assert cache.get_seq_length() == columns
        assert_close(output.logits, expected[:, columns - part.shape[1] : columns])


@torch.no_grad()
@pytest.mark.parametrize("twins", ["llama"], indirect=True)  # sliding layers cannot be cropped
def test_a_prompt_grows_and_is_cropped(twins: Twins) -> None:
    more = random_ids(3, 200, seed=3)
    cache = twins.model(IDS, use_cache=True).past_key_values
    cache.crop(-100)
    with twins.overlaps():
        logits = twins.model(more, past_key_values=cache).logits
    assert_close(logits, twins.reference(torch.cat([IDS[:, :160], more], 1)).logits[:, 160:])


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("inference", [False, True])
def test_generate(twins: Twins, beams: int, inference: bool) -> None:
    arguments = greedily(NEW, MASK, num_beams=beams)
    expected = twins.reference.generate(IDS, **arguments)
    with twins.overlaps(decode=NEW - 1), torch.inference_mode(inference):
        tokens = twins.model.generate(IDS, **arguments)
    assert_same_tokens(tokens, expected)


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_run_in_rounds(twins: Twins, way: Callable[[Any], Any]) -> None:
    # A model of its own: once asked for hidden states, transformers' hooks cannot be pickled.
    with in_blocks(twins.folder, 3) as model, torch.no_grad():
        for _ in range(2):
            twin = way(model)
            with twin.fa_pool, overlaps(twin, 3, twins.full):
                assert_close(twin(IDS).logits, twins.reference(IDS).logits)
            model(IDS)


@torch.no_grad()
@pytest.mark.parametrize("settings", [{"partition": "query_blocks"}, {"base_share": 0.0}, {"base_share": 0.7}], ids=str)
def test_any_way_to_share_out(twins: Twins, settings: dict[str, Any]) -> None:
    with in_blocks(twins.folder, 3, **settings) as model, overlaps(model, 3, twins.full, decode=NEW - 1):
        tokens = model.generate(IDS, **greedily(NEW, MASK))
    assert_same_tokens(tokens, twins.reference.generate(IDS, **greedily(NEW, MASK)))


@torch.no_grad()
def test_keys_that_outgrow_the_memory_of_a_rank_in_mid_prompt(tmp_path: Path) -> None:
    """The first blocks are pooled; the base computes those whose keys are too many."""
    folder, ids = save_long("llama", tmp_path), random_ids(6, 530)
    with in_blocks(folder, 8, pool_ranks=1, base_share=0.0, memory_limit_mib=1) as model:
        assert_close(model(ids).logits, eager(folder)(ids).logits)
        stats = model.fa_pool.stats()
    assert stats["prefill"]["pooled_calls"] > 0
    assert stats["prefill"]["local_calls"] > 0
    assert "memory_limit_mib" in "".join(stats["local_reasons"])


def test_drafts_from_the_prompt(twins: Twins) -> None:
    """Caches then keep what lies behind a window, and are cropped."""
    ids, arguments = random_ids(1, 260), greedily(8, prompt_lookup_num_tokens=3)
    expected = twins.reference.generate(ids, **arguments)
    before = twins.model.fa_pool.stats()["prefill"]["overlapped_forwards"]
    assert_same_tokens(twins.model.generate(ids, **arguments), expected)
    cut = twins.full == 2 or not cutting.past_outgrows_masks()
    assert twins.model.fa_pool.stats()["prefill"]["overlapped_forwards"] == before + cut


def test_a_past_that_outgrows_its_masks_is_not_cut(twins: Twins, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with transformers before 5.23."""
    monkeypatch.setattr(cutting, "past_outgrows_masks", lambda: True)
    ids, arguments = random_ids(1, 260), greedily(8, prompt_lookup_num_tokens=3)
    before = twins.model.fa_pool.stats()["prefill"]["overlapped_forwards"]
    assert_same_tokens(twins.model.generate(ids, **arguments), twins.reference.generate(ids, **arguments))
    stats = twins.model.fa_pool.stats()
    slides = twins.full < 2
    assert stats["prefill"]["overlapped_forwards"] == before + (not slides)
    assert any("keeps what lies behind a window" in reason for reason in stats["not_overlapped_reasons"]) == slides


@torch.no_grad()
@pytest.mark.parametrize(("length", "blocks"), [(60, 1), (128, 2), (191, 2), (192, 3), (600, 8)])
def test_as_many_blocks_as_pay(twins: Twins, length: int, blocks: int) -> None:
    """None shorter than 64 positions, at most eight."""
    with in_blocks(twins.folder, None) as model:
        ids = random_ids(1, length)
        with overlaps(model, blocks, twins.full):
            logits = model(ids).logits
    assert_close(logits, twins.reference(ids).logits)


@torch.no_grad()
def test_documents_packed_into_rows_of_a_batch_stay_local(twins: Twins) -> None:
    given = {"position_ids": torch.arange(130).repeat(3, 2), "use_cache": False}
    before = twins.model.fa_pool.stats()["local_reasons"]
    assert_close(twins.model(IDS, **given).logits, twins.reference(IDS, **given).logits)
    (reason,) = twins.model.fa_pool.stats()["local_reasons"].keys() - before.keys()
    packed = hasattr(masking_utils, "remap_positions_for_packed_sequence")  # before 5.23 they cannot be told
    assert reason.startswith("documents are packed into 3 row(s)" if packed else "the model lays a pattern"), reason


# Models and forwards that stay in one piece


@contextmanager
def _hooked(model: Any) -> Iterator[None]:
    add_hook_to_module(model.get_decoder().layers[0].mlp, ModelHook())
    yield
    remove_hook_from_module(model.get_decoder().layers[0].mlp)


@contextmanager
def _marked(thing: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(thing, name, None)
    setattr(thing, name, value)
    yield
    setattr(thing, name, before) if before is not None or name in vars(type(thing)) else delattr(thing, name)


@contextmanager
def _collecting() -> Iterator[None]:
    token = _active_collector.set({})
    yield
    _active_collector.reset(token)


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
LONG_ROPE = DYNAMIC | {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
CONVOLUTION = {"layer_types": ["conv", "full_attention"], "block_ff_dim": 64, "conv_L_cache": 3}


def _as_it_is(model: Any) -> Any:
    return nullcontext()


ONE_PIECE: dict[str, tuple[Any, dict[str, Any], Callable[[Any], Any], str]] = {
    # What is built, with what it is called, what is done to it meanwhile, and what stats() must say.
    "offload": (("llama", {}), {}, _hooked, "offload"),
    "ZeRO-3": (("llama", {}), {}, lambda model: _marked(next(model.parameters()), "ds_id", 0), "ZeRO-3"),
    "dynamic rope": (("llama", {"rope_parameters": DYNAMIC}), {}, _as_it_is, "position encoding"),
    "long rope": (("phi3", {"rope_parameters": LONG_ROPE, "pad_token_id": 0}), {}, _as_it_is, "position encoding"),
    "compiled": (("llama", {}), {}, lambda m: _marked(m, "_compiled_call_impl", m._call_impl), "compiled"),
    "compiled decoder": (
        ("llama", {}),
        {},
        lambda m: _marked(m.model, "_compiled_call_impl", m.model._call_impl),
        "compiled",
    ),
    "compiled layer": (
        ("llama", {}),
        {},
        lambda m: _marked(m.model.layers[1], "_compiled_call_impl", m.model.layers[1]._call_impl),
        "compiled",
    ),
    "router": (("mixtral", {}), {"output_router_logits": True}, _as_it_is, "output_router_logits"),
    "extra tensor": (("gpt2", {}), {"token_type_ids": IDS % 2}, _as_it_is, "argument token_type_ids"),
    "extra tensor, no cache": (
        ("gpt2", {}),
        {"token_type_ids": IDS % 2, "use_cache": False},
        _as_it_is,
        "argument token_type_ids",
    ),
    "collected": (("llama", {}), {}, lambda model: _collecting(), "outputs are collected"),
    "convolution": (CONVOLUTION, {}, _as_it_is, "layers of kind conv"),
}


@torch.no_grad()
@pytest.mark.parametrize("case", ONE_PIECE)
def test_prompts_in_one_piece(tmp_path: Path, case: str) -> None:
    built, given, meanwhile, reason = ONE_PIECE[case]
    if isinstance(built, dict):
        save_config(tiny_config("lfm2", without=("head_dim",), **LONG, **built), tmp_path)
    else:
        save_long(built[0], tmp_path, **built[1])
    reference, full = eager(tmp_path), 1 if built is CONVOLUTION else 2
    expected = reference(IDS, attention_mask=MASK, **given)
    with in_blocks(tmp_path, 3) as model:
        with meanwhile(model), overlaps(model, 1, full):
            output = model(IDS, attention_mask=MASK, **given)
        assert_close(output.logits[MASK == 1], expected.logits[MASK == 1])
        for router, wanted in zip(output.get("router_logits") or (), expected.get("router_logits") or (), strict=True):
            assert_close(router[MASK.flatten() == 1], wanted[MASK.flatten() == 1], what="router logits")
        reasons = model.fa_pool.stats()["not_overlapped_reasons"]
        assert list(reasons.values()) == [1], reasons
        assert reason in next(iter(reasons)), reasons
        if meanwhile is not _as_it_is:
            with overlaps(model, 3):
                assert_close(model(IDS).logits, reference(IDS).logits)
