"""What Megatron's own models refuse because it could not be exact, how masks and packs are read, and what weights
become. No pool rank is started."""

from __future__ import annotations

import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")

from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType

from fapool_plugin.config import FAPoolConfigError
from fapool_plugin.integrations.megatron import FAPoolGPTModel, get_fapool_layer_spec
from fapool_plugin.integrations.megatron.attention import Document, documents
from fapool_plugin.integrations.megatron.forward import positions
from fapool_plugin.integrations.megatron.weights import llama_arguments, llama_config, llama_state
from fapool_plugin.plan.shares import Geometry
from tests import megatron_models as mm
from tests.models import eager, random_ids


@pytest.fixture(scope="module")
def model(folder: Path, groups: Any) -> Any:
    return mm.build(folder, groups)


@pytest.fixture(scope="module")
def settings(folder: Path) -> dict[str, Any]:
    return eager(folder).config.to_dict()


def test_a_trace_is_completed_without_close(settings: dict[str, Any], tmp_path: Path) -> None:
    """As with every other host: when the manager is gone."""
    path = tmp_path / "trace.json"
    spec = get_fapool_layer_spec(llama_config(settings), mm.OURS | {"trace": str(path)})
    assert not path.read_text().endswith("]\n")
    del spec
    gc.collect()
    assert path.read_text().endswith("]\n")


