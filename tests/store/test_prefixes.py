"""Prefixes that have no other copy, and rows that become copies of others, against plain tensors."""

from __future__ import annotations

import torch

from fapool_plugin.plan.line import Tile
from fapool_plugin.store.prefixes import PrefixStore

D = 4
POSITION = 2 * D * 4
"""Bytes of a lane's key and value."""


def keys(rows: int, heads: int, length: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(rows, heads, length, D, generator=made) for _ in range(2))
    return k, v


def tile(rows: tuple[int, int], heads: tuple[int, int], length: int) -> Tile:
    return Tile(*rows, *heads, length - 1, length, 0, length)


def test_owned_prefixes_make_way_for_none() -> None:
    store = PrefixStore(100 * POSITION, block=10)
    assert store.put(1, 0, tile((0, 1), (0, 1), 50), *keys(1, 1, 50), 0, owned=True)
    assert store.put(2, 0, tile((0, 1), (0, 1), 40), *keys(1, 1, 40), 0)
    # The copy goes, and what is owned stays.
    assert store.put(3, 0, tile((0, 1), (0, 1), 50), *keys(1, 1, 50), 0)
    assert (1 in store, 2 in store, 3 in store, store.evictions) == (True, False, True, 1)
    assert not store.put(4, 0, tile((0, 1), (0, 1), 60), *keys(1, 1, 60), 0), "what is owned has gone"
    # Growth that does not fit leaves what was there.
    more = keys(1, 1, 70, seed=1)
    assert not store.put(1, 0, tile((0, 1), (0, 1), 120), *more, 50, owned=True)
    k, _ = store.get(1, 0, tile((0, 1), (0, 1), 50))
    assert torch.equal(k, keys(1, 1, 50)[0])
    # What comes once more takes nothing away that lies behind it.
    assert store.put(1, 0, tile((0, 1), (0, 1), 10), *keys(1, 1, 10), 0, owned=True)
    assert store.length(1, 0, tile((0, 1), (0, 1), 50)) == 50
    store.free(1)
    assert store.put(4, 0, tile((0, 1), (0, 1), 60), *keys(1, 1, 60), 0)


def test_memory_that_ends_before_the_limit_refuses_keys_and_takes_none() -> None:
    store = PrefixStore(2**62, block=10)
    whole = tile((0, 1), (0, 1), 50)
    assert store.put(1, 0, whole, *keys(1, 1, 50), 0, owned=True)
    assert not store.put(2, 0, whole, *keys(1, 1, 50), 0, capacity=2**48), "2^53 bytes are there"
    assert not store.put(1, 0, tile((0, 1), (0, 1), 60), *keys(1, 1, 10), 50, capacity=2**48, owned=True)
    assert store.length(1, 0, whole) == 50
    assert torch.equal(store.get(1, 0, whole)[0], keys(1, 1, 50)[0])
    assert store.put(1, 0, tile((0, 1), (0, 1), 60), *keys(1, 1, 10), 50, owned=True)


def test_rows_become_copies_of_others_in_their_box() -> None:
    store = PrefixStore(2**20, block=16)
    k, v = keys(5, 2, 20)
    # Rows 0 to 2 with both heads, rows 3 and 4 with one: two boxes.
    assert store.put(1, 0, tile((0, 3), (0, 2), 20), k[:3], v[:3], 0, owned=True)
    assert store.put(1, 0, tile((3, 5), (0, 1), 20), k[3:, :1], v[3:, :1], 0, owned=True)
    # Row 1 is shorter than its neighbours.
    assert store.put(1, 0, tile((1, 2), (0, 2), 20), k[1:2, :, :12], v[1:2, :, :12], 0)
    store.select(1, 0, [2, 2, 1, 4, 3])
    for row, source, length in ((0, 2, 20), (1, 2, 20), (2, 1, 12), (3, 4, 20), (4, 3, 20)):
        heads = (0, 2 if row < 3 else 1)
        here = tile((row, row + 1), heads, length)
        assert store.length(1, 0, here) == length
        for got, want in zip(store.get(1, 0, here), (k, v), strict=True):
            assert torch.equal(got[0], want[source, heads[0] : heads[1], :length]), f"row {row}"
    # A row that is not there is no source; a sequence that is not there is passed over.
    store.select(1, 0, [0, 1, 2, 3, 99])
    assert torch.equal(store.get(1, 0, tile((4, 5), (0, 1), 20))[0][0], k[3, :1])
    store.select(7, 0, [0])
    # Rows of two boxes: brought into one.
    store.select(1, 0, [4, 1, 2, 0, 4])
    for row, source in ((0, 3), (3, 2), (4, 3)):
        assert torch.equal(store.get(1, 0, tile((row, row + 1), (0, 1), 20))[0][0], k[source, :1, :20]), f"row {row}"
    assert store.nbytes == 5 * 2 * 32 * POSITION


