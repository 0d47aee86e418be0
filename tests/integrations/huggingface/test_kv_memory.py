"""Keys that live on the pool, and a base whose memory ends in a forward: a refusal, with every layer as it was."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fapool_plugin.base.admission import PoolMemoryError
from fapool_plugin.base.owned import OwnedKeys
from tests.kv_home import LENGTHS, ON_THE_POOL, Steps
from tests.models import Pair, padded_batch, random_ids, save_model

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120), pytest.mark.usefixtures("one_thread_each")]


@pytest.fixture
def no_fetch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys that come to the base would be counted against the memory that it lacks."""

    def fetch(*_: Any) -> Any:
        raise AssertionError("keys were fetched")

    monkeypatch.setattr(OwnedKeys, "fetch", fetch)


def too_much(kind: str) -> Callable[..., Any]:
    """What fails as an allocator does."""

    def fail(*_: Any, **__: Any) -> Any:
        if kind == "torch":
            torch.empty(1 << 55, dtype=torch.uint8)
        raise MemoryError

    return fail


@pytest.mark.usefixtures("no_fetch")
@pytest.mark.parametrize("kind", ["torch", "python"])
@pytest.mark.parametrize("blocks", [1, 4])
def test_memory_that_ends_in_a_forward_is_a_refusal(folder: Path, kind: str, blocks: int) -> None:
    with Pair.of(folder, pool_ranks=2, blocks=blocks, **ON_THE_POOL) as pair, torch.no_grad():
        ids, mask = padded_batch([200, 131, 200])
        mlp = pair.model.model.layers[1].mlp
        mlp.forward, whole = too_much(kind), mlp.forward
        with pytest.raises(
            PoolMemoryError, match=r"memory ended in a forward of 3 sequences of 200 tokens .* free now"
        ):
            pair.model(ids, attention_mask=mask, use_cache=True)
        assert pair.model.fa_pool.stats()["kv_bytes"] == {"base": 0, "ranks": {}}
        mlp.forward = whole
        steps = Steps(pair, ids, mask)
        steps(1, "a step")
        length, mask = steps.cache.get_seq_length(), steps.mask
        mlp.forward = too_much(kind)
        for count in (1, 70):
            more = torch.cat([mask, mask.new_ones(3, count)], dim=1)
            with pytest.raises(PoolMemoryError, match=f"of 3 sequences of {length + count} tokens.*as it was before"):
                pair.model(random_ids(3, count), attention_mask=more, past_key_values=steps.cache)
            assert steps.cache.get_seq_length() == length
            assert steps.are_away()
        mlp.forward = whole
        steps(70, "what fits")
        steps(1, "as if nothing had been")
        stats = pair.model.fa_pool.stats()
    assert (stats["replays"], stats["faults"]) == (0, 0)


def test_a_refusal_holds_nothing_of_the_forward(pair: Pair) -> None:
    """Code that catches it needs the memory for what does fit."""
    kept: list[Any] = []

    def fail(_: Any, args: Any) -> None:
        class Large:
            """Of which it is seen when it goes."""

        large = Large()
        kept.append(weakref.ref(large))
        torch.empty(1 << 55, dtype=torch.uint8)

    hook = pair.model.model.layers[1].register_forward_pre_hook(fail)
    with torch.no_grad(), pytest.raises(PoolMemoryError) as raised:
        pair.model(random_ids(2, 90), use_cache=True)
    hook.remove()
    assert raised.value.__context__ is not None
    assert kept[0]() is None


class Failing:
    """A hook that is no function."""

    def __call__(self, *_: Any) -> None:
        self.fail()

    def fail(self) -> None:
        raise ZeroDivisionError("the user's")


@torch.no_grad()
def decorated(*_: Any) -> None:
    raise ZeroDivisionError("the user's")


@pytest.mark.usefixtures("no_fetch")
@pytest.mark.parametrize("hook", [Failing(), Failing().__call__, functools.partial(Failing().__call__), decorated])
@pytest.mark.parametrize("before", [False, True])
def test_a_hook_that_fails_is_not_for_want_of_keys(pair: Pair, hook: Any, *, before: bool) -> None:
    calls = 0

    def counting(*_: Any) -> None:
        nonlocal calls
        calls += 1

    with torch.no_grad():
        steps = Steps(pair, *padded_batch(LENGTHS))
        layer = pair.model.model.layers[1]
        first = pair.model.model.layers[0].register_forward_hook(counting)
        second = (layer.register_forward_pre_hook if before else layer.register_forward_hook)(hook)
        more = torch.cat([steps.mask, steps.mask.new_ones(3, 1)], dim=1)
        with pytest.raises(ZeroDivisionError, match="the user's"):
            pair.model(random_ids(3, 1), attention_mask=more, past_key_values=steps.cache)
        first.remove()
        second.remove()
        assert calls == 1, "times that the forward was made"
        assert steps.are_away()
        steps(1, "as if nothing had been")


_LIMITED = """
import json, resource, sys
import torch
from fapool_plugin import FAPoolForCausalLM
from fapool_plugin.base.admission import PoolMemoryError
from tests.models import random_ids

MIB, (folder, limit, *batches) = 2**20, sys.argv[1:]
torch.set_num_threads(1)
fa_pool = {"pool_ranks": 3, "kv_home": "pool", "threshold": 128, "activation": "length", "memory_limit_mib": 32}
model = FAPoolForCausalLM.from_pretrained(folder, fa_pool=fa_pool | {"wave_mib": 16}).eval()


def ask(rows):
    ids = random_ids(rows, 250)
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False, pad_token_id=0)


with model.fa_pool:
    before = ask(2).tolist()
    with open("/proc/self/status") as status:
        used = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (used + int(limit) * MIB, resource.RLIM_INFINITY))
    told = []
    for rows in batches:
        try:
            told.append(len(ask(int(rows))))
        except PoolMemoryError as error:
            told.append(str(error))
        assert ask(2).tolist() == before
print(json.dumps(told))
"""


@pytest.mark.full
@pytest.mark.timeout(600)
def test_a_batch_that_just_does_not_fit_is_refused(tmp_path: Path) -> None:
    """With 96 MiB at 3 ranks and what 160 MiB of RLIMIT_DATA leave of the base: any batch is answered, or refused."""
    shape = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 8, "num_key_value_heads": 8}
    folder = save_model("llama", tmp_path, head_dim=32, num_hidden_layers=4, **shape)
    # 2 MiB of keys a row.
    batches = [*range(60, 108, 4), 200]
    command = [sys.executable, "-c", _LIMITED, str(folder), "160", *(str(rows) for rows in batches)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    answered = [rows for rows, one in zip(batches, told, strict=True) if one == rows]
    refused = [one for one in told if isinstance(one, str)]
    assert len(answered) + len(refused) == len(batches), told
    # More than the ranks alone have room for; and what is refused says what would fit, or that memory ended.
    assert max(answered) > 48, told
    assert refused, told
    assert all(("give about" in one) or ("memory ended" in one) for one in refused), refused
