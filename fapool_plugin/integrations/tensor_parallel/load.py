"""Hugging Face: a model loaded by several base ranks together, each of which reads its part of the checkpoint.

Knows who the base ranks are; how a model is divided is known by parallel and Megatron's home.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist

from fapool_plugin.base.agreement import neighbours
from fapool_plugin.config import BaseConfig, FAPoolConfigError


def load_divided(path: str | os.PathLike[str], base: BaseConfig, **hf_kwargs: Any) -> tuple[Any, dist.ProcessGroup]:
    """This rank's part of a model, and the group of base ranks that share it. Called by all base ranks.

    Starts torch.distributed if the program has not.

    Raises:
        FAPoolConfigError: ``tensor_parallel`` is not what a loader can do, or the size does not fit the base ranks.
        ValueError: the model cannot be divided exactly, or is not stored as safetensors.
    """
    if base.tensor_parallel != "megatron":
        raise FAPoolConfigError(
            f'base.tensor_parallel is "{base.tensor_parallel}": DeepSpeed divides what deepspeed.init_inference is '
            'given. Load the model with AutoModelForCausalLM and give it that, or set "megatron"'
        )
    try:
        from fapool_plugin.integrations.megatron import layers as megatron_layers
    except ImportError as error:
        raise FAPoolConfigError(
            f'base.tensor_parallel is "megatron", and megatron-core cannot be imported ({error}): pip install '
            "fapool-plugin[megatron]"
        ) from error
    from fapool_plugin.integrations.tensor_parallel.parallel import load_parallel, same_random_numbers

    if not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    group = neighbours(base.tensor_parallel_size or dist.get_world_size())
    model = load_parallel(path, group, megatron_layers, **hf_kwargs)
    same_random_numbers(group)
    return model, group
