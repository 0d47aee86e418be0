"""Megatron-core: what is known of the rows of a static inference context, and their keys where ranks may own them.

With ``kv_home`` "base" Megatron's own storage has the keys, and this remembers what ranks hold of it. With "pool" that
storage is never made: keys come here after rotary embedding, and are here while the sequence is short:

    offset 0 ─▶ here ─ above the threshold ─▶ with owners ─ a rank is lost ─▶ computed once more from what was given
                  ◀─ a forward that is local ─┘

Knows contexts and tensors; not how a forward is decided, nor what a layer computes.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor

from fapool_plugin.base.owned import KeysLost, NoRoom, OwnedKeys
from fapool_plugin.base.record import Given, Record, autocast_of, moved
from fapool_plugin.base.recovery import agreed_loss, check_complete, known_loss, no_room, replaying
from fapool_plugin.base.resource_manager import ResourceManager
from fapool_plugin.base.sequence import GrowingKV, SequenceState
from fapool_plugin.base.unrecorded import unseen
from fapool_plugin.plan.shares import Geometry

_KEPT = "fapool_kept"
_AGAIN = "fapool_again"
"""An attribute of contexts whose rows are computed once more."""
Rows = tuple[int, int]
"""The first of some rows of a context, and how many."""


@dataclass(eq=False)
class Kept:
    """What is known of some rows of a context; lives in its attributes, so that both end together.

    Megatron's contexts are compared by value and have no hash, so that no table can be keyed by them.
    """

    manager: ResourceManager
    rows: Rows
    state: SequenceState
    layers: int
    columns: int = 0
    """That it has; in Megatron's storage, after the forward under way."""
    memory: Any = None
    """The first layer's keys in Megatron's storage, to see them exchanged."""
    keys: Keys | None = None
    """Where its keys are, if ranks may own them."""

    def crop(self, columns: int) -> None:
        """The context was taken back to so many columns."""
        for layer in range(self.layers):
            self.state.crop(layer, columns)
        if self.keys is not None:
            self.keys.crop(columns)
        self.columns = columns


