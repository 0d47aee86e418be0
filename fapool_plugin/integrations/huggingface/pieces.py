"""Hugging Face: what speaks against cutting a model's forward into pieces that a trial of a few tokens cannot show, or
need not.

Constants between a trial's length and the forward's, hooks, weights that are elsewhere, and reasons that are plain to
see. Knows models and their configurations; trials are in probe.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import distributed, nn
from torch.nn.modules import module as torch_module

from fapool_plugin.base.kept_calls import fingerprint
from fapool_plugin.integrations.huggingface.arguments import in_checkpoint
from fapool_plugin.integrations.huggingface.blocks import asked
from fapool_plugin.plan.shares import Geometry

_DROPOUTS = ("dropout", "activation_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "layerdrop")
_LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}
_WINDOW = re.compile(r"window|chunk|local|block|span")
_LENGTH = re.compile(r"window|chunk|local|block|span|position|length|n_ctx|context")
_KNOWN_CODE = ("torch.nn.", "transformers.", "fapool_plugin.")
_PLAIN = (bool, int, float, complex, str, type(None))
_OWN_HOOKS = {"output_capturing_hook", "make_inputs_require_grads"}
"""Hooks of transformers' own, by name, that look at each position by itself or at nothing."""
_SURVEYED = """
afmoe apertus arcee aria_text axk1 bart beam bert bert-generation biogpt bitnet blenderbot blenderbot-small
camembert cohere cohere2 cohere2_moe cohere_compass_text ctrl cwm data2vec-text dbrx deepseek_v2 deepseek_v3
diffllama dots1 dots3_note_text electra emu3_text_model ernie ernie4_5 ernie4_5_moe exaone4 exaone_moe flex_olmo
flint fuyu gemma gemma2 gemma3_text gemma3n_text gemma4_text gemma4_unified_text glm glm4 glm4_moe glm4_moe_lite
gpt2 gpt_bigcode gpt_neox gpt_oss granite granite_swa granitemoe granitemoe_swa granitemoeshared helium
hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax internlm3 iquestcoder jais2 jetmoe kolibri1 laguna llama
marian mbart mellum mimo_v2_flash minicpm3 minimax_m2 ministral3 mixtral mllama_text_model modernbert-decoder
moss_transcribe_diarize nanochat nemotron olmo olmo2 olmo3 olmoe opt pegasus persimmon phi phi3 phimoe plbart qwen2
qwen2_moe qwen3 qwen3_moe roberta roberta-prelayernorm roc_bert seed_oss smollm3 solar_open stablelm starcoder2
vaultgemma whisper xlm-roberta xlm-roberta-xl xmod youtu
"""
SURVEYED = frozenset(_SURVEYED.split())
"""Model types whose blocks agreed with the whole in tests, windows many times shorter than the prompt included."""


def one_block_model(model: Any, decoder: Any, kinds: set[str]) -> str | None:
    """Why forwards of this model cannot be cut, beforehand; None if they can."""
    config = model.config.get_text_config(decoder=True)
    across = sorted(kinds - {"full_attention", "sliding_attention"})
    rope = getattr(config, "rope_parameters", None) or {}
    tables = [rope, *(table for table in rope.values() if isinstance(table, dict))]
    if decoder is None or decoder is model:
        return "the decoder is not a module of its own"
    mixing = {type(m).__name__ for m in decoder.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.RNNBase))}
    if across or mixing:
        return f"layers of kind {', '.join(across or sorted(mixing))} carry something from position to position"
    if any(table.get("rope_type") in _LENGTH_DEPENDENT_ROPE for table in tables):
        return "its position encoding depends on the length of the whole forward"
    return None


def one_block_reason(owner: Any, given: dict[str, Any], *, training: bool, again: bool = False) -> str | None:
    """Why this forward cannot be cut; None if it can. ``again``: as :func:`runs_again` says."""
    if is_compiled(owner):
        return "the model is compiled"
    modules = list(owner.modules())
    if any(hasattr(module, "_hf_hook") for module in modules):
        return "its weights are moved in and out by hooks (offload)"
    for parameter in owner.parameters():
        if hasattr(parameter, "ds_id"):
            return "its weights are partitioned (ZeRO-3)"
        if hasattr(parameter, "device_mesh"):
            return "its weights are partitioned (FSDP)"
    if asked(owner, given, "output_router_logits"):
        return "output_router_logits was asked for"
    if again:
        return "gradient checkpointing runs layers by themselves"
    if training and owner.training and _draws_dropout(owner, modules):
        return "dropout: pieces would draw other random numbers than the whole"
    return None


def is_compiled(owner: nn.Module) -> bool:
    """Whether torch.compile has a module of these."""
    return any(module._compiled_call_impl is not None for module in owner.modules())


