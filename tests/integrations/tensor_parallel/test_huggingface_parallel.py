"""Models divided among base ranks: logits, tokens, weights and gradients are those of the whole model in one process.

The reference is transformers' own model, undivided, in eager attention. Base ranks are processes over gloo.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from transformers import AutoConfig, AutoModelForCausalLM

from fapool_plugin.integrations.tensor_parallel.parallel import (
    load_parallel,
    refuse_parallel,
    same_random_numbers,
    split_model,
)
from tests.base_ranks import BaseRanks, base_ranks
from tests.models import (
    PAD,
    assert_clear_choices,
    assert_close,
    assert_same_tokens,
    eager,
    greedily,
    logits_too,
    padded_batch,
    plain,
    random_ids,
    save_config,
    save_model,
    tiny_config,
)

pytestmark = pytest.mark.usefixtures("one_thread_each")

NEW = 6
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
BIASES = {"attention_bias": True, "mlp_bias": True}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", UNTIED),
    "llama, tied": ("llama", TIED),
    "llama, biases": ("llama", UNTIED | BIASES),
    "llama, one KV head for each query head": ("llama", UNTIED | {"num_key_value_heads": 6}),
    "llama, FFN of 5": ("llama", UNTIED | {"intermediate_size": 5}),
    "qwen2": ("qwen2", UNTIED),
    "qwen3": ("qwen3", TIED),
    "gemma3_text": ("gemma3_text", TIED),
    "starcoder2": ("starcoder2", TIED),
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BaseRanks]:
    with base_ranks(tmp_path_factory.mktemp("ranks")) as ranks:
        yield ranks


def saved(name: str, folder: Path) -> Path:
    """A model whose biases and norms are not the ones it was born with, zeros and ones."""
    family, settings = MODELS[name]
    model = plain(save_model(family, folder, **settings))
    for path, parameter in model.named_parameters():
        if path.endswith("bias") or "norm" in path:
            nn.init.normal_(parameter, mean=0.5, std=0.2)
    model.save_pretrained(folder)
    return folder


def split(group: ProcessGroup, folder: Path, **arguments: Any) -> Any:
    # Here, since only base ranks need megatron.
    from fapool_plugin.integrations.megatron import layers as megatron_layers

    return split_model(plain(folder, **arguments), group, megatron_layers)


def answers(group: ProcessGroup, folder: Path, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    model = split(group, folder)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
    return {"logits": logits, "tokens": model.generate(ids, **greedily(NEW, mask))}


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_tokens_are_those_of_the_whole_model(tmp_path: Path, ranks: BaseRanks, name: str, size: int) -> None:
    """Three KV heads over two ranks, 64 FFN features over three, 99 tokens over both; left-padded, with a cache."""
    folder, (ids, mask) = saved(name, tmp_path), padded_batch([22, 40, 31])
    reference = eager(folder)
    with torch.no_grad():
        logits = reference(ids, attention_mask=mask).logits
    expected = reference.generate(ids, **greedily(NEW, mask), **logits_too())
    assert_clear_choices(expected.logits)
    for got in ranks.run(size, answers, folder, ids, mask):
        assert_close(got["logits"][mask == 1], logits[mask == 1])
        assert_same_tokens(got["tokens"], expected.sequences)


# Weights


def contents(group: ProcessGroup, folder: Path) -> dict[str, Any]:
    from megatron.core import parallel_state

    model = split(group, folder)
    refused = []
    for method in (model.save_pretrained, model.push_to_hub, model.resize_token_embeddings):
        with pytest.raises(NotImplementedError, match=r"one of .* parts of LlamaForCausalLM") as raised:
            method("anywhere")
        refused.append(str(raised.value))
    return {
        "state": model.state_dict(),
        "buffers": dict(model.named_buffers()),
        "bytes": sum(
            {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}.values()
        ),
        "tied": model.lm_head.weight is model.model.embed_tokens.weight,
        "marked": {n for n, p in model.named_parameters() if getattr(p, "tensor_model_parallel", False)},
        "groups": {m.num_key_value_groups for m in model.modules() if hasattr(m, "num_key_value_groups")},
        "initialized": parallel_state.model_parallel_is_initialized(),
        "refused": refused,
    }


def together(parts: list[Tensor], whole: Tensor) -> Tensor:
    """Ranks' parts side by side, along the dimension that is not whole; what is beyond the whole must be zeros."""
    dims = [dim for dim in range(whole.ndim) if any(part.shape[dim] != whole.shape[dim] for part in parts)]
    if not dims:
        for part in parts[1:]:
            assert torch.equal(part, parts[0]), f"ranks differ by up to {(part - parts[0]).abs().max().item():.3g}"
        return parts[0]
    (dim,) = dims
    joined = torch.cat(parts, dim)
    length = whole.shape[dim]
    padding = joined.narrow(dim, length, joined.shape[dim] - length)
    assert not padding.any(), f"padding is not zero, but up to {padding.abs().max().item():.3g}"
    return joined.narrow(dim, 0, length)


