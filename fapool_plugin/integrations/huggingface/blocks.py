"""Hugging Face: one decoder's forward in several pieces in flight, with the output of one forward.

A prompt is cut along its positions, and so is a training row; a training batch along its rows. Arguments that cannot
be cut are named. Knows a decoder's arguments and outputs, not who decides on pieces, nor what happens at an attention
call.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, EncoderDecoderCache
from transformers.utils.output_capturing import _active_collector

from fapool_plugin.base.rounds import run_rounds
from fapool_plugin.integrations.huggingface.arguments import strings_in
from fapool_plugin.integrations.huggingface.attention import SCOPE, Scope, mask_again
from fapool_plugin.integrations.huggingface.cache import PooledCache
from fapool_plugin.integrations.huggingface.masks import window_of
from fapool_plugin.integrations.huggingface.training_cache import GraphCache, JoinedLayer
from fapool_plugin.plan.line import GRANULE
from fapool_plugin.plan.shares import block_edges

_DIMS = {"input_ids": (0, 1), "inputs_embeds": (0, 1), "position_ids": (-2, -1), "per_layer_inputs": (0, 1)}
"""Arguments of a decoder that have the batch's rows and the prompt's positions, and in which dimensions."""


class Wave(NamedTuple):
    """How a prompt is computed whose activations are too many."""

    flight: int
    """Blocks in flight."""
    columns: int
    """Of each block."""


_WHOLE = {"attention_mask", "past_key_values", "use_cache", "return_dict", "output_hidden_states"}
"""Arguments that blocks and parts know how to treat."""


def run_blocks(
    owner: Any, enter: Callable[..., Any], given: dict[str, Any], scope: Scope, cache: PooledCache | GraphCache,
    multiple: int = GRANULE, wave: Wave | None = None,
) -> Any:  # fmt: skip
    """A decoder's forward as blocks of positions in flight; ``cache`` carries keys from block to block.

    With ``wave`` so many blocks of so many positions are in flight, one after another.

    Raises what a block raises; the cache is as it was before then.
    """
    decided, geometry = scope.decided, scope.decided.geometry
    assert geometry is not None
    past = geometry.q_column
    as_tuple = not asked(owner, given, "return_dict")
    purposes = mask_purposes(given, scope) or {}

    def block(start: int, stop: int) -> Callable[[Callable[[], None]], Any]:
        mine = given | {"past_key_values": cache, "use_cache": True, "return_dict": True}
        for name, (_, dim) in _DIMS.items():
            if isinstance(mine.get(name), Tensor):
                mine[name] = mine[name].narrow(dim, start - past, stop - start)
        if isinstance(mine.get("attention_mask"), Tensor):
            mine["attention_mask"] = mine["attention_mask"][:, :stop]

        def run(hand_over: Callable[[], None]) -> Any:
            SCOPE.set(replace_scope(scope, decided.block(start, stop, hand_over), cache))
            masks = {name: mask_again(purpose) for name, purpose in purposes.items()}
            return enter(**mine | ({"attention_mask": masks} if purposes else {}))

        return run

    flight, count = None, decided.blocks
    if wave is not None:
        flight, count = wave.flight, -(-(geometry.columns - past) // wave.columns)
        multiple = min(multiple, wave.columns)
    edges = block_edges(past, geometry.columns, count, multiple)

    def kept_of(index: int, output: Any) -> Any:
        last = index == len(edges) - 1
        return output if not scope.last_only else _last_position(output) if last else None

    rewind = cache.rewinder() if isinstance(cache, PooledCache) else None
    try:
        outputs = run_rounds([block(*edge) for edge in edges], flight, kept_of)
        outputs = outputs[-1:] if scope.last_only else outputs
    except BaseException:
        if rewind is not None:
            # Layers are at different lengths now; none of them is one that the caller knows.
            rewind()
        raise
    kept = given.get("past_key_values")
    if kept is None and asked(owner, given, "use_cache"):
        kept = cache if isinstance(cache, PooledCache) else cache.plain()
    elif isinstance(cache, GraphCache) and kept is not None:
        kept.layers[:] = cache.plain().layers
    joined = type(outputs[0])(**{name: _joined(name, [o.get(name) for o in outputs], kept) for name in _names(outputs)})
    return joined.to_tuple() if as_tuple else joined


def run_turns(owner: Any, enter: Callable[..., Any], given: dict[str, Any], scope: Scope, turns: int) -> Any:
    """A decoder's step as parts of its batch in turns: while owners attend for one, the base goes on with another."""
    decided, geometry, cache = scope.decided, scope.decided.geometry, scope.cache
    assert geometry is not None
    assert isinstance(cache, PooledCache)
    batch, as_tuple = len(geometry.starts), not asked(owner, given, "return_dict")

    def part(start: int, stop: int) -> Callable[[Callable[[], None]], Any]:
        mine = _rows_of(given, batch, start, stop)
        mine |= {"past_key_values": cache.part(), "use_cache": True, "return_dict": True}

        def run(hand_over: Callable[[], None]) -> Any:
            SCOPE.set(replace_scope(scope, decided.part(start, stop, hand_over), mine["past_key_values"]))
            output = enter(**mine)
            mine["past_key_values"].settle()
            return output

        return run

    edges = [batch * index // turns for index in range(turns + 1)]
    outputs = run_rounds([part(start, stop) for start, stop in pairwise(edges)])
    decided.turns = turns
    cache.advance(geometry.columns - geometry.q_column)
    kept = given.get("past_key_values")
    names = _names(outputs)
    joined = type(outputs[0])(**{name: _joined(name, [o.get(name) for o in outputs], kept, 0) for name in names})
    return joined.to_tuple() if as_tuple else joined


def _rows_of(given: dict[str, Any], batch: int, start: int, stop: int) -> dict[str, Any]:
    """A decoder's arguments for the rows [start, stop) of a batch."""
    mine = dict(given)
    if isinstance(mine.get("attention_mask"), Tensor):
        mine["attention_mask"] = mine["attention_mask"][start:stop]
    for name, (dim, _) in _DIMS.items():
        value = mine.get(name)
        if isinstance(value, Tensor) and value.ndim >= 2 and value.shape[dim] == batch:
            mine[name] = value.narrow(dim, start, stop - start)
    return mine


def _last_position(output: Any) -> Any:
    """A block's output without other positions."""
    return type(output)(
        **{name: x[:, -1:].clone() if isinstance(x, Tensor) and x.ndim == 3 else x for name, x in output.items()}
    )


def run_parts(owner: Any, enter: Callable[..., Any], given: dict[str, Any], scope: Scope) -> Any:
    """A decoder's forward as parts of its batch in flight, without a cache to begin with."""
    decided, geometry = scope.decided, scope.decided.geometry
    assert geometry is not None
    batch, as_tuple = len(geometry.starts), not asked(owner, given, "return_dict")
    wants_cache, purposes = asked(owner, given, "use_cache"), mask_purposes(given, scope) or {}

    def part(start: int, stop: int) -> Callable[[Callable[[], None]], Any]:
        mine = _rows_of(given, batch, start, stop)
        mine |= {"past_key_values": None, "use_cache": wants_cache, "return_dict": True}

        def run(hand_over: Callable[[], None]) -> Any:
            SCOPE.set(replace_scope(scope, decided.part(start, stop, hand_over), scope.cache))
            masks = {
                name: mask_again(_of_rows(purposes[name], start, stop)) if mask is None else mask[start:stop]
                for name, mask in (given["attention_mask"] if purposes else {}).items()
            }
            return enter(**mine | ({"attention_mask": masks} if purposes else {}))

        return run

    edges = [batch * index // decided.blocks for index in range(decided.blocks + 1)]
    outputs = run_rounds([part(start, stop) for start, stop in pairwise(edges)])
    kept = _joined_cache([output.get("past_key_values") for output in outputs])
    if (empty := given.get("past_key_values")) is not None and kept is not None:
        empty.layers[:] = kept.layers
        kept = empty
    joined = type(outputs[0])(
        **{name: _joined(name, [o.get(name) for o in outputs], kept, 0) for name in _names(outputs)}
    )
    return joined.to_tuple() if as_tuple else joined


def mask_purposes(given: dict[str, Any], scope: Scope) -> dict[str, dict[str, Any]] | None:
    """What each mask of a dict by layer kinds was made for, outside the decoder; None if there is none, or if not all
    are ours."""
    masks, found = given.get("attention_mask"), {}
    for name, mask in masks.items() if isinstance(masks, dict) else ():
        purposes = [kwargs for made, kwargs in scope.made if made is mask]
        windows = {window_of(kwargs) for kwargs in purposes}
        rows = len(scope.decided.geometry.starts) if scope.decided.geometry is not None else 0
        if len(windows) != 1 or (mask is not None and mask.shape[0] != rows):
            return None
        found[name] = purposes[-1]
    return found or None


def _of_rows(purpose: dict[str, Any], start: int, stop: int) -> dict[str, Any]:
    padding = purpose.get("attention_mask")
    rows = {"batch_size": stop - start, "attention_mask": None if padding is None else padding[start:stop]}
    return purpose | rows


def replace_scope(scope: Scope, decided: Any, cache: Any) -> Scope:
    """The scope of a piece: its masks are its own."""
    return replace(
        scope, decided=decided, cache=cache, full_mask=type(scope.full_mask)(), made=[*scope.made], asking=set()
    )


def _names(outputs: list[Any]) -> list[str]:
    return [name for name in outputs[0] if name != "past_key_values"] + ["past_key_values"]


def _joined(name: str, parts: list[Any], cache: Any, dim: int = 1) -> Any:
    """One output field of all blocks, along the positions, or of all parts, along the rows."""
    if name == "past_key_values":
        return cache
    if isinstance(parts[0], Tensor) and parts[0].ndim == 3:
        return torch.cat(parts, dim=dim)
    if isinstance(parts[0], tuple):
        return tuple(_joined(name, list(layer), cache, dim) for layer in zip(*parts, strict=True))
    if parts[0] is None:
        return None
    raise ValueError(f"fa_pool cannot join output {name} of a prompt's blocks: set blocks to 1, or do not ask for it")


def _joined_cache(parts: list[Any]) -> Any:
    """The caches of some rows each as that of all rows."""
    caches = [part for part in parts if part is not None]
    if len(caches) < len(parts):
        return None
    if isinstance(caches[0], EncoderDecoderCache):
        own, others = ([getattr(c, name) for c in caches] for name in ("self_attention_cache", "cross_attention_cache"))
        return EncoderDecoderCache(_joined_cache(own), _joined_cache(others))
    whole = copy.copy(caches[0])
    whole.layers = [_joined_layer(list(layers)) for layers in zip(*(cache.layers for cache in caches), strict=True)]
    return whole


def _joined_layer(layers: list[Any]) -> Any:
    if type(layers[0]) is DynamicLayer and layers[0].is_initialized:
        return JoinedLayer(layers)
    joined = copy.copy(layers[0])
    for name, value in vars(layers[0]).items():
        if isinstance(value, Tensor) and value.ndim == 4:
            setattr(joined, name, torch.cat([vars(layer)[name] for layer in layers]))
    return joined


def collector_reason() -> str | None:
    """Why whatever collects outputs of layers would not see one forward; None if nothing does."""
    if _active_collector.get() is not None:
        return "outputs are collected outside the decoder"
    return None


def not_in_pieces(owner: Any, given: dict[str, Any], scope: Scope, *, rows: bool) -> str | None:
    """Why a decoder's arguments cannot be cut into blocks, or with ``rows`` into parts of a batch."""
    mask = given.get("attention_mask")
    plain = mask is None or (isinstance(mask, Tensor) and mask.ndim == 2)
    if not plain and mask_purposes(given, scope) is None:
        return "masks of single layers were made outside the decoder"
    cache, training = given.get("past_key_values"), scope.decided.phase == "training"
    # An empty one is filled at the end.
    fillable = isinstance(cache, PooledCache) or (training and type(cache) is DynamicCache and not len(_filled(cache)))
    if cache is not None and not fillable:
        return f"a cache of type {type(cache).__name__} was made outside the decoder"
    if any(getattr(one, "record_past", False) for one in getattr(cache, "layers", ())) and past_outgrows_masks():
        return "its cache keeps what lies behind a window, and shows later blocks more keys than their masks have"
    for name, value in given.items():
        known = name in _DIMS.keys() | _WHOLE or not isinstance(value, Tensor | dict | list | tuple)
        if not known and name in names_used(owner):
            return f"argument {name} is not known to have a part for each block"
    positions = given.get("position_ids")
    cached = cache is not None or mask is not None
    if not rows and isinstance(positions, Tensor) and not cached and bool((positions.diff(dim=-1) != 1).any()):
        # transformers looks for this only where it sees no cache; blocks always have one.
        return "sequences are packed"
    return None


@functools.cache
def past_outgrows_masks() -> bool:
    """Whether a layer with a window that keeps its past, for drafts, gives a second forward without a crop between them
    more keys than it says; transformers before 5.23 does."""
    layer, x = DynamicSlidingWindowLayer(sliding_window=2), torch.zeros(1, 1, 3, 1)
    layer.activate_past_recording()
    layer.update(x, x)
    told, _ = layer.get_mask_sizes(3)
    keys, _ = layer.update(x, x)
    return keys.shape[2] > told


def _filled(cache: DynamicCache) -> list[Any]:
    return [layer for layer in cache.layers if getattr(layer, "is_initialized", True)]


def names_used(owner: nn.Module) -> frozenset[str]:
    """The arguments that anything in a decoder names, as a parameter or by a string: no others have any effect."""
    kinds: set[Any] = {type(module) for module in owner.modules()}
    return frozenset().union(*(_named_by(kind) for kind in kinds))


@functools.cache
def _named_by(kind: Any) -> frozenset[str]:
    forward = inspect.unwrap(kind.forward)
    return frozenset(inspect.signature(forward).parameters) | strings_in(getattr(forward, "__code__", None))


def asked(owner: PreTrainedModel, given: dict[str, Any], name: str) -> bool:
    """A switch as this call or, if it says nothing, the model's configuration has it."""
    value = given.get(name)
    return bool(getattr(owner.config, name, False) if value is None else value)
