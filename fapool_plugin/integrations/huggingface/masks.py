"""Hugging Face: what a mask says: where a batch is padded, where documents are packed into a row, and whether the
pattern that a model asks of transformers is more than causal.

transformers builds patterns of functions in functions; those are taken apart, since a pattern of n x n values that is
looked at in places only may be wrong in another. What is not recognized is not causal. Knows no forward.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function

from fapool_plugin.plan.shares import Geometry


def not_causal(kwargs: dict[str, Any], documents: tuple[int, ...]) -> str | None:
    """Why the mask that transformers' mask function is asked for with ``kwargs`` is not plain causal, within
    ``documents`` of one row if there are any; None if it is."""
    pattern = kwargs.get("mask_function", causal_mask_function)
    packed = _packed_lengths(pattern)
    if packed is None:
        if not is_causal(pattern):
            return "the model lays a pattern of its own over the causal mask (images, token types, prefixes)"
        if documents:
            return "documents are packed into a row, and this model's masks let them see each other"
        # False where the mask itself is wanted; a united pattern always says so, and may be united with nothing.
        if pattern is causal_mask_function and not kwargs.get("allow_is_causal_skip", True):
            return "the model combines the causal mask with another of its own"
        return None
    if not is_causal(_parts(pattern)[1]):
        return "documents are packed into a row under a pattern that is not causal"
    if packed != [list(documents)]:
        rows = len(packed)
        return f"documents are packed into {rows} row(s) of a batch, and only one row without a mask can be unpacked"
    return None


def window_of(kwargs: dict[str, Any]) -> int | None:
    """The sliding window of the mask that is asked for; None if it has none."""
    pattern = kwargs.get("mask_function")
    overlays = [part for part in _parts(pattern) if _name(part) == "sliding_window_overlay"] if pattern else []
    window = _inside(overlays[0], "sliding_window") if overlays else kwargs.get("local_size")
    return None if window is None else int(window)


def is_causal(pattern: Any) -> bool:
    """Whether a mask pattern is the causal one, perhaps united with blocks of which there are none."""
    if pattern is causal_mask_function:
        return True
    if _name(pattern) == "remap_positions_for_packed_sequence":
        return is_causal(_inside(pattern, "mask_function"))
    if _name(pattern) == "or_masks":
        first, *others = _parts(pattern)
        return is_causal(first) and all(_is_empty(other) for other in others)
    return False


def _is_empty(pattern: Any) -> bool:
    blocks = _inside(pattern, "block_sequence_ids") if _name(pattern) == "blockwise_overlay" else None
    return isinstance(blocks, Tensor) and bool((blocks < 0).all())


def _packed_lengths(pattern: Any) -> list[list[int]] | None:
    """The lengths of each row's documents, if a pattern keeps documents apart; None if it does not."""
    parts = _parts(pattern) if _name(pattern) == "and_masks" else ()
    if [_name(part) for part in parts] != ["packed_sequence_mask_function", "remap_positions_for_packed_sequence"]:
        return None
    numbers_BS: Tensor = _inside(parts[0], "packed_sequence_mask")
    return [torch.unique_consecutive(row, return_counts=True)[1].tolist() for row in numbers_BS]


def _name(pattern: Any) -> str:
    """By which function of transformers a pattern was made."""
    if getattr(pattern, "__module__", "") != causal_mask_function.__module__:
        return ""
    return str(getattr(pattern, "__qualname__", "")).partition(".")[0]


def _inside(pattern: Any, name: str) -> Any:
    return inspect.getclosurevars(pattern).nonlocals.get(name)


def _parts(pattern: Any) -> tuple[Any, ...]:
    return tuple(_inside(pattern, "mask_functions") or ())


def packed_documents(positions_BS: Tensor, new: int) -> tuple[int, ...]:
    """Lengths of the documents packed into one row of ``new`` tokens, as positions that begin anew tell; () if it is
    one sequence."""
    starts = (positions_BS[0].diff() != 1).nonzero().flatten() + 1
    return _several(torch.diff(starts, prepend=starts.new_zeros(1), append=starts.new_full((1,), new)), new)


def documents_between(edges: Tensor, new: int) -> tuple[int, ...]:
    """The same, as the edges of flash attention's variable lengths tell."""
    return _several(edges.diff(), new)


def _several(lengths: Tensor, new: int) -> tuple[int, ...]:
    found = tuple(lengths.tolist())
    return found if len(found) > 1 and sum(found) == new and min(found) > 0 else ()


def padding(mask: Any, batch: int, past: int, columns: int) -> Geometry:
    """Where the real tokens lie. Raises ValueError for masks that are more than padding on either side."""
    if mask is None:
        return Geometry((0,) * batch, (columns,) * batch, past, columns)
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        kind = f"{mask.ndim}-dimensional" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"fa_pool cannot pool a call with a custom attention mask ({kind}): pass the 2-D padding mask, or raise "
            f"threshold above {columns} to compute it without the pool"
        )
    if mask.shape[1] < columns:
        raise ValueError(
            f"attention_mask has {mask.shape[1]} columns, the sequences have {columns} with their past: give it a "
            "column for each token of the past, too"
        )
    real = mask[:, :columns] != 0
    counts = real.sum(1)
    starts = torch.where(counts > 0, real.int().argmax(1), columns)
    stops = torch.where(counts > 0, columns - real.flip(1).int().argmax(1), columns)
    holes = ((stops - starts) != counts).nonzero()
    if holes.numel():
        row = int(holes[0])
        at = int((~real[row, int(starts[row]) :]).int().argmax()) + int(starts[row])
        remedy = (
            'New tokens follow a prompt that is padded on its right: give the tokenizer padding_side="left"'
            if at < past
            else "Pad on one side only"
        )
        raise ValueError(
            f"attention_mask has a hole: row {row} has {int(counts[row])} tokens between columns {int(starts[row])} "
            f"and {int(stops[row])}, and none in column {at}. {remedy}, or raise threshold above {columns}"
        )
    return Geometry(tuple(starts.tolist()), tuple(stops.tolist()), past, columns)
