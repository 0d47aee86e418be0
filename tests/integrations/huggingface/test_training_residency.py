"""Pool ranks that keep training calls: the same gradients, whatever was kept, lost, used twice or called once more."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fapool_plugin.base.attention import FAPoolAttention
from fapool_plugin.base.forward import Forward
from fapool_plugin.base.requests import Request, Requests
from fapool_plugin.base.resource_manager import ResourceManager
from fapool_plugin.base.sequence import SequenceState
from fapool_plugin.config import FAPoolConfig
from fapool_plugin.plan.shares import Geometry
from fapool_plugin.wire.messages import HEADER_BYTES, TILE_FIELDS, LinkLost
from tests.base.test_attention import D, dense
from tests.base.test_gradients import inputs, pooled
from tests.blocks import in_blocks, save_long
from tests.models import FAMILIES, eager, padded_batch, random_ids
from tests.thread_pool import ThreadPool
from tests.training import assert_alike, trained

pytestmark = pytest.mark.usefixtures("one_thread_each")

LENGTH = 330
Make = Callable[..., ResourceManager]


@pytest.fixture(scope="module")
def managers() -> Iterator[Make]:
    made: dict[Any, ResourceManager] = {}

    def get(**keys: Any) -> ResourceManager:
        key = tuple(sorted(keys.items()))
        if key not in made:
            made[key] = keeping(**keys)
        return made[key]

    yield get
    for manager in made.values():
        manager.close()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_long("llama", tmp_path_factory.mktemp("llama"))


def keeping(**keys: Any) -> ResourceManager:
    config = {"threshold": 0, "memory_limit_mib": 64, "training_residency": True} | keys
    return ResourceManager(FAPoolConfig(**config), ThreadPool)


def workers(manager: Any) -> list[Any]:
    assert isinstance(manager.leases.pool, ThreadPool)
    return [worker for _, worker in sorted(manager.leases.pool.workers.items())]


def counted(manager: Any) -> tuple[int, int, int]:
    """(kept, not kept, reused) of all ranks."""
    ranks = manager.stats()["ranks"]
    kept, unkept, reused = (sum(rank[f"{what}_calls"] for rank in ranks) for what in ("kept", "unkept", "reused"))
    return kept, unkept, reused


def settle(manager: Any) -> list[int]:
    """Bytes of calls that ranks keep once all they were told has been done."""
    gc.collect()
    manager.reap()
    for rank in manager.ranks:
        rank.open()
    deadline = time.monotonic() + 5
    while not manager.ranks and any(worker.lease.token is not None for worker in workers(manager)):
        assert time.monotonic() < deadline, "a lease that was given back has not ended"
        time.sleep(0.01)
    return [worker.prefixes.reserved for worker in workers(manager)]


def assert_same(found: Any, expected: Any, tolerance: float = 1e-11) -> None:
    for name, grad, exact in zip("qkvs", found, expected, strict=False):
        worst = (grad.double() - exact.double()).abs().max().item()
        allowed = tolerance * max(1.0, exact.abs().max().item())
        assert worst <= allowed, f"d{name}: largest difference {worst:.2e}, {allowed:.2e} allowed"
        assert grad.any(), f"d{name} is all zero"


def reference(given_: list[Tensor], geometry: Geometry, dout: Tensor) -> tuple[Tensor, ...]:
    twins = [x.detach().double().requires_grad_() for x in given_]
    want = dense(twins[0], twins[1], twins[2], geometry, D**-0.5, 0.0, twins[3] if len(twins) > 3 else None)
    return torch.autograd.grad(want, twins, dout.double())


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 40)), min_size=1, max_size=3),
    ranks=st.integers(1, 4),
    mode=st.sampled_from(["line", "query_blocks"]),
    with_sinks=st.booleans(),
    share=st.sampled_from([None, 0.0]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float64]),
)
def test_not_a_bit_of_a_gradient_is_another(
    managers: Make, rows: Any, ranks: int, mode: str, with_sinks: bool, share: Any, dtype: torch.dtype
) -> None:
    """Than without, and it is the dense reference's."""
    columns = max(start + length for start, length in rows)
    geometry = Geometry(tuple(s for s, _ in rows), tuple(s + n for s, n in rows), 0, columns)
    q, k, v, sinks = inputs(len(rows), columns, dtype)
    given_ = [q, k, v, *([sinks] if with_sinks else [])]
    dout = torch.randn(len(rows), columns, q.shape[1], v.shape[3]).to(dtype)
    for row, (start, length) in enumerate(rows):
        dout[row, :start] = 0
        dout[row, start + length :] = 0
    found = []
    for residency in (True, False):
        manager = managers(pool_ranks=ranks, partition=mode, base_share=share, training_residency=residency)
        before, calls = counted(manager), sum(rank.calls for rank in manager.counters.ranks.values())
        out = pooled(manager, geometry)(*given_)
        found.append(torch.autograd.grad(out, given_, dout))
        asked = sum(rank.calls for rank in manager.counters.ranks.values()) - calls
        made = tuple(b - a for a, b in zip(before, counted(manager), strict=True))
        assert made == ((asked // 2, 0, asked // 2) if residency else (0, 0, 0))
    for name, grad, other in zip("qkvs", *found, strict=False):
        assert torch.equal(grad, other), f"d{name}: largest difference {(grad - other).abs().max():.2e}"
    if dtype != torch.bfloat16:
        tolerance = 1e-11 if dtype == torch.float64 else 1e-5
        for grad, exact in zip(found[0], reference(given_, geometry, dout), strict=True):
            worst = (grad.double() - exact).abs().max().item()
            assert worst < tolerance * max(1.0, exact.abs().max().item()), f"largest difference {worst:.2e}"


def test_a_second_backward_sends_everything(managers: Make) -> None:
    """The first used up what was kept."""
    manager, geometry = managers(pool_ranks=3), Geometry((0, 2), (30, 25), 0, 30)
    given_ = inputs(2, 30)[:3]
    before, out = counted(manager), pooled(manager, geometry)(*given_)
    dout = torch.randn(out.shape, dtype=out.dtype)
    dout[0, :0] = dout[1, :2] = dout[1, 25:] = 0
    sent = []
    for _ in range(3):
        start = manager.stats()["bytes_sent"]
        assert_same(torch.autograd.grad(out, given_, dout, retain_graph=True), reference(given_, geometry, dout))
        sent.append(manager.stats()["bytes_sent"] - start)
    assert sent[0] < sent[1] == sent[2], f"{sent} bytes were sent"
    assert counted(manager)[2] - before[2] == 3, "each rank's call serves once"
    del out
    assert settle(manager) == [0, 0, 0]


def test_a_rank_without_room_is_sent_everything_again() -> None:
    """Nothing makes way for a call, and stats() tell how often there was no room."""
    geometry, given_ = Geometry((0,), (200,), 0, 200), inputs(1, 200)[:3]
    with keeping(pool_ranks=2) as manager:
        outs = [pooled(manager, geometry)(*given_)]
        one = [worker.prefixes.reserved for worker in workers(manager)]
        assert min(one) > 0
        workers(manager)[0].prefixes.limit_bytes = 2 * one[0]
        workers(manager)[1].prefixes.limit_bytes = one[1] - 1
        workers(manager)[1].calls.clear()
        outs += [pooled(manager, geometry)(*given_) for _ in range(3)]
        assert [worker.prefixes.reserved for worker in workers(manager)] == [2 * one[0], 0]
        dout = torch.randn(outs[0].shape, dtype=outs[0].dtype)
        expected = reference(given_, geometry, dout)
        for out in outs:
            assert_same(torch.autograd.grad(out, given_, dout), expected)
        ranks = manager.stats()["ranks"]
        told = [(rank["kept_calls"], rank["unkept_calls"], rank["reused_calls"]) for rank in ranks]
        # Rank 1 kept one, and it was taken from it: it is asked once in vain.
        assert told == [(2, 2, 2), (1, 3, 0)], told
        assert manager.stats()["backward"]["local_calls"] == 0


def test_a_call_that_is_gone_is_sent_again() -> None:
    geometry, given_ = Geometry((0,), (60,), 0, 60), inputs(1, 60)[:3]
    with keeping(pool_ranks=3, base_share=0.0) as manager:
        out = pooled(manager, geometry, lost=lambda: [worker.calls.clear() for worker in workers(manager)])(*given_)
        dout = torch.randn(out.shape, dtype=out.dtype)
        assert_same(torch.autograd.grad(out, given_, dout), reference(given_, geometry, dout))
        stats = manager.stats()
        assert counted(manager) == (3, 0, 0)
        assert (stats["backward"]["pooled_calls"], stats["faults"]) == (1, 0)
        assert all(rank["calls"] == 2 for rank in stats["ranks"]), "ranks computed the gradients, not the base"


@pytest.mark.parametrize("how", ["lost", "released"])
def test_what_a_rank_kept_goes_with_it(how: str) -> None:
    """With the rank, or with its lease; another rank of that number is not taken for it."""
    geometry, given_ = Geometry((0,), (60,), 0, 60), inputs(1, 60)[:3]
    with keeping(pool_ranks=2) as manager, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)

        def gone() -> None:
            if how == "lost":
                manager.leases.pool.links[0].fail("killed")  # type: ignore[union-attr]
            else:
                manager.leases.release("test")

        out = pooled(manager, geometry, lost=gone)(*given_)
        dout = torch.randn(out.shape, dtype=out.dtype)
        assert_same(torch.autograd.grad(out, given_, dout), reference(given_, geometry, dout))
        assert counted(manager) == (2, 0, 1 if how == "lost" else 0)
        assert manager.counters.faults == (how == "lost")
        if how == "released":
            assert manager.stats()["backward"]["pooled_calls"] == 1, "by a new lease"
            assert settle(manager) == [0, 0]


def test_a_graph_that_ends_without_backward_leaves_nothing(managers: Make) -> None:
    manager = managers(pool_ranks=2)
    other = pooled(manager, Geometry((0,), (30,), 0, 30))(*inputs(1, 30)[:3])
    out = pooled(manager, Geometry((0,), (60,), 0, 60))(*inputs(1, 60)[:3])
    both = settle(manager)
    del out
    one = settle(manager)
    assert all(0 < rest < before for rest, before in zip(one, both, strict=True)), (one, both)
    del other
    assert settle(manager) == [0, 0]


class Layer:
    """Attention of one layer in one training forward, called as often as checkpointing wants; each time its inputs
    are changed by ``noise`` of that time."""

    def __init__(self, manager: ResourceManager, geometry: Geometry, noise: tuple[float, ...] = (0.0, 0.0)) -> None:
        self.layer, self.noise, self.times = FAPoolAttention(manager, 0, 1, stands_for="sdpa"), noise, 0
        decided = manager.begin("training", geometry.columns, lambda: geometry, SequenceState())
        self.decided: Forward = decided.in_graph(manager.watch)
        self.manager = manager

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        change = self.noise[self.times]
        self.times += 1
        out: Tensor = self.layer(q, k * (1 + change), v, decided=self.decided, softmax_scale=D**-0.5)
        return out * 2


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("change", [0.0, 1e-9])
def test_checkpointing_calls_once_more_and_sends_nothing_unless_it_is_another_call(
    reentrant: bool, change: float
) -> None:
    geometry, given_ = Geometry((0,), (70,), 0, 70), inputs(1, 70)[:3]
    with keeping(pool_ranks=2) as manager:
        layer = Layer(manager, geometry, (0.0, change))
        out = checkpoint(layer, *given_, use_reentrant=reentrant)
        manager.end(layer.decided)
        before = manager.stats()["bytes_sent"]
        kept = [worker.prefixes.reserved for worker in workers(manager)]
        dout = torch.randn(out.shape, dtype=out.dtype)
        out.backward(dout)
        assert layer.times == 2
        # Of the call that was made last, whose numbers are the graph's; the factor is the one of its own graph.
        q, k, v = given_
        dq, dk, dv = reference([q, k * (1 + change), v], geometry, 2 * dout)
        assert_same([q.grad, k.grad, v.grad], [dq, dk * (1 + change if reentrant else 1), dv], 1e-13)
        sent = manager.stats()["bytes_sent"] - before
        if change:
            # The second call took the first one's place; who is asked by the first one's graph sends all.
            assert counted(manager) == (4, 0, 2 if reentrant else 0)
        else:
            assert counted(manager) == (2, 0, 4)
            headers = 4 * (HEADER_BYTES + 4 * 63 + 8 * TILE_FIELDS * 4)
            assert sent < dout.numel() * 8 + headers, f"{sent} bytes were sent"
        assert max(worker.prefixes.reserved for worker in workers(manager)) <= max(kept), "two calls of one layer"
        del out, layer
        assert settle(manager) == [0, 0]


def test_a_layer_that_is_called_twice_in_a_forward_is_two_calls() -> None:
    """As layers that share their weights are; the second is not taken for the first."""
    geometry, (q, k, v, _) = Geometry((0,), (70,), 0, 70), inputs(1, 70)
    with keeping(pool_ranks=2) as manager:
        layer = Layer(manager, geometry, (0.0, 0.5))
        first, second = layer(q, k, v), layer(q, k, v)
        manager.end(layer.decided)
        dout = torch.randn(first.shape, dtype=first.dtype)
        expected = reference([q, k, v], geometry, 2 * dout)
        assert_same(torch.autograd.grad(first, (q, k, v), dout), expected)
        dq, dk, dv = torch.autograd.grad(second, (q, k, v), dout)
        assert_same((dq, dk / 1.5, dv), reference([q, 1.5 * k, v], geometry, 2 * dout))


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "deepseek_v3", "qwen2_mixed"])
@pytest.mark.parametrize("blocks", [1, 3])
def test_models_with_blocks_in_flight(name: str, blocks: int, tmp_path: Path) -> None:
    """Sinks, values of another length than keys, layers that slide."""
    with in_blocks(save_long(name, tmp_path), blocks, training_residency=True, pool_ranks=2) as model:
        folder = model.name_or_path
        assert_alike(model.train(), eager(Path(folder)).train(), random_ids(1, LENGTH))
        trained(model, FAMILIES[name].full_layers, parts=blocks)
        kept, unkept, reused = counted(model.fa_pool)
        assert kept == reused > 0 == unkept


