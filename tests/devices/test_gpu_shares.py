"""GPUs of a machine shared out by number; who shares knows it; memory is asked of the device. No GPU is needed."""

from __future__ import annotations

import re
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fapool_plugin.base.advisor import Advisor
from fapool_plugin.base.forward import Forward
from fapool_plugin.base.lease import PoolRank
from fapool_plugin.base.resource_manager import ResourceManager
from fapool_plugin.config import MIB, FAPoolConfig
from fapool_plugin.devices import gpu
from fapool_plugin.devices.gpu import CPU, free_bytes, identity, keys_limit, rank_device, sharers, warm_up
from fapool_plugin.observe.metrics import Counters, RankCounters
from fapool_plugin.plan.shares import Geometry
from fapool_plugin.ranks.local import LocalPool
from fapool_plugin.tools import doctor
from tests.thread_pool import ThreadPool

GPU = [torch.device("cuda", number) for number in range(4)]


@pytest.mark.parametrize(
    ("base", "gpus", "wanted"),
    [
        (GPU[0], 4, [1, 2, 3, 0, 1]),
        (GPU[2], 4, [3, 0, 1, 2, 3]),
        (GPU[0], 1, [0, 0, 0, 0, 0]),
        (torch.device("cuda"), 2, [1, 0, 1, 0, 1]),
    ],
)
def test_ranks_get_the_next_gpus_and_the_bases_own_last(base: torch.device, gpus: int, wanted: list[int]) -> None:
    assert [rank_device(base, rank, gpus) for rank in range(5)] == [GPU[number] for number in wanted]


def test_a_model_on_a_cpu_has_ranks_on_cpus_whatever_gpus_there_are() -> None:
    assert [rank_device(CPU, rank, gpus) for rank in range(3) for gpus in (0, 1, 8)] == [CPU] * 9
    assert sharers(CPU, 0, 3, 0) == 3


@pytest.mark.parametrize(
    ("gpus", "ranks", "wanted"), [(4, 3, [1, 1, 1]), (4, 4, [1, 1, 1, 2]), (2, 3, [2, 2, 2]), (1, 2, [3, 3])]
)
def test_who_shares_a_gpu(gpus: int, ranks: int, wanted: list[int]) -> None:
    assert [sharers(GPU[0], rank, ranks, gpus) for rank in range(ranks)] == wanted


def test_a_gpu_is_known_by_its_uuid_whatever_its_number() -> None:
    def properties(device: torch.device) -> Any:
        return SimpleNamespace(uuid=f"GPU-{(device.index or 0) % 2}")

    names = [identity(device, properties) for device in GPU]
    assert names[0] == names[2] != names[1] == names[3]
    assert all(0 < name < 2**63 for name in names)
    assert identity(CPU) == 0


def test_memory_for_keys_is_the_devices() -> None:
    def memory(device: torch.device) -> tuple[int, int]:
        return 1000 * MIB, 2000 * MIB

    assert keys_limit(GPU[0], 0, 1, memory) == 800 * MIB
    assert keys_limit(GPU[0], 0, 2, memory) == 400 * MIB, "two processes share it"
    assert keys_limit(GPU[0], 100 * MIB, 2, memory) == 100 * MIB
    assert keys_limit(GPU[0], 5000 * MIB, 1, memory) == 800 * MIB, "no more than there is"
    assert keys_limit(CPU, 0) == 2048 * MIB
    assert keys_limit(CPU, 5000 * MIB) == 5000 * MIB


