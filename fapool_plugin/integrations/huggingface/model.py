"""Hugging Face: a real transformers model whose attention layers may borrow pool ranks.

One subclass of the loaded model's own class, and what it refuses. A forward's way is in forward, masks and
attention in attention, what generate() fills in cache; pooling itself is decided elsewhere.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs

from fapool_plugin.base.agreement import Agree, agree_over
from fapool_plugin.base.attention import FAPoolAttention
from fapool_plugin.base.resource_manager import ResourceManager
from fapool_plugin.base.sequence import SequenceState
from fapool_plugin.config import FAPoolConfig, FAPoolConfigError
from fapool_plugin.integrations.huggingface.attention import NAME
from fapool_plugin.integrations.huggingface.attention_layer import AttentionLayer
from fapool_plugin.integrations.huggingface.config_view import local_name, view_configs
from fapool_plugin.integrations.huggingface.entry import EntryModule, holds_decoder
from fapool_plugin.integrations.huggingface.forward import Forwards
from fapool_plugin.integrations.huggingface.homes import Homes
from fapool_plugin.integrations.huggingface.pieces import one_block_model
from fapool_plugin.integrations.huggingface.supported import (
    FULL_LAYERS,
    attention_modules,
    ownable_layers,
    refuse_model,
    refuse_object,
)
from fapool_plugin.plan.profile import Profile
from fapool_plugin.ranks.pools import open_manager, pool_maker

_LONGEST = 1 << 20
"""Tokens up to which a threshold is looked for, if the model does not say how many it can have."""


class FAPoolForCausalLM(EntryModule):
    """A causal language model that borrows attention ranks for long sequences.

    ``from_pretrained`` returns a real transformers model: an instance of the class that AutoModelForCausalLM would
    have chosen, and of this one. ``model.fa_pool`` is its :class:`ResourceManager`: ``stats()``, ``close()``.
    """

    fa_pool: ResourceManager

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *args: Any,
        fa_pool: FAPoolConfig | Mapping[str, Any] | str | os.PathLike[str] | None = None,
        **hf_kwargs: Any,
    ) -> Any:
        """Loads a model as ``AutoModelForCausalLM.from_pretrained(path, *args, **hf_kwargs)`` does, and pools it.

        Args:
            path: model folder or name.
            fa_pool: configuration (see :class:`FAPoolConfig`), or a JSON file's path. None: what the model was saved
                with, or the defaults.

        Raises:
            FAPoolConfigError: the configuration is not valid, or asks for more than this machine has.
            FileNotFoundError: ``path`` looks like a folder and there is none.
            ValueError: the model cannot be pooled exactly.
        """
        config = FAPoolConfig.load(fa_pool) if fa_pool is not None else None
        if config is not None:
            pool_maker(config)
        text = os.fspath(path)
        if not Path(text).exists() and (text.startswith((".", "/", "~")) or text.count("/") > 1):
            raise FileNotFoundError(f"there is no model folder at {text}")
        if config is not None and config.enabled and config.base.tensor_parallel not in (None, "none"):
            from fapool_plugin.integrations.tensor_parallel.load import load_divided

            model, group = load_divided(path, config.base, **hf_kwargs)
            return cls.wrap(model, config, agree=agree_over(group), base_ranks=group.size())
        return cls.wrap(AutoModelForCausalLM.from_pretrained(path, *args, **hf_kwargs), config)

    @staticmethod
    def wrap(
        model: Any,
        fa_pool: FAPoolConfig | Mapping[str, Any] | str | os.PathLike[str] | None = None,
        *,
        agree: Agree | None = None,
        base_ranks: int = 1,
    ) -> Any:
        """Pools a loaded model, in place: the same object, its weights untouched.

        Args:
            model: a transformers causal language model.
            fa_pool: as in ``from_pretrained``.
            agree: makes base ranks that share the model decide alike; None: the model is this rank's alone.
            base_ranks: how many base ranks share the model.

        Raises as ``from_pretrained``.
        """
        refuse_object(model)
        if isinstance(model, FAPoolForCausalLM):
            raise ValueError(f"{type(model).__name__} is pooled already")
        if (inside := next((m for m in model.modules() if isinstance(m, EntryModule)), None)) is not None:
            raise ValueError(
                f"{type(model).__name__} holds a {type(inside).__name__} that is pooled as part of another model: wrap "
                "only one of them, or copy.deepcopy what they share before either is wrapped"
            )
        saved = getattr(model.config, "fapool", None)
        config = FAPoolConfig.load(saved if fa_pool is None else fa_pool)
        if config.threshold == "auto" and base_ranks > 1:
            raise FAPoolConfigError(
                f'threshold "auto" cannot be measured while {base_ranks} base ranks share the model: give a number'
            )
        attentions = list(attention_modules(model))
        refuse_model(model, attentions)
        if config.enabled and config.profile is not None:
            Profile.load(config.profile)
        manager = open_manager(config, agree, base_ranks)
        if config.enabled:
            try:
                if config.threshold == "auto":
                    _measure_threshold(model, manager)
                _install(model, manager, attentions)
            except BaseException:
                manager.close()
                raise
        kind: Any = type(model)
        model.__class__ = _subclass(FAPoolForCausalLM, kind)
        model.fa_pool = manager
        model.config.fapool = config.to_dict()
        return model

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        mode: Any,
        batch_size: int,
        max_length: int,
    ) -> Any:
        plain = generation_config.use_cache is not False and generation_config.cache_implementation in (
            None,
            "dynamic",
        )
        ours = plain and self.fa_pool.config.enabled and self._supports_default_dynamic_cache()  # type: ignore[attr-defined]
        if model_kwargs.get("past_key_values") is not None or not ours:
            return super()._prepare_cache_for_generation(  # type: ignore[misc]
                generation_config, model_kwargs, mode, batch_size, max_length
            )
        mask, embeds = model_kwargs.get("attention_mask"), model_kwargs.get("inputs_embeds")
        known = mask if isinstance(mask, Tensor) and mask.ndim == 2 else embeds
        new_tokens = generation_config.max_new_tokens
        prompt = (
            known.shape[1] if isinstance(known, Tensor) else max(0, max_length + 1 - new_tokens) if new_tokens else 0
        )
        state = SequenceState(prompt, max_length, max(1, generation_config.num_beams))
        config = self.config.get_text_config(decoder=True)  # type: ignore[attr-defined]
        cache = self.fapool_forwards.homes.new_cache(config, state)  # type: ignore[union-attr]
        if generation_config.is_assistant:
            cache.activate_past_recording()
        model_kwargs["past_key_values"] = cache
        return None

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: continuous batching would silently use another attention."""
        raise NotImplementedError(
            "generate_batch (continuous batching) has a paged cache and an attention of its own, which fa_pool does "
            "not pool: call generate(), or load the model without fa_pool"
        )

    init_continuous_batching = continuous_batching_context_manager = generate_batch