def test_parts_of_a_batch_in_flight(llama: Path) -> None:
    ids, mask = padded_batch([LENGTH, 230, 310])
    with in_blocks(llama, None, training_residency=True, pool_ranks=3) as model:
        for _ in range(2):
            assert_alike(model.train(), eager(llama).train(), ids, mask)
        kept, unkept, reused = counted(model.fa_pool)
        assert kept == reused > 0 == unkept


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("padded", [False, True])
def test_a_checkpointed_model(llama: Path, reentrant: bool, padded: bool) -> None:
    ids, mask = padded_batch([LENGTH, 250]) if padded else (random_ids(2, LENGTH), None)
    with in_blocks(llama, None, training_residency=True, pool_ranks=2) as model:
        model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        assert_alike(model, eager(llama).train(), ids, mask)
        # Two layers at two ranks: each is kept once, asked for once more, and then for its gradients.
        assert counted(model.fa_pool) == (4, 0, 8)
        assert model.fa_pool.stats()["training"]["pooled_calls"] == 4
        gc.collect()
        model.fa_pool.reap()
        assert model.fa_pool.stats()["state"] == "idle"


def test_a_rank_lost_while_it_is_asked_once_more(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpointed layer's kept call is gone, and then the rank, as all of it is sent again: its tiles have gradients
    all the same."""
    ids, original, lost = random_ids(1, LENGTH), Requests._ask, list[int]()

    def ask(self: Requests, call: Any, request: Request) -> None:
        if request.call is None or lost:
            return original(self, call, request)
        request.call = None
        lost.append(request.rank.number)
        with self._manager.guard(request.rank):
            raise LinkLost("lost as it is asked once more")

    with in_blocks(llama, 1, training_residency=True, pool_ranks=2) as model, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # The graph of the second forward is the one that goes backward.
        model.train().gradient_checkpointing_enable({"use_reentrant": True})
        model.enable_input_require_grads()
        found = []
        for net in (model, eager(llama).train()):
            loss = net(ids, labels=ids).loss
            if net is model:
                monkeypatch.setattr(Requests, "_ask", ask)
                for worker in workers(model.fa_pool):
                    worker.calls.clear()
            loss.backward()
            found.append({name: p.grad for name, p in net.named_parameters() if p.grad is not None})
        assert len(lost) == 1
        assert found[0].keys() == found[1].keys()
        largest = max(float(grad.abs().max()) for grad in found[1].values())
        apart = max(float((found[0][name] - grad).abs().max()) / largest for name, grad in found[1].items())
        assert apart <= 1e-5, f"largest difference of gradients {apart:.3g}"


def test_layers_without_gradients_are_not_kept(llama: Path) -> None:
    with in_blocks(llama, 1, training_residency=True, pool_ranks=2) as model:
        reference_ = eager(llama).train()
        for net in (model.train(), reference_):
            net.requires_grad_(False)
            net.model.layers[1].requires_grad_(True)
        assert_alike(model, reference_, random_ids(1, LENGTH))
        assert counted(model.fa_pool) == (2, 0, 2), "the upper of two layers, at two ranks"
