"""However a user calls a pooled model, it answers as the plain one: by hand, with hooks, compiled, edited, wrapped."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DataCollatorWithFlattening,
    LlamaForCausalLM,
)
from transformers.cache_utils import DynamicCache

from fapool_plugin.config import FAPoolConfig
from fapool_plugin.integrations.huggingface import FAPoolForCausalLM
from tests.blocks import in_blocks, save_long
from tests.models import THRESHOLD, assert_close, eager, plain, pools, random_ids, save_config, tiny_config
from tests.thread_pool import ThreadPool

pytestmark = [
    pytest.mark.timeout(200),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("one_thread_each"),
]
LENGTH = 200
SHORT = {"pool_ranks": 1, "threshold": THRESHOLD, "activation": "length", "kv_block": 4, "memory_limit_mib": 64}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_long("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def model(folder: Path) -> Iterator[Any]:
    with in_blocks(folder, None) as model:
        yield model


def wrapped(net: Any, **settings: Any) -> Any:
    model = FAPoolForCausalLM.wrap(net, SHORT | settings)
    model.fa_pool.leases.source = ThreadPool
    return model


def by_hand(net: Any, ids: Tensor, steps: int = 4, **given: Any) -> list[Tensor]:
    """Logits of a prompt and of steps that go on with the cache that the one before returned."""
    output = net(ids, **given)
    found = [output.logits]
    for step in range(steps):
        output = net(random_ids(ids.shape[0], 1, seed=step), past_key_values=output.past_key_values)
        found.append(output.logits)
    return found


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_steps_by_hand(model: Any, folder: Path, training: bool, grad: bool, rows: int) -> None:
    """With gradients or without, in training mode or not: what is returned goes on."""
    ids, reference = random_ids(rows, LENGTH), eager(folder).train(training)
    with torch.set_grad_enabled(grad):
        answers = [by_hand(net, ids) for net in (model.train(training), reference)]
        assert model.fa_pool.stats()["training" if grad or training else "prefill"]["pooled_calls"] > 0
        for step, (got, expected) in enumerate(zip(*answers, strict=True)):
            assert_close(got, expected, what=f"logits of step {step}")


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("given", [{}, {"use_cache": False}, {"use_cache": True}, {"return_dict": False}], ids=str)
def test_what_is_returned_is_of_the_same_kind(model: Any, folder: Path, given: dict[str, Any], rows: int) -> None:
    for training in (False, True):
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                got, expected = (
                    net.train(training)(random_ids(rows, LENGTH), **given) for net in (model, plain(folder))
                )
            assert type(got) is type(expected), (training, grad)
            if isinstance(got, tuple):
                kinds = [[type(x) for x in output if x is not None] for output in (got, expected)]
                assert len(kinds[0]) == len(kinds[1])
                continue
            assert got.keys() == expected.keys(), (training, grad)
            assert isinstance(got.get("past_key_values"), type(expected.get("past_key_values")))


def test_gradients_through_a_returned_cache(model: Any, folder: Path) -> None:
    """A second forward's loss reaches the first one's weights."""
    ids, more, answers = random_ids(1, LENGTH), random_ids(1, 3, seed=1), []
    for net in (model.train(), eager(folder).train()):
        cache = net(ids).past_key_values
        loss = net(more, past_key_values=cache, labels=more).loss
        answers.append(torch.autograd.grad(loss, list(net.parameters())))
    for got, expected in zip(*answers, strict=True):
        assert_close(got, expected, tolerance=2e-5, what="gradient")


def edit(cache: Any) -> None:
    for layer in cache.layers:
        layer.values[:, :, 5:50] *= 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_cache_edited_in_place(model: Any, folder: Path, mode: Callable[[], Any]) -> None:
    answers = []
    for net in (model, eager(folder)):
        with mode():
            cache = net(random_ids(1, LENGTH)).past_key_values
            net(random_ids(1, 1, 4), past_key_values=cache)
            edit(cache)
            answers.append(net(random_ids(1, 5, 4), past_key_values=cache).logits)
    assert_close(*answers)


# Configurations


def test_a_configuration_says_nothing_of_us(model: Any, folder: Path, tmp_path: Path) -> None:
    """Saved, pickled, copied and given to another model, inner ones, too."""
    ids, reference = random_ids(1, LENGTH), plain(folder)
    for config in (model.config, model.model.config, model.model.layers[0].self_attn.config):
        for again in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config)):
            assert again._attn_implementation == "sdpa"
            assert type(again) is type(reference.config)
        assert b"fapool_plugin" not in pickle.dumps(config)
        for another in (type(config)(), type(config).from_dict(config.to_dict()), copy.copy(config)):
            assert type(another) is type(reference.config)
        config.save_pretrained(tmp_path)
        assert AutoConfig.from_pretrained(tmp_path)._attn_implementation is None
        for other in (
            AutoModelForCausalLM.from_config(config),
            AutoModelForCausalLM.from_pretrained(folder, config=config),
            LlamaForCausalLM(config),
        ):
            other.load_state_dict(reference.state_dict())
            with torch.no_grad():
                assert torch.equal(other.eval()(ids).logits, reference(ids).logits)
                assert torch.equal(other(ids[:, :10]).logits, reference(ids[:, :10]).logits)
    model.config.use_cache = False
    assert model(ids[:, :5]).past_key_values is None, "what a user writes into it, the model reads"


def test_models_of_a_pooled_models_configuration_are_pooled(model: Any, folder: Path) -> None:
    ids, reference = random_ids(1, LENGTH), plain(folder)
    other = wrapped(AutoModelForCausalLM.from_pretrained(folder, config=model.config).eval())
    with other.fa_pool, torch.no_grad(), pools(other, prefill=2 * 3, decode=0):
        assert_close(other(ids).logits, reference(ids).logits)
        assert torch.equal(other(ids[:, :10]).logits, reference(ids[:, :10]).logits)


def test_another_attention_after_loading(model: Any, folder: Path) -> None:
    """It computes what is not pooled from then on; pooling goes on."""
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"
    ids, reference = random_ids(1, LENGTH), eager(folder)
    with torch.no_grad(), pools(model, prefill=2 * 3, decode=0):
        assert_close(model(ids).logits, reference(ids).logits)
        assert torch.equal(model(ids[:, :10]).logits, reference(ids[:, :10]).logits)


# Compilers and transforms


@pytest.mark.parametrize("way", ["wrapped", pytest.param("method", marks=pytest.mark.full), "layers"])
def test_a_compiled_model(folder: Path, way: str) -> None:
    """Short forwards are compiled as the plain model's, long ones pooled as one block outside of the graph."""
    reference, net = plain(folder), wrapped(plain(folder))
    compiled = net
    if way == "wrapped":
        compiled = torch.compile(net, backend="aot_eager", fullgraph=False)
    elif way == "method":
        net.compile(backend="aot_eager")
    else:
        for layer in net.model.layers:
            layer.compile(backend="aot_eager")
    with net.fa_pool, torch.no_grad():
        for length in (10, LENGTH, 12, LENGTH - 7):
            ids = random_ids(1, length)
            assert_close(compiled(ids).logits, reference(ids).logits)
        stats = net.fa_pool.stats()
        assert (stats["prefill"]["pooled_calls"], stats["faults"]) == (4, 0)
        assert stats["not_overlapped_reasons"] == {"the model is compiled": 2}
        ids = random_ids(1, LENGTH)
        assert torch.equal(*(m.generate(ids, max_new_tokens=4, do_sample=False) for m in (net, reference)))


