"""DeepSpeed: its two ways to make an engine, init_inference and initialize, pool the model that they are given.

Knows DeepSpeed's arguments and engines. Which ranks there are was settled before; how a model is pooled or split is
known by the homes of transformers and Megatron.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from fapool_plugin.base.agreement import agree_over, neighbours
from fapool_plugin.config import SECTION, FAPoolConfig, FAPoolConfigError, section_of
from fapool_plugin.integrations.huggingface.model import FAPoolForCausalLM
from fapool_plugin.integrations.huggingface.supported import attention_modules
from fapool_plugin.ranks.launch import is_first
from fapool_plugin.ranks.roles import say_once, take_role

_TAG = "FAPool"


def setup(config: FAPoolConfig | Mapping[str, Any] | str | os.PathLike[str]) -> None:
    """For the top of a script that is started by plain ``deepspeed`` or ``torchrun``: takes its pool ranks out of the
    launch, and pools what DeepSpeed's engines are given from then on.

    On a pool rank it does not return: the process serves and exits with code 0 when the base ranks have ended. Call it
    before anything starts torch.distributed.

    Args:
        config: settings, or a DeepSpeed config with a "fa_pool" section. ``"enabled": false`` or a file without the
            section changes nothing.

    Raises:
        SystemExit: a setting is wrong, or the launch does not fit; rank 0 has printed why.
    """
    try:
        settings = section_of(config)
    except FAPoolConfigError as error:
        say_once(error, None)
        raise SystemExit(2) from None
    if settings is not None:
        if settings.enabled:
            take_role(settings)
        install(settings)


def install(settings: FAPoolConfig) -> None:
    """Puts ours in the place of ``deepspeed.init_inference`` and ``deepspeed.initialize``. What is not enabled only
    loses its section, which DeepSpeed would refuse as an unknown key."""
    if settings.enabled and get_accelerator().device_name() == "cpu":
        # Built anew with a compiler in every new environment, and it knows no group smaller than the launch.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    host = _Host(settings)
    deepspeed.init_inference = functools.partial(host.init_inference, deepspeed.init_inference)
    deepspeed.initialize = functools.partial(host.initialize, deepspeed.initialize)


@dataclass(frozen=True)
class _Host:
    settings: FAPoolConfig

    def init_inference(self, original: Callable[..., Any], model: Any, config: Any = None, **kwargs: Any) -> Any:
        """``deepspeed.init_inference``, whose model is pooled; tensor-parallel as ``base`` in the settings says."""
        given = dict(_read(config) or {}) | kwargs
        settings = self._agreed(given.pop(SECTION, None))
        if settings is None:
            return original(model, config=given)
        if given.get("replace_with_kernel_inject") or given.get("kernel_inject"):
            raise FAPoolConfigError(
                "init_inference with replace_with_kernel_inject replaces whole layers by DeepSpeed's own kernels, so "
                f'fa_pool cannot take over their attention: leave kernel injection out, or set "{SECTION}": '
                '{"enabled": false}'
            )
        split, size = _split(given, settings)
        longest = _longest(model)
        if longest and "max_out_tokens" not in given and "max_tokens" not in given:
            # DeepSpeed's own default refuses prompts longer than 1024 tokens.
            given["max_out_tokens"] = longest
        group = None
        if split != "none":
            deepspeed.init_distributed()
        if split == "megatron":
            group = _split_by_megatron(model, size)
            given = _without_tensor_parallel(given)
        engine = original(model, config=given)
        if split == "deepspeed":
            group = engine.mp_group
        _pool(engine.module, settings, group)
        return engine

    def initialize(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``deepspeed.initialize``, whose model is pooled."""
        names = ("args", "model")
        given = dict(zip(names, args, strict=False)) | kwargs
        source = (
            given.get("config") or given.get("config_params") or getattr(given.get("args"), "deepspeed_config", None)
        )
        read = _read(source)
        settings = self._agreed(read.get(SECTION) if isinstance(read, Mapping) else None)
        if settings is not None and given.get("model") is not None:
            _pool(given["model"], settings, None)
        made = original(*args, **kwargs)
        if settings is not None and getattr(made[0], "monitor", None) is not None and made[0].monitor.enabled:
            _observe(made[0])
        return made

    def _agreed(self, section: Any) -> FAPoolConfig | None:
        """The settings of one model: a section in its own config must fit the launch. None: not pooled."""
        settings = self.settings if section is None else FAPoolConfig.load(section)
        if not self.settings.enabled:
            return None
        if not settings.enabled:
            return None
        for key in ("pool", "pool_ranks", "pool_placement", "store_port"):
            if getattr(settings, key) != getattr(self.settings, key):
                raise FAPoolConfigError(
                    f"{key} is {getattr(settings, key)!r} in this engine's {SECTION} section, and the launch was set "
                    f"up with {getattr(self.settings, key)!r}: give both the same"
                )
        return settings


