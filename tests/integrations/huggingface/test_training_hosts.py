"""Trainer and PEFT with a pooled model: what they do with any other model, on the pool."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from tests.models import assert_close, eager, one_thread, pooled, random_ids, save_model

pytestmark = [pytest.mark.processes, pytest.mark.timeout(180)]
LONG, LAYERS = 40, 2


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("model"))


def trainer(model: Any, place: Path, **more: Any) -> Trainer:
    """Of four steps over eight rows, saved after the second."""
    rows = random_ids(8, LONG)
    given: dict[str, Any] = {
        "output_dir": str(place), "max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2,
        "logging_steps": 1, "save_steps": 2, "report_to": [], "use_cpu": True, "disable_tqdm": True, "seed": 3,
    }  # fmt: skip
    dataset: Any = [{"input_ids": row, "labels": row} for row in rows]
    return Trainer(model=model, args=TrainingArguments(**given | more), train_dataset=dataset)


def losses(made: Trainer) -> list[float]:
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


def alike(found: list[float], expected: list[float]) -> None:
    worst = max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))
    assert worst < 1e-4, f"losses differ by {worst:.3g}: {found}, {expected}"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_saves_and_goes_on(folder: Path, tmp_path: Path, checkpointing: bool) -> None:
    more = {"gradient_checkpointing": checkpointing}
    reference = trainer(eager(folder), tmp_path / "reference", **more)
    reference.train()
    with pooled(folder, blocks=None) as model:
        made = trainer(model, tmp_path / "pooled", **more)
        made.train()
        alike(losses(made), losses(reference))
        stats = model.fa_pool.stats()
        parts = 1 if checkpointing else 2
        assert stats["training"]["pooled_calls"] == 4 * LAYERS * 2, stats
        assert stats["backward"]["pooled_calls"] == 4 * LAYERS * parts, stats
        assert (stats["local_reasons"], stats["faults"]) == ({}, 0), stats
    with pooled(folder, blocks=None) as model:
        again = trainer(model, tmp_path / "pooled", **more)
        again.train(resume_from_checkpoint=str(tmp_path / "pooled" / "checkpoint-2"))
        alike(losses(again)[-2:], losses(reference)[-2:])
        assert model.fa_pool.stats()["backward"]["pooled_calls"] == 2 * LAYERS * parts


def test_lora_adapters(folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    ids = random_ids(2, LONG)
    config = {"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.0, "init_lora_weights": False}

    def adapted(model: Any) -> Any:
        torch.manual_seed(5)
        return peft.get_peft_model(model, peft.LoraConfig(**config))

    reference = adapted(eager(folder))
    expected = reference(input_ids=ids, labels=ids)
    expected.loss.backward()
    with pooled(folder, blocks=None) as model:
        net = adapted(model).train()
        found = net(input_ids=ids, labels=ids)
        found.loss.backward()
        assert_close(found.loss, expected.loss, what="loss")
        ours, theirs = (dict(one.named_parameters()) for one in (net, reference))
        trained = [name for name, parameter in theirs.items() if parameter.requires_grad]
        assert len(trained) == LAYERS * 2 * 2
        for name in trained:
            assert_close(ours[name].grad, theirs[name].grad, what=f"gradient of {name}")
        assert model.fa_pool.stats()["backward"]["pooled_calls"] == LAYERS * 2
        net.save_pretrained(tmp_path)
    with pooled(folder) as model, torch.no_grad():
        loaded = peft.PeftModel.from_pretrained(model, tmp_path).eval()
        assert_close(loaded(input_ids=ids).logits, reference.eval()(input_ids=ids).logits)
