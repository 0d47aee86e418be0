"""Wrong words about where bodies are: each loses its link, and nothing else."""

from __future__ import annotations

import os
import random
import socket
from contextlib import suppress

import pytest
import torch

from fapool_plugin.wire.descriptor import Descriptor
from fapool_plugin.wire.link import Link
from fapool_plugin.wire.loop import Loop
from fapool_plugin.wire.messages import Header, LinkLost, Op, Status, header_bytes, header_of, rooms
from fapool_plugin.wire.ring import Ring
from fapool_plugin.wire.sockets import pair
from tests.bodies import RING, answer, answer_bytes, request


class Liar:
    """The other end of a link, by hand."""

    def __init__(self, loop: Loop, asks: bool) -> None:
        mine, self.sock = pair()
        self.link = Link(mine, loop, name="test", timeout_s=20, asks=asks, ring_bytes=RING if asks else 0)
        self.sock.settimeout(5)
        if asks:
            self.link.send(Header(op=Op.HELLO), attached=self.link.terms.offer())
            self.say(Header(op=Op.BEAT, status=Status.OK))
            self.theirs = Ring(self.hear())
            self.mine, made = Ring.made(RING)
            self.say(Header(op=Op.HELLO, status=Status.OK), made)
            self.link.terms.agree(self.link.receive(5.0).attached)
        else:
            self.mine, made = Ring.made(RING)
            self.say(Header(op=Op.HELLO), made)
            self.link.send(Header(op=Op.HELLO), attached=self.link.terms.agree(self.link.receive(5.0).attached))
            self.hear()  # its first heartbeat
            self.theirs = Ring(self.hear())
        assert self.link.carrier.name == "shm"

    def say(self, header: Header, attached: Descriptor | None = None) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, attached.fileno().to_bytes(4, "little"))] if attached else []
        self.sock.sendmsg([header_bytes(header)], rights)

    def hear(self) -> Descriptor:
        _, rights, _, _ = self.sock.recvmsg(256, socket.CMSG_SPACE(4))
        return Descriptor(int.from_bytes(rights[0][2][:4], "little") if rights else -1)

    def header(self) -> Header:
        data = b""
        while len(data) < 256:
            data += self.sock.recv(256 - len(data))
        return header_of(data)


ASKED = Header(op=Op.ATTEND, tiles=1, q_elements=2**12, call=1)
NBYTES = rooms(ASKED)[1]
LIES: dict[str, list[Header]] = {
    "a slot before the ring": [ASKED._replace(slot=-64, piece=NBYTES)],
    "a slot behind it": [ASKED._replace(slot=RING - 64, piece=NBYTES)],
    "a slot far behind it": [ASKED._replace(slot=2**62, piece=NBYTES)],
    "a piece of less than nothing": [ASKED._replace(piece=-64)],
    "a piece larger than the body": [ASKED._replace(piece=NBYTES + 1)],
    "a piece larger than the ring": [ASKED._replace(piece=2**40)],
    "a body in a slot that has none": [Header(op=Op.FREE, piece=64)],
    "a piece of no body": [Header(op=Op.PIECE, call=1, piece=64)],
    "another call's piece": [ASKED._replace(piece=64), Header(op=Op.PIECE, call=2, piece=64)],
    "a piece too much": [ASKED._replace(piece=64), Header(op=Op.PIECE, call=1, piece=NBYTES)],
    "no piece": [ASKED._replace(piece=64), Header(op=Op.PIECE, call=1)],
    "a message in the middle of a body": [ASKED._replace(piece=64), Header(op=Op.FREE)],
    "room for an answer before the ring": [ASKED._replace(piece=NBYTES, answer_slot=-64, answer_bytes=2**13)],
    "room for an answer behind it": [ASKED._replace(piece=NBYTES, answer_slot=RING, answer_bytes=2**13)],
    "no room for an answer": [ASKED._replace(piece=NBYTES, answer_bytes=64)],
    "less than no room for an answer": [ASKED._replace(piece=NBYTES, answer_bytes=-(2**40))],
    "credit that was not asked for": [Header(op=Op.CREDIT, status=Status.OK, extra=1)],
    "credit for less than nothing": [Header(op=Op.CREDIT, status=Status.OK, extra=-(2**40))],
}


