"""Storage and records of keys, against plain concatenation and a dictionary of what each rank was sent."""

from __future__ import annotations

from itertools import product

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fapool_plugin.base.residency import Residency, alike_rows, grown
from fapool_plugin.base.sequence import GrowingKV, SequenceState
from fapool_plugin.plan.line import Tile, round_up
from fapool_plugin.store.prefixes import PrefixStore

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
    views = [grown.append(*kv(1))[0] for _ in range(64)]  # kept, so that no storage takes the place of another
    assert len({view.data_ptr() for view in views}) == 4
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


def test_what_a_graph_saved_is_not_written_to() -> None:
    """With gradients it is as concatenation, and without them storage begins anew, cut to less before or not."""
    grown = GrowingKV(block=16)
    grown.append(*kv(3))
    new = tuple(x.requires_grad_() for x in kv(2))
    saved, _ = grown.append(*new)
    grown.append(*kv(2))
    grown.crop(6)
    grown.select_rows(torch.tensor([1, 0]))
    with torch.no_grad():
        for _ in range(2):
            last, _ = grown.append(*kv(1))
    assert not last.requires_grad
    assert last.untyped_storage().nbytes() == 16 * last[:, :, 0].numel() * 4
    (saved * saved).sum().backward()
    assert new[0].grad is not None
    assert torch.equal(new[0].grad, 2 * new[0])
    assert new[1].grad is None
    before, _ = grown.append(*kv(1))
    after, _ = grown.append(*kv(1), saved=True)
    assert after.data_ptr() != before.data_ptr()


def lanes(row: int, row_stop: int | None = None, heads: int = 1, first: int = 0) -> Tile:
    """A tile of these rows and heads."""
    return Tile(row, row_stop or row + 1, first, first + heads, 0, 0, 0, 0)


def send(held: Residency, tile: Tile, length: int) -> None:
    """Rank 7 is sent so many positions of layer 1."""
    held.hold(7, 1, grown(held.of(7, 1), [(tile, length)]))


def prefixes(held: Residency, rows: int) -> list[int]:
    """What rank 7 holds of layer 1, by row."""
    return [length for row in range(rows) for _, length in alike_rows(held.of(7, 1), lanes(row, heads=2))]


def test_residency_of_lanes_crops_reorders_and_forgets() -> None:
    state = SequenceState(prompt_columns=20, copies=2)
    state.place((0, 3, 0, 0))
    held = state.residency
    for row in range(4):
        send(held, lanes(row, heads=2), 20 + row)
    assert alike_rows(held.of(7, 1), lanes(2, heads=2)) == [(lanes(2, heads=2), 22)]
    assert alike_rows(held.of(7, 1), lanes(2, heads=3)) == [(lanes(2, heads=3), 0)], "one lane holds nothing"
    assert held.of(8, 1) is held.of(7, 0) is None
    assert held.total(7) == 2 * (20 + 21 + 22 + 23)
    assert held.total(8) == 0
    state.crop(1, 22)
    assert prefixes(held, 4) == [20, 19, 22, 22]
    together = [(lanes(0), 20), (lanes(1), 19), (lanes(2, 4), 22)]
    assert alike_rows(held.of(7, 1), lanes(0, 4)) == together, "alike rows together"
    before = held.of(7, 1)
    state.crop(1, 22)
    assert held.of(7, 1) is before, "nothing has changed"
    # Rows 0, 1 and rows 2, 3 are beams of one prompt each; row 1's prompt has 3 columns of padding.
    state.reorder(1, [0, 0, 3, 1])
    assert prefixes(held, 4) == [20, 17, 20, 0]
    held.forget(7)
    assert prefixes(held, 4) == [0, 0, 0, 0]


def test_positions_that_move_are_resident_nowhere() -> None:
    state = SequenceState()
    state.place((0, 0))
    send(state.residency, lanes(0, heads=2), 9)
    state.place((0, 0))
    assert prefixes(state.residency, 1) == [9]
    state.place((0, 2))
    assert prefixes(state.residency, 1) == [0]


def test_without_a_known_prompt_a_reordered_row_holds_nothing() -> None:
    state = SequenceState()
    state.place((0, 0, 0))
    send(state.residency, lanes(0, 3, heads=2), 9)
    state.reorder(1, [0, 0])
    assert prefixes(state.residency, 3) == [9, 0, 0], "the third row is gone"