def test_a_graph_in_one_piece(folder: Path) -> None:
    reference, net = plain(folder), wrapped(plain(folder))
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    with net.fa_pool, torch.no_grad():
        ids = random_ids(1, 10)
        assert_close(compiled(ids, use_cache=False).logits, reference(ids).logits)
        with pytest.raises(torch._dynamo.exc.Unsupported, match="fa_pool computes forwards above its threshold"):
            compiled(random_ids(1, LENGTH), use_cache=False)


def test_transforms_and_exports_are_local(model: Any, folder: Path) -> None:
    """Their tensors have no values to send, and no pool rank is lost for it."""
    reference = plain(folder)
    embeds = torch.randn(1, 40, 48)

    def loss(net: Any) -> Callable[[Tensor], Tensor]:
        return lambda x: net(inputs_embeds=x, use_cache=False).logits.square().mean()

    got, expected = (torch.func.grad(loss(net))(embeds) for net in (model, reference))
    assert_close(got, expected, what="gradient")
    with torch.no_grad():
        exported = torch.export.export(model, (random_ids(1, 40),), {"use_cache": False}, strict=False).module()
        ids = random_ids(1, 40, seed=1)
        assert torch.equal(exported(ids, use_cache=False).logits, reference(ids).logits)
        with pools(model, prefill=2, decode=0):
            assert_close(model(ids).logits, reference(ids).logits)
    stats = model.fa_pool.stats()
    assert stats["faults"] == 0
    assert any("torch.func" in reason for reason in stats["local_reasons"]), stats["local_reasons"]


