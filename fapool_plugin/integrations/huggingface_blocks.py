"""Hugging Face: one decoder's forward in several pieces in flight, with the output of one forward.

A prompt is cut along its positions, and so is a training row; a training batch along its rows. What can't be cut is
named. Knows a decoder's arguments and outputs, not who decides on pieces, nor what happens at an attention call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.output_capturing import _active_collector

from fapool_plugin.integrations.huggingface_attention import SCOPE, Scope
from fapool_plugin.integrations.huggingface_cache import GraphCache, PooledCache
from fapool_plugin.rounds import block_edges, run_rounds

_BLOCK_MULTIPLE = 64
"""Blocks begin at multiples of this many positions: the row block of the flash kernels."""
_CUT = {"input_ids": 1, "inputs_embeds": 1, "position_ids": -1}
"""Arguments of a decoder that have the prompt's positions, and in which dimension."""
_WHOLE = {"attention_mask", "past_key_values", "use_cache", "return_dict", "output_hidden_states"}
"""Arguments that blocks know how to treat."""


def run_blocks(
    owner: Any, enter: Callable[..., Any], given: dict[str, Any], scope: Scope, cache: PooledCache | GraphCache
) -> Any:
    """A decoder's forward as blocks of positions in flight; ``cache`` carries keys from block to block."""
    decided, geometry = scope.decided, scope.decided.geometry
    assert geometry is not None
    past = geometry.q_column
    as_tuple = not asked(owner, given, "return_dict")

    def block(start: int, stop: int) -> Callable[[Callable[[], None]], Any]:
        mine = given | {"past_key_values": cache, "use_cache": True, "return_dict": True}
        for name, dim in _CUT.items():
            if isinstance(mine.get(name), Tensor):
                mine[name] = mine[name].narrow(dim, start - past, stop - start)
        if mine.get("attention_mask") is not None:
            mine["attention_mask"] = mine["attention_mask"][:, :stop]

        def run(hand_over: Callable[[], None]) -> Any:
            SCOPE.set(replace(scope, decided=decided.block(start, stop, hand_over), cache=cache))
            return enter(**mine)

        return run

    edges = block_edges(past, geometry.columns, decided.blocks, _BLOCK_MULTIPLE)
    rewind = cache.rewinder() if isinstance(cache, PooledCache) else None
    try:
        outputs = run_rounds([block(start, stop) for start, stop in edges])
    except BaseException:
        if rewind is not None:
            # Layers are at different lengths now; none of them is one that the caller knows.
            rewind()
        raise
    kept = given.get("past_key_values")
    joined = type(outputs[0])(**{name: _joined(name, [o[name] for o in outputs], kept) for name in outputs[0]})
    return joined.to_tuple() if as_tuple else joined


def run_parts(owner: Any, enter: Callable[..., Any], given: dict[str, Any], scope: Scope) -> Any:
    """A decoder's forward as parts of its batch in flight, without a cache."""
    decided, geometry = scope.decided, scope.decided.geometry
    assert geometry is not None
    batch, as_tuple = len(geometry.starts), not asked(owner, given, "return_dict")

    def part(start: int, stop: int) -> Callable[[Callable[[], None]], Any]:
        mine = given | {"use_cache": False, "return_dict": True}
        for name, value in given.items():
            if isinstance(value, Tensor) and value.ndim and value.shape[0] == batch:
                mine[name] = value[start:stop]

        def run(hand_over: Callable[[], None]) -> Any:
            SCOPE.set(replace(scope, decided=decided.part(start, stop, hand_over)))
            return enter(**mine)

        return run

    edges = [batch * index // decided.blocks for index in range(decided.blocks + 1)]
    outputs = run_rounds([part(start, stop) for start, stop in pairwise(edges)])
    joined = type(outputs[0])(**{name: _joined(name, [o[name] for o in outputs], None, 0) for name in outputs[0]})
    return joined.to_tuple() if as_tuple else joined


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


def collector_reason() -> str | None:
    """Why whatever collects outputs of layers would not see one forward; None if nothing does."""
    if _active_collector.get() is not None:
        return "outputs are collected outside the decoder"
    return None


def not_in_blocks(given: dict[str, Any]) -> str | None:
    """Why a decoder's arguments cannot be cut into blocks."""
    for name, value in given.items():
        if isinstance(value, Tensor | dict | list | tuple) and name not in _CUT.keys() | _WHOLE:
            return f"argument {name} is not known to have a part for each block"
    positions = given.get("position_ids")
    cached = given.get("past_key_values") is not None or given.get("attention_mask") is not None
    if isinstance(positions, Tensor) and not cached and bool((positions.diff(dim=-1) != 1).any()):
        # transformers looks for this only where it sees no cache; blocks always have one.
        return "sequences are packed"
    return None


def asked(owner: PreTrainedModel, given: dict[str, Any], name: str) -> bool:
    """A switch as this call or, if it says nothing, the model's configuration has it."""
    value = given.get(name)
    return bool(getattr(owner.config, name, False) if value is None else value)
