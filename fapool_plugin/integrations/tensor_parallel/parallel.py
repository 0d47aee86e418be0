"""Hugging Face: a causal language model of which each base rank holds a part, made of parallel layers.

Puts those layers in the place of whole ones, with weights cut out of a loaded model or read from its checkpoint. Who
makes the layers is an argument: it knows no Megatron, and no pool rank.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from fapool_plugin.integrations.tensor_parallel.division import blocks_of, ends_of, evenly, refuse_parallel
from fapool_plugin.integrations.tensor_parallel.slices import WHOLE, Checkpoint, Cut

_FROM_THE_HUB = {"cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token"}

Read = Callable[[str, Cut | None], Tensor]
"""Gives a parameter's part, or all of it, by the parameter's name."""


class ParallelLayers(Protocol):
    """Makes layers over a group from what one rank holds of their weights; the module megatron_layers is one."""

    def ColumnParallel(self, weight_NI: Tensor, bias_N: Tensor | None, group: ProcessGroup) -> nn.Module:
        """(B, S, I) to this rank's (B, S, N)."""

    def RowParallel(self, weight_OI: Tensor, bias_O: Tensor | None, group: ProcessGroup) -> nn.Module:
        """This rank's (B, S, I) to the sum over all ranks, plus the bias, (B, S, O)."""

    def ParallelEmbedding(
        self, weight_VI: Tensor, group: ProcessGroup, *, scale: Tensor | None, padding_idx: int | None
    ) -> nn.Module:
        """Token ids (B, S) to (B, S, I); every rank holds equally many rows."""

    def ParallelHead(
        self, weight_VI: Tensor, bias_V: Tensor | None, group: ProcessGroup, *, vocabulary: int
    ) -> nn.Module:
        """(B, S, I) to the logits of all ranks, (B, S, vocabulary); every rank holds equally many rows."""


def split_model(model: Any, group: ProcessGroup, layers: ParallelLayers) -> Any:
    """Divides a loaded model in place: the same object, of which this rank keeps its part, and returns it.

    Args:
        model: a transformers causal language model, whole, the same on every rank.
        group: the base ranks.
        layers: makes the parallel layers.

    Raises:
        ValueError: the model cannot be divided exactly.
    """
    refuse_parallel(model, group.size())

    def read(name: str, cut: Cut | None) -> Tensor:
        whole: Tensor = model.get_parameter(name).detach()
        return whole if cut is None else cut.of(whole)

    _Divider(group, layers, read).divide(model)
    return _sum_gradients(model, group)


def load_parallel(path: str | os.PathLike[str], group: ProcessGroup, layers: ParallelLayers, **hf_kwargs: Any) -> Any:
    """Loads this rank's part of a model: the same as ``from_pretrained`` and :func:`split_model`, but only that part
    is read.

    Args:
        path: model folder or name, with safetensors files.
        group: the base ranks.
        layers: makes the parallel layers.
        hf_kwargs: of ``AutoModelForCausalLM.from_pretrained``: ``dtype``, ``attn_implementation``, ``config``, what
            concerns the Hub, and values of the configuration.

    Raises:
        ValueError: the model cannot be divided exactly, an argument is not known here, or the checkpoint is not as
            the model is: then load it whole, and call :func:`split_model`.
    """
    hub = {key: hf_kwargs[key] for key in hf_kwargs.keys() & _FROM_THE_HUB}
    trust = {key: hf_kwargs[key] for key in hf_kwargs.keys() & {"trust_remote_code"}}
    how = {key: hf_kwargs.pop(key) for key in hf_kwargs.keys() & {"attn_implementation"}}
    dtype, config = hf_kwargs.pop("dtype", "auto"), hf_kwargs.pop("config", None)
    unknown = {key: value for key, value in hf_kwargs.items() if key not in hub.keys() | trust.keys()}
    config = copy.deepcopy(config)
    if config is None:
        config, unknown = AutoConfig.from_pretrained(path, return_unused_kwargs=True, **hf_kwargs)
    if unknown or getattr(config, "quantization_config", None):
        what = ", ".join(sorted(unknown)) or "quantization_config"
        raise ValueError(f"{what} is not known where each base rank reads its part of {os.fspath(path)}; {WHOLE}")
    refuse_parallel(config, group.size())
    with ExitStack() as opened:
        checkpoint = Checkpoint(path, hub, opened)
        if dtype == "auto":
            dtype = config.dtype or checkpoint.dtype()
        # As transformers does: everything is made on meta, and what is no weight is computed again.
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, **how, **trust)
        _compute_buffers(model)
        refuse_parallel(model, group.size())
        names = _names(model)

        def read(name: str, cut: Cut | None) -> Tensor:
            return checkpoint.read(names[name], cut, model.get_parameter(name))

        _Divider(group, layers, read).divide(model)
        _read_rest(model, checkpoint, names)
    with suppress(OSError):  # without a file, the one that the configuration implies
        model.generation_config = GenerationConfig.from_pretrained(path, **hub)
    return _sum_gradients(model, group).eval()


