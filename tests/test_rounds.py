"""Blocks in flight: the order in which they run, and that a prompt cut into them gives the model's own results.

The rotation is checked against a sorted list of (round, block); models against their own eager attention. Pool ranks
are threads here; ranks that die are in test_rounds_faults.
"""

from __future__ import annotations

import contextvars
import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fapool_plugin.rounds import block_edges, run_rounds
from tests.models import (
    FAMILIES,
    assert_clear_choices,
    assert_close,
    assert_same_tokens,
    eager,
    greedily,
    load_pooled,
    logits_too,
    one_thread,
    padded_batch,
    pools,
    random_ids,
    save_model,
)
from tests.thread_pool import ThreadPool

HandOver = Callable[[], None]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


# The rotation


class Blocks:
    """Blocks that hand over so often each, and note what they do and how they end."""

    def __init__(self, hand_overs: list[int], failing: tuple[int, int] | None = None, error: type = ValueError) -> None:
        self.hand_overs, self.failing, self.error = hand_overs, failing, error
        self.steps: list[tuple[int, int]] = []
        self.closed: list[int] = []

    def run(self) -> list[str]:
        return run_rounds([self._block(index, times) for index, times in enumerate(self.hand_overs)])

    def _block(self, index: int, times: int) -> Callable[[HandOver], str]:
        def run(hand_over: HandOver) -> str:
            try:
                for turn in range(times + 1):
                    self.steps.append((turn, index))
                    if (index, turn) == self.failing:
                        raise self.error(f"block {index} in round {turn}")
                    if turn < times:
                        hand_over()
                return f"result {index}"
            finally:
                self.closed.append(index)

        return run

    def in_order(self) -> list[tuple[int, int]]:
        """All steps, round after round, and in each round block after block."""
        return sorted((turn, index) for index, times in enumerate(self.hand_overs) for turn in range(times + 1))


HAND_OVERS = st.lists(st.integers(0, 6), max_size=9)


@settings(deadline=None, max_examples=150)
@given(HAND_OVERS)
def test_blocks_take_turns_whatever_each_one_does(hand_overs: list[int]) -> None:
    blocks = Blocks(hand_overs)
    assert blocks.run() == [f"result {index}" for index in range(len(hand_overs))]
    assert blocks.steps == blocks.in_order()


@settings(deadline=None, max_examples=150)
@given(HAND_OVERS.filter(len), st.data(), st.sampled_from([ValueError, KeyboardInterrupt, SystemExit]))
def test_an_error_cancels_the_others_where_they_stood(hand_overs: list[int], data: st.DataObject, error: type) -> None:
    index = data.draw(st.integers(0, len(hand_overs) - 1))
    turn = data.draw(st.integers(0, hand_overs[index]))
    blocks = Blocks(hand_overs, (index, turn), error)
    with pytest.raises(error, match=f"block {index} in round {turn}"):
        blocks.run()
    before = [step for step in blocks.in_order() if step <= (turn, index)]
    assert blocks.steps == before, "something ran after the error"
    assert sorted(blocks.closed) == sorted({block for _, block in before}), "a block was left where it stood"


@pytest.mark.parametrize("how", ["raises", "hands over", "goes on"])
def test_a_cancelled_block_that_will_not_end_hides_neither_the_error_nor_the_others(how: str) -> None:
    ended: list[int] = []

    def unwilling(index: int) -> Callable[[HandOver], None]:
        def run(hand_over: HandOver) -> None:
            try:
                hand_over()
            except BaseException:
                if how == "goes on":
                    for _ in range(3):
                        hand_over()
                raise
            finally:
                ended.append(index)
                if how == "raises":
                    raise OSError("while it was cancelled")
                if how == "hands over":
                    hand_over()

        return run

    def fails(_: HandOver) -> None:
        raise ValueError("the first error")

    with pytest.raises(ValueError, match="the first error"):
        run_rounds([unwilling(0), unwilling(1), fails, unwilling(3)])
    assert ended == [0, 1]


