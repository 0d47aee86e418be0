"""The table of operators: what is picked where, and what surrounds those for GPUs.

There is no GPU here. Numbers come from stand-ins that compute what an original is documented to; shapes, dtypes and
devices from torch's own shape functions; the signatures that torch has are compared with those that are called.
"""

import itertools
import re
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fapool_plugin.kernels import flash_attn, operators
from fapool_plugin.kernels.backward import attend_backward
from fapool_plugin.kernels.band import Band, Given
from fapool_plugin.kernels.forward import attend, fold_sinks, merge_
from fapool_plugin.kernels.operators import OPERATORS, Case, able
from tests import operator_stand_ins as stand_ins
from tests.dense_attention import assert_attention, reference, tensors, visible_ST
from tests.dense_gradients import SCALE, Whole, assert_gradients
from tests.fake_cuda import Waits, fake_cuda

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
AMPERE, ADA, HOPPER, BLACKWELL, RTX_50, TURING = (8, 0), (8, 9), (9, 0), (10, 0), (12, 0), (7, 5)
BY_NAME = {operator.name: operator for operator in OPERATORS if operator.can is not operators._can_flash_cpu}
FLASH = "flash_attn_3 flash_attn_4 flash_attn_2"
FOR_GPUS = ("flash_attn_3", "flash_attn_4", "flash_attn_2", "torch_flash", "torch_efficient")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def install(monkeypatch, *versions: int, flash_3_lacks: tuple[str, ...] = ()) -> None:
    """These versions of flash-attn, and no others, as stand-ins."""
    modules = {2: ("flash_attn", "flash_attn.flash_attn_interface"), 3: ("flash_attn_interface",)}
    modules[4] = ("flash_attn.cute", "flash_attn.cute.interface")
    there = [module for version in versions for module in modules[version]]

    def function(module, name="flash_attn_func"):
        return stand_ins.PACKAGES.get((module, name)) if module in there else None

    monkeypatch.setattr(flash_attn, "function", function)
    monkeypatch.setattr(flash_attn, "flash_3_can", lambda feature: 3 in versions and feature not in flash_3_lacks)


# The choice.


@pytest.mark.parametrize(
    ("installed", "capability", "dtype", "dims", "asked", "expected"),
    [
        # Nothing installed: torch's own.
        ((), HOPPER, BF16, (128, 128), {}, "torch_flash torch_efficient dense"),
        ((), AMPERE, FP16, (64, 64), {}, "torch_flash torch_efficient dense"),
        ((), ADA, BF16, (256, 256), {"backward": True}, "torch_flash torch_efficient dense"),
        ((), HOPPER, BF16, (128, 128), {"left_window": True}, "torch_flash dense"),
        ((), HOPPER, BF16, (128, 128), {"softcap": True}, "dense"),
        ((), HOPPER, BF16, (512, 512), {}, "torch_efficient dense"),
        ((), HOPPER, BF16, (192, 128), {}, "torch_efficient torch_flash dense"),
        ((), HOPPER, FP32, (128, 128), {"backward": True}, "torch_efficient dense"),
        ((), HOPPER, FP32, (512, 512), {}, "torch_efficient dense"),
        ((), HOPPER, FP32, (128, 128), {"left_window": True}, "dense"),
        ((), HOPPER, FP64, (64, 64), {}, "dense"),
        ((), TURING, FP16, (64, 64), {}, "dense"),
        # Everything installed.
        ((2, 3, 4), HOPPER, BF16, (128, 128), {}, f"{FLASH} torch_flash torch_efficient dense"),
        ((2, 3, 4), HOPPER, BF16, (128, 128), {"decode": True},
         "flash_attn_3 flash_attn_2 torch_flash torch_efficient dense"),
        ((2, 3, 4), HOPPER, BF16, (192, 128), {},
         "flash_attn_4 torch_efficient flash_attn_3 flash_attn_2 torch_flash dense"),
        ((2, 3, 4), HOPPER, BF16, (64, 64), {"softcap": True}, "flash_attn_3 flash_attn_2 dense"),
        ((2, 3, 4), HOPPER, BF16, (64, 64), {"left_window": True}, f"{FLASH} torch_flash dense"),
        ((2, 3, 4), AMPERE, BF16, (128, 128), {}, "flash_attn_2 torch_flash torch_efficient dense"),
        ((2, 3, 4), BLACKWELL, BF16, (128, 128), {}, "flash_attn_4 flash_attn_2 torch_flash torch_efficient dense"),
        ((2, 3, 4), BLACKWELL, BF16, (192, 192), {}, "flash_attn_2 torch_flash torch_efficient dense"),
        ((2, 3, 4), BLACKWELL, BF16, (192, 128), {}, "flash_attn_4 torch_efficient flash_attn_2 torch_flash dense"),
        ((2, 3, 4), RTX_50, BF16, (128, 128), {"backward": True}, "flash_attn_2 torch_flash torch_efficient dense"),
        ((2, 3, 4), HOPPER, FP32, (128, 128), {}, "torch_efficient dense"),
        ((2,), AMPERE, BF16, (64, 64), {"softcap": True, "left_window": True}, "flash_attn_2 dense"),
    ],
)  # fmt: skip
def test_what_is_picked(installed, capability, dtype, dims, asked, expected, monkeypatch):
    install(monkeypatch, *installed)
    case = Case("cuda", capability, dtype, *dims, **asked)
    assert " ".join(operator.name for operator in able(case)) == expected


