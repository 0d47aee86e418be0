"""What the configuration of each causal language model type needs to be tiny, beyond what all share.

Knows names and numbers of configurations, and builds none. ``tests/survey.py`` gives a setting to the types that have
it, so a row stands here only where that is not enough.
"""

from __future__ import annotations

from typing import Any

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, NARROW = 4, 64, 4, 2, 16, 32
EXPERTS, EXPERTS_OF_A_TOKEN, STATE, WINDOW, POSITIONS = 4, 2, 8, 8, 512
VOCABULARY = 99
LEFT_OUT = object()
"""In place of a value: the setting is not given, so that the configuration derives it."""

_SETTINGS: tuple[tuple[int, str], ...] = (
    (
        HIDDEN,
        "hidden_size d_model n_embd lru_width emb_dim embedding_size input_embedding_size output_embedding_size "
        "word_embed_proj_dim intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner dff dim_ff d_inner "
        "ffn_hidden_size dense_intermediate_size intermediate_size_mlp feed_forward_size",
    ),
    (
        NARROW,
        "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size shared_intermediate_size "
        "shared_experts_intermediate_size moe_shared_expert_intermediate_size prompt_mid_dim",
    ),
    (
        HEAD_DIM,
        "head_dim v_head_dim index_head_dim swa_head_dim linear_head_dim linear_key_head_dim linear_value_head_dim "
        "mamba_d_head mamba_head_dim dim_head kv_channels kv_lora_rank q_lora_rank o_lora_rank router_hidden_size "
        "hidden_size_per_layer_input",
    ),
    (LAYERS, "num_hidden_layers num_layers n_layer n_layers decoder_layers encoder_layers"),
    (
        HEADS,
        "num_attention_heads num_heads n_head n_heads attention_heads decoder_attention_heads encoder_attention_heads "
        "swa_num_attention_heads linear_num_heads linear_num_value_heads",
    ),
    (KV_HEADS, "num_key_value_heads swa_num_key_value_heads linear_num_key_heads index_n_heads"),
    (EXPERTS, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    (EXPERTS_OF_A_TOKEN, "num_experts_per_tok num_experts_per_token moe_topk moe_k"),
    (1, "num_shared_experts n_shared_experts moe_num_shared_experts n_group topk_group"),
    (1, "first_k_dense_replace num_dense_layers"),
    (STATE, "state_size ssm_state_size mamba_d_state time_step_rank qk_rope_head_dim qk_nope_head_dim rotary_dim"),
    (STATE, "mamba_n_heads mamba_num_heads"),
    (WINDOW, "sliding_window sliding_window_size attention_window_size local_attention window_size index_topk"),
    (POSITIONS, "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions context_length"),
    (VOCABULARY, "vocab_size vocab_size_per_layer_input unpadded_vocab_size"),
)
SMALL: dict[str, int] = {name: value for value, names in _SETTINGS for name in names.split()}
"""What a setting of this name becomes in every type that has it as a number."""
TOKENS: dict[str, int | None] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}

_WINDOWS = ["sliding_attention", "full_attention"] * 2
_LINEAR = ["linear_attention", "full_attention"] * 2
_HYBRID = ["linear_attention", "hybrid"] * 2
_CONV = {"layer_types": ["conv", "full_attention"] * 2}
_HEAD_DIM = {"head_dim": HEAD_DIM}
_SOME_SLIDE = {"layer_types": _WINDOWS, "sliding_window": WINDOW}
_SOME_SLIDE_IF_ASKED = _SOME_SLIDE | {"use_sliding_window": True}
_LATENT = {"num_key_value_heads": HEADS, "head_dim": LEFT_OUT}
"""Of multi-head latent attention, whose head dim is the sum of two parts."""
_ROUTED = {
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "num_experts_per_tok": EXPERTS_OF_A_TOKEN,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": NARROW,
}
_DOTS3 = _SOME_SLIDE | {
    "use_dsa": False,
    "num_key_value_heads": HEADS,
    "swa_num_attention_heads": HEADS,
    "swa_num_key_value_heads": HEADS,
    "swa_q_lora_rank": HEAD_DIM,
    "swa_kv_lora_rank": HEAD_DIM,
    "swa_head_dim": HEAD_DIM,
    "swa_qk_nope_head_dim": 8,
    "swa_v_head_dim": HEAD_DIM,
}
_GEMMA4 = {"global_head_dim": 2 * HEAD_DIM}
_QWEN4 = {
    "num_key_value_heads": KV_HEADS,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": HEAD_DIM,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
    "hc_lowrank": 8,
    "ngram_vocab_size_base": 101,
    "split_ngram_parts": 1,
    "make_ngram_vocab_size_divisible_by": 1,
}
_BYTES = {"hidden_size_global": 2 * HIDDEN}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}