def same_random_numbers(group: ProcessGroup) -> None:
    """All ranks go on with the random numbers of the group's first, whose own stay as they were.

    Call it before ``generate(do_sample=True)``: ranks that draw different tokens would wait for each other for ever.
    """
    device = torch.device("cuda") if "nccl" in dist.get_backend(group) else torch.device("cpu")
    state = torch.get_rng_state().to(device)
    dist.broadcast(state, group=group, group_src=0)
    torch.set_rng_state(state.cpu())
    if torch.cuda.is_available():
        state = torch.cuda.get_rng_state().to(device)
        dist.broadcast(state, group=group, group_src=0)
        torch.cuda.set_rng_state(state.cpu())


@dataclass(frozen=True)
class _Divider:
    """Puts one rank's layers in the place of whole ones."""

    group: ProcessGroup
    layers: ParallelLayers
    read: Read

    def divide(self, model: Any) -> None:
        size, rank = self.group.size(), self.group.rank()
        for block in list(blocks_of(model)):
            for child, cut in block.cuts(size, rank).items():
                whole = getattr(block.module, child)
                setattr(block.module, child, self._linear(f"{block.name}.{child}", whole, cut))
        self._divide_ends(model)
        model.save_pretrained = model.push_to_hub = model.resize_token_embeddings = _refused(model, size)

    def _linear(self, name: str, whole: nn.Linear, cut: Cut) -> nn.Module:
        # A sum has its bias added once, by every rank.
        make, cut_of_bias = (self.layers.ColumnParallel, cut) if cut.dim == 0 else (self.layers.RowParallel, None)
        weight, bias = self.read(f"{name}.weight", cut), self._bias(name, whole, cut_of_bias)
        return _as_trainable(make(weight, bias, self.group), whole)

    def _bias(self, name: str, whole: nn.Linear, cut: Cut | None) -> Tensor | None:
        return None if whole.bias is None else self.read(f"{name}.bias", cut)

    def _divide_ends(self, model: Any) -> None:
        """The embedding and the head: one weight, if they were."""
        embedding, head, size, rank = *ends_of(model), self.group.size(), self.group.rank()
        names = {module: name for name, module in model.named_modules()}
        tied = head.weight is embedding.weight
        weight = self.read(f"{names[embedding]}.weight", evenly(embedding.num_embeddings, size, rank))
        scale = getattr(embedding, "embed_scale", None)
        part = self.layers.ParallelEmbedding(weight, self.group, scale=scale, padding_idx=embedding.padding_idx)
        shared = _as_trainable(part, embedding).weight
        model.set_input_embeddings(part)
        cut = evenly(head.out_features, size, rank)
        weight = weight if tied else self.read(f"{names[head]}.weight", cut)
        bias = self._bias(names[head], head, cut)
        part = self.layers.ParallelHead(weight, bias, self.group, vocabulary=head.out_features)
        if tied:
            part.weight = shared
        model.set_output_embeddings(_as_trainable(part, head))


def _sum_gradients(model: Any, group: ProcessGroup) -> Any:
    """Of what every rank applies to its own heads: each would have their gradient only."""

    def summed(grad: Tensor) -> Tensor:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    for block in blocks_of(model):
        for parameter in block.shared_by_heads():
            # A hook is taken only by what is trained, and stays.
            trained = parameter.requires_grad
            parameter.requires_grad_(True).register_hook(summed)
            parameter.requires_grad_(trained)
    return model


def _as_trainable(part: nn.Module, whole: nn.Module) -> nn.Module:
    """Trains what was trained."""
    for name, parameter in whole.named_parameters(recurse=False):
        part.get_parameter(name).requires_grad_(parameter.requires_grad)
    return part.train(whole.training)


def _refused(model: Any, size: int) -> Callable[..., Any]:
    name = type(model).__name__

    def refuse(*_: Any, **__: Any) -> Any:
        raise NotImplementedError(
            f"this rank holds one of {size} parts of {name}, which can neither be saved nor resized by itself: "
            "load the model whole for that, without base ranks"
        )

    return refuse


def _compute_buffers(model: Any) -> None:
    """Gives what is no weight and in no checkpoint its values, in a model made on meta."""
    for module in model.modules():
        names = module._non_persistent_buffers_set & {name for name, _ in module.named_buffers(recurse=False)}
        for name in names:
            setattr(module, name, torch.empty_like(getattr(module, name), device="cpu"))
        if names:
            model._init_weights(module)


def _names(model: Any) -> dict[str, list[str]]:
    """By each name of a parameter or buffer, all names that it goes by: tied weights have several, and checkpoints of
    a base model leave out its prefix."""
    by_tensor: dict[Tensor, list[str]] = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    prefix = f"{model.base_model_prefix}."
    for name, tensor in named:
        by_tensor.setdefault(tensor, []).append(name)
        if name.startswith(prefix):
            by_tensor[tensor].append(name.removeprefix(prefix))
    return {name: by_tensor[tensor] for name, tensor in named}


def _read_rest(model: Any, checkpoint: Checkpoint, names: dict[str, list[str]]) -> None:
    """What every rank has whole."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_meta:
            continue
        parent, _, child = name.rpartition(".")
        value = checkpoint.read(names[name], None, tensor)
        if isinstance(tensor, nn.Parameter):
            value = nn.Parameter(value, requires_grad=tensor.requires_grad)
        setattr(model.get_submodule(parent), child, value)
