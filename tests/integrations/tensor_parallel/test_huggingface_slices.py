"""Loading by base ranks, each its part, and divided models that borrow pool ranks.

What is loaded in parts is compared, bit for bit, with what transformers loads whole and is divided then; what is
pooled, with the whole model in eager attention.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed import ProcessGroup
from transformers import AutoConfig, GenerationConfig

from fapool_plugin.integrations.huggingface import FAPoolForCausalLM
from fapool_plugin.integrations.tensor_parallel import slices as huggingface_slices
from fapool_plugin.integrations.tensor_parallel.parallel import load_parallel, split_model
from tests.base_ranks import BaseRanks, base_ranks
from tests.integrations.tensor_parallel.test_huggingface_parallel import NoGroup
from tests.models import (
    THRESHOLD,
    assert_clear_choices,
    assert_close,
    assert_same_tokens,
    eager,
    greedily,
    logits_too,
    padded_batch,
    plain,
    pools,
    random_ids,
    save_model,
    workers,
)

pytestmark = pytest.mark.usefixtures("one_thread_each")

LAYERS = 2


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BaseRanks]:
    with base_ranks(tmp_path_factory.mktemp("ranks")) as ranks:
        yield ranks


class Counted:
    """An open file, or a slice of it, that counts the elements read."""

    elements = 0

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __enter__(self) -> Counted:
        self.inner = self.inner.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.inner.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def get_slice(self, name: str) -> Counted:
        return Counted(self.inner.get_slice(name))

    def get_tensor(self, name: str) -> Tensor:
        raise AssertionError(f"{name} was read whole")

    def __getitem__(self, index: Any) -> Tensor:
        part: Tensor = self.inner[index]
        Counted.elements += part.numel()
        return part


def loaded(group: ProcessGroup, folder: Path, arguments: dict[str, Any]) -> dict[str, Any]:
    """Loads a model in parts, and whole, and says where they differ."""
    from fapool_plugin.integrations.megatron import layers as megatron_layers

    if "config" in arguments:
        arguments = arguments | {"config": AutoConfig.from_pretrained(folder, **arguments["config"])}
        given = arguments["config"].to_dict()
    original, Counted.elements = huggingface_slices.safe_open, 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_slices, "safe_open", lambda *a, **kw: Counted(original(*a, **kw)))
        model = load_parallel(folder, group, megatron_layers, **arguments)
    read = Counted.elements
    assert "config" not in arguments or arguments["config"].to_dict() == given, "the caller's configuration was changed"
    whole = split_model(plain(folder, **arguments), group, megatron_layers)
    ours, theirs = model.state_dict(), whole.state_dict()
    buffers = dict(model.named_buffers()), dict(whole.named_buffers())
    pairs = [(name, ours.get(name), theirs[name]) for name in theirs]
    pairs += [(name, buffers[0].get(name), buffers[1][name]) for name in buffers[1]]
    differ = [
        name
        for name, one, other in pairs
        if one is None or one.dtype != other.dtype or one.device != other.device or not torch.equal(one, other)
    ]
    with torch.no_grad():
        logits = [one(random_ids(2, 20)).logits for one in (model, whole)]
    return {
        "differ": differ,
        "names": (ours.keys() == theirs.keys(), buffers[0].keys() == buffers[1].keys()),
        "read": read,
        "held": sum(parameter.numel() for parameter in model.parameters()),
        "tied": model.lm_head.weight is model.get_input_embeddings().weight,
        "kind": type(model).__name__,
        "training": model.training,
        "generation": model.generation_config.to_dict(),
        "config": {**model.config.to_dict(), "_attn": model.config._attn_implementation},
        "whole_config": {**whole.config.to_dict(), "_attn": whole.config._attn_implementation},
        "logits": logits,
    }


def sharded(folder: Path) -> None:
    plain(folder).save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink()
    assert len(list(folder.glob("*.safetensors"))) > 2


def without_prefix(folder: Path) -> None:
    """As checkpoints of a base model are."""
    file = folder / "model.safetensors"
    state = {name.removeprefix("model."): value for name, value in load_file(file).items()}
    save_file(state, file, metadata={"format": "pt"})


def head_only(folder: Path) -> None:
    """Tied weights under their other name."""
    file = folder / "model.safetensors"
    state = load_file(file)
    state["lm_head.weight"] = state.pop("model.embed_tokens.weight")
    save_file(state, file, metadata={"format": "pt"})


def no_dtype(folder: Path) -> None:
    plain(folder, dtype="bfloat16").save_pretrained(folder)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    del config["dtype"]
    file.write_text(json.dumps(config))


LOADED: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "one file": ("llama", None, {}),
    "several files": ("llama", sharded, {}),
    "bfloat16": ("qwen2", None, {"dtype": torch.bfloat16}),
    "bfloat16 by name, embeddings scaled": ("gemma3_text", None, {"dtype": "bfloat16"}),
    "dtype of the file": ("llama", no_dtype, {}),
    "norms of heads, eager, and a changed setting": (
        "qwen3",
        None,
        {"attn_implementation": "eager", "rms_norm_eps": 1e-3},
    ),
    "a configuration of the caller's": ("llama", None, {"config": {"rms_norm_eps": 1e-3}, "dtype": "bfloat16"}),
    "tied, without the model's prefix": ("llama tied", without_prefix, {}),
    "tied, under the head's name": ("llama tied", head_only, {}),
}


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("case", LOADED)
def test_each_rank_reads_its_part_and_no_more(tmp_path: Path, ranks: BaseRanks, case: str, size: int) -> None:
    family, change, arguments = LOADED[case]
    tied = family in ("llama tied", "gemma3_text")
    folder = save_model(family.split()[0], tmp_path, tie_word_embeddings=tied)
    GenerationConfig(max_new_tokens=3, do_sample=True, top_k=7).save_pretrained(folder)
    if change:
        change(folder)
    parts = ranks.run(size, loaded, folder, arguments)
    whole = plain(folder)
    for rank, part in enumerate(parts):
        assert part["differ"] == [], f"rank {rank}"
        assert part["names"] == (True, True)
        assert part["config"] == part["whole_config"]
        assert (part["kind"], part["tied"], part["training"]) == (type(whole).__name__, tied, False)
        assert part["generation"] == whole.generation_config.to_dict()
        assert part["generation"]["top_k"] == 7
        assert torch.equal(*part["logits"])
        # What the last rank has beyond the vocabulary, and beyond the FFN, is in no file.
        config, is_last = whole.config, rank == size - 1
        padded_rows = (-config.vocab_size % size) * (1 if tied else 2) + LAYERS * 3 * (-config.intermediate_size % size)
        assert part["read"] == part["held"] - is_last * padded_rows * config.hidden_size


# What cannot be read in parts


def lose_a_tensor(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, folder / "model.safetensors")


def keep_both(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"] + 1
    save_file(state, folder / "model.safetensors")


def change_a_shape(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    state["model.norm.weight"] = torch.ones(47)
    save_file(state, folder / "model.safetensors")


def only_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def quantize(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))


UNREADABLE: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no safetensors": (only_a_pickle, {}, r"has neither model\.safetensors nor .*: save it anew with save_pretrained"),
    "a tensor is missing": (lose_a_tensor, {}, r"holds no model\.layers\.1\.mlp\.up_proj\.weight: load the model with"),
    "two tied weights": (keep_both, {}, r"holds both model\.embed_tokens\.weight and lm_head\.weight, which are one"),
    "another shape": (change_a_shape, {}, r"model\.norm\.weight is \(47,\) in .*, the model's is \(48,\): load"),
    "quantized": (quantize, {}, "quantization_config is not known where each base rank reads its part"),
    "device_map": (None, {"device_map": "auto"}, "device_map is not known where each base rank reads its part"),
}


class WholeLayers:
    """In place of parallel layers, for ranks that are alone."""

    @staticmethod
    def ColumnParallel(weight: Tensor, *_: Any, **__: Any) -> torch.nn.Module:
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight = torch.nn.Parameter(weight)
        return layer

    RowParallel = ParallelEmbedding = ParallelHead = ColumnParallel


@pytest.mark.parametrize("case", UNREADABLE)
def test_checkpoints_that_cannot_be_read_in_parts_are_refused(tmp_path: Path, case: str) -> None:
    change, arguments, told = UNREADABLE[case]
    folder, layers, alone = save_model("llama", tmp_path, tie_word_embeddings=True), WholeLayers(), NoGroup(1)
    load_parallel(folder, alone, layers)  # type: ignore[arg-type]
    if change:
        change(folder)
    with pytest.raises(ValueError, match=told) as raised:
        load_parallel(folder, alone, layers, **arguments)  # type: ignore[arg-type]
    assert "AutoModelForCausalLM.from_pretrained on every base rank, and call split_model" in str(raised.value)


# Pooled


def agreed(group: ProcessGroup, mine: tuple[int, int]) -> tuple[int, int]:
    """What the group's first rank wants."""
    wanted = torch.tensor(mine)
    dist.broadcast(wanted, group=group, group_src=0)
    mode, blocks = wanted.tolist()
    return mode, blocks


