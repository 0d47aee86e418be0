"""Hugging Face: what of a causal language model may be divided among base ranks, and how much of it each rank gets.

Read off transformers' own tensor-parallel plan: whole KV groups with their query heads, FFN features and vocabulary
evenly. Whatever this would not divide exactly is refused. Moves no weight.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fapool_plugin.integrations.tensor_parallel.slices import Cut

_QKV = {"q_proj", "k_proj", "v_proj"}
_FFN = ({"gate_proj", "up_proj"}, {"up_proj"}, {"c_fc"}, {"fc1"})
_HEAD_NORMS = {"q_norm", "k_norm"}


def refuse_parallel(model_or_config: Any, size: int) -> None:
    """Raises ValueError for what cannot be divided exactly among ``size`` base ranks.

    A configuration says what its plan divides and how many KV heads there are; only a model shows all of its weights.
    """
    config = getattr(model_or_config, "config", model_or_config)
    is_config = isinstance(model_or_config, PretrainedConfig)
    name = type(model_or_config).__name__
    if is_config:
        name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, name)
    text = config.get_text_config(decoder=True)
    _refuse_plan(name, text)
    least = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    if not is_config:
        blocks = list(blocks_of(model_or_config))
        for block in blocks:
            _refuse_block(name, block)
        if not any(block.is_attention for block in blocks):
            raise ValueError(_cannot(name, "transformers' tensor-parallel plan names no module of it"))
        _refuse_ends(name, model_or_config)
        least = min(block.kv_heads for block in blocks if block.is_attention)
    if size > least:
        raise ValueError(
            f"tensor_parallel_size is {size}, but {name} has {least} KV heads; every base rank needs at least one, "
            f"with the query heads that belong to it: set tensor_parallel_size to {least} or less"
        )


@dataclass(frozen=True)
class Block:
    """An attention or FFN module: projections of which ranks hold rows, and one of which they hold columns."""

    name: str
    module: Any
    columns: list[str]
    row: str

    @property
    def is_attention(self) -> bool:
        return set(self.columns) == _QKV

    @property
    def kv_heads(self) -> int:
        return int(self.module.k_proj.out_features // self.module.head_dim)

    def shared_by_heads(self) -> Iterator[nn.Parameter]:
        """What every rank has whole, and applies to its own heads."""
        for name in _HEAD_NORMS if self.is_attention else ():
            yield from getattr(self.module, name, nn.Identity()).parameters()

    def cuts(self, size: int, rank: int) -> dict[str, Cut]:
        """By projection, what a rank holds of it."""
        outs = {name: getattr(self.module, name).out_features for name in self.columns}
        cuts = {name: self._cut(features, 0, size, rank) for name, features in outs.items()}
        return cuts | {self.row: self._cut(getattr(self.module, self.row).in_features, 1, size, rank)}

    def _cut(self, features: int, dim: int, size: int, rank: int) -> Cut:
        if not self.is_attention:
            return evenly(features, size, rank, dim)
        # Query heads lie in the order of the KV heads they belong to.
        heads, of_a_group = groups_of(self.kv_heads, size, rank), features // self.kv_heads
        return Cut(heads.start * of_a_group, heads.stop * of_a_group, len(heads) * of_a_group, dim)


def groups_of(kv_heads: int, size: int, rank: int) -> range:
    """The KV heads of one of ``size`` ranks: equally many for each, one more for the first where they do not divide."""
    fewer, more = divmod(kv_heads, size)
    start = rank * fewer + min(rank, more)
    return range(start, start + fewer + (rank < more))


def evenly(features: int, size: int, rank: int, dim: int = 0) -> Cut:
    """Equally much for every rank; what is beyond the last feature is zeros."""
    each = -(-features // size)
    return Cut(min(rank * each, features), min((rank + 1) * each, features), each, dim)


def _plan(config: Any) -> dict[str, dict[str, str]]:
    """transformers' plan: styles by the name of a projection, by the pattern of the module that has it."""
    plan: dict[str, dict[str, str]] = {}
    for path, style in (getattr(config, "base_model_tp_plan", None) or {}).items():
        parent, _, child = path.rpartition(".")
        plan.setdefault(parent, {})[child] = style
    return plan


def blocks_of(model: Any) -> Iterator[Block]:
    """Every module of which the plan divides something."""
    plan = _plan(model.config.get_text_config(decoder=True))
    inner = model.base_model
    prefix = next(name for name, module in model.named_modules() if module is inner)
    for name, module in inner.named_modules():
        styles = plan.get(re.sub(r"\d+", "*", name), {})
        columns = [child for child, style in styles.items() if style == "colwise"]
        if columns:
            (row,) = (child for child, style in styles.items() if style == "rowwise")
            yield Block(f"{prefix}.{name}" if prefix else name, module, columns, row)


def _refuse_plan(name: str, config: Any) -> None:
    plan = _plan(config)
    reason = None
    if not plan:
        reason = "transformers has no tensor-parallel plan for it, which would say what may be divided"
    for parent, styles in plan.items():
        for child, style in styles.items():
            norm = style == "replicated_with_grad_allreduce" and child in _HEAD_NORMS
            if style not in ("colwise", "rowwise") and not norm:
                reason = reason or f"transformers' tensor-parallel plan has {parent}.{child} as {style}"
        columns = {child for child, style in styles.items() if style == "colwise"}
        rows = [child for child, style in styles.items() if style == "rowwise"]
        if (columns != _QKV and columns not in _FFN) or len(rows) != 1:
            reason = reason or f"its {parent} is divided as {', '.join(sorted([*columns, *rows]))}"
    if plan and not any(styles.keys() >= _QKV for styles in plan.values()):
        reason = reason or "its plan has no q_proj, k_proj and v_proj"
    if reason:
        raise ValueError(_cannot(name, reason))


def _cannot(name: str, reason: str) -> str:
    return (
        f"{name} cannot be divided among base ranks: {reason}. Supported are models with separate q_proj, k_proj and "
        "v_proj and a plain FFN, such as Llama, Qwen2, Qwen3, Mistral and Gemma: load this one whole, on one base rank"
    )


def _refuse_block(name: str, block: Block) -> None:
    reason, divided = None, {*block.columns, block.row}
    for child in sorted(divided):
        linear = getattr(block.module, child, None)
        if type(linear) is not nn.Linear:
            reason = f"{block.name}.{child} is a {type(linear).__name__}, not a Linear"
    for path, parameter in block.module.named_parameters():
        child = path.split(".")[0]
        per_head = block.is_attention and child in _HEAD_NORMS and parameter.numel() == block.module.head_dim
        if child not in divided and not per_head:
            reason = reason or f"{block.name}.{path}, {tuple(parameter.shape)}, is not in transformers' plan"
    if reason is None and block.is_attention and block.module.q_proj.out_features % block.kv_heads:
        reason = f"{block.name} has {block.kv_heads} KV heads, which do not divide its query heads"
    if reason:
        raise ValueError(_cannot(name, reason))


def ends_of(model: Any) -> tuple[Any, Any]:
    """The embedding and the LM head."""
    return model.get_input_embeddings(), model.get_output_embeddings()


def _refuse_ends(name: str, model: Any) -> None:
    embedding, head = ends_of(model)
    plain = type(embedding) is nn.Embedding or hasattr(embedding, "embed_scale")
    if not isinstance(embedding, nn.Embedding) or not plain:
        raise ValueError(_cannot(name, f"its embedding is a {type(embedding).__name__}"))
    if type(head) is not nn.Linear:
        raise ValueError(_cannot(name, f"its LM head is a {type(head).__name__}"))