def test_context_variables_are_each_blocks_own() -> None:
    variable: contextvars.ContextVar[Any] = contextvars.ContextVar("variable")
    variable.set("caller")

    def block(index: int) -> Callable[[HandOver], list[Any]]:
        def run(hand_over: HandOver) -> list[Any]:
            seen = [variable.get()]
            variable.set(index)
            for _ in range(2):
                hand_over()
                seen.append(variable.get())
            return seen

        return run

    assert run_rounds([block(index) for index in range(3)]) == [["caller", index, index] for index in range(3)]
    assert variable.get() == "caller"


@pytest.mark.parametrize("state", [nullcontext, torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("autocast", [False, True])
def test_torchs_state_is_the_callers(state: Callable[[], Any], autocast: bool) -> None:
    def now() -> tuple[bool, ...]:
        cast = torch.is_autocast_enabled("cpu")
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), cast, torch.get_num_threads() == 1

    def block(hand_over: HandOver) -> list[tuple[bool, ...]]:
        seen = [now()]
        hand_over()
        return [*seen, now()]

    with state(), torch.autocast("cpu", enabled=autocast):
        expected = now()
        assert run_rounds([block] * 3) == [[expected] * 2] * 3
        assert now() == expected


def test_rounds_inside_a_round() -> None:
    inner = Blocks([2, 1])

    def outer(hand_over: HandOver) -> list[str]:
        hand_over()
        return inner.run()

    assert run_rounds([outer, lambda _: ["other"]]) == [["result 0", "result 1"], ["other"]]
    assert inner.steps == inner.in_order()


@given(st.integers(0, 500), st.integers(1, 2000), st.integers(1, 12), st.integers(1, 70))
def test_edges_cover_the_positions_in_order(start: int, length: int, blocks: int, multiple: int) -> None:
    edges = block_edges(start, start + length, blocks, multiple)
    positions = [position for first, last in edges for position in range(first, last)]
    assert positions == list(range(start, start + length))
    assert len(edges) == min(blocks, len(range(0, length, multiple)))
    assert not [edge for edge in edges if (edge[0] - start) % multiple]
    units = [len(range(first, last, multiple)) for first, last in edges]
    assert max(units) - min(units) <= 1, f"blocks of {units} multiples"


@pytest.mark.parametrize("wrong", [(5, 5, 1, 1), (5, 4, 1, 1), (0, 5, 0, 1), (0, 5, 1, 0)])
def test_edges_of_nothing_are_refused(wrong: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match=rf"\[{wrong[0]}, {wrong[1]}\) cannot be cut into {wrong[2]} blocks"):
        block_edges(*wrong)


# Models


LONG = {"max_position_embeddings": 1024}
NEW = 4
LENGTHS = [530, 433, 501]


def save_long(name: str, folder: Path, **changes: Any) -> Path:
    """A model of this family for prompts of many blocks."""
    longer = {"n_positions": 1024} if name == "gpt2" else LONG
    return save_model(name, folder, **(longer | changes))


@contextmanager
def in_blocks(folder: Path, blocks: int | None, **changes: Any) -> Iterator[Any]:
    """The model with pool ranks that are threads, its prompts cut into so many blocks."""
    model = load_pooled(folder, blocks=blocks, **changes)
    model.fa_pool._make_pool = ThreadPool
    with model.fa_pool:
        yield model


@contextmanager
def overlaps(model: Any, blocks: int, full: int = 2, forwards: int = 1, decode: int = 0) -> Iterator[None]:
    """What runs inside makes so many forwards of a prompt, each of so many blocks; ``full`` layers are pooled."""
    before = model.fa_pool.stats()
    with pools(model, prefill=full * blocks * forwards, decode=full * decode):
        yield
    after = model.fa_pool.stats()
    made = after["prefill"]["overlapped_forwards"] - before["prefill"]["overlapped_forwards"]
    assert made == (forwards if blocks > 1 else 0), f"{made} forwards overlapped; {after['not_overlapped_reasons']}"


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
        self.reference, self.model, self.full = eager(folder), model, full

    def overlaps(self, blocks: int = 3, **counts: int) -> Any:
        return overlaps(self.model, blocks, self.full, **counts)

    def held(self) -> int:
        """Bytes of keys on the pool ranks."""
        return sum(worker.prefixes.nbytes for worker in self.model.fa_pool._pool.workers.values())


@pytest.fixture(scope="module", params=["llama", "gemma3_text"])
def twins(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Twins]:
    folder = save_long(request.param, tmp_path_factory.mktemp(request.param))
    with in_blocks(folder, 3) as model:
        yield Twins(folder, model, FAMILIES[request.param].full_layers)


IDS, MASK = padded_batch([260, 201, 245])
EMBEDS = torch.randn(3, 260, 48, generator=torch.Generator().manual_seed(1))
ARGUMENTS: dict[str, dict[str, Any]] = {
    "labels": {"input_ids": IDS, "attention_mask": MASK, "labels": IDS.masked_fill(MASK == 0, -100)},
    "hidden states": {"input_ids": IDS, "attention_mask": MASK, "output_hidden_states": True},
    "some logits": {"input_ids": IDS, "attention_mask": MASK, "logits_to_keep": 5},
    "no cache": {"input_ids": IDS, "attention_mask": MASK, "use_cache": False},
    "no mask": {"input_ids": IDS},
    "positions": {"input_ids": IDS, "attention_mask": MASK, "position_ids": (MASK.cumsum(1) - 1).clamp(min=0)},
    "shared positions": {"input_ids": IDS, "position_ids": torch.arange(7, 267)[None]},
    "embeddings": {"inputs_embeds": EMBEDS, "attention_mask": MASK},
    "a tuple": {"input_ids": IDS, "attention_mask": MASK, "return_dict": False, "use_cache": False},
}


@torch.no_grad()
@pytest.mark.parametrize("case", ARGUMENTS)
@pytest.mark.parametrize("direct", [False, True], ids=["model", "decoder"])
def test_arguments(twins: Twins, case: str, direct: bool) -> None:
    given = ARGUMENTS[case]
    if direct and {"labels", "logits_to_keep"} & given.keys():
        pytest.skip("the decoder has no head")
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
    assert twins.held() == 0, "keys of an ended forward are left on the pool ranks"


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
def test_a_prompt_grows_and_is_cropped(twins: Twins) -> None:
    if twins.full < 2:
        pytest.skip("sliding layers cannot be cropped")
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


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"])
def test_copies_run_in_rounds(twins: Twins, way: Callable[[Any], Any]) -> None:
    twin = way(twins.model)
    with twin.fa_pool, torch.no_grad(), overlaps(twin, 3, twins.full):
        assert_close(twin(IDS).logits, twins.reference(IDS).logits)


@torch.no_grad()
@pytest.mark.parametrize(("length", "blocks"), [(60, 1), (128, 2), (191, 2), (192, 3), (600, 8)])
def test_as_many_blocks_as_pay(twins: Twins, length: int, blocks: int) -> None:
    """None shorter than 64 positions, at most eight."""
    with in_blocks(twins.reference.config._name_or_path, None) as model:
        ids = random_ids(1, length)
        with overlaps(model, blocks, twins.full):
            logits = model(ids).logits
    assert_close(logits, twins.reference(ids).logits)


def test_packed_sequences_are_refused_as_in_one_piece(twins: Twins) -> None:
    positions = torch.arange(130).repeat(3, 2)
    with torch.no_grad(), pytest.raises(ValueError, match="packed"):
        twins.model(IDS, position_ids=positions, use_cache=False)
    assert Tensor is not None
