"""generate() and plain forwards in all their forms: pooled results equal those of the model's own eager attention."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models import (
    Pair,
    assert_close,
    assert_same_tokens,
    eager,
    greedily,
    logits_equal,
    padded_batch,
    plain,
    pooled,
    pools,
    random_ids,
    save_model,
)

pytestmark = pytest.mark.usefixtures("one_thread_each")

NEW = 8
STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.8},
    "beams": {"num_beams": 3},
    "beam_sampling": {"num_beams": 3, "do_sample": True},
    "several_samples": {"do_sample": True, "num_return_sequences": 3},
    "several_beams": {"num_beams": 4, "num_return_sequences": 2},
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with Pair.of(save_model("llama", tmp_path_factory.mktemp("llama"))) as pair:
        yield pair


def long_batch() -> tuple[Tensor, Tensor]:
    """Ids and mask of three sequences, padded on the left."""
    return padded_batch([22, 40, 31])


@contextmanager
def recorded_forwards(model: Any) -> Iterator[list[int]]:
    """The number of new tokens in every forward."""
    lengths: list[int] = []
    hook = model.get_input_embeddings().register_forward_hook(lambda _, args, out: lengths.append(out.shape[1]))
    yield lengths
    hook.remove()


@pytest.mark.processes
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategies(pair: Pair, strategy: str) -> None:
    ids, mask = long_batch()
    arguments = greedily(NEW, mask) | STRATEGIES[strategy]
    tokens, expected = pair.generate(ids, prefill=1, decode=NEW - 1, **arguments)
    assert_same_tokens(tokens, expected)


@pytest.mark.processes
def test_prompt_lookup(pair: Pair) -> None:
    ids = random_ids(1, 120)  # nearly every token occurs, so candidates are found
    with recorded_forwards(pair.reference) as lengths:
        expected = pair.reference.generate(ids, **greedily(NEW, prompt_lookup_num_tokens=3))
    assert max(lengths[1:]) > 1, "no candidates were looked up"
    with pair.forwards(prefill=1, decode=len(lengths) - 1):
        tokens = pair.model.generate(ids, **greedily(NEW, prompt_lookup_num_tokens=3))
    assert_same_tokens(tokens, expected)


@pytest.mark.processes
@pytest.mark.parametrize("assistant_is_pooled", [False, True])
def test_assisted_decoding(pair: Pair, tmp_path: Path, assistant_is_pooled: bool) -> None:
    """The assistant is right at times, so that candidates are both kept and cropped."""
    ids, arguments = random_ids(1, 40), greedily(16)
    assistant = plain(pair.folder)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    assistant.save_pretrained(tmp_path)
    with recorded_forwards(pair.reference) as lengths:
        expected = pair.reference.generate(ids, assistant_model=eager(tmp_path), **arguments)
    forwards = len(lengths)
    assert 2 < forwards < 16, f"{forwards} forwards for 16 tokens: some candidates must be kept, some cropped"

    before = pair.model.fa_pool.stats()
    if assistant_is_pooled:
        with pooled(tmp_path, pool_ranks=1) as pooled_assistant:
            tokens = pair.model.generate(ids, assistant_model=pooled_assistant, **arguments)
            helped = pooled_assistant.fa_pool.stats()
        assert helped["prefill"]["pooled_calls"] > 0
        assert helped["decode"]["pooled_calls"] > 0
        assert helped["faults"] == 0
    else:
        tokens = pair.model.generate(ids, assistant_model=eager(tmp_path), **arguments)
    assert_same_tokens(tokens, expected)
    after = pair.model.fa_pool.stats()
    made = [after[phase]["pooled_calls"] - before[phase]["pooled_calls"] for phase in ("prefill", "decode")]
    assert sum(made) == pair.layers * forwards, f"pooled calls (prefill, decode) {made} in {forwards} forwards"
    assert min(made) > 0, made
    assert after["faults"] == after["stale"] == 0


@pytest.mark.processes
@pytest.mark.parametrize("beams", [1, 3])
def test_continuing_on_a_returned_cache(pair: Pair, beams: int) -> None:
    ids, mask = long_batch()
    if beams > 1:
        ids, mask = ids[:1], mask[:1]
    more, results = random_ids(beams if beams > 1 else 3, 9, seed=1), []
    several = {"num_beams": beams, "num_return_sequences": beams}
    for net, factor in ((pair.reference, 0), (pair.model, 1)):
        first = net.generate(ids, **greedily(4, mask, return_dict_in_generate=True, **several))
        longer = torch.cat([first.sequences, more], 1)
        rows = mask.repeat_interleave(beams, 0)
        longer_mask = torch.cat([rows, rows.new_ones(len(rows), longer.shape[1] - rows.shape[1])], 1)
        # The first answer's last token was never a key: it and nine more are the second call's prompt.
        with pair.forwards(prefill=factor, decode=3 * factor):
            arguments = greedily(4, longer_mask, past_key_values=first.past_key_values)
            results.append(net.generate(longer, **arguments))
    assert_same_tokens(results[1], results[0])


@pytest.mark.processes
def test_a_copied_prompt_cache_serves_twice(pair: Pair) -> None:
    """Both copies live at once, and each goes its own way; the third call goes on where the first one ended."""
    prompt = random_ids(1, 32)
    answers: list[Tensor] = []
    for net, factor in ((pair.reference, 0), (pair.model, 1)):
        with torch.no_grad():
            cache = net(prompt, use_cache=True).past_key_values
        copies = [copy.deepcopy(cache), copy.deepcopy(cache)]
        for turn, serving in enumerate([copies[0], copies[1], copies[0]]):
            start = prompt if turn < 2 else answers[-2]
            ids = torch.cat([start, random_ids(1, 7, seed=turn)], 1)
            with pair.forwards(prefill=factor, decode=factor * (NEW - 1)):
                answers.append(net.generate(ids, past_key_values=serving, **greedily(NEW)))
    for answer, expected in zip(answers[3:], answers[:3], strict=True):
        assert_same_tokens(answer, expected)


EDITS: dict[str, tuple[Any, Any]] = {
    # What is done to the cache of (2, 40) tokens, and what it then stands for.
    "crop": (lambda cache: cache.crop(-10), lambda ids: ids[:, :30]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), lambda ids: ids.repeat_interleave(2, 0)),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([1])), lambda ids: ids[1:]),
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), lambda ids: ids.flip(0)),
    "reset": (lambda cache: cache.reset(), lambda ids: ids[:, :0]),
}


@pytest.mark.processes
@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_cache(pair: Pair, edit: str) -> None:
    """What pool ranks hold of it is out of date, and must not be used."""
    ids, (change, stands_for) = random_ids(2, 40), EDITS[edit]
    past = stands_for(ids)
    more = random_ids(len(past), 20, seed=1)
    with torch.no_grad(), pair.forwards(prefill=2):
        cache = pair.model(ids, use_cache=True).past_key_values
        change(cache)
        logits = pair.model(more, past_key_values=cache).logits
    with torch.no_grad():
        expected = pair.reference(torch.cat([past, more], 1)).logits[:, past.shape[1] :]
    assert_close(logits, expected)


@pytest.mark.processes
def test_rows_of_a_beam_cache_that_are_no_beams_any_more(pair: Pair) -> None:
    """One row of each prompt is kept; reordering these exchanges whole prompts."""
    prompts, order = random_ids(3, 40), torch.tensor([2, 0, 1])
    first, second = random_ids(3, 9, seed=1), random_ids(3, 9, seed=2)
    given = greedily(2, num_beams=3, return_dict_in_generate=True)
    cache = pair.model.generate(prompts, **given).past_key_values
    cache.crop(40 - cache.get_seq_length())
    cache.batch_select_indices(torch.tensor([0, 3, 6]))
    with torch.no_grad():
        pair.model(first, past_key_values=cache)
        cache.reorder_cache(order)
        logits = pair.model(second, past_key_values=cache).logits
        expected = pair.reference(torch.cat([torch.cat([prompts, first], 1)[order], second], 1)).logits
    assert_close(logits, expected[:, 49:])


@pytest.mark.processes
def test_prefill_in_chunks(pair: Pair) -> None:
    """The whole prompt is long, so its first chunk is pooled although that is short."""
    ids, mask = long_batch()
    arguments = greedily(NEW, mask, prefill_chunk_size=8)
    tokens, expected = pair.generate(ids, prefill=5, decode=NEW - 1, **arguments)
    assert_same_tokens(tokens, expected)


class Collector:
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


@pytest.mark.processes
def test_streamer(pair: Pair) -> None:
    ids, collector = random_ids(1, 40), Collector()
    with pair.forwards(prefill=1, decode=NEW - 1):
        pair.model.generate(ids, **greedily(NEW, streamer=collector))
    assert collector.ended
    assert collector.tokens == pair.reference.generate(ids, **greedily(NEW))[0].tolist()


@pytest.mark.processes
def test_inputs_embeds(pair: Pair) -> None:
    ids, mask = long_batch()
    embeds, results = pair.reference.get_input_embeddings()(ids).detach(), []
    for net, factor in ((pair.reference, 0), (pair.model, 1)):
        with pair.forwards(prefill=factor, decode=factor * (NEW - 1)):
            results.append(net.generate(inputs_embeds=embeds, **greedily(NEW, mask)))
    assert_same_tokens(results[1], results[0])
    with torch.no_grad():
        with pair.forwards(prefill=1):
            logits = pair.model(inputs_embeds=embeds, attention_mask=mask).logits
        assert_close(logits[mask == 1], pair.reference(ids, attention_mask=mask).logits[mask == 1])


@pytest.mark.processes
@pytest.mark.parametrize("batch", [1, 3, 64])
@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_uneven_batches(pair: Pair, batch: int, left: bool) -> None:
    lengths = [40, 1, 17] if batch == 3 else [40 - 7 * i % 40 for i in range(batch)]
    ids, mask = padded_batch(lengths, left=left)
    with pair.forwards(prefill=1):
        logits_equal(pair.model, pair.reference, ids, mask)
    if left:
        tokens, expected = pair.generate(ids, prefill=1, decode=2, **greedily(3, mask))
        assert_same_tokens(tokens, expected)


@pytest.mark.processes
def test_arguments_by_position(pair: Pair) -> None:
    """forward(input_ids, attention_mask) means the same as with keywords."""
    ids, mask = long_batch()
    with torch.no_grad():
        with pair.forwards(prefill=1):
            logits = pair.model(ids, mask).logits
        expected = pair.reference(ids, mask).logits
    assert_close(logits[mask == 1], expected[mask == 1])


@pytest.mark.processes
def test_two_models_in_one_process(pair: Pair, tmp_path: Path) -> None:
    """Their forwards alternate; each keeps its own keys on its own ranks."""
    ids = random_ids(2, 40)
    with Pair.of(save_model("gpt2", tmp_path, seed=5), pool_ranks=1) as other, torch.no_grad():
        caches: list[Any] = [None, None]
        for start in (0, 20):
            for at, one in enumerate((pair, other)):
                with one.forwards(prefill=1):
                    part = ids[:, start : start + 20]
                    output = one.model(part, past_key_values=caches[at], use_cache=True)
                caches[at] = output.past_key_values
                assert_close(output.logits, one.reference(ids).logits[:, start : start + 20])
        tokens, expected = other.generate(ids, prefill=1, decode=NEW - 1, **greedily(NEW))
    assert_same_tokens(tokens, expected)


@pytest.mark.processes
def test_hidden_states(pair: Pair) -> None:
    ids, mask = long_batch()
    with torch.no_grad():
        expected = pair.reference(ids, attention_mask=mask, output_hidden_states=True)
        with pair.forwards(prefill=1):
            output = pair.model(ids, attention_mask=mask, output_hidden_states=True)
    assert len(output.hidden_states) == pair.layers + 1
    for states, wanted in zip(output.hidden_states, expected.hidden_states, strict=True):
        assert_close(states[mask == 1], wanted[mask == 1], what="hidden states")


@pytest.mark.processes
def test_an_error_inside_a_forward_does_no_harm(pair: Pair) -> None:
    ids = random_ids(2, 40)

    def fail(*_: object) -> None:
        raise InterruptedError("in the middle")

    hook = pair.model.model.layers[1].register_forward_pre_hook(fail)
    with torch.no_grad(), pytest.raises(InterruptedError):
        pair.model(ids)
    hook.remove()
    with pair.forwards(prefill=1):
        logits_equal(pair.model, pair.reference, ids)


@pytest.mark.processes
def test_bfloat16_within_its_own_noise(pair: Pair) -> None:
    ids, mask = long_batch()
    stock = plain(pair.folder, attn_implementation="sdpa", dtype=torch.bfloat16)
    with pooled(pair.folder, {"dtype": torch.bfloat16}) as model, torch.no_grad():
        exact = pair.reference(ids, attention_mask=mask).logits
        with pools(model, prefill=pair.layers, decode=0):
            logits = model(ids, attention_mask=mask).logits
        with pools(model, prefill=pair.layers, decode=pair.layers * (NEW - 1)):
            tokens = model.generate(ids, **greedily(NEW, mask))
        usual = stock(ids, attention_mask=mask).logits
    assert logits.dtype == torch.bfloat16
    assert tokens.shape == (3, 40 + NEW)
    error, noise = ((given.float() - exact)[mask == 1].abs() for given in (logits, usual))
    assert noise.max() > 0
    assert error.max() <= 1.5 * noise.max(), f"largest error {error.max():.3g}, sdpa's {noise.max():.3g}"
    assert error.mean() <= 1.2 * noise.mean(), f"mean error {error.mean():.3g}, sdpa's {noise.mean():.3g}"