# Hooks and arguments


@pytest.mark.parametrize("length", [10, LENGTH])
def test_hooks_see_the_callers_arguments(model: Any, length: int) -> None:
    seen: list[tuple[Any, ...]] = []
    model.register_forward_pre_hook(lambda module, args: seen.append(args))
    model.register_forward_hook(lambda module, args, output: seen.append(args))
    ids = random_ids(1, length)
    with torch.no_grad():
        model(ids)
        model(ids, torch.ones_like(ids))
    assert [len(args) for args in seen] == [1, 1, 2, 2]
    assert all(args[0] is ids for args in seen)


@pytest.mark.parametrize(
    "settings", [{}, {"return_seq_idx": True}, {"return_flash_attn_kwargs": True, "return_seq_idx": True}], ids=str
)
def test_packed_rows_with_all_that_collators_add(model: Any, folder: Path, settings: dict[str, Any]) -> None:
    documents = [{"input_ids": random_ids(1, length, length)[0].tolist()} for length in (90, 20, 70)]
    given = DataCollatorWithFlattening(return_tensors="pt", **settings)(documents)
    with pools(model, prefill=0, decode=0):
        losses = [net.train()(**given, use_cache=False).loss for net in (model, eager(folder))]
        assert_close(*losses, what="loss")
        assert model.fa_pool.stats()["training"]["pooled_calls"] == 2


def test_lengths_of_flash_attention_alone_mean_nothing_to_others(model: Any, folder: Path) -> None:
    """As without the plugin: sdpa and eager attention look at positions only."""
    edges = torch.tensor([0, 90, LENGTH], dtype=torch.int32)
    given = {
        "cu_seq_lens_q": edges,
        "cu_seq_lens_k": edges,
        "max_length_q": 110,
        "max_length_k": 110,
        "use_cache": False,
    }
    ids = random_ids(1, LENGTH)
    with torch.no_grad(), pools(model, prefill=2 * 3, decode=0):
        assert_close(model(ids, **given).logits, eager(folder)(ids, **given).logits)


def test_an_argument_that_nothing_uses_does_not_stop_pieces(model: Any, folder: Path) -> None:
    ids = random_ids(1, LENGTH)
    with torch.no_grad(), pools(model, prefill=2 * 3, decode=0):
        given = {"labels": ids, "num_items_in_batch": torch.tensor(LENGTH)}
        assert_close(model(ids, **given).loss, eager(folder)(ids, **given).loss, what="loss")
    assert model.fa_pool.stats()["not_overlapped_reasons"] == {}


def test_a_mask_with_a_hole_says_which_and_what_to_do(model: Any) -> None:
    ids, mask = random_ids(2, 40), torch.ones(2, 40, dtype=torch.long)
    mask[1, 30:] = 0
    with pytest.raises(ValueError, match=r'row 1 has 31 .* none in column 30. New tokens .* padding_side="left"'):
        model.generate(ids, attention_mask=mask, max_new_tokens=2, do_sample=False, pad_token_id=0)


