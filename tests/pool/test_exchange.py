"""A pool rank among pool ranks: what arrives in time is merged, what does not is missing, and no rank waits for one
that is gone."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fapool_plugin.kernels.forward import merge_
from fapool_plugin.plan.line import Tile
from fapool_plugin.pool.exchange import Exchange, Inbox
from fapool_plugin.pool.partial_results import PartialResults
from fapool_plugin.pool.worker import Worker
from fapool_plugin.wire.loop import Loop
from fapool_plugin.wire.messages import TILE_FIELDS, Header, LinkLost, Message, Op, Status
from fapool_plugin.wire.sockets import Listener, listen, pair
from tests.thread_pool import link_pair, two_loops

PATIENCE_S, TOKEN, GROUP, E = 1.0, 7, 2, 3
NOTHING = torch.zeros(0)


@pytest.fixture
def loop() -> Iterator[Loop]:
    made = Loop()
    yield made
    made.close()


@pytest.fixture
def meet(loop: Loop) -> Iterator[Callable[[int], list[Exchange]]]:
    """Makes so many ranks, each introduced to the next."""
    made: list[Exchange] = []

    def together(ranks: int) -> list[Exchange]:
        made.extend(Exchange(number, TOKEN, loop, PATIENCE_S) for number in range(ranks))
        for number in range(ranks - 1):
            one, other = pair()
            made[number].meet(number + 1, one)
            made[number + 1].meet(number, other)
        return made

    yield together
    for exchange in made:
        exchange.close()


def request(merge: int, below: list[int]) -> Message:
    """One query of one KV head."""
    header = Header(op=Op.ATTEND, token=TOKEN, merge=merge, tiles=1, group=GROUP, v_head_dim=E, peers=len(below))
    table = torch.tensor([[0, 1, 0, 1, 9, 10, 0, 9, 0, 0, 0]])
    return Message(header, [table, NOTHING, NOTHING, NOTHING, *([torch.tensor(below)] if below else [])])


def computed(message: Message) -> tuple[Header, tuple[list[Tensor], list[Tensor]]]:
    header = message.header._replace(status=Status.OK, q_elements=GROUP * E, lse_elements=GROUP, extra=5, clock=6)
    return header, ([torch.randn(1, 1, GROUP, E)], [torch.randn(1, GROUP, 1)])


def test_parts_are_merged_on_their_way_and_every_rank_is_reported(meet: Callable[[int], list[Exchange]]) -> None:
    """From rank 2 by way of rank 1 to rank 0."""
    ranks = meet(3)
    answers = [computed(request(1, [])) for _ in ranks]
    want_out, want_lse = torch.zeros(1, 1, GROUP, E), torch.full((1, GROUP, 1), -torch.inf)
    for _, (out, lse) in answers:
        merge_(want_out, want_lse, out[0], lse[0])
    ranks[2].send(1, *ranks[2].merged(request(1, []), *answers[2]))
    ranks[1].send(0, *ranks[1].merged(request(1, [2]), *answers[1]))
    header, (outs, lses, table, rows) = ranks[0].merged(request(1, [1]), *answers[0])
    assert (header.status, header.parts, header.tiles) == (Status.OK, 3, 1)
    assert torch.as_tensor(rows).tolist() == [[number, Status.OK, 5, 6] for number in range(3)]
    assert torch.as_tensor(table).tolist() == [[0, 1, 0, 1, 9, 10, 0, 9, 0, 0, 0]]
    for got, want in ((outs[0], want_out), (lses[0], want_lse)):
        difference = (got - want).abs().max().item()
        assert difference < 1e-6, f"largest difference {difference:.2e}"


def test_a_stale_rank_passes_others_parts_on(meet: Callable[[int], list[Exchange]]) -> None:
    ranks = meet(2)
    ranks[1].send(0, *ranks[1].merged(request(1, []), *computed(request(1, []))))
    header, (_, _, table, rows) = ranks[0].merged(request(1, [1]), Header(status=Status.STALE), ())
    assert header.status == Status.OK
    assert torch.as_tensor(rows).tolist() == [[0, Status.STALE, 0, 0], [1, Status.OK, 5, 6]]
    assert len(torch.as_tensor(table)) == 1
    header, (outs, _, table, _) = ranks[1].merged(request(2, []), Header(status=Status.STALE), ())
    assert (header.parts, header.tiles, list(outs)) == (1, 0, [])
    assert torch.as_tensor(table).shape == (0, TILE_FIELDS)


def test_what_does_not_come_is_missed_after_a_while(meet: Callable[[int], list[Exchange]]) -> None:
    ranks = meet(2)
    began = time.monotonic()
    header, _ = ranks[0].merged(request(1, [1]), *computed(request(1, [])))
    assert header.parts == 1
    took = time.monotonic() - began
    assert PATIENCE_S <= took < 2 * PATIENCE_S, f"it took {took:.2f} s"


def test_nobody_waits_for_a_rank_that_is_gone_or_unknown(meet: Callable[[int], list[Exchange]]) -> None:
    ranks = meet(2)
    ranks[1].send(0, *ranks[1].merged(request(1, []), *computed(request(1, []))))
    assert ranks[0].merged(request(1, [1]), *computed(request(1, [])))[0].parts == 2  # their link stands
    ranks[1].close()
    deadline = time.monotonic() + 5
    while not ranks[0]._peers[1].lost:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    began = time.monotonic()
    for merge, below in ((2, [1]), (3, [99])):
        header, _ = ranks[0].merged(request(merge, below), *computed(request(merge, [])))
        assert header.parts == 1
    took = time.monotonic() - began
    assert took < PATIENCE_S / 2, f"{took:.2f} s were waited"


def test_a_rank_that_never_comes_is_given_up(loop: Loop) -> None:
    exchange = Exchange(0, TOKEN, loop, PATIENCE_S)
    exchange.reach(1, "tcp:127.0.0.1:1", 7)
    assert exchange._peers[1].lost
    exchange.send(1, *computed(request(1, [])))
    with pytest.raises(LinkLost, match="did not introduce"):
        exchange.send(2, *computed(request(1, [])))
    exchange.close()


@pytest.mark.parametrize("told_first", [True, False])
def test_ranks_of_two_machines_meet_at_an_address(loop: Loop, told_first: bool) -> None:
    """The first listens; the base tells it of the second before that comes, or after."""
    inboxes = [Inbox(loop, PATIENCE_S) for _ in range(2)]
    workers = [Worker(inbox, 2**20, torch.device("cpu")) for inbox in inboxes]
    listener, address = listen("tcp:127.0.0.1:0")
    handler = Listener(listener, loop, lambda sock: workers[0].link(sock, 5.0))
    bases = [pair() for _ in range(2)]
    links = [worker.link(other, 5.0) for worker, (_, other) in zip(workers, bases, strict=True)]
    told = torch.tensor(list(address.encode()), dtype=torch.uint8)
    first = Message(Header(op=Op.PEER, token=1, number=0, peer=1, extra=77), [])
    second = Message(Header(op=Op.PEER, token=1, number=1, peer=0, extra=77, address=len(told)), [told])
    arrivals = [(0, first), (1, second)]
    for number, message in arrivals if told_first else arrivals[::-1]:
        inboxes[number].put((links[number], message))
        time.sleep(0.2)
    if told_first:
        time.sleep(2.5 * PATIENCE_S)  # nothing is said on their link for longer than its silence
    answers = [computed(request(1, [])) for _ in range(2)]
    exchanges = [inbox.exchange(link) for inbox, link in zip(inboxes, links, strict=True)]
    exchanges[1].send(0, *exchanges[1].merged(request(1, []), *answers[1]))
    header, _ = exchanges[0].merged(request(1, [1]), *answers[0])
    assert header.parts == 2
    for exchange in exchanges:
        exchange.close()
    for link in links:
        link.close()
    loop.remove(handler)
    listener.close()


def test_what_comes_too_late_is_not_kept(meet: Callable[[int], list[Exchange]]) -> None:
    ranks = meet(2)
    ranks[0].merged(request(5, []), *computed(request(5, [])))
    for merge in (3, 6):
        ranks[1].send(0, *ranks[1].merged(request(merge, []), *computed(request(merge, []))))
    deadline = time.monotonic() + 5
    while not ranks[0]._parts:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert list(ranks[0]._parts) == [(6, 1)]
    ranks[0].merged(request(7, []), *computed(request(7, [])))
    assert not ranks[0]._parts


@given(st.data())
def test_results_are_merged_lane_by_lane(data: st.DataObject) -> None:
    """Tiles of any runs of rows and heads, against one accumulator for each lane."""
    total = PartialResults(GROUP, E)
    lanes: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}
    for _ in range(data.draw(st.integers(1, 8))):
        row, start = data.draw(st.integers(0, 2)), data.draw(st.integers(0, 4))
        row_stop, stop = data.draw(st.integers(row + 1, 4)), data.draw(st.integers(start + 1, 5))
        queries = data.draw(st.integers(1, 2))
        tile = Tile(row, row_stop, start, stop, 3, 3 + queries, 0, 9)
        heads = (stop - start) * GROUP
        out, lse = torch.randn(row_stop - row, queries, heads, E), torch.randn(row_stop - row, heads, queries)
        for lane in product(range(row, row_stop), range(start, stop)):
            part = lane_of(tile, lane, out, lse)
            empty = torch.zeros(1, queries, GROUP, E), torch.full((1, GROUP, queries), -torch.inf)
            merge_(*lanes.setdefault((*lane, queries), empty), *part)
        if data.draw(st.booleans()):
            total.add_flat([tile], out.reshape(-1).clone(), lse.reshape(-1).clone())
        else:
            total.add(tile, out.clone(), lse.clone())
    table, (outs, lses) = total.result()
    found = set()
    for entry, out, lse in zip(table, outs, lses, strict=True):
        tile = Tile(*entry[:8])
        for row, head in product(range(*tile[:2]), range(*tile[2:4])):
            answered = row, head, tile.q_stop - tile.q_start
            assert answered not in found, f"{answered} was answered twice"
            found.add(answered)
            for got, want in zip(lane_of(tile, (row, head), out, lse), lanes[answered], strict=True):
                difference = (got - want).abs().max().item()
                assert difference < 1e-5, f"largest difference {difference:.2e}"
    assert found == set(lanes)


def lane_of(tile: Tile, lane: tuple[int, int], out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """The part of a tile's result that is of one row and KV head."""
    row, head = lane[0] - tile.row_start, lane[1] - tile.head_start
    heads = slice(head * GROUP, (head + 1) * GROUP)
    return out[row : row + 1, :, heads], lse[row : row + 1, heads]


