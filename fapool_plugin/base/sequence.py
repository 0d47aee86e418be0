"""What the base keeps of a batch of sequences: their keys and values, and which prefix of them each pool rank holds.

Knows tensors and lanes, but no model, no link and no plan.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fapool_plugin.base.kept_calls import KeptCalls
from fapool_plugin.plan.line import Row, round_up


class GrowingKV:
    """K and V of one layer, in storage that grows by blocks, so that a step appends without copying the past.

    Args:
        block: positions by which storage grows.
        capacity: positions to allocate at once, when known; 0 if not.
    """

    def __init__(self, block: int, capacity: int = 0) -> None:
        self.block, self.capacity, self.length = block, capacity, 0
        self._k: Tensor | None = None
        self._v: Tensor | None = None

    def append(self, k_BKSD: Tensor, v_BKSE: Tensor) -> tuple[Tensor, Tensor]:
        """Stores new positions; returns views of all keys (B, K, T, D) and values (B, K, T, E), in the wider dtype of
        old and new ones, as concatenation has it."""
        stop = self.length + k_BKSD.shape[2]
        wider = any(
            x is not None and torch.promote_types(x.dtype, y.dtype) != x.dtype for x, y in self._pairs(k_BKSD, v_BKSE)
        )
        if self._k is None or self._v is None or wider or stop > self._k.shape[2]:
            size = self.capacity if self.capacity >= stop else round_up(stop, self.block)
            # Tensors made in inference mode count no writes, and can be written in no other.
            with torch.inference_mode(False), torch.no_grad():
                self._k, self._v = (self._grown(x, y, size) for x, y in self._pairs(k_BKSD, v_BKSE))
        self._k[:, :, self.length : stop] = k_BKSD
        self._v[:, :, self.length : stop] = v_BKSE
        self.length = stop
        return self.views()

    def views(self) -> tuple[Tensor, Tensor]:
        """All keys and values stored, as views. Raises RuntimeError while there are none."""
        if self._k is None or self._v is None:
            raise RuntimeError("nothing is stored yet; append() first")
        return self._k[:, :, : self.length], self._v[:, :, : self.length]

    def crop(self, length: int) -> None:
        """Forgets every position from ``length`` on."""
        self.length = min(self.length, length)

    def select_rows(self, rows: Tensor) -> None:
        """Row i becomes a copy of row ``rows[i]``; the batch may change its size."""
        if self._k is None or self._v is None:
            return
        k, v = self.views()
        if rows.numel() == k.shape[0]:
            k.copy_(k.index_select(0, rows))
            v.copy_(v.index_select(0, rows))
        else:
            self.length = 0
            self._k = self._v = None
            self.append(k.index_select(0, rows), v.index_select(0, rows))

    def _pairs(self, k_BKSD: Tensor, v_BKSE: Tensor) -> tuple[tuple[Tensor | None, Tensor], ...]:
        return (self._k, k_BKSD), (self._v, v_BKSE)

    def _grown(self, old: Tensor | None, new: Tensor, size: int) -> Tensor:
        batch, heads, _, dim = new.shape
        dtype = new.dtype if old is None else torch.promote_types(old.dtype, new.dtype)
        storage = torch.empty(batch, heads, size, dim, dtype=dtype, device=new.device)
        if old is not None:
            storage[:, :, : self.length] = old[:, :, : self.length]
        return storage


class Residency:
    """How long a prefix of each lane each pool rank holds: one integer per (rank, layer, row, head), kept by the
    base and advanced when keys are sent. Positions are lane-relative."""

    def __init__(self) -> None:
        self._held: dict[tuple[int, int], dict[tuple[int, int], int]] = {}

    def held(self, rank: int, layer: int, row: int, head_start: int, head_stop: int) -> int:
        """The prefix that all lanes of ``row``'s heads [head_start, head_stop) have on ``rank``."""
        lanes = self._held.get((rank, layer))
        if not lanes:
            return 0
        return min((lanes.get((row, head), 0) for head in range(head_start, head_stop)), default=0)

    def by_row(self, rank: int, rows: Sequence[int]) -> list[int]:
        """Positions held of each row by ``rank``, summed over heads, in a layer of which it holds any."""
        held = dict.fromkeys(rows, 0)
        lanes = next((lanes for (key, _), lanes in self._held.items() if key == rank), {})
        for (row, _), positions in lanes.items():
            if row in held:
                held[row] += positions
        return list(held.values())

    def advance(self, rank: int, layer: int, row: int, head_start: int, head_stop: int, length: int) -> None:
        """These lanes now have exactly ``length`` positions on ``rank``."""
        lanes = self._held.setdefault((rank, layer), {})
        lanes.update({(row, head): length for head in range(head_start, head_stop)})

    def crop(self, layer: int, length_of: Callable[[int], int]) -> None:
        """Row r of ``layer`` was cut to ``length_of(r)`` positions."""
        for (_, at), lanes in self._held.items():
            if at == layer:
                lanes.update({lane: min(held, length_of(lane[0])) for lane, held in lanes.items()})

    def reorder(self, layer: int, rows: Sequence[int], common: Callable[[int, int], int]) -> None:
        """Row i of ``layer`` now holds what row ``rows[i]`` held; ``common(i, j)`` positions of both were equal."""
        for (_, at), lanes in self._held.items():
            if at == layer:
                for (row, head), held in list(lanes.items()):
                    source = rows[row] if row < len(rows) else -1
                    if source != row:
                        lanes[(row, head)] = min(held, common(row, source)) if source >= 0 else 0

    def forget(self, rank: int | None = None) -> None:
        """``rank``, or every rank, holds nothing any more."""
        self._held = {} if rank is None else {key: v for key, v in self._held.items() if key[0] != rank}


