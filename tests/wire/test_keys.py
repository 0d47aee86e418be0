"""Links between machines: an end with the key gets one, an end without gets nothing, and no other reads along."""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from fapool_plugin.wire.key_file import lease_token, read_key
from fapool_plugin.wire.link import Link
from fapool_plugin.wire.loop import Loop
from fapool_plugin.wire.messages import Header, LinkLost, Op
from fapool_plugin.wire.seal import SealedSocket, answer, call
from fapool_plugin.wire.sockets import Listener, connect, listen

KEY, OTHER = bytes(range(32)), bytes(range(1, 33))


def both(mine: bytes, theirs: bytes) -> tuple[list[SealedSocket], list[BaseException]]:
    """What a caller and a listener with these keys get."""
    one, other = socket.socketpair()
    got: list[SealedSocket] = []
    errors: list[BaseException] = []

    def run(agree: Any, *arguments: Any) -> None:
        try:
            got.append(agree(*arguments))
        except OSError as error:
            errors.append(error)

    threads = [
        threading.Thread(target=run, args=(call, one, mine, "link", 2.0)),
        threading.Thread(target=run, args=(answer, other, theirs, 2.0)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    return got, errors


def test_a_key_file_is_long_and_its_users_own(tmp_path: Path) -> None:
    path = tmp_path / "key"
    with pytest.raises(ValueError, match="cannot be read"):
        read_key(str(path))
    path.write_bytes(KEY)
    path.chmod(0o640)
    with pytest.raises(ValueError, match="chmod 600"):
        read_key(str(path))
    path.chmod(0o600)
    assert read_key(str(path)) == KEY
    path.write_bytes(KEY[:31])
    with pytest.raises(ValueError, match="31 bytes"):
        read_key(str(path))


def test_the_lease_is_derived_and_differs_by_key_and_run() -> None:
    tokens = {lease_token(key, run) for key in (KEY, OTHER) for run in ("a", "b")}
    assert len(tokens) == 4
    assert all(0 < token < 2**62 for token in tokens)
    assert lease_token(KEY, "a") == lease_token(KEY, "a")


def test_ends_with_one_key_agree() -> None:
    got, errors = both(KEY, KEY)
    assert (len(got), errors) == (2, [])
    for end in got:
        end.close()


@pytest.mark.parametrize("mine", [OTHER, KEY + b"x"])
def test_ends_with_different_keys_do_not(mine: bytes) -> None:
    got, errors = both(mine, KEY)
    assert not got
    assert "another link key" in str(errors)


def test_an_end_without_a_key_gets_no_link(loops: tuple[Loop, Loop]) -> None:
    """Neither one that speaks at once, nor one that says nothing; and it receives nothing but the end."""
    listener, address = listen("tcp:127.0.0.1:0")
    accepted: queue.SimpleQueue[Any] = queue.SimpleQueue()
    handler = Listener(listener, loops[1], accepted.put, KEY, 1.0)
    for said in (Header(op=Op.HELLO), None):
        stranger = connect(address, 5.0)
        if said is not None:
            stranger.sendall(bytes(4096))
        stranger.settimeout(10)
        with stranger, suppress(ConnectionResetError):
            assert stranger.recv(4096) == b""
    with pytest.raises(ConnectionError, match="another link key"):
        connect(address, 5.0, OTHER)
    assert accepted.empty()
    connect(address, 5.0, KEY, "after all that").close()
    accepted.get(timeout=5).close()
    loops[1].remove(handler)
    listener.close()


def test_a_proof_that_was_overheard_proves_nothing() -> None:
    """What a caller sent once is sent again, word for word."""
    one, heard = socket.socketpair()
    thread = threading.Thread(target=call, args=(one, KEY, "link", 2.0))
    thread.start()
    hello = heard.recv(4096)
    mine, other = socket.socketpair()
    answers: list[BaseException] = []

    def listening() -> None:
        try:
            answer(other, KEY, 2.0)
        except OSError as error:
            answers.append(error)

    listener = threading.Thread(target=listening)
    listener.start()
    mine.sendall(hello)
    reply = mine.recv(4096)
    heard.sendall(reply)  # relayed, so the caller is satisfied and proves itself
    proof = heard.recv(4096)
    mine.sendall(proof[:-1] + bytes([proof[-1] ^ 1]))
    listener.join(5)
    assert "another link key" in str(answers)
    thread.join(5)
    second, third = socket.socketpair()
    refused: list[BaseException] = []

    def listening_again() -> None:
        try:
            answer(third, KEY, 2.0)
        except OSError as error:
            refused.append(error)

    listener = threading.Thread(target=listening_again)
    listener.start()
    second.sendall(hello)
    second.recv(4096)
    second.sendall(proof)  # of another conversation
    second.settimeout(5)
    with suppress(ConnectionResetError):
        assert second.recv(1) == b""
    listener.join(5)
    assert "another link key" in str(refused)
    for end in (heard, mine, second):
        end.close()


@pytest.fixture
def sealed(loops: tuple[Loop, Loop]) -> Iterator[tuple[Link, Link, list[Any]]]:
    """A link under a key, and what its two sockets are."""
    got, _ = both(KEY, KEY)
    base = Link(got[0], loops[0], name="base", timeout_s=5, asks=True)
    pool = Link(got[1], loops[1], name="pool", timeout_s=5, asks=False)
    base.is_local = pool.is_local = False  # as between machines: nothing but bytes goes
    yield base, pool, got
    base.close()
    pool.close()


@pytest.mark.parametrize("size", [0, 5, 70_000, 3_000_000])
def test_messages_of_any_size_arrive_both_ways_at_once(sealed: tuple[Link, Link, list[Any]], size: int) -> None:
    *ends, _ = sealed
    large = torch.randn(size)
    header = Header(op=Op.ATTEND, q_elements=size, k_elements=size)
    message = header, [torch.zeros((0, 10), dtype=torch.int64), large, large, torch.zeros(0)]
    for _ in range(3):
        for end in ends:
            end.send(*message)
    for end in ends:
        for _ in range(3):
            got = end.receive(20.0)
            assert got.header == header
            assert torch.equal(got.tensors[1], large)
            assert torch.equal(got.tensors[2], large)


def test_a_changed_byte_ends_the_link_and_nothing_of_it_is_used(sealed: tuple[Link, Link, list[Any]]) -> None:
    base, pool, (one, _) = sealed
    encrypt = one._sending.encrypt

    class Flipped:
        def encrypt(self, *arguments: Any) -> bytes:
            data = bytearray(encrypt(*arguments))
            data[7] ^= 1
            return bytes(data)

    one._sending = Flipped()
    base.send(Header(op=Op.HELLO, token=3))
    with pytest.raises(LinkLost, match="did not seal"):
        pool.receive(5.0)


def test_nothing_can_be_read_on_the_way(loops: tuple[Loop, Loop], monkeypatch: pytest.MonkeyPatch) -> None:
    """A relay between the two ends sees every byte, and not a key's."""
    (first, second), _ = both(KEY, KEY)
    secret = torch.full((4096,), 1.2345)
    raw = secret.numpy().tobytes()
    seen = bytearray()
    send = first._sock.send

    class Seen:
        def send(self, data: memoryview) -> int:
            count = send(data)
            seen.extend(data[:count])
            return count

        def __getattr__(self, name: str) -> Any:
            return getattr(inner, name)

    inner = first._sock
    monkeypatch.setattr(first, "_sock", Seen())
    base = Link(first, loops[0], name="base", timeout_s=5, asks=True)
    pool = Link(second, loops[1], name="pool", timeout_s=5, asks=False)
    base.is_local = pool.is_local = False
    header = Header(op=Op.ATTEND, q_elements=4096)
    base.send(header, [torch.zeros((0, 10), dtype=torch.int64), secret, torch.zeros(0), torch.zeros(0)])
    assert torch.equal(pool.receive(5.0).tensors[1], secret)
    assert len(seen) > len(raw)
    assert raw[:16] not in seen
    base.close()
    pool.close()


def test_no_socket_is_sent_under_a_key(sealed: tuple[Link, Link, list[Any]]) -> None:
    mine, its = socket.socketpair()
    with mine, pytest.raises(LinkLost, match="another machine"):
        sealed[0].send(Header(op=Op.PEER), attached=its)
    its.close()