@pytest.mark.parametrize("name", ["llama, tied", "llama, biases"])
@pytest.mark.parametrize("size", [2, 3])
def test_each_rank_holds_its_part_and_no_more(tmp_path: Path, ranks: BaseRanks, name: str, size: int) -> None:
    folder = saved(name, tmp_path)
    reference, parts = plain(folder), ranks.run(size, contents, folder)
    state, buffers = reference.state_dict(), dict(reference.named_buffers())
    for part in parts:
        assert part["state"].keys() == state.keys()
        assert part["tied"] == (name == "llama, tied")
        assert part["groups"] == {2}
        assert not part["initialized"]
        assert {key.rsplit(".", 1)[0] for key in part["marked"]} == {
            path
            for path, module in reference.named_modules()
            if isinstance(module, nn.Linear | nn.Embedding) and not (part["tied"] and path == "lm_head")
        }
        assert not any(key.endswith(("o_proj.bias", "down_proj.bias")) for key in part["marked"])
        assert all(torch.equal(part["buffers"][key], value) for key, value in buffers.items())
        held = {key: value for key, value in part["state"].items() if not (part["tied"] and key == "lm_head.weight")}
        assert part["bytes"] == sum(value.numel() * value.element_size() for value in held.values())
        assert all("load the model whole" in text for text in part["refused"])
    for key, value in state.items():
        joined = together([part["state"][key] for part in parts], value)
        assert torch.equal(joined, value), f"{key}: largest difference {(joined - value).abs().max().item():.3g}"
    heads = {2: [2, 1], 3: [1, 1, 1]}[size]
    for projection, of_a_group in (("q", 16), ("k", 8), ("v", 8)):
        rows = [len(part["state"][f"model.layers.0.self_attn.{projection}_proj.weight"]) for part in parts]
        assert rows == [of_a_group * count for count in heads]


# Gradients


def gradients(
    group: ProcessGroup, way: str, folder: Path, ids: Tensor, mask: Tensor, labels: Tensor
) -> dict[str, Tensor]:
    from fapool_plugin.integrations.megatron import layers as megatron_layers

    if way == "split":
        model = split(group, folder)
    elif way == "loaded":
        model = load_parallel(folder, group, megatron_layers)
    else:
        model = split_model(plain(folder).requires_grad_(False), group, megatron_layers).requires_grad_(True)
    loss = model(ids, attention_mask=mask, labels=labels).loss
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("way", ["loaded", "split while frozen"])
def test_gradients_do_not_depend_on_how_a_model_was_divided(tmp_path: Path, ranks: BaseRanks, way: str) -> None:
    check_gradients(tmp_path, ranks, "qwen3", 2, way)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_the_whole_model(tmp_path: Path, ranks: BaseRanks, name: str, size: int) -> None:
    """Of every weight: padded rows and columns get none, the padding token's embedding neither."""
    check_gradients(tmp_path, ranks, name, size, "split")