@settings(deadline=None, max_examples=150)
@given(data=st.data(), capacity=st.sampled_from([0, 10, 64]))
def test_prefixes_hold_what_was_sent_last(data: st.DataObject, capacity: int) -> None:
    """Boxes of lanes that overlap in any way, beside a dictionary with an entry for each lane."""
    store = PrefixStore(limit_bytes=2**30, block=8)
    truth: dict[tuple[int, int], torch.Tensor] = {}

    def box() -> Tile:
        row, head = (data.draw(st.integers(0, 3)) for _ in range(2))
        rows, heads = (data.draw(st.integers(1, 3)) for _ in range(2))
        return lanes(row, row + rows, heads, head)

    for _ in range(data.draw(st.integers(1, 8))):
        tile = box()
        each = list(product(range(*tile[:2]), range(*tile[2:4])))
        length = min(truth[lane].shape[0] if lane in truth else 0 for lane in each)
        start = data.draw(st.integers(0, length + 2))
        shape = tile.row_stop - tile.row_start, tile.head_stop - tile.head_start, data.draw(st.integers(1, 20)), D
        new = torch.randn(shape)
        stored = store.put(1, 0, tile, new, -new, start, capacity)
        assert stored == (start == 0 or start <= length)
        for (row, head), sent in zip(each, new.flatten(0, 1), strict=True):
            if stored:
                truth[row, head] = torch.cat([truth.get((row, head), sent[:0])[:start], sent])
        wanted = box()
        each = list(product(range(*wanted[:2]), range(*wanted[2:4])))
        length = min(truth[lane].shape[0] if lane in truth else 0 for lane in each)
        for asked, held in [(wanted, length)] + [(lanes(r, first=h), len(truth[r, h])) for r, h in truth]:
            assert store.length(1, 0, asked) == held, f"{asked}"
            if held:
                k, v = store.get(1, 0, asked._replace(k_start=held // 2, k_stop=held))
                want = [truth[lane][held // 2 : held] for lane in product(range(*asked[:2]), range(*asked[2:4]))]
                assert torch.equal(k.flatten(0, 1), torch.stack(want)), f"{asked}"
                assert torch.equal(v, -k)
    held_bytes = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in stored_tensors(store)}
    assert store.nbytes == sum(held_bytes.values())
    store.free(1)
    assert store.nbytes == 0


def test_boxes_that_only_meet_in_a_larger_one_come_into_it() -> None:
    """The last tile meets the second box only; the box around both meets the first, which has more room."""
    store, lengths = PrefixStore(limit_bytes=2**30, block=8), dict[tuple[int, int], int]()
    for tile, length in (
        (lanes(1, heads=3), 14),
        (lanes(0, 3, first=3), 3),
        (lanes(2, 5, heads=2, first=2), 2),
    ):
        new = torch.randn(tile.row_stop - tile.row_start, tile.head_stop - tile.head_start, length, D)
        assert store.put(1, 0, tile, new, new, 0)
        lengths |= dict.fromkeys(product(range(*tile[:2]), range(*tile[2:4])), length)
    held = {lane: store.length(1, 0, lanes(lane[0], first=lane[1])) for lane in lengths}
    assert held == lengths


def test_keys_of_another_dtype_are_never_converted() -> None:
    store, exact = PrefixStore(limit_bytes=2**30, block=8), torch.randn(1, 1, 5, D, dtype=torch.float64)
    assert store.put(1, 0, lanes(1, first=1), exact, exact, 0)
    for tile in (lanes(0, 2), lanes(0, heads=2)):  # the box around both has the first one's lane in it
        new = torch.zeros(tile.row_stop - tile.row_start, tile.head_stop - tile.head_start, 5, D)
        assert store.put(1, 0, tile, new, new, 0)
    assert store.length(1, 0, lanes(1, first=1)) == 0, "it was of another kind"


def test_layers_share_what_they_hold_of_every_rank() -> None:
    state = SequenceState(prompt_columns=20)
    state.place((0, 0))
    for layer, rank in product(range(3), (7, 8)):
        known = state.residency.of(rank, 0)
        state.residency.hold(
            rank, layer, known if known is not None else grown(None, [(lanes(0, 2, heads=2), 20 + rank)])
        )
    for columns in (26, 24):
        for layer in range(3):
            state.crop(layer, columns)
        for rank in (7, 8):
            arrays = [state.residency.of(rank, layer) for layer in range(3)]
            assert arrays[0] is arrays[1] is arrays[2]
            assert arrays[0] is not None
            assert arrays[0].max() == columns


def stored_tensors(store: PrefixStore) -> list[torch.Tensor]:
    boxes = [one for rows in store._sequences.get(1, {}).values() for row in rows.values() for one in row]
    return [x for one in boxes for x in (one.k, one.v)]


def test_the_least_recently_used_sequence_is_evicted() -> None:
    new = torch.zeros(1, 1, 8, D)
    each = 2 * new.numel() * 4
    store = PrefixStore(limit_bytes=3 * each, block=8)
    for sequence in (1, 2, 3):
        assert store.put(sequence, 0, lanes(0), new, new, 0)
    assert store.length(1, 0, lanes(0)) == 8  # uses 1, so that 2 is the oldest
    assert store.put(4, 0, lanes(0), new, new, 0)
    assert [s for s in (1, 2, 3, 4) if s in store] == [1, 3, 4]
    assert (store.nbytes, store.evictions) == (3 * each, 1)
    store.free(3)
    assert store.nbytes == 2 * each
    assert not store.put(5, 0, lanes(0), torch.zeros(1, 1, 800, D), torch.zeros(1, 1, 800, D), 0), (
        "larger than the limit"
    )
    store.clear()
    assert store.nbytes == 0