class Keys:
    """The keys of some rows, after rotary embedding: with their owners, or here.

    Args:
        manager: has the ranks.
        state: of these rows.
        layers: attention layers of the model.
    """

    def __init__(self, manager: ResourceManager, state: SequenceState, layers: int) -> None:
        self.manager, self.state, self.layers = manager, state, layers
        self.record = Record(joins=True)
        self.past = 0
        """Columns before the forward under way."""
        self.owning = False
        """Whether the forward under way gives its keys to owners."""
        self._here: dict[int, GrowingKV] = {}
        self._away = False
        self._unkept: tuple[int, ...] = ()
        """Columns of padding at the beginning of each row that no owner was given."""
        state.ownable = True
        self._ends = manager.watch(self, state)

    def refuse_seen(self, mask: Tensor | None, first_row: int) -> None:
        """Raises ValueError for a mask (1 or B, 1, S, T), None: causal, by which padding is seen that was not kept."""
        for row, unkept in enumerate(self._unkept if any(self._unkept) else ()):
            hidden = mask is not None and bool(mask[min(row, mask.shape[0] - 1), 0, :, :unkept].all())
            if unkept and not hidden:
                raise ValueError(
                    f"row {first_row + row} of this context began with {unkept} columns of padding, which this "
                    'forward\'s attention_mask does not hide, and their keys were not kept (kv_home "pool"): hide them '
                    'in each step, begin again at offset 0, or set kv_home to "base"'
                )

    def prepare(self, past: int, geometry: Geometry | None) -> None:
        """Before a forward; with a geometry its keys go to owners. Raises KeysLost."""
        self.past, self.owning = past, geometry is not None
        owned = self.state.owned
        if owned is not None and (geometry is None or owned.geometry.starts != geometry.starts):
            self._come_home(owned, "its padding is another now" if geometry is not None else "a forward is local")
        elif owned is not None:
            owned.full = ""  # it may have been cut since

    def given(self, layer: int, k_BKSD: Tensor, v_BKSE: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values that a layer's attention takes, of its new ones: these where the others have owners or
        there are none, else all."""
        owned = self.state.owned
        if self._away and owned is not None:
            if owned.kinds[layer][0] != k_BKSD.dtype:
                raise ValueError(
                    f"keys of this context are {owned.kinds[layer][0]} and the model makes {k_BKSD.dtype} now: begin "
                    "again at offset 0"
                )
            return k_BKSD, v_BKSE
        if self.owning and not self.past:
            return k_BKSD, v_BKSE
        if layer not in self._here:
            self._here[layer] = GrowingKV(self.manager.config.kv_block)
        return self._here[layer].append(k_BKSD, v_BKSE)

    def complete(self) -> None:
        """At its end. Raises KeysLost or NoRoom, on all base ranks that share the model or on none."""
        if not self.owning:
            return
        owned = self.state.owned
        check_complete(self.manager, owned)
        if owned is not None:
            # What was here until now stayed, for a forward that fails.
            self._here, self._away, self._unkept = {}, True, owned.geometry.starts

    def undo(self, error: BaseException) -> None:
        """A forward has failed: all is as it was before it. Raises PoolMemoryError where keys had no room."""
        owned = self.state.owned
        columns = owned.geometry.columns if owned is not None else self.past
        self.crop(self.past)
        if owned is not None and not self._away:
            self._start_anew()
        elif owned is not None and isinstance(error, KeysLost):
            owned.broken = owned.broken or str(error)
        if isinstance(error, NoRoom):
            raise no_room(error, self.manager.config, columns) from None

    def crop(self, columns: int) -> None:
        """Forgets every column from ``columns`` on."""
        for layer in range(self.layers):
            if layer in self._here:
                self._here[layer].crop(columns)
            self.state.crop(layer, columns)
            if self.state.owned is not None:
                self.state.owned.crop(layer, columns)
        self._unkept = tuple(min(one, columns) for one in self._unkept)
        self.record.crop(columns)

    def _come_home(self, owned: OwnedKeys, why: str) -> None:
        here, lost = dict[int, GrowingKV](), ""
        try:
            for layer in range(self.layers):
                here[layer] = GrowingKV(self.manager.config.kv_block)
                here[layer].append(*owned.fetch(layer))
        except KeysLost as error:
            lost = str(error)
        if lost := agreed_loss(self.manager, lost):
            raise KeysLost(lost)
        self.manager.counters.log("home", f"keys of a Megatron context were fetched from the pool: {why}")
        self._here, self._away = here, False
        self._start_anew()

    def _start_anew(self) -> None:
        """What ranks hold goes; these rows are another sequence for them from now on."""
        self._ends()
        self.state.owned, self.state.id = None, secrets.randbits(62)
        self.state.residency.forget()
        self._ends = self.manager.watch(self, self.state)
        if self.owning:
            self.manager.leases.sequences.add(self.state.id)  # the forward under way has begun as the other


def kept_of(context: Any, manager: ResourceManager, batch: int, past: int, columns: int, layers: int) -> Kept:
    """What is known of the rows that a forward is about, as far as it is still true.

    Raises ValueError where their keys would have to be somewhere and are not, or beyond the context's size.
    """
    first = int(context.batch_size_offset)
    rows, all_kept = (first, batch), _all_kept(context)
    found, on_pool = all_kept.get(rows), manager.config.kv_home == "pool"
    known = found is not None and found.manager is manager and past > 0 and found.memory is _memory(context)
    if on_pool:
        _refuse_beyond(context, rows, past, columns, found.columns if known and found is not None else 0)
    if found is None or not known:
        # Sequences that were here before end with what was known of them.
        for other in [other for other in all_kept if other[0] < first + batch and first < sum(other)]:
            del all_kept[other]
        state = SequenceState(capacity=context.max_sequence_length, again=_AGAIN in vars(context))
        found = all_kept[rows] = Kept(manager, rows, state, layers)
        if on_pool:
            found.keys = Keys(manager, state, layers)
            context.swap_key_value_dict = _no_swap
        else:
            manager.watch(found, state)
    elif past < found.columns:
        found.crop(past)
    if not on_pool:
        found.columns = columns
    return found


def remember(kept: Kept, context: Any) -> None:
    """At a forward's end."""
    kept.memory = _memory(context)


def recover(context: Any, manager: ResourceManager, batch: int) -> None:
    """Computes the keys of some rows once more, if they are lost for any base rank. Raises RuntimeError if that
    cannot be done."""
    rows, past = (int(context.batch_size_offset), batch), int(context.sequence_len_offset)
    kept = _all_kept(context).get(rows)
    if kept is None or kept.keys is None or kept.manager is not manager or not past or past > kept.columns:
        return
    owned, record = kept.state.owned, kept.keys.record
    if owned is None or not (why := known_loss(manager, owned)):
        return
    model = record.owner(edited=False)
    scratch = StaticInferenceContext(batch, context.max_sequence_length)
    setattr(scratch, _AGAIN, True)
    with replaying(manager, owned, past, why), unseen(model, lambda hook: False):
        for given in record.forwards(past):
            with autocast_of(given), torch.no_grad():
                model(**_once_more(model, given, scratch))
            scratch.sequence_len_offset = _all_kept(scratch)[0, batch].columns
        again = _all_kept(scratch).pop((0, batch))
        assert again.keys is not None
        again.rows, again.keys.record, again.memory = rows, record, kept.memory
        _all_kept(context)[rows] = again


def inputs(given: Mapping[str, Any], seen: Geometry | str | None) -> Given:
    """What a replay needs of a forward's arguments.

    Args:
        given: the arguments, by name.
        seen: what its mask says; None: it has none.
    """
    embedded_SBH, mask = given.get("decoder_input"), None
    if isinstance(seen, Geometry) and any(seen.starts):
        mask = torch.arange(seen.columns) >= torch.tensor(seen.starts)[:, None]
    return {
        "input_ids": given.get("input_ids") if embedded_SBH is None else None,
        "inputs_embeds": embedded_SBH.transpose(0, 1) if embedded_SBH is not None else None,
        "position_ids": given.get("position_ids"),
        "attention_mask": mask,
        "mask_of_its_own": given["attention_mask"] if isinstance(seen, str) else None,
    }


def _once_more(model: Any, given: Given, context: Any) -> dict[str, Any]:
    """Arguments of a forward that makes keys once more."""
    again = moved(given, next(model.parameters()).device)
    embedded_BSH, ids_BS = again.pop("inputs_embeds", None), again.pop("input_ids", None)
    new = (ids_BS if ids_BS is not None else embedded_BSH).shape[1]
    start = int(context.sequence_len_offset)
    mask, hidden = again.pop("attention_mask", None), again.pop("mask_of_its_own", None)
    if mask is not None:
        queries_S1, keys_T = torch.arange(start, start + new, device=mask.device)[:, None], mask.shape[1]
        hidden = (torch.arange(keys_T, device=mask.device) > queries_S1) | ~mask[:, None, None, :]
    elif hidden is not None:
        hidden = hidden[:, :, :new, : start + new]  # it may have been cut since
    return again | {
        "input_ids": ids_BS,
        "decoder_input": embedded_BSH.transpose(0, 1).contiguous() if embedded_BSH is not None else None,
        "attention_mask": hidden,
        "inference_context": context,
        "runtime_gather_output": True,
    }


def _all_kept(context: Any) -> dict[Rows, Kept]:
    found: dict[Rows, Kept] = vars(context).setdefault(_KEPT, {})
    return found


def _memory(context: Any) -> Any:
    return next((k for k, _ in context.key_value_memory_dict.values()), None)


def _no_swap(batch_idx: Any) -> None:
    raise ValueError(
        'swap_key_value_dict: rows whose keys may live on the pool (kv_home "pool") are not exchanged: give each its '
        'own tokens once more from offset 0, or set kv_home to "base"'
    )


def _refuse_beyond(context: Any, rows: Rows, past: int, columns: int, known: int) -> None:
    first, batch = rows
    if columns > context.max_sequence_length or first + batch > context.max_batch_size:
        raise ValueError(
            f"rows {first} to {first + batch - 1} with {columns} columns, in a context of {context.max_batch_size} "
            f"rows and {context.max_sequence_length} columns: make a larger StaticInferenceContext"
        )
    if past > known:
        raise ValueError(
            f"rows {first} to {first + batch - 1} of this context go on at column {past}, and this model knows {known} "
            'of their keys (kv_home "pool"; a copy of a context has none): go on with the rows of the prompt, begin '
            'at offset 0, or set kv_home to "base"'
        )