@dataclass
class SequenceState:
    """What the base knows about one batch of sequences beside its keys: who holds what, and what is to come.

    ``id`` names the batch on pool ranks; ids are random, so that base ranks need not agree on them.
    """

    prompt_columns: int = 0
    """Length of the whole prompt, padding included; 0 when nobody said."""
    capacity: int = 0
    """Positions the sequence will need at most; 0 when nobody said."""
    copies: int = 1
    """Rows r // copies are copies of one prompt (beams)."""
    starts: tuple[int, ...] | None = None
    """First unpadded column of each row."""
    line: tuple[float, ...] = ()
    """The ranks' parts of the line that its prompt was cut by, the base's last."""
    prompt: tuple[Row, ...] | None = None
    """The rows of that prompt."""
    residency: Residency = field(default_factory=Residency)
    kept: KeptCalls = field(default_factory=KeptCalls)
    dtypes: dict[int, tuple[torch.dtype, torch.dtype]] = field(default_factory=dict)
    """Of keys and values as they are sent, by layer."""
    full: set[int] = field(default_factory=set)
    """Ranks that assumed nothing and still could not store what they were sent."""
    id: int = field(default_factory=lambda: secrets.randbits(62))

    def __reduce__(self) -> tuple[type[SequenceState], tuple[int, int, int]]:
        """Copies and pickles go their own way: under another id, resident nowhere."""
        return SequenceState, (self.prompt_columns, self.capacity, self.copies)

    def place(self, starts: tuple[int, ...]) -> None:
        """Says where rows start. If that changed, positions mean something else and nothing is resident."""
        if self.starts != starts:
            if self.starts is not None:
                self.residency.forget()
            self.starts = starts

    def send_as(self, layer: int, k: torch.dtype, v: torch.dtype) -> None:
        """Says in which dtypes a layer's keys and values are sent. In others (under autocast, or no more) nothing of
        it is resident."""
        if self.dtypes.setdefault(layer, (k, v)) != (k, v):
            self.dtypes[layer] = k, v
            self.residency.crop(layer, lambda row: 0)

    def crop(self, layer: int, columns: int) -> None:
        """``layer`` was cut to ``columns`` columns."""
        starts = self.starts or ()
        self.prompt_columns = min(self.prompt_columns, columns)
        self.residency.crop(layer, lambda row: max(0, columns - starts[row]) if row < len(starts) else 0)

    def rows_changed(self) -> None:
        """The batch has other rows now: nobody holds anything of them, and who copies whom is not known."""
        self.copies, self.line, self.prompt = 1, (), None
        self.residency.forget()

    def reorder(self, layer: int, rows: Sequence[int]) -> None:
        """Row i of ``layer`` became a copy of row ``rows[i]``: beams of one prompt keep the prompt."""
        starts = self.starts or ()

        def common(row: int, source: int) -> int:
            if self.copies > 1 and row // self.copies == source // self.copies and row < len(starts):
                return max(0, self.prompt_columns - starts[row])
            return 0

        self.residency.reorder(layer, rows, common)