def test_each_base_rank_has_its_own_ranks_and_leases_do_not_mix(loop: Loop) -> None:
    inbox = Inbox(loop, PATIENCE_S)
    with two_loops() as (base_loop, _):
        pairs = [link_pair(base_loop, loop, f"l{i}", into=inbox.put) for i in range(2)]
        (one, one_end), (_, two_end) = pairs
        with pytest.raises(LinkLost, match="did not introduce"):
            inbox.exchange(one_end)

        def introduce(token: int, peer: int) -> Exchange:
            mine, its = pair()
            others.append(mine)
            header = Header(op=Op.PEER, token=token, number=3, peer=peer, extra=peer)
            one.send(header, attached=its)
            one.send(Header(op=Op.HELLO))
            assert inbox.get()[0] is one_end
            return inbox.exchange(one_end)

        others: list[socket.socket] = []
        first = introduce(1, 4)
        assert (first.number, first.token, list(first._peers)) == (3, 1, [4])
        with pytest.raises(LinkLost):
            inbox.exchange(two_end)
        second = introduce(2, 5)
        assert list(second._peers) == [5], "a new lease knows nothing of the old one"
        assert first._peers[4].lost
        inbox.leave(one_end)
        assert second._peers[5].lost
        for other in others:
            other.settimeout(5)
            while other.recv(4096):
                pass  # its first word, and then the end
            other.close()
        for base, end in pairs:
            base.close()
            end.close()