def runs_again(owner: nn.Module, *, training: bool, shown: bool) -> bool:
    """Whether gradient checkpointing runs layers of this forward, or all of it, a second time. ``shown``: layers did
    so before."""
    return (training and _is_checkpointed(owner)) or (torch.is_grad_enabled() and (shown or in_checkpoint()))


def _is_checkpointed(owner: nn.Module) -> bool:
    modules = list(owner.modules())
    own = owner.training and any(getattr(module, "gradient_checkpointing", False) for module in modules)
    return own or any(type(module).__name__ == "CheckpointWrapper" for module in modules)  # torch's


def _draws_dropout(owner: Any, modules: Iterable[nn.Module]) -> bool:
    config = owner.config.get_text_config(decoder=True)
    rates = [module.p for module in modules if isinstance(module, nn.Dropout)]
    return any([*rates, *(getattr(config, name, None) for name in _DROPOUTS)])


def is_own_hook(hook: Any) -> bool:
    """Whether a hook belongs to a framework and looks at nothing."""
    return getattr(hook, "__name__", "") in _OWN_HOOKS


def hook_reason(decoder: nn.Module) -> str | None:
    """Why a user's hook in a decoder speaks against pieces: it may look at all positions, and is not for trials."""
    if any(getattr(torch_module, f"_global_{kind}_hooks") for kind in ("forward", "forward_pre", "backward")):
        return "a hook on all modules may look at all positions"
    for name, module in decoder.named_modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        for hook in (hook for kind in hooks for hook in kind.values()):
            if not is_own_hook(hook):
                return f"a hook on {name or 'the decoder'} ({type(module).__name__}) may look at all positions"
        if hasattr(module, "parametrizations"):
            return f"weights of {name or 'the decoder'} ({type(module).__name__}) are parametrized"
    return None


def may_try(*, training: bool, base_ranks: int) -> bool:
    """Whether a trial may be made: not where others wait for this process's gradients, or have part of its weights."""
    several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > base_ranks
    return not (training and several)


def untried_reason(decoder: Any, *, training: bool, base_ranks: int) -> str | None:
    """Why a model is whole where no trial may be made; None if one may, or tests have tried it."""
    if may_try(training=training, base_ranks=base_ranks) or is_surveyed(decoder):
        return None
    return f"{type(decoder).__name__} is trained by several processes, where no trial is made"


def is_surveyed(decoder: Any) -> bool:
    """Whether tests have tried this very model in pieces."""
    kind = type(decoder)
    own = kind.__module__.startswith("transformers.models.") and "forward" not in vars(decoder)
    return own and decoder.config.model_type in SURVEYED


def is_surveyed_alone(decoder: Any) -> bool:
    """Whether tests have tried this very model in pieces, and no module in it has code that is not known."""
    return is_surveyed(decoder) and all(type(m).__module__.startswith(_KNOWN_CODE) for m in decoder.modules())


def beyond_trial(decoder: Any, trial: int, geometry: Geometry, windows: Iterable[int]) -> str | None:
    """Which constant of a model lies between a trial's length and the forward's, and so was not tried; None if none
    does, or if tests have tried such a one."""
    if is_surveyed(decoder):
        return None
    own = type(decoder).__module__.startswith("transformers.models.")
    names = _WINDOW if own else _LENGTH
    constants = [("a window", value) for value in windows]
    for name, value in vars(decoder.config).items():
        if isinstance(value, int) and not isinstance(value, bool) and names.search(name) and "layer" not in name:
            constants.append((name, value))
    for name, value in constants:
        if trial < value < geometry.columns:
            return f"{name} = {value} lies between a trial's {trial} tokens and this forward's {geometry.columns}"
    return None


def structure(decoder: nn.Module) -> int:
    """A number that is another one when modules are replaced, patched, or change their mode."""
    seen = [
        (type(module), module.training, id(vars(module).get("forward")), getattr(module, "p", None))
        for module in decoder.modules()
    ]
    return hash((tuple(map(repr, seen)), repr(vars(decoder.config))))


def values(decoder: nn.Module) -> object:
    """What else a verdict depends on where code is not known: values of weights, buffers and plain attributes. A gate
    that is closed hides what looks at other positions, until an optimizer opens it. None where all code is known."""
    if is_surveyed_alone(decoder):
        return None
    modules = list(decoder.modules())
    tensors = [x for x in (*decoder.parameters(), *decoder.buffers()) if x.numel() and not x.is_meta]
    plain = [[(name, x) for name, x in vars(module).items() if isinstance(x, _PLAIN)] for module in modules]
    try:
        return fingerprint(*(x.reshape(1, 1, -1, x.shape[-1] if x.ndim else 1) for x in tensors)), repr(plain)
    except (RuntimeError, TypeError, KeyError):
        return object()  # tensors of a kind that has no such bits: tried each time
