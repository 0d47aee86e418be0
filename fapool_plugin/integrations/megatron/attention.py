"""Megatron-core: the ``core_attention`` of a layer, which computes as its forward was decided, and the self attention
around it where keys live on the pool.

Knows Megatron's contract, masks and packed documents; not how a forward is decided, nor how work is shared out.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

from fapool_plugin.base.attention import FAPoolAttention
from fapool_plugin.base.forward import Forward, refusal
from fapool_plugin.base.resource_manager import ResourceManager
from fapool_plugin.integrations.megatron.contexts import Keys
from fapool_plugin.kernels.forward import attend

OUTSIDE = "a layer was called outside its model's forward: build FAPoolGPTModel, and call the whole model"
_CAUSAL = {AttnMaskType.causal, AttnMaskType.padding_causal}
_DECODER = _CAUSAL | {AttnMaskType.no_mask}
"""Mask types a causal layer is called with: Megatron says no_mask for steps that follow a prompt."""


class Document(NamedTuple):
    """One of several in a row, by its first token and the one after its last."""

    start: int
    stop: int

    @property
    def tokens(self) -> int:
        return self.stop - self.start

    def of(self, x_THD: Tensor) -> Tensor:
        """Its part (tokens, H, D) of a pack."""
        return x_THD[self.start : self.stop]


@dataclass(frozen=True)
class Scope:
    """One forward of one model."""

    manager: ResourceManager
    decided: Forward
    documents: tuple[Document, ...] | None = None
    """Where packed documents lie, if they are packed."""
    pooled: tuple[Document, ...] = ()
    """Those of them that are rows of a pooled forward."""
    keys: Keys | None = None
    """Of an inference context, where they may live on the pool."""


SCOPE: ContextVar[Scope | None] = ContextVar("fapool_megatron_scope", default=None)
"""Megatron hands a layer only its own arguments: the forward it belongs to travels beside them."""


class FAPoolCoreAttention(MegatronModule):
    """Stands in for Megatron's DotProductAttention; has no parameters. :func:`get_fapool_layer_spec` builds it.

    Args:
        config, layer_number, attn_mask_type, attention_type, cp_comm_type, softmax_scale, pg_collection: as
            Megatron's attention layers give them.
        manager: decides and counts; shared by all layers of a model.
        agrees: whether the manager makes the ranks of a tensor-parallel group decide alike.

    Raises:
        ValueError: what this layer is to compute cannot be computed exactly here.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        *,
        manager: ResourceManager,
        agrees: bool,
    ) -> None:
        super().__init__(config=config)
        _refuse_config(config, attn_mask_type, attention_type, pg_collection, agrees)
        # apply_query_key_layer_scaling divides scores and multiplies them again: nothing is left of it.
        self.softmax_scale = config.kv_channels**-0.5 if softmax_scale is None else float(softmax_scale)
        # Where Megatron's checkpoints look for it.
        self.tp_group = getattr(pg_collection, "tp", None)
        self.core = FAPoolAttention(manager, layer_number - 1, config.num_layers, stands_for="sdpa")

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Causal attention of the new queries against all keys.

        Args:
            query: (S, B, H, D), of packed documents (S, H, D); H: this rank's heads. After RoPE.
            key: (T, B, K, D) or (S, K, D), the past included; (S, B, K, D) where keys may live on the pool.
            value: (T, B, K, E) or (S, K, E).
            attention_mask: (1 or B, 1, S, T), True where a query does not see a key; None: causal.
            attn_mask_type: causal, padding_causal, or after a prompt no_mask.
            attention_bias: refused.
            packed_seq_params: where documents begin and end.

        Returns:
            (S, B, H * E), of packed documents (S, H * E); contiguous.

        Raises:
            ValueError: what is asked for cannot be computed exactly here.
        """
        if attention_bias is not None:
            raise ValueError(f"attention_bias {tuple(attention_bias.shape)}: neither the pool nor this layer adds one")
        if attn_mask_type is not None and attn_mask_type not in _DECODER:
            raise ValueError(f"attn_mask_type {attn_mask_type.name}: this layer is causal, use Megatron's own")
        scope = SCOPE.get()
        if scope is None or scope.manager is not self.core.manager:
            self._note_outside(query, key)
            scope = None
        packed = documents(packed_seq_params, query.shape[0]) if packed_seq_params is not None else None
        if packed is not None:
            if attention_mask is not None:
                raise ValueError("attention_mask beside packed_seq_params: documents say who sees whom, pass None")
            out = self._packed(query, key, value, scope, packed)
        else:
            q_BHSD, k_BKTD, v_BKTE = (x.permute(1, 2, 0, 3) for x in (query, key, value))
            out = self._attend(q_BHSD, k_BKTD, v_BKTE, scope, attention_mask).transpose(0, 1)
        return out.flatten(-2).contiguous()

    def _attend(
        self, q_BHSD: Tensor, k_BKTD: Tensor, v_BKTE: Tensor, scope: Scope | None, masked: Tensor | None
    ) -> Tensor:
        """(B, S, H, E), as the forward was decided."""
        columns = k_BKTD.shape[2]
        if scope is not None and scope.keys is not None:
            columns += scope.keys.past
            k_BKTD, v_BKTE = scope.keys.given(self.core.layer, k_BKTD, v_BKTE)

        def local() -> Tensor:
            return self._local(q_BHSD, k_BKTD, v_BKTE, masked)

        if scope is None:
            return local()
        if not scope.decided.pooled:
            return self.core(q_BHSD, k_BKTD, v_BKTE, decided=scope.decided, local=local)
        return self._pooled(q_BHSD, k_BKTD, v_BKTE, scope.decided, columns, owned=scope.keys is not None)

    def _packed(
        self, q_THD: Tensor, k_TKD: Tensor, v_TKE: Tensor, scope: Scope | None, packed: tuple[Document, ...]
    ) -> Tensor:
        """(T, H, E): every document by itself. What belongs to none is 0."""
        if scope is not None and packed != scope.documents:
            raise ValueError(f"a layer was given documents {packed}, its forward was decided for {scope.documents}")
        pooled = scope.pooled if scope is not None and scope.decided.pooled else ()

        def alone() -> dict[Document, Tensor]:
            short = [document for document in packed if document not in pooled]
            return {one: self._document(one, q_THD, k_TKD, v_TKE) for one in short}

        def local() -> Tensor:
            return _joined(alone(), q_THD, v_TKE.shape[2])

        if scope is None:
            return local()
        if not pooled:
            return self.core(q_THD, k_TKD, v_TKE, decided=scope.decided, local=local)
        q_BHSD, k_BKSD, v_BKSE = (
            pad_sequence([one.of(x_THD) for one in pooled], batch_first=True).transpose(1, 2)
            for x_THD in (q_THD, k_TKD, v_TKE)
        )
        rows_BSHE = self._pooled(q_BHSD, k_BKSD, v_BKSE, scope.decided, k_BKSD.shape[2], owned=False)
        parts = {one: row_SHE[: one.tokens] for one, row_SHE in zip(pooled, rows_BSHE, strict=True)}
        return _joined(alone() | parts, q_THD, v_TKE.shape[2])

    def _document(self, document: Document, q_THD: Tensor, k_TKD: Tensor, v_TKE: Tensor) -> Tensor:
        """(n, H, E) of one document, without the pool."""
        q_BHSD, k_BKSD, v_BKSE = (document.of(x_THD).transpose(0, 1)[None] for x_THD in (q_THD, k_TKD, v_TKE))
        return self._local(q_BHSD, k_BKSD, v_BKSE, None)[0]

    def _pooled(
        self, q_BHSD: Tensor, k_BKTD: Tensor, v_BKTE: Tensor, decided: Forward, columns: int, *, owned: bool
    ) -> Tensor:
        """(B, S, H, E) of queries that see ``columns`` keys, of which those with owners are not given."""
        geometry = decided.geometry
        shape = (q_BHSD.shape[0], columns, q_BHSD.shape[2])
        if geometry is None or (len(geometry.starts), geometry.columns, geometry.columns - geometry.q_column) != shape:
            raise ValueError(
                f"layer {self.core.layer + 1} has {shape[2]} queries for {shape[0]} rows of {shape[1]} keys, its "
                f"forward was decided for {geometry}: raise threshold to compute it locally"
            )
        return self.core(
            q_BHSD,
            k_BKTD,
            v_BKTE,
            decided=decided,
            # Megatron keeps keys before RoPE and rotates all of them in every call: each is what it was before.
            resident=decided.lasting and not owned,
            owned=owned,
            softmax_scale=self.softmax_scale,
        )

    def _local(self, q_BHSD: Tensor, k_BKTD: Tensor, v_BKTE: Tensor, masked: Tensor | None) -> Tensor:
        """(B, S, H, E) without the pool; ``masked`` as Megatron's masks are, None: causal, aligned to the end."""
        dropout = self.config.attention_dropout if self.training else 0.0
        grads = torch.is_grad_enabled() and any(x.requires_grad for x in (q_BHSD, k_BKTD, v_BKTE))
        if masked is None and not grads and not dropout:
            q, k, v = (x.transpose(1, 2) for x in (q_BHSD, k_BKTD, v_BKTE))
            return attend(q, k, v, softmax_scale=self.softmax_scale, causal=True)[0]
        queries, keys = q_BHSD.shape[2], k_BKTD.shape[2]
        seen = None if masked is None else ~masked
        if seen is None and queries != keys:
            seen = torch.ones(queries, keys, dtype=torch.bool, device=q_BHSD.device).tril(keys - queries)
        arguments: dict[str, Any] = {"attn_mask": seen, "is_causal": seen is None, "scale": self.softmax_scale}
        if dropout and torch.cuda.is_available():
            # As Megatron does: ranks of one tensor-parallel group drop out different things (untried).
            with get_cuda_rng_tracker().fork():
                out = scaled_dot_product_attention(
                    q_BHSD, k_BKTD, v_BKTE, dropout_p=dropout, enable_gqa=True, **arguments
                )
        else:
            out = scaled_dot_product_attention(q_BHSD, k_BKTD, v_BKTE, dropout_p=dropout, enable_gqa=True, **arguments)
        return out.transpose(1, 2)

    def _note_outside(self, query: Tensor, key: Tensor) -> None:
        # In the backward pass of a checkpoint, too: that is no forward of its own.
        manager = self.core.manager
        recomputed = torch.is_grad_enabled() and query.requires_grad
        if manager.in_pooled_forward:
            raise RuntimeError(f"{OUTSIDE}, from one thread: a pooled forward is under way")
        if self.core.layer == 0 and key.shape[0] > manager.threshold and manager.config.enabled and not recomputed:
            if manager.config.strict:
                raise refusal(OUTSIDE, key.shape[0], manager.threshold)
            manager.counters.stay_local(OUTSIDE)


