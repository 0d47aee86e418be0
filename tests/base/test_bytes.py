"""What a model's forwards send to pool ranks is the least that their tiles need: counted position by position.

Which tiles a rank computes is taken from its requests; that they are right, the logits say.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fapool_plugin.base.lease import PoolRank
from fapool_plugin.wire.messages import HEADER_BYTES, Op
from tests.base.test_advisor import LAYERS, planned
from tests.models import assert_close, eager, random_ids, save_model

pytestmark = pytest.mark.usefixtures("one_thread_each")

LONG, GROUP, DIM, FP32 = 300, 2, 8, 4
GAPS = 4 * 63
"""Bytes between the tensors of a message, at most: each of four begins at a multiple of 64."""
QUERY, POSITION = GROUP * DIM * FP32, 2 * DIM * FP32


class Ledger:
    """What was asked of pool ranks, in bytes of queries, keys and values; and what of it was needed."""

    def __init__(self) -> None:
        self.payload = self.needed = self.messages = self.tables = 0
        self.known: set[tuple[int, ...]] = set()
        self.apart = False
        """Nothing stays from one message to the next."""

    def note(self, rank: int, layer: int, tensors: list[Any], *, backward: bool = False, kept: bool = False) -> None:
        if self.apart or (backward and not kept):
            self.known = set()  # nothing stays from forward, or from another layer
        table, *payload = tensors
        self.messages += 1
        if kept and not backward:
            assert not any(len(part) for part in tensors), "a call that was kept was sent once more"
            return
        self.tables += table.numel() * 8
        parts = [x for part in payload for x in ([part] if isinstance(part, Tensor) else part)]
        self.payload += sum(part.numel() * FP32 for part in parts)
        for row, row_stop, first, last, q_start, q_stop, k_start, k_stop, *_ in table.tolist():
            for lane in product(range(row, row_stop), range(first, last)):
                # Backward with every query its output, that one's gradient, and its LSEs; what is kept needs none.
                row_bytes = QUERY if kept or not backward else 3 * QUERY + GROUP * FP32
                self.needed += row_bytes * (q_stop - q_start)
                # Keys of a lane lie in one prefix: what is before the first one needed is there as well.
                seen = {(rank, layer, *lane, at) for at in range(min(k_stop, q_stop))}
                self.needed += POSITION * len(seen - self.known)
                self.known |= seen
                assert k_start < k_stop

    def take(self) -> tuple[int, int, int]:
        """(sent, needed, at most so much of headers and tables) since the last look."""
        found = self.payload, self.needed, self.messages * (HEADER_BYTES + GAPS) + self.tables
        self.payload = self.needed = self.messages = self.tables = 0
        return found


@pytest.fixture
def ledger(monkeypatch: pytest.MonkeyPatch) -> Ledger:
    ledger, ask = Ledger(), PoolRank.ask

    def asked(self: PoolRank, header: Any, tensors: Any, expected: Any) -> int:
        kept = header.keep == 2 and header.extra > 0
        ledger.note(self.number, header.layer, list(tensors), backward=header.op == Op.BACKWARD, kept=kept)
        return ask(self, header, tensors, expected)

    monkeypatch.setattr(PoolRank, "ask", asked)
    return ledger


@pytest.mark.parametrize("share", [None, 0.0, 0.4])
@pytest.mark.parametrize("blocks", [1, 4])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("mode", ["line", "query_blocks"])
def test_a_prompt_and_its_steps_send_the_least(
    tmp_path: Path, ledger: Ledger, mode: str, ranks: int, blocks: int, share: float | None
) -> None:
    folder = save_model("llama", tmp_path, max_position_embeddings=1024)
    reference, ids = eager(folder), random_ids(2, LONG)
    settings: dict[str, Any] = {
        "pool_ranks": ranks,
        "blocks": blocks,
        "base_share": share,
        "partition": mode,
        "kv_block": 256,
    }
    with planned(folder, activation="length", **settings) as model, torch.no_grad():

        def stats_sent() -> int:
            return int(model.fa_pool.stats()["bytes_sent"])

        got, want = model(ids), reference(ids)
        assert_close(got.logits, want.logits)
        sent, needed, headers = ledger.take()
        assert sent == needed, f"{sent} bytes of q, k and v were sent, {needed} are needed"
        if share == 0.0 and ranks == 1:
            # By closed form, too: everything goes to the only rank.
            assert sent == LAYERS * 2 * 3 * LONG * (QUERY + POSITION), sent
        greetings = ranks * HEADER_BYTES
        assert sent <= stats_sent() <= sent + headers + greetings
        for step in range(3):
            before = stats_sent()
            more = random_ids(2, 1, seed=step)
            logits = model(more, past_key_values=got.past_key_values).logits
            assert_close(logits, reference(more, past_key_values=want.past_key_values).logits, what=f"step {step}")
            sent, needed, headers = ledger.take()
            assert 0 < sent == needed, f"step {step}: {sent} bytes sent, {needed} needed"
            assert sent <= LAYERS * ranks * 2 * 3 * QUERY, f"step {step}: {sent} bytes: keys, too?"
            assert stats_sent() - before <= sent + headers


@pytest.mark.parametrize(("rows", "ranks", "cut"), [(2, 1, 0), (2, 2, 0), (2, 3, 0), (1, 2, 1), (2, 4, 2)])
def test_a_step_over_owners_sends_each_number_once(
    tmp_path: Path, ledger: Ledger, rows: int, ranks: int, cut: int
) -> None:
    """By closed form: every new key to one owner, every query to all owners of its lane, and one answer of each."""
    folder, lanes = save_model("llama", tmp_path, max_position_embeddings=1024), 3 * rows
    reference, ids = eager(folder), random_ids(rows, LONG)
    settings: dict[str, Any] = {"pool_ranks": ranks, "base_share": 0.0, "kv_home": "pool"}
    with planned(folder, activation="length", **settings) as model, torch.no_grad():
        got, want = model(ids), reference(ids)
        for step in range(3):
            ledger.take()
            before, more = model.fa_pool.stats(), random_ids(rows, 1, seed=step)
            logits = model(more, past_key_values=got.past_key_values).logits
            assert_close(logits, reference(more, past_key_values=want.past_key_values).logits, what=f"step {step}")
            after, (sent, _, headers) = model.fa_pool.stats(), ledger.take()
            assert sent == LAYERS * ((lanes + cut) * QUERY + lanes * POSITION), f"step {step}: {sent} bytes"
            assert sent <= after["bytes_sent"] - before["bytes_sent"] <= sent + headers
            answers = LAYERS * (lanes + cut) * (QUERY + GROUP * FP32)
            received = after["bytes_received"] - before["bytes_received"]
            assert 0 <= received - answers <= headers, f"step {step}: {received} bytes came, {answers} are needed"


@pytest.mark.parametrize("share", [None, 0.0])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("mode", ["line", "query_blocks"])
def test_blocks_of_a_training_row_send_their_keys_anew_and_no_more(
    tmp_path: Path, ledger: Ledger, mode: str, ranks: int, share: float | None
) -> None:
    """The least that each block's tiles need by themselves, in both directions."""
    folder, ids = save_model("llama", tmp_path, max_position_embeddings=1024), random_ids(1, LONG)
    settings: dict[str, Any] = {"pool_ranks": ranks, "blocks": 4, "base_share": share, "partition": mode}
    with planned(folder, activation="length", **settings) as model:
        ledger.apart = True
        loss = model(ids, labels=ids).loss
        forward, needed, _ = ledger.take()
        assert forward == needed, f"forward: {forward} bytes were sent, {needed} are needed"
        loss.backward()
        backward, needed, _ = ledger.take()
        assert backward == needed, f"backward: {backward} bytes were sent, {needed} are needed"
        if share == 0.0 and ranks == 1:
            # By closed form: blocks end at these positions, and each sends all keys up to its own end.
            keys, rows = LAYERS * 3 * sum((64, 128, 192, LONG)), LAYERS * 3 * LONG
            assert forward == rows * QUERY + keys * POSITION, forward
            assert backward == rows * (3 * QUERY + GROUP * FP32) + keys * POSITION, backward


