"""Megatron-core: a Llama model of Hugging Face's layout as Megatron's GPTModel, one tensor-parallel rank at a time.

Takes plain mappings, of settings (config.json) and of names to tensors; knows neither transformers nor pools.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import silu

_EXPECTED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "sliding_window": None}
"""Settings with one value that this layout has; a model without them has that value."""


def llama_config(settings: Mapping[str, Any], *, tp_size: int = 1, **others: Any) -> TransformerConfig:
    """A TransformerConfig for weights of a Llama model.

    Args:
        settings: its config.json.
        tp_size: tensor-parallel ranks.
        others: more settings of Megatron's, which come before these.

    Raises:
        ValueError: the model has something that this layout has not, or its heads cannot be shared out.
    """
    wrong = [f"{name} {settings[name]!r}" for name, value in _EXPECTED.items() if settings.get(name, value) != value]
    rope = _rope(settings)
    if rope.get("rope_type", "default") != "default":
        wrong.append(f"rope_type {rope['rope_type']!r}")
    heads = settings["num_attention_heads"]
    kv_heads = settings.get("num_key_value_heads") or heads
    if kv_heads % tp_size or settings["vocab_size"] % tp_size or settings["intermediate_size"] % tp_size:
        wrong.append(
            f"{kv_heads} KV heads, {settings['intermediate_size']} FFN channels and {settings['vocab_size']} tokens "
            f"for {tp_size} tensor-parallel ranks (choose a number that divides all three)"
        )
    if wrong:
        raise ValueError(f"not a plain Llama model that can be cut so: {'; '.join(wrong)}")
    values = {
        "num_layers": settings["num_hidden_layers"],
        "hidden_size": settings["hidden_size"],
        "ffn_hidden_size": settings["intermediate_size"],
        "num_attention_heads": heads,
        "num_query_groups": kv_heads,
        "kv_channels": settings.get("head_dim") or settings["hidden_size"] // heads,
        "layernorm_epsilon": settings["rms_norm_eps"],
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "tensor_model_parallel_size": tp_size,
        "use_cpu_initialization": not torch.cuda.is_available(),
        "perform_initialization": False,
    }
    return TransformerConfig(**values | others)


def llama_arguments(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of GPTModel that are not in its TransformerConfig."""
    return {
        "vocab_size": settings["vocab_size"],
        "max_sequence_length": settings["max_position_embeddings"],
        "position_embedding_type": "rope",
        "rotary_base": _rope(settings)["rope_theta"],
        "share_embeddings_and_output_weights": bool(settings.get("tie_word_embeddings", False)),
    }


def llama_state(weights: Mapping[str, Tensor], config: Any, *, tp_rank: int = 0, tp_size: int = 1) -> dict[str, Tensor]:
    """The state of one rank's GPTModel from all weights of a Llama model.

    Fused rows lie as Megatron reads them: of QKV, per KV head its query heads, its key and its value; of a gated
    FFN, this rank's gate, then its up projection. A head that shares the embedding's weights is left out.

    Args:
        weights: as transformers names them.
        config: from :func:`llama_config`.
        tp_rank, tp_size: which part.

    Raises:
        ValueError: a weight is missing, or there is one that has no place.
    """
    left = dict(weights)
    state: dict[str, Tensor] = {}

    def take(name: str) -> Tensor:
        if name not in left:
            raise ValueError(f"no weight {name} among {len(weights)}; these must be a Llama model's")
        return left.pop(name)

    def part(weight: Tensor, dim: int = 0) -> Tensor:
        if weight.shape[dim] % tp_size:
            raise ValueError(f"{weight.shape[dim]} rows or columns cannot be cut for {tp_size} ranks")
        return weight.chunk(tp_size, dim)[tp_rank].contiguous()

    for layer in range(config.num_layers):
        theirs, ours = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        q, k, v = (take(f"{theirs}self_attn.{name}_proj.weight") for name in "qkv")
        groups = [x.unflatten(0, (config.num_query_groups, -1)) for x in (q, k, v)]
        state[f"{ours}self_attention.linear_qkv.weight"] = part(torch.cat(groups, dim=1)).flatten(0, 1)
        state[f"{ours}self_attention.linear_proj.weight"] = part(take(f"{theirs}self_attn.o_proj.weight"), 1)
        gated = [part(take(f"{theirs}mlp.{name}_proj.weight")) for name in ("gate", "up")]
        state[f"{ours}mlp.linear_fc1.weight"] = torch.cat(gated)
        state[f"{ours}mlp.linear_fc2.weight"] = part(take(f"{theirs}mlp.down_proj.weight"), 1)
        state[f"{ours}input_layernorm.weight"] = take(f"{theirs}input_layernorm.weight")
        state[f"{ours}pre_mlp_layernorm.weight"] = take(f"{theirs}post_attention_layernorm.weight")
    state["embedding.word_embeddings.weight"] = part(take("model.embed_tokens.weight"))
    state["decoder.final_layernorm.weight"] = take("model.norm.weight")
    if "lm_head.weight" in left:
        head = take("lm_head.weight")
        if head.data_ptr() != weights["model.embed_tokens.weight"].data_ptr():
            state["output_layer.weight"] = part(head)
    if left:
        raise ValueError(f"no place for {', '.join(sorted(left)[:5])}: not a plain Llama model")
    return state


def _rope(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Position encoding, as newer or as older files have it."""
    found = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    return {"rope_theta": settings.get("rope_theta", 10000.0), **found}