def layer(settings: dict[str, Any], changed: dict[str, Any], **others: Any) -> Any:
    """One core_attention, as Megatron's attention layers build it."""
    config = llama_config(settings)
    for name, value in changed.items():
        setattr(config, name, value)
    core = get_fapool_layer_spec(config, mm.OURS).submodules.self_attention.submodules.core_attention
    given = {"attn_mask_type": AttnMaskType.causal, "attention_type": "self", "cp_comm_type": "p2p"}
    given |= {"softmax_scale": None, "pg_collection": None}
    return core(config=config, layer_number=1, **(given | others))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"context_parallel_size": 2}, "context_parallel_size 2: set 1"),
        ({"pipeline_model_parallel_size": 4}, "pipeline_model_parallel_size 4: set 1"),
        ({"window_size": (128, 0)}, r"window_size \(128, 0\)"),
        ({"softmax_type": "learnable"}, "softmax_type 'learnable'"),
        ({"softmax_type": "off-by-one"}, "softmax_type 'off-by-one'"),
        ({"multi_latent_attention": True}, "multi_latent_attention"),
        ({"flash_decode": True}, "flash_decode"),
        ({"cuda_graph_impl": "local"}, "cuda_graph_impl 'local'"),
    ],
)
def test_a_layer_that_is_not_plain_is_refused(settings: dict[str, Any], changed: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        layer(settings, changed)


@pytest.mark.parametrize(
    ("others", "told"),
    [
        ({"attention_type": "cross"}, "attention_type 'cross'"),
        ({"attn_mask_type": AttnMaskType.padding}, "attn_mask_type padding: only causal"),
        ({"attn_mask_type": AttnMaskType.arbitrary}, "attn_mask_type arbitrary: only causal"),
        ({"pg_collection": SimpleNamespace(tp=None, cp=None, pp=SimpleNamespace(size=lambda: 2))}, "pipeline"),
        ({"pg_collection": SimpleNamespace(tp=None, pp=None, cp=SimpleNamespace(size=lambda: 3))}, "context"),
        ({"pg_collection": SimpleNamespace(cp=None, pp=None, tp=SimpleNamespace(size=lambda: 2))}, "agree_over"),
    ],
)
def test_a_layer_in_another_place_is_refused(settings: dict[str, Any], others: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        layer(settings, {}, **others)


@pytest.mark.parametrize(
    ("fa_pool", "told"),
    [
        ({"threshold": "auto"}, "give the threshold as a number"),
        ({"profile": "profile.json"}, "no profile"),
        ({"treshold": 3}, 'did you mean "threshold"'),
        ({"pool_ranks": 10**6}, "memory"),
    ],
)
def test_a_configuration_that_nothing_measures_is_refused(
    settings: dict[str, Any], fa_pool: dict[str, Any], told: str
) -> None:
    with pytest.raises(FAPoolConfigError, match=told):
        get_fapool_layer_spec(llama_config(settings), fa_pool)


def test_a_model_of_other_layers_is_refused(settings: dict[str, Any], groups: Any) -> None:
    config = llama_config(settings)
    with pytest.raises(ValueError, match="layers of 0 pools"):
        FAPoolGPTModel(
            config, get_gpt_layer_local_spec(normalization="RMSNorm"), pg_collection=groups, **llama_arguments(settings)
        )


@torch.no_grad()
def test_calls_that_cannot_be_exact_are_refused(model: Any) -> None:
    core = model.decoder.layers[0].self_attention.core_attention
    q, k = torch.randn(5, 1, mm.HEADS, mm.DIM), torch.randn(5, 1, mm.KV_HEADS, mm.DIM)
    with pytest.raises(ValueError, match="attention_bias"):
        core(q, k, k, None, attention_bias=torch.zeros(1, 1, 5, 5))
    with pytest.raises(ValueError, match="attn_mask_type arbitrary"):
        core(q, k, k, None, attn_mask_type=AttnMaskType.arbitrary)
    with pytest.raises(ValueError, match="pass None"):
        core(q[:, 0], k[:, 0], k[:, 0], mm.causal_mask([0], 5), packed_seq_params=mm.pack([5]))


@torch.no_grad()
def test_forwards_that_cannot_be_exact_are_refused(model: Any) -> None:
    ids = random_ids(1, 40)
    dynamic = SimpleNamespace(is_static_batching=lambda: False)
    with pytest.raises(ValueError, match="paged cache"):
        mm.logits_of(model, ids, inference_context=dynamic)
    with pytest.raises(ValueError, match="a row of its own"):
        mm.logits_of(model, ids, inference_context=StaticInferenceContext(1, 64), packed_seq_params=mm.pack([40]))
    with pytest.raises(ValueError, match=r"shape \(1, 1, 40, 39\), 40 queries of 1 rows see 40 keys"):
        mm.logits_of(model, ids, mm.causal_mask([0], 40)[..., :39])
    assert not model.fa_pool.in_pooled_forward
    assert model.fa_pool.stats()["activations"] == 0


def test_masks_are_read_as_padding_or_not_at_all() -> None:
    def read(mask: torch.Tensor | None, past: int = 0) -> Geometry | str:
        return positions(mask, 2, past, 10)

    assert read(None) == Geometry((0, 0), (10, 10), 0, 10)
    assert read(mm.causal_mask([0], 10)) == Geometry((0, 0), (10, 10), 0, 10)
    assert read(mm.causal_mask([3, 0], 10, [10, 6])) == Geometry((3, 0), (10, 6), 0, 10)
    assert read(mm.causal_mask([3, 0], 10, past=9), 9) == Geometry((3, 0), (10, 10), 9, 10)
    assert read(mm.causal_mask([10, 0], 10)) == Geometry((10, 0), (10, 10), 0, 10), "a row of padding"
    for changed in ((slice(5, None), 2, True), (3, 7, False), (6, 5, True), (0, 1, False)):
        mask = mm.causal_mask([0, 0], 10)
        queries, keys, masked = changed
        mask[1, 0, queries, keys] = masked
        assert isinstance(read(mask), str), f"changed at {changed[:2]}"
    holes = mm.causal_mask([0, 0], 10, past=9)
    holes[0, 0, 0, 4:6] = True
    assert isinstance(read(holes, 9), str), "a step's mask with a hole"


def test_packs_are_read_or_refused() -> None:
    assert documents(mm.pack([4, 6]), 10) == (Document(0, 4), Document(4, 10))
    assert documents(mm.pack([4, 0, 5]), 10) == (Document(0, 4), Document(4, 9)), "an empty document, and a rest"
    assert documents(mm.pack([3, 5], [4, 6]), 10) == (Document(0, 3), Document(4, 9))
    told = {
        "do not fit a pack of 9": (mm.pack([4, 6]), 9),
        "of \\[4, 6\\] tokens at \\[0, 3, 10\\]": (mm.pack([4, 6], [3, 7]), 10),
        "qkv_format 'sbhd'": (PackedSeqParams(qkv_format="sbhd"), 10),
        "a document attends to itself": (
            PackedSeqParams("thd", torch.tensor([0, 4, 10]), torch.tensor([0, 5, 10])),
            10,
        ),
        "2 context-parallel ranks": (PackedSeqParams("thd", torch.tensor([0, 10]), local_cp_size=2), 10),
    }
    for match, (packed, tokens) in told.items():
        with pytest.raises(ValueError, match=match):
            documents(packed, tokens)


def test_weights_lie_as_megatron_reads_them(settings: dict[str, Any], folder: Path) -> None:
    weights, config = eager(folder).state_dict(), llama_config(settings)
    halves = [llama_state(weights, config, tp_rank=rank, tp_size=2) for rank in range(2)]
    q, k, v = (weights[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkv")
    per_group = mm.HEADS // mm.KV_HEADS * mm.DIM
    for head in range(mm.KV_HEADS):
        rank, at = divmod(head, 2)
        rows = halves[rank]["decoder.layers.1.self_attention.linear_qkv.weight"].split(per_group + 2 * mm.DIM)[at]
        assert torch.equal(rows[:per_group], q[head * per_group : (head + 1) * per_group])
        assert torch.equal(rows[per_group : per_group + mm.DIM], k[head * mm.DIM : (head + 1) * mm.DIM])
        assert torch.equal(rows[per_group + mm.DIM :], v[head * mm.DIM : (head + 1) * mm.DIM])
    gate, up = (weights[f"model.layers.0.mlp.{name}_proj.weight"] for name in ("gate", "up"))
    fused = halves[1]["decoder.layers.0.mlp.linear_fc1.weight"]
    assert torch.equal(fused, torch.cat([gate.chunk(2)[1], up.chunk(2)[1]]))


def test_weights_of_other_models_are_refused(settings: dict[str, Any], folder: Path) -> None:
    weights, config = eager(folder).state_dict(), llama_config(settings)
    with pytest.raises(ValueError, match=r"no weight model\.norm\.weight"):
        llama_state({name: w for name, w in weights.items() if name != "model.norm.weight"}, config)
    with pytest.raises(ValueError, match=r"no place for model\.layers\.0\.self_attn\.q_norm\.weight"):
        llama_state(weights | {"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}, config)
    for changed, told in (
        ({"sliding_window": 8}, "sliding_window 8"),
        ({"attention_bias": True}, "attention_bias True"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope_type 'llama3'"),
    ):
        with pytest.raises(ValueError, match=told):
            llama_config(settings | changed)
    with pytest.raises(ValueError, match=r"4 KV heads, .* for 3 tensor-parallel ranks"):
        llama_config(settings, tp_size=3)


def test_a_tied_head_is_left_out(settings: dict[str, Any], tmp_path: Path) -> None:
    tied = eager(mm.save_llama(tmp_path, tie_word_embeddings=True))
    state = llama_state(tied.state_dict(), llama_config(settings))
    assert "output_layer.weight" not in state
    assert llama_arguments(tied.config.to_dict())["share_embeddings_and_output_weights"]