def check_gradients(tmp_path: Path, ranks: BaseRanks, name: str, size: int, way: str) -> None:
    folder, (ids, mask) = saved(name, tmp_path), padded_batch([9, 14])
    ids[1, 5] = PAD
    # A row's first token would be predicted at a padded position, where anything may stand.
    labels = ids.masked_fill(mask.cumsum(1) <= 1, -100)
    reference = eager(folder)
    loss = reference(ids, attention_mask=mask, labels=labels).loss
    loss.backward()
    parts = ranks.run(size, gradients, way, folder, ids, mask, labels)
    for part in parts:
        assert_close(part["loss"], loss.detach(), what="loss")
    for key, parameter in reference.named_parameters():
        assert parameter.grad is not None
        got = together([part[key] for part in parts], parameter.grad)
        assert_close(got, parameter.grad, tolerance=3e-5, what=f"gradient of {key}")


def frozen(group: ProcessGroup, folder: Path) -> dict[str, bool]:
    from fapool_plugin.integrations.megatron import layers as megatron_layers

    model = plain(folder)
    model.model.layers.requires_grad_(False)
    model = split_model(model.train(), group, megatron_layers)
    assert all(module.training for module in model.modules())
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def test_what_was_frozen_stays_frozen(tmp_path: Path, ranks: BaseRanks) -> None:
    (part, _) = ranks.run(2, frozen, saved("llama, biases", tmp_path))
    assert {name: "layers" not in name for name in part} == part


# Layers by themselves


