"""What a pooled call costs beside its kernels, measured with real pool ranks and with times made up."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fapool_plugin.base.lease import PoolRank
from fapool_plugin.config import FAPoolConfig
from fapool_plugin.integrations.huggingface import linear as huggingface_linear
from fapool_plugin.integrations.huggingface.calibrate import _lease
from fapool_plugin.measure import calls as calibrate_calls
from fapool_plugin.plan.profile import AttentionCost, Fit, LinearCost, LinkCost, Machine, Profile, Shape
from fapool_plugin.ranks.local import LocalPool
from fapool_plugin.wire.messages import Header, LinkLost, Message
from tests.models import plain, save_model

SHAPE = Shape(hidden=64, layers=2, heads=4, kv_heads=2, head_dim=16, v_head_dim=8, dtype="float32", parameters=1)
FREE = Profile(
    date="2026-01-01",
    quick=True,
    machine=Machine(processor="any", cores=2, torch="2", fapool="0"),
    shape=SHAPE,
    attention=(AttentionCost(kernel="torch_flash", dtype="float32", threads=1, prefill=Fit(), decode=Fit()),),
    linear=(LinearCost(threads=1, prefill=Fit(), decode=Fit()),),
    link=LinkCost(to_rank=Fit(), to_base=Fit()),
    activation_s=0.0,
)


@pytest.fixture
def rank() -> Iterator[PoolRank]:
    pool = LocalPool(FAPoolConfig(pool_ranks=1))
    try:
        yield _lease(pool, torch.device("cpu"))[0]
    finally:
        pool.close()


@pytest.mark.processes
@pytest.mark.timeout(120)
def test_what_is_known_already_is_taken_off(rank: PoolRank, monkeypatch: pytest.MonkeyPatch) -> None:
    before, threads = rank.counters, torch.get_num_threads()
    everything = calibrate_calls.measure_calls(rank, FREE)
    assert all(0 <= seconds < 1 for _, seconds in everything), f"{everything}"
    assert min(everything.ask_s, everything.merge_s, everything.own_s, everything.rank_s) > 0, f"{everything}"
    # The same calls are nothing but kernels if kernels are said to take that long.
    slow = Fit(a=1.0)
    costs = tuple(cost.model_copy(update={"decode": slow}) for cost in FREE.attention)
    nothing = calibrate_calls.measure_calls(rank, FREE.model_copy(update={"attention": costs}))
    assert (nothing.own_s, nothing.rank_s) == (0.0, 0.0), f"{nothing}, before it was {everything}"
    assert nothing.ask_s > 0
    assert rank.counters is before, "the measurement was counted"
    assert before.calls == 0
    assert torch.get_num_threads() == threads


def test_a_rank_is_kept_busy() -> None:
    """One request takes it a tenth of a second: the two that find that out are over when the block begins."""
    asked: list[int] = []
    answered: list[int] = []

    class Rank:
        link = SimpleNamespace(drain=lambda messages: None)

        def ask(self, header: Header, tensors: Any, expected: Any) -> int:
            assert [t.numel() for t in tensors[1:]] == [header.q_elements, header.k_elements, header.v_elements]
            asked.append(len(asked))
            return asked[-1]

        def answer(self, call: int) -> Message:
            answered.append(call)
            return Message(Header(extra=100_000_000), [])

    rank: Any = Rank()
    with calibrate_calls.kept_busy(rank, SHAPE, 0.5):
        assert answered == [0, 1]
        assert 5 <= len(asked) - 2 <= 10, f"{len(asked) - 2} requests under way"
    assert answered == asked


@pytest.mark.processes
@pytest.mark.timeout(120)
def test_a_busy_rank_answers(rank: PoolRank) -> None:
    with calibrate_calls.kept_busy(rank, SHAPE, 0.05):
        rank.check()
    assert calibrate_calls.measure_calls(rank, FREE).ask_s > 0, "an answer was left over"


@pytest.mark.processes
@pytest.mark.timeout(120)
def test_a_lost_rank_is_told_of(rank: PoolRank) -> None:
    rank.link.close()
    with pytest.raises(LinkLost):
        calibrate_calls.measure_calls(rank, FREE)


@pytest.mark.parametrize(("slow", "expected"), [(1.25, 1.25), (0.8, 1.0)])
def test_the_linear_part_beside_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, slow: float, expected: float
) -> None:
    busy = False

    @contextmanager
    def others(seconds: float) -> Iterator[None]:
        nonlocal busy
        busy = True
        yield
        busy = False

    def timed(self: Any, sequences: int, tokens: int, limit_s: float) -> Callable[[], float]:
        return lambda: slow if busy else 1.0

    monkeypatch.setattr(huggingface_linear._Model, "timed", timed)
    assert huggingface_linear.measure_beside(plain(save_model("llama", tmp_path)), others) == expected
