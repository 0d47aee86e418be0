"""Vision-language models: the text part is pooled and in blocks, the vision tower is left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from fapool_plugin.integrations.huggingface import FAPoolForCausalLM
from tests import survey
from tests.models import THRESHOLD, assert_close
from tests.thread_pool import ThreadPool

pytestmark = [
    pytest.mark.timeout(200),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("one_thread_each"),
]
LENGTH, IMAGE = 200, 90

TEXT = {
    "vocab_size": 99, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 3,
    "intermediate_size": 64, "head_dim": 8, "initializer_range": 0.3, "max_position_embeddings": 1024,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
CONFIGS: dict[str, dict[str, Any]] = {
    "smolvlm": {
        "text_config": {"model_type": "llama", **TEXT}, "vision_config": VISION, "image_token_id": IMAGE,
        "scale_factor": 2,
    },
    "llava": {
        "text_config": {"model_type": "llama", **TEXT}, "image_token_index": IMAGE,
        "vision_config": {"model_type": "clip_vision_model", "projection_dim": 32, **VISION},
    },
    "qwen2_vl": {
        "text_config": {**TEXT, "rope_parameters": MROPE}, "image_token_id": IMAGE, "video_token_id": 91,
        "vision_start_token_id": 92, "vision_end_token_id": 93,
        "vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 48, "num_heads": 2, "patch_size": 4},
    },
    "gemma3": {
        "text_config": {**TEXT, **SLIDING}, "mm_tokens_per_image": 4, "image_token_index": IMAGE,
        "vision_config": {**VISION, "image_size": 28, "patch_size": 14},
    },
}  # fmt: skip


def built(name: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(AutoConfig.for_model(name, **CONFIGS[name])).eval()


def pooled(name: str) -> Any:
    settings = {"pool_ranks": 1, "threshold": THRESHOLD, "activation": "length", "kv_block": 4, "memory_limit_mib": 64}
    model = FAPoolForCausalLM.wrap(built(name), settings)
    model.fa_pool.leases.source = ThreadPool
    return model


def prompt(rows: int = 1) -> torch.Tensor:
    return torch.randint(3, 80, (rows, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", CONFIGS)
def test_text_in_blocks_and_steps(name: str) -> None:
    model, reference = pooled(name), built(name)
    given: dict[str, Any] = {"token_type_ids": torch.zeros(1, LENGTH, dtype=torch.long)} if name == "gemma3" else {}
    full = 1 if name == "gemma3" else 2
    with model.fa_pool, torch.no_grad():
        outputs = [net(input_ids=prompt(), **given) for net in (model, reference)]
        assert_close(outputs[0].logits, outputs[1].logits)
        step = torch.tensor([[5]])
        later = [
            net(input_ids=step, past_key_values=output.past_key_values).logits
            for net, output in zip((model, reference), outputs, strict=True)
        ]
        assert_close(later[0], later[1], what="logits of a step")
        short = prompt()[:, :10]
        brief = {name: value[:, :10] for name, value in given.items()}
        assert torch.equal(model(input_ids=short, **brief).logits, reference(input_ids=short, **brief).logits)
        stats = model.fa_pool.stats()
    assert stats["prefill"]["overlapped_forwards"] == 1, stats["not_overlapped_reasons"]
    assert stats["prefill"]["pooled_calls"] == 3 * full
    assert stats["decode"]["pooled_calls"] == full
    assert stats["local_reasons"] == {}


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("name", CONFIGS)
def test_gradients(name: str, rows: int) -> None:
    model, reference, ids = pooled(name).train(), built(name).train(), prompt(rows)
    given: dict[str, Any] = {"token_type_ids": torch.zeros_like(ids)} if name == "gemma3" else {}
    mask = torch.ones_like(ids)
    mask[0, :70] = 0
    with model.fa_pool:
        found = []
        for net in (model, reference):
            net.zero_grad()
            net(input_ids=ids, labels=ids, attention_mask=mask, **given).loss.backward()
            found.append({name: p.grad for name, p in net.named_parameters() if p.grad is not None})
        assert found[0].keys() == found[1].keys()
        largest = max(float(grad.abs().max()) for grad in found[1].values())
        for parameter, grad in found[1].items():
            apart = float((found[0][parameter] - grad).abs().max()) / largest
            assert apart <= 1e-5, f"gradient of {parameter}: largest difference {apart:.3g}"
        stats = model.fa_pool.stats()
    assert stats["training"]["overlapped_forwards"] == 1, stats["not_overlapped_reasons"]


@pytest.mark.parametrize("rows", [1, 2])
def test_gradients_through_what_is_made_outside_the_decoder(rows: int) -> None:
    """Gemma 4 computes an input of each layer before its decoder runs: a trial must not use up that graph."""
    found, ids = [], prompt(rows)
    settings = {"pool_ranks": 1, "threshold": THRESHOLD, "activation": "length", "kv_block": 4, "memory_limit_mib": 64}
    model = FAPoolForCausalLM.wrap(survey.build("gemma4"), settings).train()
    model.fa_pool.leases.source = ThreadPool
    with model.fa_pool:
        for net in (model, survey.build("gemma4", "eager").train()):
            net(input_ids=ids, labels=ids).loss.backward()
            found.append({name: p.grad for name, p in net.named_parameters() if p.grad is not None})
        stats = model.fa_pool.stats()
    largest = max(float(grad.abs().max()) for grad in found[1].values())
    apart = max(float((found[0][name] - grad).abs().max()) / largest for name, grad in found[1].items())
    assert apart <= 1e-5, f"largest difference of gradients {apart:.3g}"
    assert stats["training"]["overlapped_forwards"] == 1, stats["not_overlapped_reasons"]


def test_an_image() -> None:
    """The vision tower's masks are its own."""
    model, reference, ids = pooled("smolvlm"), built("smolvlm"), prompt()
    ids[0, 0] = IMAGE
    pixels = torch.randn(1, 1, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    with model.fa_pool, torch.no_grad():
        assert_close(*(net(input_ids=ids, pixel_values=pixels).logits for net in (model, reference)))
        stats = model.fa_pool.stats()
    assert stats["prefill"]["pooled_calls"] == 2 * 3
    assert stats["prefill"]["overlapped_forwards"] == 1, stats["not_overlapped_reasons"]


def test_images_that_are_looked_at_in_both_directions_stay_local() -> None:
    model, reference, ids = pooled("gemma3"), built("gemma3"), prompt()
    kinds = torch.zeros_like(ids)
    kinds[:, 4:12] = 1
    with model.fa_pool, torch.no_grad():
        for _ in range(2):
            assert_close(*(net(input_ids=ids, token_type_ids=kinds).logits for net in (model, reference)))
        (reason,) = model.fa_pool.stats()["local_reasons"]
        assert reason.startswith("the model lays a pattern of its own"), reason