@pytest.mark.parametrize("share", [None, 0.0])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("mode", ["line", "query_blocks"])
def test_a_step_of_training_sends_the_least(
    tmp_path: Path, ledger: Ledger, mode: str, ranks: int, share: float | None
) -> None:
    folder, ids = save_model("llama", tmp_path, max_position_embeddings=1024), random_ids(2, LONG)
    settings: dict[str, Any] = {"pool_ranks": ranks, "blocks": 1, "base_share": share, "partition": mode}
    with planned(folder, activation="length", **settings) as model:
        loss = model(ids, labels=ids).loss
        sent, needed, _ = ledger.take()
        assert sent == needed, f"forward: {sent} bytes were sent, {needed} are needed"
        forward, before = sent, model.fa_pool.stats()
        loss.backward()
        sent, needed, headers = ledger.take()
        assert sent == needed, f"backward: {sent} bytes were sent, {needed} are needed"
        assert sent > forward, "output, its gradient and LSE come along"
        after = model.fa_pool.stats()
        assert sent <= after["bytes_sent"] - before["bytes_sent"] <= sent + headers
        if share == 0.0 and ranks == 1:
            # By closed form: everything goes to the only rank, and gradients of q, k and v come back.
            rows = LAYERS * 2 * 3 * LONG
            assert sent == rows * (3 * QUERY + GROUP * FP32 + POSITION), sent
            received = after["bytes_received"] - before["bytes_received"]
            assert 0 <= received - rows * (QUERY + POSITION) <= LAYERS * (HEADER_BYTES + GAPS), received


@pytest.mark.parametrize("checkpointed", [None, True, False], ids=["plain", "reentrant", "not reentrant"])
@pytest.mark.parametrize("share", [None, 0.0])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("mode", ["line", "query_blocks"])
def test_a_step_with_residency_sends_each_number_once(
    tmp_path: Path, ledger: Ledger, mode: str, ranks: int, share: float | None, checkpointed: bool | None
) -> None:
    """q, k and v in forward and dout in backward, with layers that run a second time, too."""
    folder, ids = save_model("llama", tmp_path, max_position_embeddings=1024), random_ids(2, LONG)
    settings: dict[str, Any] = {"pool_ranks": ranks, "blocks": 1, "base_share": share, "partition": mode}
    with planned(folder, activation="length", training_residency=True, **settings) as model:
        if checkpointed is not None:
            model.train().gradient_checkpointing_enable({"use_reentrant": checkpointed})
            model.enable_input_require_grads()
        loss = model(ids, labels=ids).loss
        sent, needed, _ = ledger.take()
        assert sent == needed, f"forward: {sent} bytes were sent, {needed} are needed"
        before = model.fa_pool.stats()
        loss.backward()
        sent, needed, headers = ledger.take()
        assert sent == needed, f"backward: {sent} bytes were sent, {needed} are needed"
        after = model.fa_pool.stats()
        assert sent <= after["bytes_sent"] - before["bytes_sent"] <= sent + headers
        reused = sum(rank["reused_calls"] for rank in after["ranks"])
        assert reused == LAYERS * ranks * (1 if checkpointed is None else 2)
        if share == 0.0 and ranks == 1:
            assert sent == LAYERS * 2 * 3 * LONG * QUERY, "by closed form, dout of every query"
