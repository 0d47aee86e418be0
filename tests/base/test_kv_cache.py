"""Storage and records of keys, against plain concatenation and a dictionary of what each rank was sent."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fapool_plugin.base.sequence import GrowingKV, Residency, SequenceState
from fapool_plugin.plan.line import round_up
from fapool_plugin.pool.store import PrefixStore

HEADS, D, E = 3, 4, 5


def kv(length: int, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, HEADS, length, D), torch.randn(batch, HEADS, length, E)


@settings(deadline=None, max_examples=60)
@given(
    steps=st.lists(st.one_of(st.integers(1, 9), st.integers(-6, -1)), min_size=1, max_size=12),
    block=st.integers(1, 8),
    capacity=st.integers(0, 40),
)
def test_growing_storage_holds_what_concatenation_would(steps: list[int], block: int, capacity: int) -> None:
    grown = GrowingKV(block, capacity)
    k, v = kv(0)
    for step in steps:
        if step > 0:
            new = kv(step)
            k, v = torch.cat([k, new[0]], 2), torch.cat([v, new[1]], 2)
            got = grown.append(*new)
        else:
            k, v = k[:, :, :step], v[:, :, :step]
            grown.crop(k.shape[2])
            if not k.shape[2]:
                continue
            got = grown.views()
        assert torch.equal(got[0], k)
        assert torch.equal(got[1], v)


def test_known_capacity_is_allocated_at_once_and_then_never_moves() -> None:
    grown = GrowingKV(block=4, capacity=50)
    first, _ = grown.append(*kv(10))
    for _ in range(40):
        last, _ = grown.append(*kv(1))
    assert last.data_ptr() == first.data_ptr()
    assert last.shape[2] == 50
    assert last.stride(1) == 50 * D, "storage is larger than asked for"


def test_growth_goes_by_blocks() -> None:
    grown = GrowingKV(block=16)
    pointers = {grown.append(*kv(1))[0].data_ptr() for _ in range(64)}
    assert len(pointers) == 4
    assert [round_up(n, 16) for n in (0, 1, 16, 17)] == [0, 16, 16, 32]


def test_rows_are_selected_with_all_they_hold() -> None:
    grown = GrowingKV(block=4)
    k, v = kv(7, batch=3)
    grown.append(k, v)
    for rows in ([2, 2, 0], [1, 0], [0, 0, 1, 1]):
        index = torch.tensor(rows)
        k, v = k[index], v[index]
        grown.select_rows(index)
        assert torch.equal(grown.views()[0], k)
        assert torch.equal(grown.views()[1], v)


def test_residency_of_lanes_crops_reorders_and_forgets() -> None:
    state = SequenceState(prompt_columns=20, copies=2)
    state.place((0, 3, 0, 0))
    held = state.residency
    for row in range(4):
        held.advance(7, 1, row, 0, 2, 20 + row)
    assert held.held(7, 1, 2, 0, 2) == 22
    assert held.held(7, 1, 2, 0, 3) == 0, "one lane of the run holds nothing"
    assert held.held(8, 1, 2, 0, 2) == held.held(7, 0, 2, 0, 2) == 0
    state.crop(1, 22)
    assert [held.held(7, 1, row, 0, 2) for row in range(4)] == [20, 19, 22, 22]
    # Rows 0, 1 and rows 2, 3 are beams of one prompt each; row 1's prompt has 3 columns of padding.
    state.reorder(1, [0, 0, 3, 1])
    assert [held.held(7, 1, row, 0, 2) for row in range(4)] == [20, 17, 20, 0]
    held.forget(7)
    assert held.held(7, 1, 0, 0, 2) == 0


def test_positions_that_move_are_resident_nowhere() -> None:
    state = SequenceState()
    state.place((0, 0))
    state.residency.advance(1, 0, 0, 0, 1, 9)
    state.place((0, 0))
    assert state.residency.held(1, 0, 0, 0, 1) == 9
    state.place((0, 2))
    assert state.residency.held(1, 0, 0, 0, 1) == 0


def test_without_a_known_prompt_a_reordered_row_holds_nothing() -> None:
    residency = Residency()
    residency.advance(1, 0, 0, 0, 1, 9)
    residency.advance(1, 0, 1, 0, 1, 9)
    residency.reorder(0, [0, 0], lambda row, source: 0)
    assert (residency.held(1, 0, 0, 0, 1), residency.held(1, 0, 1, 0, 1)) == (9, 0)


@settings(deadline=None, max_examples=80)
@given(data=st.data(), capacity=st.sampled_from([0, 10, 64]))
def test_prefixes_hold_what_was_sent_last(data: st.DataObject, capacity: int) -> None:
    store = PrefixStore(limit_bytes=2**30, block=8)
    truth: dict[int, torch.Tensor] = {}
    for _ in range(data.draw(st.integers(1, 8))):
        first = data.draw(st.integers(0, 4))
        last = data.draw(st.integers(first + 1, 5))
        length = min(truth[h].shape[0] if h in truth else 0 for h in range(first, last))
        start = data.draw(st.integers(0, length + 2))
        new = torch.randn(last - first, data.draw(st.integers(1, 20)), D)
        stored = store.put(1, 0, 0, first, new, new, start, capacity)
        assert stored == (start == 0 or start <= length)
        if stored:
            for at, head in enumerate(range(first, last)):
                truth[head] = torch.cat([truth.get(head, new[at][:0])[:start], new[at]])
        for head, want in truth.items():
            assert store.length(1, 0, 0, head, head + 1) == want.shape[0]
            k, v = store.get(1, 0, 0, slice(head, head + 1), slice(0, want.shape[0]))
            assert torch.equal(k[0], want)
            assert torch.equal(v[0], want)


def test_the_least_recently_used_sequence_is_evicted() -> None:
    new = torch.zeros(1, 8, D)
    each = 2 * new.numel() * 4
    store = PrefixStore(limit_bytes=3 * each, block=8)
    for sequence in (1, 2, 3):
        assert store.put(sequence, 0, 0, 0, new, new, 0)
    assert store.length(1, 0, 0, 0, 1) == 8  # uses 1, so that 2 is the oldest
    assert store.put(4, 0, 0, 0, new, new, 0)
    assert [s for s in (1, 2, 3, 4) if s in store] == [1, 3, 4]
    assert (store.nbytes, store.evictions) == (3 * each, 1)
    store.free(3)
    assert store.nbytes == 2 * each
    assert not store.put(5, 0, 0, 0, torch.zeros(1, 800, D), torch.zeros(1, 800, D), 0), "larger than the limit"
    store.clear()
    assert store.nbytes == 0