def test_a_build_of_flash_attn_3_without_gradients_windows_or_softcap(monkeypatch):
    install(monkeypatch, 3, flash_3_lacks=("BACKWARD", "LOCAL", "SOFTCAP"))
    plain = Case("cuda", HOPPER, BF16, 128, 128)
    assert able(plain)[0].name == "flash_attn_3"
    others = plain._replace(backward=True), plain._replace(left_window=True), plain._replace(softcap=True)
    assert [able(case)[0].name for case in others] == ["torch_flash", "torch_flash", "dense"]


def test_on_the_cpu_nothing_has_changed(monkeypatch):
    install(monkeypatch, 2, 3, 4)
    for dtype, dims, backward in itertools.product(
        (BF16, FP32, FP64), ((64, 64), (192, 128), (512, 512)), (False, True)
    ):
        case = Case("cpu", (0, 0), dtype, *dims, backward=backward)
        assert [operator.name for operator in able(case)] == ["torch_flash", "dense"]
        assert able(case)[0].attend.__module__.endswith("torch_flash")
        assert [operator.name for operator in able(case._replace(softcap=True))] == ["dense"]
        assert [operator.name for operator in able(case._replace(left_window=True))] == ["dense"]


def test_the_tensors_device_is_asked_what_it_can(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: {0: TURING, 1: HOPPER, 2: AMPERE}[index])
    operators._capability.cache_clear()
    try:
        asked = {name: operators.capability(torch.device(name)) for name in ("cuda:0", "cuda", "cuda:2", "cpu")}
    finally:
        operators._capability.cache_clear()
    assert asked == {"cuda:0": TURING, "cuda": HOPPER, "cuda:2": AMPERE, "cpu": (0, 0)}


def test_what_is_not_installed_is_not_there():
    """As things are here: no flash-attn of any version."""
    for module in (flash_attn.FLASH_2, flash_attn.FLASH_3, flash_attn.FLASH_4):
        if flash_attn.function(module) is not None:
            pytest.skip(f"{module} is installed")
    assert not flash_attn.has_flash_3()
    assert not flash_attn.flash_3_can("BACKWARD")
    assert able(Case("cuda", HOPPER, BF16, 128, 128))[0].name == "torch_flash"


# Numbers, by stand-ins.

ANY_MASK = st.fixed_dictionaries(
    {
        "causal": st.booleans(),
        "q_offset": st.none() | st.integers(-15, 15),
        "window_size": st.just((-1, -1)) | st.tuples(st.integers(-1, 14), st.integers(-1, 14)),
    }
)


