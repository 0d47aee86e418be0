"""What pool ranks keep of training calls, and what the base knows of it: bytes, names, and what is the same again."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fapool_plugin.base.kept_calls import KeptCalls, fingerprint
from fapool_plugin.plan.line import Tile
from fapool_plugin.pool.store import CallStore, KeptTile
from fapool_plugin.store.prefixes import PrefixStore
from tests.fake_cuda import fake_cuda

TILES = [Tile(0, 1, 0, 1, 0, 5, 0, 5)]


def tile(elements: int) -> KeptTile:
    """Of five times as many elements of four bytes."""
    return KeptTile(*(torch.zeros(elements) for _ in range(5)))


def test_calls_and_prefixes_share_one_limit() -> None:
    prefixes = PrefixStore(limit_bytes=1000, block=1)
    calls, keys = CallStore(prefixes), torch.zeros(1, 1, 10, 5)
    assert calls.put(1, 1, [tile(10), tile(10)])
    assert prefixes.reserved == 400
    assert prefixes.put(7, 0, TILES[0], keys, keys, 0), "400 bytes, of 600 that are left"
    assert not prefixes.put(8, 0, TILES[0], keys[:, :, :4], torch.zeros(1, 1, 4, 150), 0), (
        "calls make no way for prefixes"
    )
    assert not calls.put(1, 2, [tile(11)]), "prefixes make no way for calls"
    assert 7 in prefixes
    assert calls.put(1, 2, [tile(10)])
    assert prefixes.reserved + prefixes.nbytes == 1000
    assert prefixes.put(8, 0, TILES[0], keys, keys, 0), "prefixes make way for prefixes"
    assert (7 in prefixes, prefixes.evictions) == (False, 1)
    assert calls.pop(1, 1) is not None
    assert prefixes.reserved == 200


def test_what_shares_storage_is_counted_once() -> None:
    prefixes, whole = PrefixStore(limit_bytes=1000), torch.zeros(100)
    assert CallStore(prefixes).put(1, 1, [KeptTile(*whole.split(20))])
    assert prefixes.reserved == 400


def test_a_call_is_used_up_once_and_goes_with_its_sequence() -> None:
    prefixes = PrefixStore(limit_bytes=10**6)
    calls = CallStore(prefixes)
    for sequence, call in ((1, 1), (1, 2), (2, 1)):
        assert calls.put(sequence, call, [tile(sequence * 10 + call)])
    found = calls.get(1, 2)
    assert found is not None
    assert found[0].q.numel() == 12
    assert calls.pop(1, 2) is found
    assert calls.get(1, 2) is calls.pop(1, 2) is calls.get(3, 1) is None
    calls.free(1)
    calls.free(1)
    assert (calls.get(1, 1), prefixes.reserved) == (None, 5 * 4 * 21)
    calls.clear()
    assert (calls.get(2, 1), prefixes.reserved) == (None, 0)


def test_only_the_same_call_of_the_same_rank_and_layer_is_the_same_again() -> None:
    kept = KeptCalls()
    kept.add(7, 3, 0, TILES, b"bits")
    for other in (
        (8, 0, TILES, b"bits"),
        (7, 1, TILES, b"bits"),
        (7, 0, [*TILES, *TILES], b"bits"),
        (7, 0, TILES, b""),
    ):
        assert kept.again(*other) == (0, 0), other
    assert kept.again(7, 0, TILES, b"bits") == (3, 0)
    assert kept.again(7, 0, TILES, b"other") == (0, 3)
    assert not kept.take(7, 3), "another call took its place"
    assert kept.again(7, 0, TILES, b"bits") == (0, 0)
    kept.add(7, 4, 0, TILES, b"bits")
    assert kept.take(7, 4)
    assert not kept.take(7, 4)
    assert kept.again(7, 0, TILES, b"bits") == (0, 0), "gradients used it up"


@given(
    data=st.data(),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    dim=st.integers(1, 9),
    transposed=st.booleans(),
)
def test_any_change_of_a_bit_is_another_fingerprint(
    data: st.DataObject, dtype: torch.dtype, dim: int, transposed: bool
) -> None:
    def heads_first(x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2) if transposed else x

    x = torch.randn(2, 3, 4, dim).to(dtype)
    before = fingerprint(heads_first(x), heads_first(x))
    assert before == fingerprint(heads_first(x.clone()), heads_first(x))
    changed = x.clone()
    integers = changed.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]).view(-1)
    integers[data.draw(st.integers(0, x.numel() - 1))] ^= 1 << data.draw(st.integers(0, 14))
    assert fingerprint(heads_first(changed), heads_first(x)) != before
    assert fingerprint(heads_first(x), heads_first(changed)) != before


@pytest.mark.parametrize("dim", [1, 2])
def test_what_changes_its_place_is_another_fingerprint(dim: int) -> None:
    x = torch.randn(1, 4, 6, 8)
    assert fingerprint(x.flip(dim)) != fingerprint(x)
    assert fingerprint(x, x + 1) != fingerprint(x + 1, x)
    assert fingerprint(x.view(1, 4, 8, 6)) != fingerprint(x)


def test_a_device_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In each layer of a step of training: for all sums of q, k and v together."""
    taken = list[torch.Size]()

    def cpu(x: torch.Tensor) -> SimpleNamespace:
        taken.append(x.shape)
        return SimpleNamespace(numpy=lambda: np.zeros(1))

    with fake_cuda():
        qkv = [torch.zeros(2, heads, 6, 8, dtype=torch.bfloat16, device="cuda") for heads in (4, 2, 2)]
        monkeypatch.setattr(torch.Tensor, "cpu", cpu)
        assert fingerprint(*qkv)
    assert len(taken) == 1, f"the host waits {len(taken)} times"
