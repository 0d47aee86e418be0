"""Hugging Face: parts of weights, cut out of tensors or read from a checkpoint's files without the rest.

Knows safetensors and where transformers puts them, not which part is whose.
"""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

WHOLE = "load the model with AutoModelForCausalLM.from_pretrained on every base rank, and call split_model"
"""What always works, if there is memory for it."""


@dataclass(frozen=True)
class Cut:
    """What a rank holds of dimension ``dim``: [start, stop), and zeros behind it up to ``size``."""

    start: int
    stop: int
    size: int
    dim: int = 0

    def of(self, whole: Any) -> Tensor:
        """The part of a tensor, or of a safetensors slice, as a tensor of its own."""
        part: Tensor = whole[(slice(None),) * self.dim + (slice(self.start, self.stop),)]
        shape = list(part.shape)
        shape[self.dim] = self.size
        padded = part.new_zeros(shape)
        padded.narrow(self.dim, 0, self.stop - self.start).copy_(part)
        return padded


class Checkpoint:
    """The open safetensors files of a model.

    Args:
        path: the model's folder or name.
        hub: arguments for what downloads files.
        opened: closes the files.

    Raises:
        ValueError: there are none.
    """

    def __init__(self, path: str | os.PathLike[str], hub: dict[str, Any], opened: ExitStack) -> None:
        self.path = os.fspath(path)
        optional = {"_raise_exceptions_for_missing_entries": False, **hub}
        single = cached_file(self.path, SAFE_WEIGHTS_NAME, **optional)
        index = cached_file(self.path, SAFE_WEIGHTS_INDEX_NAME, **optional)
        if single is not None:
            files = [single]
        elif index is not None:
            with open(index, encoding="utf-8") as file:
                names = sorted(set(json.load(file)["weight_map"].values()))
            files = [cached_file(self.path, name, **hub) for name in names]
        else:
            raise ValueError(
                f"{self.path} has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}, and only such files can "
                f"be read in parts: save it anew with save_pretrained, or {WHOLE}"
            )
        self._files: dict[str, Any] = {}
        for name in files:
            opened_file = opened.enter_context(safe_open(name, framework="pt"))
            self._files.update(dict.fromkeys(opened_file.keys(), opened_file))

    def dtype(self) -> torch.dtype:
        """Of its first floating-point tensor."""
        for name, file in self._files.items():
            read: Tensor = file.get_slice(name)[:0]
            if read.is_floating_point():
                return read.dtype
        raise ValueError(f"{self.path} holds no floating-point tensor: give dtype")

    def read(self, names: list[str], cut: Cut | None, like: Tensor) -> Tensor:
        """A part, or all, of the tensor that goes by one of these names, in the dtype of ``like``.

        Raises:
            ValueError: it goes by none of them, by several, or has another shape than ``like``.
        """
        present = [name for name in names if name in self._files]
        if len(present) != 1:
            held = f"both {' and '.join(present)}, which are one weight here" if present else f"no {names[0]}"
            raise ValueError(f"{self.path} holds {held}: {WHOLE}")
        whole = self._files[present[0]].get_slice(present[0])
        if tuple(whole.get_shape()) != tuple(like.shape):
            here, there = tuple(like.shape), tuple(whole.get_shape())
            raise ValueError(f"{present[0]} is {there} in {self.path}, the model's is {here}: {WHOLE}")
        part: Tensor = whole[...] if cut is None else cut.of(whole)
        return part.to(like.dtype)