@pytest.mark.parametrize("name", FOR_GPUS)
@given(
    S=st.integers(1, 12),
    T=st.integers(1, 12),
    mask=ANY_MASK,
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    dims=st.sampled_from([(8, 8), (8, 16), (5, 3)]),
    softcap=st.sampled_from([0.0, 2.0]),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_rectangle(name, S, T, mask, heads, dims, softcap, monkeypatch):
    q, k, v = tensors(2, S, T, *heads, *dims)
    whole = Whole(q, k, v, visible_ST(S, T, **mask), softcap=softcap)
    offset = T - S if mask["q_offset"] is None else mask["q_offset"]
    rows, columns, band = Band.of(S, T, offset, mask["causal"], mask["window_size"]).trim(S, T)
    case = Case("cuda", HOPPER, BF16, dims[0], dims[1], band.hides_left(rows.stop - rows.start), softcap > 0)
    with monkeypatch.context() as patch:
        install(patch, 2, 3, 4)
        patch.setattr(torch.ops, "aten", stand_ins.aten(stand_ins.Calls()))
        if rows.start >= rows.stop or columns.start >= columns.stop or not BY_NAME[name].can(case):
            return
        cut = q[:, rows], k[:, columns], v[:, columns]
        got = BY_NAME[name].attend(*cut, SCALE, band, softcap)
        inputs = Given(whole.dout, q, k, v, whole.out, whole.lse).cut(rows, columns)
        gradients = BY_NAME[name].attend_backward(inputs, SCALE, band, softcap)
    out, lse = reference(q, k, v, visible_ST(S, T, **mask), SCALE, softcap)
    assert_attention(got, (out[:, rows], lse[:, :, rows]), FP64, f"{name} {mask}")
    expected = [x[:, part] for x, part in zip(whole.gradients, (rows, columns, columns), strict=True)]
    assert_gradients(gradients, expected, FP64, f"{name} {mask}", tolerance=1e-10)


@pytest.mark.parametrize("name", FOR_GPUS)
def test_gradients_are_those_of_the_whole_call(name, monkeypatch):
    """Of two shards of keys, with the output and LSE of both, and rows that are left out."""
    install(monkeypatch, 2, 3, 4)
    q, k, v = tensors(2, 9, 12, 4, 2, 8)
    whole = Whole(q, k, v, visible_ST(9, 12))
    lse = whole.lse.clone()
    lse[:, :, 4] = torch.inf
    whole.dout[:, 4] = 0
    found = []
    with monkeypatch.context() as patch:
        patch.setattr(torch.ops, "aten", stand_ins.aten(stand_ins.Calls()))
        for keys in (slice(0, 5), slice(5, 12)):
            inputs = Given(whole.dout, q, k, v, whole.out, lse).cut(slice(None), keys)
            found.append(BY_NAME[name].attend_backward(inputs, SCALE, Band(-9, 12), 0.0))
    again = Whole(q, k, v, visible_ST(9, 12))
    again.dout, again.out, again.lse = whole.dout, whole.out, whole.lse
    dq, dk, dv = again.backward(kernel="dense")
    got = found[0][0] + found[1][0], *(torch.cat(parts, 1) for parts in zip(*(x[1:] for x in found), strict=True))
    assert not got[0][:, 4].any()
    assert_gradients(got, (dq, dk, dv), FP64, name, tolerance=1e-10)


def test_flash_attn_3_of_before_its_lse_was_optional(monkeypatch):
    monkeypatch.setattr(flash_attn, "function", lambda module, name="": stand_ins.flash_3_of_old)
    q, k, v = tensors(1, 5, 9, 4, 2, 8)
    got = flash_attn.flash_3(q, k, v, SCALE, Band(-5, 4), 0.0)
    assert_attention(got, reference(q, k, v, visible_ST(5, 9, True), SCALE), FP64)


@pytest.mark.parametrize(
    ("S", "T", "mask", "expected"),
    [
        (7, 7, {"causal": True}, [7]),
        (4, 9, {"causal": True}, [9]),
        (4, 9, {}, [9]),
        (1, 9, {"causal": True}, [9]),
        (4, 9, {"causal": True, "window_size": (2, -1)}, [6]),  # of nine keys three are cut off
        (9, 6, {"causal": True, "q_offset": 2}, [6, 6]),  # five queries see all keys
        (9, 6, {"causal": True, "q_offset": 2, "window_size": (3, -1)}, [6, 3]),
    ],
)
def test_a_causal_rectangle_is_one_call(S, T, mask, expected, monkeypatch):
    calls = stand_ins.Calls()
    q, k, v = tensors(1, S, T, 4, 2, 8)
    offset = mask.get("q_offset", T - S)
    rows, columns, band = Band.of(S, T, offset, mask.get("causal", False), mask.get("window_size", (-1, -1))).trim(S, T)
    with monkeypatch.context() as patch:
        patch.setattr(torch.ops, "aten", stand_ins.aten(calls))
        BY_NAME["torch_flash"].attend(q[:, rows], k[:, columns], v[:, columns], SCALE, band, 0.0)
    assert [keys for _, keys in calls] == expected


def test_a_window_as_wide_as_the_keys_is_no_window_to_flash_attn():
    """Why queries past the last key are a call of their own: asked for all, it would show keys that are hidden."""
    q, k, v = tensors(1, 30, 25, 1, 1, 8)
    visible = visible_ST(30, 25, True, 20)
    asked_at_once, _, _ = stand_ins.flash_2(q, k, v, softmax_scale=SCALE, window_size=(-1, 25), return_attn_probs=True)
    off = (asked_at_once - reference(q, k, v, visible, SCALE)[0]).abs().amax((0, 2, 3))
    assert (off[:4] > 1e-3).all(), f"largest differences {off}"
    assert (off[4:] < 1e-10).all(), f"largest differences {off}"
    parts = Band.of(30, 25, 20, True, (-1, -1)).bottom_right(30, 25)
    assert [(part.queries, part.causal) for part in parts] == [(slice(0, 5), True), (slice(5, 30), False)]


@pytest.mark.parametrize("name", ["flash_attn_2", "flash_attn_3", "flash_attn_4"])
def test_gradients_are_deterministic_where_torch_is_told_to(name, monkeypatch):
    asked = []

    def backward(*args, deterministic, **kwargs):
        asked.append(deterministic)
        return args[:3]

    monkeypatch.setattr(flash_attn, "function", lambda module, name="": backward)
    x = torch.zeros(1, 8, 2, 8)
    inputs = Given(x, x, x, x, x, torch.zeros(1, 2, 8))
    try:
        for flag, warn_only in ((False, False), (True, False), (True, True)):
            torch.use_deterministic_algorithms(flag, warn_only=warn_only)
            BY_NAME[name].attend_backward(inputs, SCALE, Band(-8, 8), 0.0)
    finally:
        torch.use_deterministic_algorithms(False)
    assert asked == [False, True, False], "torch's own operators do not follow a flag that only warns"


# Shapes, dtypes and devices, by torch's shape functions.


@pytest.mark.parametrize(
    ("dtype", "dims", "mask", "kernel"),
    [
        (BF16, (64, 64), {"causal": True}, "_flash_attention"),
        (BF16, (64, 64), {}, "_flash_attention"),
        (FP16, (20, 20), {"causal": True, "window_size": (9, -1)}, "_flash_attention"),
        (BF16, (20, 20), {"causal": True, "q_offset": 15}, "_flash_attention"),
        (BF16, (64, 64), {"causal": True, "q_offset": 0}, "_flash_attention"),
        (BF16, (192, 128), {"causal": True}, "_efficient_attention"),
        (FP32, (64, 64), {"causal": True}, "_efficient_attention"),
        (FP32, (512, 512), {"causal": True, "q_offset": 15}, "_efficient_attention"),
        (FP32, (64, 64), {"softcap": 3.0}, "bmm"),
        (FP64, (64, 64), {"causal": True, "window_size": (9, -1)}, "bmm"),
    ],
)
@pytest.mark.parametrize("S", [1, 24])
def test_nothing_waits_for_the_device(S, dtype, dims, mask, kernel):
    with fake_cuda() as called:
        q, k, v = (torch.empty(2, n, h, d, device="cuda", dtype=dtype) for n, h, d in _sizes(S, *dims))
        out, lse = attend(q, k, v, softmax_scale=SCALE, **mask)
        exact = FP64 if dtype == FP64 else FP32
        assert (out.shape, out.dtype, out.is_cuda) == ((2, S, 8, dims[1]), dtype, True)
        assert (lse.shape, lse.dtype, lse.is_cuda) == ((2, 8, S), exact, True)
        total = out.to(exact), lse.clone()
        merge_(*total, out, lse)
        out, lse = fold_sinks(*total, torch.empty(8, device="cuda"))
        gradients = attend_backward(out, q, k, v, out, lse, softmax_scale=SCALE, **mask)
        rounded = dtype if kernel != "bmm" else exact
        for x, like in zip(gradients, (q, k, v), strict=True):
            assert (x.shape, x.dtype, x.is_cuda) == (like.shape, rounded, True)
    for half in ("_forward", "_backward") if kernel != "bmm" else ("",):
        assert f"aten.{kernel}{half}" in called, called
    # Nothing that is as large as the scores, unless they are what is computed.
    assert kernel == "bmm" or "aten.bmm" not in called


def _sizes(S: int, D: int, E: int) -> tuple[tuple[int, int, int], ...]:
    return (S, 8, D), (32, 2, D), (32, 2, E)


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.to("cpu"),
        lambda x: bool(x.any()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: torch.zeros(3).to("cuda"),
        lambda x: x[torch.tensor([0, 1])],
    ],
)
def test_what_would_wait_raises(wait):
    with fake_cuda(), pytest.raises(Waits):
        wait(torch.empty(3, device="cuda"))


