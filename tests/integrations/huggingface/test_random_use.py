"""Random sequences of what a user does in a notebook, beside the same with the plain model.

A pool rank is killed now and then. Each forward gives the plain model's logits; a loss may be refused only after
something that no recorded input tells. The short form is one walk for each home of keys; more are ``full``.
"""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kv_home import ON_THE_POOL, cut, in_threads, kill
from tests.models import Pair, assert_close, assert_same_tokens, greedily, padded_batch, random_ids

pytestmark = [
    pytest.mark.processes,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("one_thread_each"),
]
HOMES: dict[str, dict[str, Any]] = {"base": {"timeout_s": 2.0}, "pool": ON_THE_POOL}
MOST_COLUMNS, MOST_ROWS = 220, 4


class Walk:
    """Both models, a cache of each, and what they were given so far.

    Args:
        pair: the models.
        seed: of all choices.
    """

    def __init__(self, pair: Pair, seed: int) -> None:
        self.pair, self.choose = pair, random.Random(seed)
        self.done: list[str] = []
        self.begin()

    @property
    def models(self) -> tuple[Any, Any]:
        return self.pair.model, self.pair.reference

    @property
    def rows(self) -> int:
        return len(self.ids)

    def begin(self) -> None:
        """A new prompt, of some rows and lengths, padded on the left."""
        lengths = [self.choose.choice([5, 14, 30, 61, 90]) for _ in range(self.choose.randint(1, 3))]
        self.ids, self.mask = padded_batch(lengths)
        self.may_refuse, self.caches = False, list[Any]([None, None])
        self._forward(self.ids, self.mask)

    def step(self) -> None:
        count = self.choose.choice([1, 1, 1, 2, 7, 33])
        new = random_ids(self.rows, count, seed=self.choose.randrange(1000))
        self.ids, self.mask = torch.cat([self.ids, new], 1), self._longer(count)
        self._forward(new, self.mask)

    def step_of_embeddings(self) -> None:
        new = random_ids(self.rows, 2, seed=self.choose.randrange(1000))
        self.ids, self.mask = torch.cat([self.ids, new], 1), self._longer(2)
        embeds = self.pair.reference.get_input_embeddings()(new)
        self._forward(None, self.mask, inputs_embeds=embeds)

    def step_that_looks(self) -> None:
        """At all hidden states, or at attention weights, which no pool rank returns."""
        new = random_ids(self.rows, 1, seed=self.choose.randrange(1000))
        self.ids, self.mask = torch.cat([self.ids, new], 1), self._longer(1)
        self._forward(new, self.mask, **{self.choose.choice(["output_attentions", "output_hidden_states"]): True})

    def step_with_a_hook(self) -> None:
        """Which alters what a layer returns, or only looks at it."""
        alters = self.choose.random() < 0.5

        def hook(module: Any, args: Any, output: Tensor) -> Tensor | None:
            return output * 1.25 if alters else None

        made = [model.model.layers[0].register_forward_hook(hook) for model in self.models]
        self.step()
        for handle in made:
            handle.remove()
        self.may_refuse |= alters

    def step_in_another_mode(self) -> None:
        """Training mode, or without no_grad: local, and keys are where they were."""
        for model in self.models:
            model.train()
        self.step()
        for model in self.models:
            model.eval()
        self.may_refuse = True

    def generate(self) -> None:
        count, found = self.choose.randint(2, 5), []
        new = random_ids(self.rows, 1, seed=self.choose.randrange(1000))
        self.ids, self.mask = torch.cat([self.ids, new], 1), self._longer(1)
        for at, model in enumerate(self.models):
            more = greedily(count, self.mask, past_key_values=self.caches[at], return_dict_in_generate=True)
            found.append(model.generate(self.ids, **more))
        assert_same_tokens(found[0].sequences, found[1].sequences)
        self.ids, self.mask = found[1].sequences[:, :-1], self._longer(count - 1)
        self.caches = [output.past_key_values for output in found]

    def generate_anew(self) -> None:
        """By other strategies, from the same seed; caches are generate()'s own."""
        more = self.choose.choice(
            [{"num_beams": 2}, {"do_sample": True, "top_k": 5}, {"prompt_lookup_num_tokens": 3}, {"num_beams": 3}]
        )
        ids, mask = padded_batch([40] if "prompt_lookup_num_tokens" in more else [40, 23])
        answers = []
        for model in self.models:
            torch.manual_seed(11)
            answers.append(model.generate(ids, **greedily(4, mask) | more))
        assert_same_tokens(*answers)

    def train(self) -> None:
        """A step of training beside the sequence."""
        ids, mask = padded_batch([40, 31])
        losses = []
        with torch.enable_grad():
            for model in self.models:
                output = model(ids, attention_mask=mask, use_cache=False)
                losses.append((output.logits.float() * mask[..., None]).square().mean())
                losses[-1].backward()
        assert_close(*(loss.detach() for loss in losses), what="losses")
        for mine, other in zip(*(list(model.parameters()) for model in self.models), strict=True):
            assert_close(mine.grad, other.grad, what="gradients", tolerance=1e-4)
            mine.grad = other.grad = None

    def another_thread(self) -> None:
        """Two calls at a time, with caches of their own."""

        def call(seed: int) -> Tensor:
            with torch.no_grad():
                cache = self.pair.model(random_ids(1, 40, seed=seed), use_cache=True).past_key_values
                logits: Tensor = self.pair.model(random_ids(1, 3, seed=seed + 1), past_key_values=cache).logits
                return logits

        with ThreadPoolExecutor(2) as threads:
            answers = list(threads.map(call, (3, 5)))
        for seed, logits in zip((3, 5), answers, strict=True):
            cache = self.pair.reference(random_ids(1, 40, seed=seed), use_cache=True).past_key_values
            expected = self.pair.reference(random_ids(1, 3, seed=seed + 1), past_key_values=cache).logits
            assert_close(logits, expected, what="a thread's logits")

    def crop(self) -> None:
        real = int(self.mask.sum(1).min())
        count = self.choose.randint(0, max(0, min(40, real - 2)))
        self._both(lambda cache: cache.crop(-count))
        self.ids, self.mask = self.ids[:, : self.ids.shape[1] - count], self.mask[:, : self.mask.shape[1] - count]

    def reorder(self) -> None:
        rows = torch.tensor([self.choose.randrange(self.rows) for _ in range(self.rows)])
        self._both(lambda cache: cache.reorder_cache(rows))
        self.ids, self.mask = self.ids[rows], self.mask[rows]

    def select(self) -> None:
        rows = torch.tensor(self.choose.sample(range(self.rows), self.choose.randint(1, self.rows)))
        self._both(lambda cache: cache.batch_select_indices(rows))
        self.ids, self.mask = self.ids[rows], self.mask[rows]

    def repeat(self) -> None:
        if self.rows * 2 <= MOST_ROWS:
            self._both(lambda cache: cache.batch_repeat_interleave(2))
            self.ids, self.mask = (x.repeat_interleave(2, dim=0) for x in (self.ids, self.mask))

    def copies(self) -> None:
        how = self.choose.choice([copy.deepcopy, copy.copy, lambda cache: pickle.loads(pickle.dumps(cache))])
        self.caches = [how(self.caches[0]), copy.deepcopy(self.caches[1])]

    def branch(self) -> None:
        """A snapshot of tensors, a branch, and back."""
        saved = [[(layer.keys, layer.values) for layer in cache.layers] for cache in self.caches]
        ids, mask = self.ids, self.mask
        self.choose.choice([self.crop, self.reorder, self.step])()
        self.step()
        for cache, layers in zip(self.caches, saved, strict=True):
            for layer, (keys, values) in zip(cache.layers, layers, strict=True):
                layer.keys, layer.values = keys, values
        self.ids, self.mask, self.may_refuse = ids, mask, True

    def edit(self) -> None:
        how, index = self.choose.randrange(3), self.choose.randrange(2)

        def change(cache: Any) -> None:
            layer = cache.layers[index]
            if how == 0:
                layer.keys = layer.keys * 0.5
            elif how == 1:
                layer.values[:, :, 1:4] += 1.0
            else:
                layer.values.data[:, :, 1:4].mul_(2.0)

        self._both(change)
        self.may_refuse = True

    def write_weights(self) -> None:
        index, factor = self.choose.randrange(2), self.choose.choice([0.9, 1.1])
        for model in self.models:
            model.model.layers[index].mlp.up_proj.weight.data[3] *= factor
        self.may_refuse = True

    def hide(self) -> None:
        """From now on some tokens at the beginning are not seen."""
        first = int(self.mask.argmax(1).min()) + self.choose.randint(1, 4)
        if int(self.mask[:, first:].sum(1).min()) > 1:
            self.mask = self.mask.clone()
            self.mask[:, :first] = 0

    def interrupt(self) -> None:
        """In mid-forward: the cache is as before, where a plain one is half done."""

        def stop(*_: Any) -> None:
            raise KeyboardInterrupt

        hook = self.pair.model.model.layers[self.choose.randrange(2)].register_forward_hook(stop)
        try:
            with pytest.raises(KeyboardInterrupt):
                self.pair.model(
                    random_ids(self.rows, 2),
                    attention_mask=self._longer(2),
                    past_key_values=self.caches[0],
                    use_cache=True,
                )
        finally:
            hook.remove()

    def lose(self) -> None:
        kill(1)
        cut(self.pair.model)  # where ranks are threads

    def walk(self, count: int) -> None:
        """So many things, each followed by a step."""
        ways: list[Callable[[], None]] = [
            self.step, self.step, self.generate, self.generate_anew, self.train, self.another_thread, self.crop,
            self.reorder, self.select, self.repeat, self.copies, self.branch, self.edit, self.write_weights, self.hide,
            self.interrupt, self.lose, self.begin, self.step_of_embeddings, self.step_that_looks,
            self.step_with_a_hook, self.step_in_another_mode,
        ]  # fmt: skip
        for _ in range(count):
            way = self.choose.choice(ways)
            self.done.append(way.__name__)
            try:
                if self.ids.shape[1] > MOST_COLUMNS or self.mask.sum(1).min() < 2:
                    self.begin()
                way()
                self.step()
            except RuntimeError as error:
                if "no replay brings them back" not in str(error) or not self.may_refuse:
                    raise
                self.done.append("refused")
                self.begin()

    def _longer(self, count: int) -> Tensor:
        return torch.cat([self.mask, self.mask.new_ones(self.rows, count)], 1)

    def _both(self, change: Callable[[Any], object]) -> None:
        for cache in self.caches:
            change(cache)

    def _forward(self, ids: Tensor | None, mask: Tensor, **more: Any) -> None:
        outputs = [
            model(ids, attention_mask=mask, past_key_values=cache, use_cache=True, **more)
            for model, cache in zip(self.models, self.caches, strict=True)
        ]
        self.caches = [output.past_key_values for output in outputs]
        real = mask[:, -outputs[0].logits.shape[1] :] == 1
        assert_close(*(output.logits[real] for output in outputs), what=f"logits after {self.done[-12:]}")


@contextmanager
def walking(folder: Path, home: str, seed: int, opened: Any = in_threads) -> Iterator[Walk]:
    with opened(folder, pool_ranks=2, **HOMES[home]) as pair, torch.no_grad():
        walk = Walk(pair, seed)
        try:
            yield walk
        except BaseException:
            print(f"{home}, seed {seed}: {walk.done}")
            raise


@pytest.mark.parametrize("home", HOMES)
def test_a_walk(folder: Path, home: str) -> None:
    with walking(folder, home, 1) as walk:
        walk.walk(40)
        stats = walk.pair.model.fa_pool.stats()
    assert stats["decode"]["pooled_calls"] > 20


@pytest.mark.full
@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("seed", range(2, 14))
def test_long_walks(folder: Path, home: str, seed: int) -> None:
    with walking(folder, home, seed, Pair.of if seed % 2 else in_threads) as walk:
        walk.walk(150)