@pytest.fixture
def no_accelerator() -> Iterator[None]:
    """Accelerate keeps one precision for a process; a Trainer before this test has set it."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.mark.usefixtures("no_accelerator")
def test_autocast_of_accelerate(folder: Path) -> None:
    """Its forward opens autocast inside of ours: pooled in its dtype."""
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    net = wrapped(plain(folder))
    reference, prepared = accelerator.prepare(plain(folder)), accelerator.prepare(net)
    ids = random_ids(1, LENGTH)
    with net.fa_pool, torch.no_grad():
        assert_close(prepared(ids).logits, reference(ids).logits, tolerance=3e-2)
        assert net.fa_pool.stats()["prefill"]["pooled_calls"] > 0
        assert net.fa_pool.stats()["local_reasons"] == {}


# What may be pooled


def test_embedding_and_reward_models(folder: Path) -> None:
    ids = random_ids(2, LENGTH)
    for kind, field in ((AutoModel, "last_hidden_state"), (AutoModelForSequenceClassification, "logits")):
        torch.manual_seed(0)
        reference = kind.from_pretrained(folder).eval()
        reference.config.pad_token_id = None
        net = wrapped(copy.deepcopy(reference))
        with net.fa_pool, torch.no_grad():
            for one in (ids[:1], ids[:1, :10]):
                assert_close(net(one)[field], reference(one)[field], what=field)
            assert net.fa_pool.stats()["prefill"]["pooled_calls"] > 0
        again = pickle.loads(pickle.dumps(net))
        again.fa_pool.leases.source = ThreadPool
        with again.fa_pool, torch.no_grad():
            assert_close(again(ids[:1])[field], reference(ids[:1])[field], what=field)
            assert again.fa_pool.stats()["prefill"]["pooled_calls"] > 0


class _Holder(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def test_what_cannot_be_wrapped_says_what_to_do(folder: Path) -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(plain(folder), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    for thing, told in (
        (adapted, "PeftModelForCausalLM holds the model that is to be pooled: wrap first, then PEFT"),
        (str(folder), "is a path: use from_pretrained"),
        (nn.Linear(2, 2), "Linear is not a transformers model"),
        (torch.compile(plain(folder)), "OptimizedModule holds the model that is to be pooled"),
        (_Holder(plain(folder)), "_Holder holds the model that is to be pooled: wrap first, then _Holder"),
    ):
        with pytest.raises(ValueError, match=told):
            FAPoolForCausalLM.wrap(thing, SHORT)


def test_attention_in_both_directions_is_refused_at_load() -> None:
    config = tiny_config("llama")
    config.is_causal = False
    for net in (AutoModelForCausalLM.from_config(config), AutoModel.from_config(tiny_config("bert"))):
        with pytest.raises(ValueError, match="attends in both directions"):
            FAPoolForCausalLM.wrap(net, FAPoolConfig())


def test_a_model_that_makes_masks_of_its_own_stays_local(tmp_path: Path) -> None:
    """doge lays its own mask over the one that it is given; packed or not."""
    folder = save_config(tiny_config("doge"), tmp_path)
    reference, net = eager(folder), wrapped(plain(folder))
    with net.fa_pool, torch.no_grad():
        for given in ({}, {"position_ids": torch.arange(20).repeat(1, 2), "use_cache": False}):
            assert_close(net(random_ids(1, 40), **given).logits, reference(random_ids(1, 40), **given).logits)
        assert len(net.fa_pool.stats()["local_reasons"]) >= 1
        assert net.fa_pool.stats()["prefill"]["pooled_calls"] == 0


def test_hybrid_layers_are_pooled_in_decode(tmp_path: Path) -> None:
    folder = save_config(
        tiny_config(
            "falcon_h1",
            without=("initializer_range",),
            mamba_n_heads=8,
            mamba_d_head=16,
            mamba_d_state=8,
            mamba_d_ssm=128,
        ),
        tmp_path,
    )
    reference, net = eager(folder), wrapped(plain(folder))
    with net.fa_pool, torch.no_grad():
        answers = [by_hand(one, random_ids(2, 40)) for one in (net, reference)]
        for got, expected in zip(*answers, strict=True):
            assert_close(got, expected, tolerance=1e-4)
        assert net.fa_pool.stats()["decode"]["pooled_calls"] == 2 * 4
        cache = net(random_ids(2, 40)).past_key_values
        assert isinstance(cache, DynamicCache)