# Schemas: what is called, as torch must have it.

SCHEMAS = {
    "_flash_attention_forward": (
        "Tensor query, Tensor key, Tensor value, Tensor? cum_seq_q, Tensor? cum_seq_k, SymInt max_q, SymInt max_k, "
        "float dropout_p, bool is_causal, bool return_debug_mask",
        "float? scale=None, SymInt? window_size_left=None, SymInt? window_size_right=None, Tensor? seqused_k=None",
        "(Tensor output, Tensor softmax_logsumexp, Tensor rng_state, Tensor unused, Tensor debug_attn_mask)",
    ),
    "_flash_attention_backward": (
        "Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor logsumexp, Tensor cum_seq_q, "
        "Tensor cum_seq_k, SymInt max_q, SymInt max_k, float dropout_p, bool is_causal, Tensor rng_state, "
        "Tensor unused",
        "float? scale=None, SymInt? window_size_left=None, SymInt? window_size_right=None",
        "(Tensor, Tensor, Tensor)",
    ),
    "_efficient_attention_forward": (
        "Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
        "SymInt? max_seqlen_q, SymInt? max_seqlen_k, float dropout_p, int custom_mask_type, "
        "bool compute_log_sumexp=False",
        "float? scale=None",
        "(Tensor output, Tensor logsumexp, Tensor philox_seed, Tensor philox_offset, SymInt max_seqlen_batch_q, "
        "SymInt max_seqlen_batch_k)",
    ),
    "_efficient_attention_backward": (
        "Tensor grad_out_, Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor out, Tensor? cu_seqlens_q, "
        "Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, Tensor logsumexp, float dropout_p, "
        "Tensor philox_seed, Tensor philox_offset, int custom_mask_type, bool bias_requires_grad",
        "float? scale=None",
        "(Tensor, Tensor, Tensor, Tensor)",
    ),
    "_scaled_dot_product_flash_attention_for_cpu": (
        "Tensor query, Tensor key, Tensor value, float dropout_p=0., bool is_causal=False",
        "float? scale=None",
        "(Tensor output, Tensor logsumexp)",
    ),
    "_scaled_dot_product_flash_attention_for_cpu_backward": (
        "Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor logsumexp, float dropout_p, "
        "bool is_causal",
        "float? scale=None",
        "(Tensor grad_query, Tensor grad_key, Tensor grad_value)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEMAS)
def test_torch_has_the_operators_as_they_are_called(name):
    """Positional ones exactly, since they are counted; of the others those that are named."""
    positional, named, returned = SCHEMAS[name]
    told = str(getattr(torch.ops.aten, name).default._schema)
    inputs, outputs = told.removeprefix(f"aten::{name}(").split(") -> ")
    before, _, after = inputs.partition(", *, ")
    assert before == positional, told
    missing = set(named.split(", ")) - set(after.split(", "))
    assert not missing, f"{missing} in {told}"
    assert outputs == returned, told


def test_every_operator_that_is_called_has_a_guard():
    import fapool_plugin.kernels as room

    called: set[str] = set()
    for path in Path(room.__path__[0]).glob("*.py"):
        called |= set(re.findall(r"torch\.ops\.aten\.(\w+)", path.read_text(encoding="utf-8")))
    assert called == SCHEMAS.keys()