def test_rows_of_two_boxes_that_do_not_fit_into_one_are_forgotten() -> None:
    store = PrefixStore(48 * POSITION, block=16)
    k, v = keys(2, 2, 16)
    # Three lanes are here, and a box around them would have four.
    assert store.put(1, 0, tile((0, 1), (0, 2), 16), k[:1], v[:1], 0, owned=True)
    assert store.put(1, 0, tile((1, 2), (0, 1), 16), k[1:, :1], v[1:, :1], 0, owned=True)
    store.select(1, 0, [1, 0])
    assert 1 not in store
    assert store.nbytes == 0


def one_storage(store: PrefixStore, tiles: list[Tile]) -> bool:
    found = [store.get(1, 0, one) for one in tiles]
    return all(len({x.untyped_storage().data_ptr() for x in kind}) == 1 for kind in zip(*found, strict=True))


def test_boxes_come_together_as_they_are() -> None:
    """Rows of unequal lengths in one storage, with no room for padding; what grows is left apart until it is more."""
    lengths = (5, 17, 9, 30, 12, 8, 25, 11, 6)
    store = PrefixStore(10_000 * POSITION, block=10)
    tiles, held = [tile((row, row + 1), (0, 2), n) for row, n in enumerate(lengths)], []
    for row, one in enumerate(tiles):
        held.append(keys(1, 2, lengths[row], seed=row))
        assert store.put(1, 0, one, *held[row], 0)
    nbytes = store.nbytes
    assert not one_storage(store, tiles)
    store.together(1, 0, tiles)
    assert one_storage(store, tiles)
    assert store.nbytes == nbytes
    positions = [x[0].storage_offset() for x in (store.get(1, 0, one) for one in tiles)]
    assert positions == [x[1].storage_offset() for x in (store.get(1, 0, one) for one in tiles)], "laid out alike"
    # The first grows out of its room, and the rest stays where it is; so it does while one in eight is apart.
    more = keys(1, 2, 8, seed=99)
    tiles[0] = tile((0, 1), (0, 2), 13)
    assert store.put(1, 0, tiles[0], *more, 5)
    store.together(1, 0, tiles)
    assert not one_storage(store, tiles)
    assert one_storage(store, tiles[1:])
    tiles[1] = tile((1, 2), (0, 2), 25)
    assert store.put(1, 0, tiles[1], *more, 17)
    store.together(1, 0, tiles)
    assert one_storage(store, tiles)
    for row, one in enumerate(tiles):
        for got, first, second in zip(store.get(1, 0, one), held[row], more, strict=True):
            expected = torch.cat([first, second], 2) if row < 2 else first
            assert torch.equal(got, expected), f"row {row}: {(got - expected).abs().max():.3g}"
    store.free(1)
    assert store.nbytes == 0


def test_boxes_stay_apart_where_memory_is_short() -> None:
    store = PrefixStore(45 * POSITION, block=10)
    tiles = [tile((row, row + 1), (0, 1), 10 * (1 + row)) for row in range(2)]
    for row, one in enumerate(tiles):
        assert store.put(1, 0, one, *keys(1, 1, 10 * (1 + row), seed=row), 0)
    store.together(1, 0, tiles)  # 30 positions, and 30 more meanwhile
    assert not one_storage(store, tiles)
    store.limit_bytes = 60 * POSITION
    store.together(1, 0, tiles)
    assert one_storage(store, tiles)