def _install(model: Any, manager: ResourceManager, attentions: list[Any]) -> None:
    """Puts FAPoolAttention into every attention layer, and an entry module at every way into the model."""
    kinds, _ = get_layer_types_and_kwargs(model.config.get_text_config(decoder=True))
    full = sum(kind in FULL_LAYERS for kind in kinds)
    for module in attentions:
        module.fa_pool = FAPoolAttention(manager, module.layer_idx, full, stands_for=local_name(module.config) or "")
        own: Any = type(module)
        if not issubclass(own, AttentionLayer):  # a layer that was another pooled model's is already
            module.__class__ = _subclass(AttentionLayer, own)
        # What holds another attention layer has it ask.
        holds = any(inside is not module and inside in attentions for inside in module.modules())
        module.fapool_unmasked = kinds[module.layer_idx] in FULL_LAYERS and not holds
    # Not only the outermost: some models call their decoder past the model that holds it.
    holding = [
        module
        for module in model.modules()
        if isinstance(module, PreTrainedModel) and set(attentions) <= set(module.modules())
    ]
    # Asked of the class, since models without a head for tokens generate nothing and still have caches.
    makes_cache = GenerationMixin._supports_default_dynamic_cache.__func__(type(model))
    one_block = one_block_model(model, holding[-1], set(kinds))
    if not makes_cache:
        one_block = one_block or "it takes a cache of its own kind only"
    # What base ranks share cannot be measured by one of them: their collectives belong together.
    profiler = functools.partial(_profiler, manager.config) if manager.base_ranks == 1 else _no_profiler
    ownable = ownable_layers(attentions) if manager.config.kv_home == "pool" and makes_cache else frozenset()
    if manager.config.kv_home == "pool" and len(ownable) < full:
        manager.counters.log("home", f"the keys of {full - len(ownable)} of {full} layers stay with the base")
    forwards = Forwards(
        manager, full, makes_cache, one_block, profiler, Homes(manager, ownable, joins=one_block is None)
    )
    for depth, module in enumerate(holding):
        if module is not model:
            kind: Any = type(module)
            module.__class__ = _subclass(EntryModule, kind)
        module.fapool_forwards, module.fapool_in_rounds = forwards, module is holding[-1]
        module.fapool_depth = depth
    view_configs(model, set(attentions), NAME, own=not holds_decoder(model))


def _no_profiler(module: Any) -> None:
    return None


def _profiler(config: FAPoolConfig, module: Any) -> Any:
    if any(hasattr(parameter, "ds_id") for parameter in module.parameters()):
        return None  # ZeRO-3: what gathers weights is done by all ranks or by none
    # Measuring is what most programs never need.
    from fapool_plugin.integrations.huggingface.profile import ModelProfiler

    return ModelProfiler(module, config)


def _measure_threshold(model: Any, manager: ResourceManager) -> None:
    """Finds the threshold "auto"."""
    profiler = _profiler(manager.config, model)
    manager.compute_on(model.device)
    manager.advisor.profile = profiler.known() or profiler.measure_alone()
    text = model.config.get_text_config(decoder=True)
    longest = getattr(text, "max_position_embeddings", None) or _LONGEST
    manager.threshold = manager.advisor.threshold(manager.advisor.cores(torch.get_num_threads()), longest)
    manager.counters.log("threshold", f"measured: {manager.threshold} tokens")


@functools.cache
def _subclass(ours: Any, base: Any) -> Any:
    """A class that is both; under the base's own name, so that saving, pipelines and PEFT see what they know."""
    members = {
        "__module__": base.__module__,
        "__doc__": base.__doc__,
        "__reduce_ex__": lambda self, protocol: (_blank, (ours, base), self.__dict__),
    }
    return type(base.__name__, (ours, base), members)


def _blank(ours: Any, base: Any) -> Any:
    """An empty instance for copies and pickles."""
    kind = _subclass(ours, base)
    return object.__new__(kind)