def test_a_device_is_chosen_before_anything_is_made_there(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    cuda = SimpleNamespace(
        set_device=lambda device: log.append(f"set {device}"), synchronize=lambda device: log.append("waited")
    )
    ones = torch.ones

    def made(*sizes: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        log.append(f"made on {device}")
        return ones(*sizes, dtype=dtype)

    monkeypatch.setattr(gpu.torch, "ones", made)
    warm_up(GPU[2], cuda)
    assert log == ["set cuda:2", "made on cuda:2", "waited"]


def test_local_ranks_are_told_their_devices_and_move_with_the_model() -> None:
    told: list[tuple[str, int]] = []
    real = LocalPool._process

    class Pool(LocalPool):
        def _process(self, sock: Any, device: str, together: int) -> Any:
            told.append((device, together))
            return real(self, sock, "cpu", together)

    pool = Pool(FAPoolConfig(pool_ranks=2, memory_limit_mib=16), gpus=lambda: 2)
    try:
        pool.acquire(lambda text: None, GPU[0])
        assert told == [("cuda:1", 1), ("cuda:0", 2)]
        pool.acquire(lambda text: None, GPU[0])
        assert len(told) == 2, "they run"
        pool.acquire(lambda text: None, GPU[1])
        assert told[2:] == [("cuda:0", 1), ("cuda:1", 2)]
        pool.acquire(lambda text: None, CPU)
        assert [device for device, _ in told[4:]] == ["cpu", "cpu"]
    finally:
        pool.close()


def test_what_a_rank_shares_or_lacks_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fapool_plugin.base.advisor.identity", lambda device: 5 if device.type == "cuda" else 0)
    advisor = Advisor(FAPoolConfig(memory_limit_mib=1000), Counters())

    def rank_of(number: int, gpu: int, mib: int, *notes: str) -> Any:
        link = SimpleNamespace(terms=SimpleNamespace(notes=notes, lost_bytes=number == 3))
        return SimpleNamespace(number=number, gpu=gpu, memory_limit=mib * MIB, link=link)

    rank = rank_of(0, 5, 1000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        advisor.look_at(rank)  # the base computes on a CPU
    advisor.device = GPU[1]
    with pytest.warns(RuntimeWarning, match="pool rank 0 computes on cuda:1, which the base uses"):
        advisor.look_at(rank)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        advisor.look_at(rank)
        advisor.look_at(rank_of(1, 6, 1000))
    with pytest.warns(RuntimeWarning, match="pool rank 1 has 700 MiB for keys, not memory_limit_mib = 1000"):
        advisor.look_at(rank_of(1, 6, 700))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a slower way is no mistake
        for _ in range(2):
            advisor.look_at(rank_of(2, 7, 1000, "bodies go through host memory"))
    with pytest.warns(RuntimeWarning, match="pool rank 3: 5 of 64 bytes"):
        advisor.look_at(rank_of(3, 7, 1000, "5 of 64 bytes were not what the other end wrote here"))
    assert [event.kind for event in advisor.counters.events] == ["device", "device", "carrier", "carrier"]


def test_what_is_free_on_a_gpu_counts_what_torch_keeps_unused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("mem_get_info", (100, 1000)), ("memory_reserved", 70), ("memory_allocated", 30)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert free_bytes(GPU[0]) == 140


def test_a_rank_says_what_it_computes_on() -> None:
    pool = ThreadPool(FAPoolConfig(pool_ranks=1))
    try:
        rank = PoolRank(0, pool.acquire(print)[0], 7, RankCounters(0))
        rank.open()
        assert rank.gpu == 0
        pool.workers[0].device = GPU[0]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fapool_plugin.pool.worker.identity", lambda device: 9)
            rank.open()
        assert rank.gpu == 9
    finally:
        pool.close()


def test_threads_are_lent_to_ranks_on_cpus_only() -> None:
    """Found out from where the base computes: that CUDA is there says nothing."""
    manager = ResourceManager(FAPoolConfig(pool_ranks=2), ThreadPool)
    assert manager.advisor.lends_cores
    assert manager.advisor.cores(4).per_rank == 1
    manager.compute_on(GPU[0])
    assert not manager.advisor.lends_cores
    assert manager.advisor.threads_left(4, 2) == 4
    manager.compute_on(CPU)
    assert manager.advisor.lends_cores


def test_blocks_fill_a_gpu_unless_their_number_is_set() -> None:
    prompt = Geometry((0,), (8192,), 0, 8192)
    for config, device, wanted in (
        (FAPoolConfig(), CPU, 8),
        (FAPoolConfig(), GPU[0], 4),
        (FAPoolConfig(blocks=8), GPU[0], 8),
    ):
        advisor = Advisor(config, Counters(), device=device)
        found = advisor.blocks(Forward(config, advisor.counters, "prefill", geometry=prompt), None, None)
        assert found == wanted, f"{found} blocks on {device}"


def test_the_doctor_says_where_ranks_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert not doctor._gpus().usable
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: "H100")
    for count, told in ((1, "1 x H100; .* share it with the base"), (4, "4 x H100; .* the next ones")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        assert re.search(told, doctor._gpus().why)