@pytest.mark.parametrize("lie", LIES)
def test_a_base_that_lies_loses_its_link(loops: tuple[Loop, Loop], lie: str) -> None:
    liar = Liar(loops[0], asks=False)
    with liar.sock:
        for header in LIES[lie]:
            liar.say(header)
        with pytest.raises(LinkLost, match="broke the protocol"):
            liar.link.receive(5.0)
    liar.link.close()


@pytest.mark.parametrize("slot", [-64, 0, 2**62], ids=["before", "elsewhere", "behind"])
@pytest.mark.parametrize("piece", [2**14, 2**16])
def test_a_rank_that_answers_elsewhere_loses_its_link(loops: tuple[Loop, Loop], slot: int, piece: int) -> None:
    liar = Liar(loops[0], asks=True)
    with liar.sock:
        for call in (1, 2):
            liar.link.send(*request(call, 300), answer_bytes=answer_bytes(2**14))
        first = liar.header()
        liar.sock.recv(rooms(first)[1])
        second = liar.header()
        assert first.answer_bytes == second.answer_bytes == answer_bytes(2**14)
        told = answer(second, 2**14)[0]._replace(answer_slot=0, answer_bytes=0)
        liar.say(told._replace(slot=slot or first.answer_slot, piece=piece))
        with pytest.raises(LinkLost, match="broke the protocol"):
            liar.link.receive(5.0)
    liar.link.close()


def test_a_base_outlives_whatever_a_rank_says(loops: tuple[Loop, Loop]) -> None:
    """Each answer is given by a rank of its own, in a slot, with changed fields of where it is."""
    random_ = random.Random(14)
    taken = lost = 0
    for _ in range(150):
        liar = Liar(loops[0], asks=True)
        with liar.sock:
            liar.link.send(*request(1, 300), answer_bytes=answer_bytes(2**14))
            asked = liar.header()
            told, _ = answer(asked._replace(answer_slot=0, answer_bytes=0), 2**14)
            first = random_.choice((asked.answer_bytes, 64 * random_.randrange(1, 250)))
            said = [told._replace(slot=asked.answer_slot, piece=first)]
            said.append(Header(op=Op.PIECE, call=1, slot=first, piece=asked.answer_bytes - first))
            wrong = random_.randrange(3)
            for index, header in enumerate(said):
                place = random_.choice(("slot", "piece", "answer_slot", "answer_bytes", "op", "call", "extra"))
                value = random_.choice((0, 1, -1, -64, 63, RING, RING - 64, 2**31, 2**62, -(2**62)))
                with suppress(OSError):  # it was cut off
                    liar.say(header._replace(**{place: value}) if index == wrong else header)
            try:
                message = liar.link.receive(0.2)
                assert message.header.op != Op.ATTEND or len(message.tensors) in (0, 2)
                taken += 1
            except LinkLost:
                lost += 1
        liar.link.close()
    assert min(taken, lost) > 30, f"{taken} taken, {lost} lost: one of the two was not tried"


def test_what_changes_after_it_was_copied_out_changes_nothing(loops: tuple[Loop, Loop]) -> None:
    liar = Liar(loops[0], asks=False)
    with liar.sock:
        liar.theirs.part(0, NBYTES)[:] = 1
        liar.say(ASKED._replace(piece=NBYTES))
        message = liar.link.receive(5.0)
        before = [x.clone() for x in message.tensors]
        liar.theirs.part(0, NBYTES)[:] = 255
        assert all(torch.equal(x, y) for x, y in zip(before, message.tensors, strict=True))
    liar.link.close()


@pytest.mark.parametrize("what", ["unsealed", "socket", "second"])
def test_a_descriptor_that_is_no_ring_loses_the_link(loops: tuple[Loop, Loop], what: str) -> None:
    mine, sock = pair()
    link = Link(mine, loops[0], name="test", timeout_s=20, asks=False)
    other, unsealed = socket.socket(), Descriptor(os.memfd_create("test"))
    os.ftruncate(unsealed.fileno(), RING)
    with sock, other:
        if what == "second":
            assert link.terms.agree(Ring.made(RING)[1]) is not None
            offered = Ring.made(RING)[1]
        else:
            offered = unsealed if what == "unsealed" else Descriptor(other.detach())
        with pytest.raises(LinkLost, match=r"offers|cannot be mapped"):
            link.terms.agree(offered)
    unsealed.close()
    link.close()