def layer_results(group: ProcessGroup, frozen: bool) -> dict[str, float]:
    """Largest differences from whole layers, of inputs and gradients that lie in another order in memory."""
    from fapool_plugin.integrations.megatron.layers import ColumnParallel, ParallelEmbedding, ParallelHead, RowParallel

    torch.manual_seed(0)
    size, rank, inputs = group.size(), group.rank(), torch.randn(5, 2, 12).transpose(0, 1)
    widths = [5, 7] if size == 2 else [3, 4, 5]
    mine = slice(sum(widths[:rank]), sum(widths[: rank + 1]))
    up, down = nn.Linear(12, 12), nn.Linear(12, 10)
    column = ColumnParallel(up.weight[mine].detach(), up.bias[mine].detach(), group).requires_grad_(not frozen)
    row = RowParallel(down.weight[:, mine].detach(), down.bias.detach(), group).requires_grad_(not frozen)
    a, b = inputs.clone().requires_grad_(), inputs.clone().requires_grad_()
    expected = down(up(a).transpose(0, 1))
    got = row(column(b).transpose(0, 1))
    weight = torch.randn(2, 5, 10).transpose(0, 1)
    (expected * weight).sum().backward()
    (got * weight).sum().backward()
    assert a.grad is not None
    assert b.grad is not None
    table = torch.randn(7, 12)
    each = -(-7 // size)
    part = nn.functional.pad(table, (0, 0, 0, each * size - 7))[rank * each :][:each].clone()
    logits = ParallelHead(part, None, group, vocabulary=7)(inputs)
    assert logits.is_contiguous()
    ids = torch.randint(7, (5, 3)).t()
    return {
        "output": (got - expected).abs().max().item(),
        "gradient": (b.grad - a.grad).abs().max().item(),
        "logits": (logits - inputs @ table.t()).abs().max().item(),
        "embeddings": (ParallelEmbedding(part, group)(ids) - table[ids]).abs().max().item(),
    }


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("size", [2, 3])
def test_layers_sum_what_lies_in_any_order_in_memory(ranks: BaseRanks, size: int, frozen: bool) -> None:
    for differences in ranks.run(size, layer_results, frozen):
        assert max(differences.values()) < 1e-5, differences


# Sampling


def samples(group: ProcessGroup, folder: Path, ids: Tensor) -> dict[str, Tensor]:
    model = split(group, folder)
    torch.manual_seed(group.rank())
    same_random_numbers(group)
    return {"tokens": model.generate(ids, **greedily(12, do_sample=True)), "next": torch.rand(4)}


def test_all_ranks_draw_the_tokens_of_the_first(tmp_path: Path, ranks: BaseRanks) -> None:
    folder, ids = saved("llama", tmp_path), random_ids(2, 20)
    torch.manual_seed(0)
    expected = {"tokens": eager(folder).generate(ids, **greedily(12, do_sample=True)), "next": torch.rand(4)}
    assert (expected["tokens"] != eager(folder).generate(ids, **greedily(12))).any(), "nothing was sampled"
    for got in ranks.run(2, samples, folder, ids):
        assert_same_tokens(got["tokens"], expected["tokens"])
        assert torch.equal(got["next"], expected["next"]), f"{got['next']} is not {expected['next']}"


# Refusals


class NoGroup:
    """A group for those who are to be refused before anything is sent."""

    def __init__(self, size: int) -> None:
        self._size = size

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return 0


TOO_MANY = (
    r"tensor_parallel_size is 4, but LlamaForCausalLM has 3 KV heads; every base rank needs at least one, .*: set "
    "tensor_parallel_size to 3 or less"
)
REFUSED = {
    "llama": TOO_MANY,
    "phi3": r"plan has layers\.\*\.self_attn\.qkv_proj as colwise_gather_output",
    "glm4": r"plan has layers\.\*\.mlp\.gate_up_proj as colwise_gather_output",
    "olmo2": r"plan has layers\.\*\.self_attn\.q_proj as colwise_gather_output",
    "mixtral": r"plan has layers\.\*\.mlp\.experts\.gate_up_proj as packed_colwise",
    "deepseek_v3": r"plan has layers\.\*\.mlp\.experts",
    "gpt_oss": "GptOssForCausalLM cannot be divided among base ranks: transformers",
    "gpt2": "GPT2LMHeadModel cannot be divided among base ranks: transformers has no tensor-parallel plan for it",
    "gpt_neox": r"its layers\.\*\.attention is divided as dense, query_key_value",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_divided_is_refused_before_it_is_touched(tmp_path: Path, name: str) -> None:
    model = plain(save_model(name, tmp_path))
    size = 4 if name == "llama" else 2
    before = {key: value.data_ptr() for key, value in model.state_dict().items()}
    no_layers: Any = None
    for refuse in (
        lambda: refuse_parallel(model.config, size),
        lambda: refuse_parallel(model, size),
        lambda: split_model(model, NoGroup(size), no_layers),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match=REFUSED[name]) as raised:
            refuse()
        assert "\n" not in str(raised.value)
    assert {key: value.data_ptr() for key, value in model.state_dict().items()} == before


def test_weights_beside_the_plan_are_refused(tmp_path: Path) -> None:
    """Cohere's norms of queries and keys are of all heads, and in no plan."""
    model = plain(save_config(tiny_config("cohere", ("head_dim",), use_qk_norm=True), tmp_path))
    with pytest.raises(ValueError, match=r"self_attn\.q_norm\.weight, \(6, 8\), is not in transformers' plan"):
        refuse_parallel(model, 2)


def test_plans_of_a_part_of_the_model_are_refused() -> None:
    """A model of several kinds of input: its decoder is not where the plan looks for it."""
    text = tiny_config("gemma3_text").to_dict()
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=r"Gemma3ForConditionalGeneration cannot be .* names no module of it"):
        refuse_parallel(model, 2)


class OtherLinear(nn.Linear):
    """Stands for quantized layers and adapters."""


@pytest.mark.parametrize("path", ["model.layers.1.mlp.up_proj", "lm_head"])
def test_layers_of_another_kind_are_refused(tmp_path: Path, path: str) -> None:
    model = plain(save_model("llama", tmp_path))
    old = model.get_submodule(path)
    model.set_submodule(path, OtherLinear(old.in_features, old.out_features, bias=False))
    with pytest.raises(ValueError, match=r"is a OtherLinear"):
        refuse_parallel(model, 2)