def pooled_answers(
    group: ProcessGroup, folder: Path, ids: Tensor, mask: Tensor, new: int, settings: dict[str, Any]
) -> dict[str, Any]:
    from fapool_plugin.integrations.megatron import layers as megatron_layers

    ours = {"threshold": THRESHOLD, "pool_ranks": 2, "kv_block": 4, "memory_limit_mib": 64, "activation": "length"}
    model = FAPoolForCausalLM.wrap(load_parallel(folder, group, megatron_layers), ours | settings)
    model.fa_pool._agree = lambda mine: agreed(group, mine)
    blocks = settings["blocks"]
    with model.fa_pool, torch.no_grad():
        with pools(model, prefill=LAYERS * blocks, decode=0):
            prompt = model(ids, attention_mask=mask)
        with pools(model, prefill=LAYERS * blocks, decode=LAYERS * (new - 1)):
            answer = model.generate(ids, **greedily(new, mask), **logits_too())
        stats = model.fa_pool.stats()
    return {
        "logits": prompt.logits,
        "heads": [layer.keys.shape[1] for layer in prompt.past_key_values.layers],
        "tokens": answer.sequences,
        "steps": torch.stack(answer.logits, 1),
        "calls": [rank["calls"] for rank in stats["ranks"]],
        "overlapped": stats["prefill"]["overlapped_forwards"],
        "left": workers(),
    }


@pytest.mark.processes
@pytest.mark.parametrize("blocks", [1, 4])
def test_base_ranks_pool_their_own_heads(tmp_path: Path, ranks: BaseRanks, blocks: int) -> None:
    """Two base ranks of two and one KV heads, each with two pool ranks of its own; left-padded; prompt and steps."""
    folder, (ids, mask), new = save_model("llama", tmp_path, max_position_embeddings=1024), padded_batch([300, 260]), 5
    reference = eager(folder)
    with torch.no_grad():
        logits = reference(ids, attention_mask=mask).logits
    expected = reference.generate(ids, **greedily(new, mask), **logits_too())
    assert_clear_choices(expected.logits)
    parts = ranks.run(2, pooled_answers, folder, ids, mask, new, {"blocks": blocks})
    for part in parts:
        assert_close(part["logits"][mask == 1], logits[mask == 1])
        assert_close(part["steps"], torch.stack(expected.logits, 1), what="logits of steps")
        assert_same_tokens(part["tokens"], expected.sequences)
        assert part["overlapped"] == (2 if blocks > 1 else 0)
        assert all(part["calls"]), part["calls"]
        assert not part["left"]
    assert [part["heads"] for part in parts] == [[2] * LAYERS, [1] * LAYERS]
