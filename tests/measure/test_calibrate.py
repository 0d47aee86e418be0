"""Measured costs are those that were made, under a clock that the tests turn; a profile comes out of a real model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fapool_plugin.devices.clock import Clock as DeviceClock
from fapool_plugin.integrations.huggingface import calibrate as huggingface_calibrate
from fapool_plugin.integrations.huggingface.calibrate import calibrate_model, default_path, keep, shape_of_path
from fapool_plugin.measure import attention, calibrate
from fapool_plugin.plan.profile import Fit, Profile, Shape
from fapool_plugin.wire.inline import Inline
from fapool_plugin.wire.messages import Header, LinkLost, Message, Status
from tests.models import plain, save_model, workers
from tests.plan.test_cost import profile
from tests.recorded_streams import Ticks

SHAPE = Shape(hidden=48, layers=2, heads=6, kv_heads=3, head_dim=8, v_head_dim=12, dtype="float32", parameters=1)


class Clock:
    """Time that passes only when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def perf_counter(self) -> float:
        return self.now

    def process_time(self) -> float:
        """A third of the time this process computes."""
        return self.now / 3

    def after(self, seconds: Callable[..., float]) -> Callable[..., None]:
        """A hook that lets time pass."""

        def hook(*args: Any) -> None:
            self.now += seconds(*args)

        return hook


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (attention, calibrate):
        monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def assert_fit(found: Fit, rel: float = 1e-6, **expected: float) -> None:
    for name in "abc":
        wanted = expected.get(name, 0.0)
        assert getattr(found, name) == pytest.approx(wanted, rel=rel, abs=1e-12), f"{name} of {found}, not {wanted}"
    assert found.error < rel, f"largest relative error {found.error:.3g} of exact points"


# Samples.


def test_a_sample_is_a_median_with_its_spread() -> None:
    seconds = iter([9.0, 3.0, 1.0, 2.0])  # the first warms up
    assert calibrate.sample(7, lambda: next(seconds)) == (7, 2.0, 1.0)


def test_short_runs_are_repeated() -> None:
    runs = itertools.count()
    calibrate.sample(1, lambda: 0.001 + 0 * next(runs))
    assert next(runs) >= 3 * 10


def test_sizes_grow_until_the_budget_is_spent(clock: Clock) -> None:
    def timed_at(size: int) -> Callable[[], float]:
        def timed() -> float:
            clock.now += size**2
            return float(size**2)

        return timed

    def taken(budget_s: float, at_least: int = 1) -> list[float]:
        return [s.n for s in calibrate.ascend([1, 2, 4, 8], timed_at, budget_s, at_least, growth=2)]

    assert taken(4 * (1 + 4 + 16 + 64)) == [1, 2, 4, 8]
    assert taken(4 * (1 + 4 + 16 + 64) - 1) == [1, 2, 4]
    assert taken(1) == [1]
    assert taken(1, at_least=3) == [1, 2, 4]


@pytest.mark.parametrize(("threads", "budget_s"), [([], 1.0), ([1, 0], 1.0), ([1], 0.0), ([1], float("nan"))])
def test_bad_efforts_are_refused(threads: list[int], budget_s: float) -> None:
    with pytest.raises(ValueError, match="give"):
        attention.measure_attention(SHAPE, threads, budget_s)


def test_this_machine() -> None:
    here = calibrate.machine()
    assert here.processor
    assert (here.torch, here.fapool) == (torch.__version__, "0.1.0")
    assert here.cores >= 1
    assert calibrate.machine() == here


# Attention.