def _read(config: Any) -> Any:
    """A config's mapping, from a file if it is a path."""
    if isinstance(config, str | os.PathLike):
        try:
            with open(config, encoding="utf-8") as file:
                return json.load(file)
        except (OSError, ValueError) as error:
            raise FAPoolConfigError(f"{os.fspath(config)} cannot be read as JSON: {error}") from None
    return config


def _split(given: Mapping[str, Any], settings: FAPoolConfig) -> tuple[str, int]:
    """Who splits the model, over how many base ranks."""
    asked = given.get("tensor_parallel") or given.get("tp") or {}
    own = asked.get("tp_size", 1) if isinstance(asked, Mapping) else getattr(asked, "tp_size", 1)
    own = max(own, given.get("mp_size", 1))
    size = settings.base.tensor_parallel_size or own
    who = settings.base.tensor_parallel
    if who is None:
        installed = importlib.util.find_spec("megatron") is not None
        who = "none" if size == 1 else "megatron" if installed else "deepspeed"
    if who == "none" and size > 1:
        raise FAPoolConfigError(
            f'base.tensor_parallel is "none", and the size asked for is {size}: leave one of both out'
        )
    if size == 1:
        return "none", 1
    return who, size


def _longest(model: Any) -> int | None:
    """Positions that a transformers model can have."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else None
    return getattr(text, "max_position_embeddings", None)


def _without_tensor_parallel(given: Mapping[str, Any]) -> dict[str, Any]:
    """DeepSpeed must not split again what is split."""
    return {key: value for key, value in given.items() if key not in ("tensor_parallel", "tp", "mp_size")}


def _split_by_megatron(model: Any, size: int) -> Any:
    """Divides a model among groups of ``size`` neighbouring base ranks; returns this rank's group."""
    from fapool_plugin.integrations.megatron import layers as megatron_layers
    from fapool_plugin.integrations.tensor_parallel import parallel as huggingface_parallel

    try:
        huggingface_parallel.refuse_parallel(model, size)
        group = neighbours(size)
        huggingface_parallel.split_model(model, group, megatron_layers)
    except ValueError as error:
        raise FAPoolConfigError(str(error)) from error
    huggingface_parallel.same_random_numbers(group)
    return group


def _pool(model: Any, settings: FAPoolConfig, group: Any) -> None:
    """Pools a model in place, and says how much of it."""
    if isinstance(model, FAPoolForCausalLM):
        if group is None:
            return  # the user did it already
        raise FAPoolConfigError(
            "the model was pooled before it was divided among base ranks: give init_inference what "
            "AutoModelForCausalLM.from_pretrained returns"
        )
    agree = None if group is None else agree_over(group)
    try:
        FAPoolForCausalLM.wrap(
            model, settings, agree=agree, base_ranks=1 if group is None else dist.get_world_size(group)
        )
    except ValueError as error:
        raise FAPoolConfigError(str(error)) from error
    layers = list(attention_modules(model))
    pooled = sum(hasattr(layer, SECTION) for layer in layers)
    if is_first():
        text = f"fa_pool: attention replaced in {pooled} of {len(layers)} attention layers of {type(model).__name__}"
        print(text, file=sys.stderr, flush=True)


def _observe(engine: Any) -> None:
    """After each optimizer step the monitor gets what stats() counts."""
    step, manager = engine.step, engine.module.fa_pool

    @functools.wraps(step)
    def observed(*args: Any, **kwargs: Any) -> Any:
        boundary = engine.is_gradient_accumulation_boundary()
        result = step(*args, **kwargs)
        if boundary:
            scalars = _scalars(manager.stats())
            engine.monitor.write_events([(f"{_TAG}/{key}", value, engine.global_samples) for key, value in scalars])
        return result

    engine.step = observed


def _scalars(stats: Mapping[str, Any], above: str = "") -> list[tuple[str, float]]:
    """The numbers in stats(), by path."""
    found: list[tuple[str, float]] = []
    for key, value in stats.items():
        if isinstance(value, Mapping) and not key.endswith("reasons"):
            found += _scalars(value, f"{above}{key}/")
        elif isinstance(value, int | float):
            found.append((f"{above}{key}", float(value)))
    return found
