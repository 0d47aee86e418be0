"""What the base keeps of a batch of sequences: their keys and values, and what else it knows of them.

Knows tensors and lanes, but no model, no link and no plan.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fapool_plugin.base.kept_calls import KeptCalls
from fapool_plugin.base.owned import OwnedKeys
from fapool_plugin.base.residency import Residency
from fapool_plugin.plan.line import Row, round_up


class GrowingKV:
    """K and V of one layer, in storage that grows by blocks, so that a step appends without copying the past.

    What a graph may have saved for backward is written to no more: with gradients new positions are concatenated, as
    by a cache that does nothing else, and storage begins anew with the next append without.

    Args:
        block: positions by which storage grows.
        capacity: positions to allocate at once, when known; 0 if not.
    """

    def __init__(self, block: int, capacity: int = 0) -> None:
        self.block, self.capacity, self.length = block, capacity, 0
        self._k: Tensor | None = None
        self._v: Tensor | None = None
        self._saved = False
        """Whether a graph may have saved what is stored."""

    def append(self, k_BKSD: Tensor, v_BKSE: Tensor, *, saved: bool = False) -> tuple[Tensor, Tensor]:
        """Stores new positions; returns views of all keys (B, K, T, D) and values (B, K, T, E), in the wider dtype of
        old and new ones, as concatenation has it. ``saved``: a graph saves what is returned, even if neither old nor
        new ones require gradients. Raises ValueError for other rows, heads or dims."""
        for old, new in self._pairs(k_BKSD, v_BKSE):
            if old is not None and any(old.shape[dim] != new.shape[dim] for dim in (0, 1, 3)):
                raise ValueError(
                    f"a cache of {old.shape[0]} rows x {old.shape[1]} heads x {old.shape[3]} dims is given new keys of "
                    f"{new.shape[0]} x {new.shape[1]} x {new.shape[3]}: go on with all rows of its batch, by its model"
                )
        stop = self.length + k_BKSD.shape[2]
        wider = any(
            x is not None and torch.promote_types(x.dtype, y.dtype) != x.dtype for x, y in self._pairs(k_BKSD, v_BKSE)
        )
        saved = saved or any(x is not None and x.requires_grad for pair in self._pairs(k_BKSD, v_BKSE) for x in pair)
        if saved and torch.is_grad_enabled():
            self._k, self._v = (
                torch.cat([x[:, :, : self.length], y], dim=2) if x is not None else y.clone()
                for x, y in self._pairs(k_BKSD, v_BKSE)
            )
            self.length, self._saved = stop, True
            return self.views()
        if self._k is None or self._v is None or wider or self._saved or stop > self._k.shape[2]:
            size = self.capacity if self.capacity >= stop else round_up(stop, self.block)
            # Tensors made in inference mode count no writes, and can be written in no other.
            with torch.inference_mode(False), torch.no_grad():
                self._k, self._v = (self._grown(x, y, size) for x, y in self._pairs(k_BKSD, v_BKSE))
            self._saved = False
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
        """Forgets every position from ``length`` on; what is cut without gradients has none, as a slice of it."""
        if self._k is not None and self._v is not None and length < self.length and not torch.is_grad_enabled():
            self._k, self._v = self._k.detach(), self._v.detach()
        self.length = min(self.length, length)

    def select_rows(self, rows: Tensor) -> None:
        """Row i becomes a copy of row ``rows[i]``; the batch may change its size."""
        if self._k is None or self._v is None:
            return
        k, v = self.views()
        if rows.numel() == k.shape[0] and not self._saved:
            k.copy_(k.index_select(0, rows))
            v.copy_(v.index_select(0, rows))
        else:
            saved, self.length, self._saved = self._saved, 0, False
            self._k = self._v = None
            self.append(k.index_select(0, rows), v.index_select(0, rows), saved=saved)

    def _pairs(self, k_BKSD: Tensor, v_BKSE: Tensor) -> tuple[tuple[Tensor | None, Tensor], ...]:
        return (self._k, k_BKSD), (self._v, v_BKSE)

    def _grown(self, old: Tensor | None, new: Tensor, size: int) -> Tensor:
        batch, heads, _, dim = new.shape
        dtype = new.dtype if old is None else torch.promote_types(old.dtype, new.dtype)
        storage = torch.empty(batch, heads, size, dim, dtype=dtype, device=new.device)
        if old is not None:
            storage[:, :, : self.length] = old[:, :, : self.length]
        return storage


@dataclass
class SequenceState:
    """What the base knows about one batch of sequences beside its keys: who holds what, and what is to come.

    ``id`` names the batch on pool ranks; ids are random, so that base ranks need not agree on them.
    """

    prompt_columns: int = 0
    """Length of the whole prompt, padding included; 0 when that is not known."""
    capacity: int = 0
    """Positions the sequence will need at most; 0 when that is not known."""
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
    made_by: dict[int, Any] = field(default_factory=dict)
    """Of keys that are not stored but made of what is, what made them, by layer."""
    full: set[int] = field(default_factory=set)
    """Ranks that assumed nothing and still could not store what they were sent."""
    id: int = field(default_factory=lambda: secrets.randbits(62))
    ownable: bool = False
    """Whether its keys are to have owners, above the threshold."""
    edited: bool = False
    """Whether other keys were put by hand in the place of those that its forwards made."""
    owned: OwnedKeys | None = None
    """Its keys, if they have owners."""
    again: bool = False
    """Whether it is computed once more, for keys that were lost."""
    owning: bool = False
    """Whether a forward is under way whose keys go to owners."""
    blank_BT: Tensor | None = None
    """Columns without tokens, whose keys are not what the model makes of padding; None: there are none, or keys were
    put in their place by hand."""
    under_way: bool = False
    """Whether keys are read and written by a forward, or by the cache as a whole: not by hand."""
    recorded: bool = False
    """Whether the forward under way, or the last one, may record gradients."""

    def __reduce__(self) -> tuple[type[SequenceState], tuple[int, int, int], dict[str, Any]]:
        """Copies and pickles go their own way: under another id, resident nowhere."""
        more = {"edited": self.edited, "blank_BT": self.blank_BT}
        return SequenceState, (self.prompt_columns, self.capacity, self.copies), more

    def anew(self) -> SequenceState:
        """For the same sequences, computed once more as they were: what was short is so again, whatever its mask."""
        return SequenceState(0, self.capacity, self.copies, again=True)

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
            self.residency.crop(layer, np.zeros(0, dtype=np.int64))

    def make_by(self, layer: int, what: Any) -> None:
        """Says what makes a layer's keys of what is stored. If that changed nothing of it is resident."""
        if self.made_by.setdefault(layer, what) != what:
            self.made_by[layer] = what
            self.residency.crop(layer, np.zeros(0, dtype=np.int64))

    def crop(self, layer: int, columns: int) -> None:
        """``layer`` was cut to ``columns`` columns."""
        self.prompt_columns = min(self.prompt_columns, columns)
        self.residency.crop(layer, np.maximum(0, columns - self._first_columns()))

    def rows_changed(self) -> None:
        """The batch has other rows now: nothing of them is held anywhere, and which is a copy of which is not known."""
        self.copies, self.line, self.prompt = 1, (), None
        self.residency.forget()

    def reorder(self, layer: int, rows: Sequence[int]) -> None:
        """Row i of ``layer`` became a copy of row ``rows[i]``: beams of one prompt keep the prompt."""
        now, starts = np.arange(len(rows)), self._first_columns()
        # What of a row is still what it was: all if it stayed, the prompt if it became another beam of it.
        kept = np.where(now == rows, np.iinfo(np.int64).max, 0)
        if self.copies > 1:
            beams = (now // self.copies == np.asarray(rows) // self.copies) & (now != rows) & (now < len(starts))
            kept[beams] = np.maximum(0, self.prompt_columns - starts[now[beams]])
        self.residency.crop(layer, kept)

    def _first_columns(self) -> np.ndarray[Any, Any]:
        return np.array(self.starts or (), dtype=np.int64)