def test_attention_costs_what_the_kernel_takes(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a kernel that is told how long to take; also sees what it is given."""
    given = set()

    def attend(q_BSHD: Any, k_BTKD: Any, v_BTKE: Any, *, causal: bool, softmax_scale: float, **others: Any) -> None:
        queries, keys = q_BSHD.shape[1], k_BTKD.shape[1]
        given.add((q_BSHD.shape[2:], k_BTKD.shape[2:], v_BTKE.shape[2:], causal, q_BSHD.dtype, softmax_scale))
        threads = torch.get_num_threads()
        clock.now += (1e-5 + 1e-7 * keys if queries == 1 else 2e-6 * queries + 1e-9 * queries**2) / threads

    monkeypatch.setattr(attention, "attend", attend)
    costs = attention.measure_attention(SHAPE, [1, 2], 1e9)
    found = [(cost.kernel, cost.dtype, cost.threads) for cost in costs]
    assert found == [
        (kernel, dtype, threads)
        for dtype in ("float32", "bfloat16")
        for kernel in ("torch_flash", "dense")
        for threads in (1, 2)
    ]
    for cost in costs:
        assert_fit(cost.prefill, b=2e-6 / cost.threads, c=1e-9 / cost.threads)
        assert_fit(cost.decode, a=1e-5 / cost.threads, b=1e-7 / cost.threads)
    assert given == {((6, 8), (3, 8), (3, 12), True, dtype, 8**-0.5) for dtype in (torch.float32, torch.bfloat16)}


def test_decode_meets_other_keys_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(attention, "attend", lambda q, k, v, **_: seen.append((k.data_ptr(), v.data_ptr())))
    timed = attention._Attention(SHAPE, "dense", torch.float32, torch.device("cpu"), 0.0).decode(1000)
    turn = attention._KEYS_BYTES // (4 * 1000 * 3 * (8 + 12))
    for _ in range(2 * turn):
        timed()
    addresses = sorted(address for pair in seen[:turn] for address in pair)
    assert min(later - earlier for earlier, later in pairwise(addresses)) >= 4 * 1000 * 3 * 8, "they overlap"
    assert seen[:turn] == seen[turn:]


def test_real_kernels_are_measured_and_threads_restored() -> None:
    stages: list[tuple[str, int, int | None]] = []
    torch.set_num_threads(3)
    costs = attention.measure_attention(SHAPE, [1, 2], 0.01, lambda *told: stages.append(told), quick=True)
    assert torch.get_num_threads() == 3
    assert [(cost.kernel, cost.dtype, cost.threads) for cost in costs] == [
        ("torch_flash", "float32", 1),
        ("torch_flash", "float32", 2),
    ]
    assert all(cost.prefill.at(1000) > 0 and cost.decode.at(1000) > 0 for cost in costs)
    assert [(done, total) for _, done, total in stages] == [(0, 2), (1, 2), (2, 2)]


def test_softcap_leaves_kernels_out() -> None:
    """A profile must not promise what the model's attention cannot use."""
    for quick in (True, False):
        costs = attention.measure_attention(SHAPE, [1], 0.01, quick=quick, softcap=30.0)
        assert {cost.kernel for cost in costs} == {"dense"}, costs


def test_threads_are_restored_after_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(attention, "attend", interrupt)
    with pytest.raises(KeyboardInterrupt):
        attention.measure_attention(SHAPE, [1], 1.0)
    assert torch.get_num_threads() == 2


def test_a_gpu_is_measured_at_lengths_that_fill_it_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in: tensors are made on the CPU, and time is what events say."""
    ticks, given = Ticks(0.25), set()
    monkeypatch.setattr(attention, "Clock", lambda device: DeviceClock(device, ticks))
    monkeypatch.setattr(attention, "attend", lambda q, k, v, **_: given.add((q.shape[1], k.shape[1])))
    monkeypatch.setattr(attention, "_kernels", lambda *args: [("torch", torch.float32)])
    monkeypatch.setattr(
        attention._Attention, "_random", lambda self, *sizes: torch.zeros(1).expand(*sizes[:-1], sizes[-1])
    )
    monkeypatch.setattr(attention, "_KEYS_BYTES", 1)
    costs = attention.measure_attention(SHAPE, [8, 4, 1], 1e9, device="cuda")
    assert [cost.threads for cost in costs] == [8]
    lengths = (2048, 8192, 32768, 65536, 131072)
    assert given == {(n, n) for n in lengths} | {(1, n) for n in lengths}
    assert costs[0].prefill.at(32768) == pytest.approx(0.25)
    assert attention._lengths(torch.device("cuda"), "dense", False)[0] == [512, 1024, 2048]


# Links.


class FakeRank:
    """A pool rank whose messages take a known time."""

    number = 0
    link = SimpleNamespace(carrier=Inline())

    def __init__(self, clock: Clock, latency_s: float, there_s: float, back_s: float, status: Status) -> None:
        self.clock, self.latency_s, self.there_s, self.back_s, self.status = (
            clock,
            latency_s,
            there_s,
            back_s,
            status,
        )
        self._reply = Header()

    def ask(self, header: Header, tensors: Any, expected: Any) -> int:
        tiles, *payload = tensors
        assert [t.numel() for t in payload] == [header.q_elements, header.k_elements, header.v_elements]
        assert len(tiles) == header.tiles
        self.clock.now += self.latency_s + self.there_s * sum(4 * t.numel() for t in payload)
        computing_s, nbytes = 0.5, 0
        for _, _, head_start, head_stop, q_start, q_stop, *_ in tiles.tolist():
            assert header.q_elements == (q_stop - q_start) * header.head_dim
            nbytes += 4 * (head_stop - head_start) * header.group * (q_stop - q_start) * (header.v_head_dim + 1)
        self.clock.now += computing_s + self.latency_s + self.back_s * nbytes
        self._reply = header._replace(status=self.status, extra=int(computing_s * 1e9))
        return 1

    def answer(self, call: int) -> Message:
        return Message(self._reply, [])


@pytest.mark.parametrize("quick", [True, False])
def test_a_link_costs_what_its_messages_take(clock: Clock, quick: bool) -> None:
    link = calibrate.measure_link(FakeRank(clock, 3e-4, 7e-10, 5e-10, Status.OK), quick=quick)  # type: ignore[arg-type]
    # Each answer brings one query's 512 bytes, and each question for queries one key.
    assert_fit(link.to_rank, rel=1e-3, a=3e-4, b=7e-10)
    assert_fit(link.to_base, rel=1e-3, a=3e-4, b=5e-10)
    # The rank of this test computes half a second in this very process.
    assert_fit(link.send, rel=1e-3, a=(3e-4 + 0.25) / 3, b=7e-10 / 3)


def test_a_rank_without_a_lease_is_told_of(clock: Clock) -> None:
    with pytest.raises(RuntimeError, match=r"STALE.*open it again"):
        calibrate.measure_link(FakeRank(clock, 1.0, 0.0, 0.0, Status.STALE))  # type: ignore[arg-type]


# Profiles.


@pytest.mark.processes
@pytest.mark.timeout(120)
@pytest.mark.parametrize(("name", "kernel"), [("llama", "torch_flash"), ("gemma2", "dense")])
def test_calibrate_a_model(tmp_path: Path, name: str, kernel: str) -> None:
    folder, before = save_model(name, tmp_path), workers()
    stages: list[str] = []
    profile = calibrate_model(
        folder, threads=[2, 1], quick=True, budget_s=0.1, progress=lambda stage, done, total: stages.append(stage)
    )
    assert workers() == before, "the pool rank was left behind"
    assert torch.get_num_threads() == 2
    assert profile.quick
    assert profile.misfit(calibrate.machine(), shape_of_path(folder, "float32")) is None
    assert [(cost.kernel, cost.threads) for cost in profile.attention] == [(kernel, 1), (kernel, 2)]
    assert [cost.threads for cost in profile.linear] == [1, 2]
    seconds = [
        profile.attention_for(1).prefill.at(1000),
        profile.attention_for(1).decode.at(1000),
        profile.linear_for(1).prefill.at(1000),
        profile.linear_for(1).decode.at(1),
        profile.link.to_rank.at(1e6),
        profile.link.to_base.at(1e6),
        profile.link.send.at(1e6),
        profile.link.take.at(1e6),
        profile.call.ask_s,
        profile.call.merge_s,
        profile.call.own_s,
        profile.start_s,
        profile.activation_s,
    ]
    assert all(0 <= value < 60 for value in seconds), seconds
    # What is a difference of two times may be lost in a busy machine's.
    assert sum(value > 0 for value in seconds) >= len(seconds) - 3, seconds
    assert profile.beside >= 1
    assert not profile.on_devices
    assert {stage.split(":")[0] for stage in stages} >= {"loading the model", "starting a pool rank", "link", "linear"}
    profile.save(tmp_path / "profile.json")
    assert Profile.load(tmp_path / "profile.json") == profile


@pytest.mark.processes
@pytest.mark.timeout(120)
def test_an_error_ends_the_pool_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(*args: Any, **kwargs: Any) -> None:
        assert workers()
        raise LinkLost("gone")

    monkeypatch.setattr(huggingface_calibrate, "measure_link", lose)
    with pytest.raises(LinkLost):
        calibrate_model(plain(save_model("llama", tmp_path)), budget_s=0.1)
    assert not workers()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [({"threads": [0]}, "threads"), ({"budget_s": -1.0}, "budget_s"), ({"threads_per_rank": 0}, "threads_per_rank")],
)
def test_bad_input_starts_nothing(monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], told: str) -> None:
    started: list[object] = []
    monkeypatch.setattr(huggingface_calibrate, "LocalPool", started.append)
    loaded = SimpleNamespace(from_pretrained=lambda *_, **__: started.append("loading"))
    monkeypatch.setattr(huggingface_calibrate, "AutoModelForCausalLM", loaded)
    with pytest.raises(ValueError, match=told):
        calibrate_model("nowhere", **arguments)
    assert not started


def test_profiles_are_kept_by_machine_and_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_calibrate, "user_cache_dir", lambda name: str(tmp_path / name))
    mine = profile()
    path = default_path(mine.machine, mine.shape)
    assert tmp_path in path.parents
    assert not path.exists()
    assert keep(mine) == path
    assert Profile.load(path) == mine
    others = {
        default_path(mine.machine.model_copy(update={"torch": "9"}), mine.shape),
        default_path(mine.machine, mine.shape.model_copy(update={"layers": 9})),
        path,
    }
    assert len(others) == 3
    adapted = mine.shape.model_copy(update={"parameters": mine.shape.parameters + 1})
    assert default_path(mine.machine, adapted) == path, "adapters are added to a model, not another model"