class FAPoolSelfAttention(SelfAttention):
    """Megatron's, where keys may live on the pool: a static context gets no storage, and ``core_attention`` the new
    keys only, rotated at their own positions. (Megatron stores keys from before that, and turns all in each step.)"""

    def _adjust_key_value_for_inference(
        self, inference_context: Any, query: Tensor, key: Tensor, value: Tensor, rotary_pos_emb: Any, *args: Any,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        scope = SCOPE.get()
        mine = scope is not None and scope.manager is self.core_attention.core.manager
        if inference_context is None or scope is None or not mine or scope.keys is None:
            return super()._adjust_key_value_for_inference(
                inference_context, query, key, value, rotary_pos_emb, *args, **kwargs
            )
        start, stop = scope.keys.past, scope.keys.past + key.shape[0]
        if rotary_pos_emb is not None:
            rotary_pos_emb = tuple(angles[start:stop] for angles in rotary_pos_emb)
        mask_type = AttnMaskType.no_mask if start else self.attn_mask_type
        return query, key, value, rotary_pos_emb, mask_type, None


def documents(packed: PackedSeqParams, tokens: int) -> tuple[Document, ...]:
    """Where the documents of a pack lie; empty ones are left out.

    Raises ValueError for packs of another layout, cut over several ranks, or with keys of their own.
    """
    if packed.qkv_format != "thd" or packed.cu_seqlens_q is None:
        raise ValueError(f"packed_seq_params with qkv_format {packed.qkv_format!r}: only 'thd' with cu_seqlens_q")
    if (packed.local_cp_size or 1) > 1:
        raise ValueError(f"packed_seq_params for {packed.local_cp_size} context-parallel ranks: only 1")
    stops, keys = packed.cu_seqlens_q.tolist(), packed.cu_seqlens_kv
    if keys is not None and keys.tolist() != stops:
        raise ValueError(f"cu_seqlens_kv {keys.tolist()} is not cu_seqlens_q {stops}: a document attends to itself")
    padded = packed.cu_seqlens_q_padded
    offsets = stops if padded is None else padded.tolist()
    lengths, room = ([stop - start for start, stop in pairwise(x)] for x in (stops, offsets))
    fits = len(offsets) == len(stops) and all(0 <= n <= most for n, most in zip(lengths, room, strict=True))
    if not fits or offsets[0] != 0 or offsets[-1] > tokens:
        raise ValueError(f"documents of {lengths} tokens at {offsets} do not fit a pack of {tokens} tokens")
    return tuple(Document(at, at + n) for at, n in zip(offsets, lengths, strict=False) if n)


def _joined(parts: dict[Document, Tensor], like_THD: Tensor, dim: int) -> Tensor:
    """All documents' parts (n, H, E) in their places; gradients flow through. Between them lie zeros."""
    pieces, at = [], 0
    for document in sorted(parts):
        pieces += [like_THD.new_zeros(document.start - at, like_THD.shape[1], dim), parts[document]]
        at = document.stop
    return torch.cat([*pieces, like_THD.new_zeros(like_THD.shape[0] - at, like_THD.shape[1], dim)])


def _refuse_config(config: Any, mask_type: AttnMaskType, attention_type: str, groups: Any, agrees: bool) -> None:
    sizes = {name: _size(groups, name) for name in ("tp", "cp", "pp")}
    context = max(config.context_parallel_size, sizes["cp"])
    stages = max(config.pipeline_model_parallel_size, sizes["pp"])
    problems = {
        f"attention_type {attention_type!r}: only self attention": attention_type != "self",
        f"attn_mask_type {mask_type.name}: only causal layers": mask_type not in _CAUSAL,
        f"context_parallel_size {context}: set 1": context > 1,
        f"pipeline_model_parallel_size {stages}: set 1": stages > 1,
        f"window_size {config.window_size}: sliding windows are not pooled": bool(config.window_size),
        f"softmax_type {config.softmax_type!r}: only 'vanilla'": config.softmax_type != "vanilla",
        "multi_latent_attention: only plain heads": config.multi_latent_attention,
        "flash_decode goes past core_attention: set it to False": config.flash_decode,
        f"cuda_graph_impl {config.cuda_graph_impl!r}: a graph cannot hold messages, set 'none'": (
            config.cuda_graph_impl != "none"
        ),
        f"{sizes['tp']} tensor-parallel ranks must decide alike: pass agree=agree_over(pg_collection.tp)": (
            sizes["tp"] > 1 and not agrees
        ),
    }
    refused = [text for text, applies in problems.items() if applies]
    if refused:
        raise ValueError(
            f"fa_pool cannot take over this layer: {'; '.join(refused)}. Or build it with Megatron's own layer spec"
        )


def _size(groups: Any, name: str) -> int:
    group = getattr(groups, name, None)
    return 1 if group is None else int(group.size())