NEEDS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "bailing_hybrid", "deepseek_v3", "deepseek_v32", "glm4_moe_lite"), _LATENT),
    **dict.fromkeys(("glm_moe_dsa", "kimi_linear", "minicpm3", "youtu"), _LATENT),
    **dict.fromkeys(("qwen2", "qwen2_moe", "qwen3", "smollm3"), _SOME_SLIDE_IF_ASKED),
    **dict.fromkeys(("laguna", "mellum"), _SOME_SLIDE),
    **dict.fromkeys(("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral"), _HEAD_DIM),
    **dict.fromkeys(("lfm2", "lfm2_moe"), _CONV),
    "bamba": {"attn_layer_indices": [1, 3], "layer_types": LEFT_OUT},
    "blt": {
        "encoder_hash_byte_group_vocab": 100,
        "encoder_hash_byte_group_size": [2, 3],
        "vocab_size": 260,
        "encoder_config": _BYTES | {"vocab_size": 260},
        "decoder_config": _BYTES | {"vocab_size": 260},
        "global_config": {"hidden_size": 2 * HIDDEN},
        "patcher_config": {"vocab_size": 260},
    },
    "cohere_compass_text": _SOME_SLIDE | {"rope_parameters": dict.fromkeys(_WINDOWS, _ROPE)},
    "dbrx": {
        "attn_config": {"kv_n_heads": KV_HEADS, "rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": NARROW, "moe_num_experts": EXPERTS, "moe_top_k": 2, "hidden_size": HIDDEN},
    },
    "deepseek_v2": _LATENT | _ROUTED,
    "dots1": _SOME_SLIDE_IF_ASKED | _ROUTED,
    "dots3_note": {
        "text_config": _DOTS3,
        "vision_config": {"mlp_layer_types": ["dense"] * LAYERS, "adapter_in_dim": HIDDEN, "adapter_out_dim": HIDDEN},
        "audio_config": {"adapter_input_size": HIDDEN, "adapter_out_dim": HIDDEN},
    },
    "dots3_note_text": _DOTS3,
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4": {"text_config": _GEMMA4},
    "gemma4_text": _GEMMA4,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": _LINEAR},
    "inkling_text": {"layer_types": ["hybrid", "hybrid_sliding"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "longcat_flash": _LATENT
    | {"num_layers": 2, "num_hidden_layers": LEFT_OUT, "zero_expert_num": 1, "head_dim": 8, "qk_head_dim": LEFT_OUT},
    "mamba2": {"num_heads": 8},
    "nemotron": {"head_dim": HEAD_DIM, "num_key_value_heads": KV_HEADS},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "reformer": {"axial_pos_embds_dim": [16, 48], "axial_pos_shape": [16, 32]},
    "phi4_multimodal": {
        "vision_config": {"hidden_size": NARROW, "image_size": 28, "crop_size": 28, "patch_size": 14},
        "audio_config": {"hidden_size": NARROW, "ext_pw_out_channel": NARROW, "nemo_conv_channels": 8},
    },
    "roc_bert": {"pronunciation_vocab_size": 50, "shape_vocab_size": 50},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {"layers_block_type": _HYBRID},
    "zamba2": {"layers_block_type": _HYBRID, "num_mem_blocks": 2},
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid", "hybrid_sliding"] * 2, "sliding_window": WINDOW},
}
SINGLE = {"blt", "inkling2_text", "xglm"}
"""Types that compute nothing in fp64: their routing, or the lowest number that their scores may have, is of fp32."""
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral-full": ("mistral", {"sliding_window": None}),
    "ministral-full": ("ministral", {"layer_types": ["full_attention"] * LAYERS}),
}
"""More than one of a type: (type, changes) by a name of its own. These slide in every layer or in none."""
NOT_BUILT: dict[str, str] = {
    "gemma3n": "its vision tower needs the timm package",
    **dict.fromkeys(
        ("gemma4_assistant", "gemma4_unified_assistant"), "it has no keys of its own and needs those of another model"
    ),
    **dict.fromkeys(
        ("musicgen", "musicgen_melody"), "AutoModelForCausalLM gives its decoder the configuration of the whole"
    ),
}
"""Types of which there is no plain model to compare with, and why."""
