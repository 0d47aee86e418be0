"""Fits are the best there are, shares cost what their parts cost, and a damaged profile is refused with a remedy."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fapool_plugin.plan.line import Row, Tile, partition
from fapool_plugin.plan.profile import (
    PROFILE_VERSION,
    AttentionCost,
    Fit,
    LinearCost,
    LinkCost,
    Machine,
    Profile,
    ProfileError,
    Shape,
    least_squares,
    share_s,
)

KV_HEADS = 3


def attention(kernel: str = "fast", dtype: str = "float32", threads: int = 1, **prefill: float) -> AttentionCost:
    return AttentionCost(
        kernel=kernel, dtype=dtype, threads=threads, prefill=fit(**(prefill or {"c": 1e-9})), decode=fit(b=2e-7)
    )


def fit(a: float = 0.0, b: float = 0.0, c: float = 0.0) -> Fit:
    return Fit(a=a, b=b, c=c, error=0.0, spread=0.0)


STEPS = fit(a=1e-3, b=1e-4).model_copy(update={"points": ((1, 0.5e-3), (2, 1.5e-3), (16, 3e-3))})


def profile(**changes: Any) -> Profile:
    values: dict[str, Any] = {
        "date": "2030-01-01T00:00:00+00:00",
        "quick": False,
        "machine": Machine(processor="abacus", cores=4, torch="2.13.0", fapool="0.1.0"),
        "shape": Shape(
            hidden=48,
            layers=2,
            heads=6,
            kv_heads=KV_HEADS,
            head_dim=8,
            v_head_dim=8,
            dtype="float32",
            parameters=1234,
        ),
        "attention": (attention(),),
        "linear": (LinearCost(threads=1, prefill=fit(b=1e-5), decode=STEPS),),
        "link": LinkCost(to_rank=fit(a=1e-4, b=1e-9), to_base=fit(a=1e-4, b=1e-9)),
        "activation_s": 0.001,
        "start_s": 1.0,
    }
    return Profile(**{**values, **changes})


# Fits.

coefficients = st.one_of(st.just(0.0), st.floats(1e-10, 1.0))
lengths = st.lists(st.integers(1, 10_000), min_size=3, max_size=8, unique=True)


@given(st.tuples(coefficients, coefficients, coefficients), lengths)
def test_a_fit_recovers_what_made_the_points(truth: tuple[float, float, float], at: list[int]) -> None:
    made = fit(*truth)
    assume(made.at(1) > 0)
    found = least_squares([(n, made.at(n)) for n in at])
    worst = max(abs(found.at(n) / made.at(n) - 1) for n in at)
    assert worst < 1e-9, f"largest relative difference {worst:.3g} of {found} from {made}"


noisy = st.lists(
    st.tuples(st.integers(1, 10_000), st.floats(1e-6, 10.0)),
    min_size=3,
    max_size=8,
    unique_by=lambda point: point[0],
)


@given(noisy, st.sampled_from([(0, 1, 2), (1, 2), (0, 1), (2,)]))
def test_a_fit_is_non_negative_and_its_error_is_as_declared(points: list[tuple[int, float]], powers: Any) -> None:
    found = least_squares(points, powers)
    values = (found.a, found.b, found.c)
    assert min(values) >= 0, found
    assert not any(value for power, value in enumerate(values) if power not in powers), found
    errors = [abs(found.a + found.b * n + found.c * n * n - s) / s for n, s in points]
    assert found.error == pytest.approx(max(errors), rel=1e-9), f"declared {found.error}, is {max(errors)}"


@settings(deadline=None)
@given(noisy)
def test_no_fit_is_better(points: list[tuple[int, float]]) -> None:
    """Against numpy's unbounded fit wherever that is non-negative, and against neighbours everywhere."""
    found = least_squares(points)
    n, seconds = (np.array(column, dtype=float) for column in zip(*points, strict=True))
    scale = np.array([1.0, n.max(), n.max() ** 2])
    table = np.stack([np.ones_like(n), n, n * n], axis=1) / scale / seconds[:, None]

    def loss(values: np.ndarray) -> float:
        return float(((table @ values - 1) ** 2).sum())

    mine = np.array([found.a, found.b, found.c]) * scale
    free = np.linalg.lstsq(table, np.ones_like(n), rcond=None)[0]
    slack = 1e-9 * (1 + loss(mine))
    assert loss(free) <= loss(mine) + slack, "better than the best without bounds"
    if (free >= 0).all():
        assert loss(mine) <= loss(free) + slack, f"{loss(mine)} against {loss(free)} by {free / scale}"
    for power, step in ((p, s) for p in range(3) for s in (-1e-4, 1e-4)):
        moved = mine.copy()
        moved[power] = max(0.0, moved[power] + step * seconds.min())
        assert loss(mine) <= loss(moved) + slack, f"{found}: moving coefficient {power} by {step} is better"


@pytest.mark.parametrize(
    ("n", "seconds"), [(1, 0.5e-3), (1.5, 1e-3), (2, 1.5e-3), (9, 2.25e-3), (16, 3e-3), (17, 2.7e-3), (0.5, 1.05e-3)]
)
def test_kept_points_hold_between_the_first_and_the_last(n: float, seconds: float) -> None:
    assert STEPS.at(n) == pytest.approx(seconds, rel=1e-12), f"{STEPS.at(n)} is not {seconds}"


@pytest.mark.parametrize(
    ("points", "told"),
    [
        ([], "at least one point"),
        ([(0, 1.0), (1, 1.0), (2, 1.0)], "n > 0"),
        ([(1, 0.0), (2, 1.0), (3, 1.0)], "seconds > 0"),
        ([(1, 1.0), (2, float("nan")), (3, 1.0)], "seconds > 0"),
        ([(1, 1.0), (2, 1.0), (2, 1.1)], "2 different n"),
    ],
)
def test_a_fit_refuses(points: list[tuple[float, float]], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        least_squares(points)


# Shares.

fits = st.builds(fit, *[st.floats(0, 1e-3)] * 3)


@given(fits, fits, st.integers(2, 5000))
def test_a_square_of_all_lanes_costs_what_was_measured(prefill: Fit, decode: Fit, n: int) -> None:
    cost = attention().model_copy(update={"prefill": prefill, "decode": decode})
    square = share_s(cost, KV_HEADS, [Tile(0, 1, 0, KV_HEADS, 0, n, 0, n)])
    assert square == pytest.approx(prefill.at(n), rel=1e-9), f"{square} is not {prefill.at(n)}"
    row = share_s(cost, KV_HEADS, [Tile(0, 1, 0, KV_HEADS, n, n + 1, 0, n)])
    assert row == pytest.approx(decode.at(n), rel=1e-9), f"{row} is not {decode.at(n)}"


@given(
    fits,
    st.lists(st.integers(2, 300), min_size=1, max_size=3),
    st.lists(st.floats(0, 1), min_size=1, max_size=4),
    st.sampled_from(["line", "query_blocks"]),
)
def test_shares_add_up(prefill: Fit, rows: list[int], speeds: list[float], mode: Any) -> None:
    """Whatever the cuts, all shares together cost the whole, and a call's own cost for each tile."""
    assume(any(speeds))
    cost = attention().model_copy(update={"prefill": prefill})
    shares = partition([Row(0, n, n) for n in rows], KV_HEADS, speeds, mode=mode, block=1)
    tiles = [tile for share in shares for tile in share]
    assume(all(tile.q_stop - tile.q_start > 1 for tile in tiles))  # single queries are priced as decode
    whole = sum(prefill.at(n) - prefill.a for n in rows) + len(tiles) * prefill.a
    parts = sum(share_s(cost, KV_HEADS, share) for share in shares)
    assert parts == pytest.approx(whole, rel=1e-9, abs=1e-15), f"{parts} is not {whole}"


@given(st.integers(3, 2000), st.lists(st.integers(1, 1999), max_size=4))
def test_decode_adds_up_over_keys_and_lanes(keys: int, cuts: list[int]) -> None:
    cost = attention()
    edges = sorted({0, keys, *(cut for cut in cuts if cut < keys)})
    tiles = [
        Tile(0, 1, head, head + 1, keys, keys + 1, start, stop) for head in range(3) for start, stop in pairwise(edges)
    ]
    assert share_s(cost, KV_HEADS, tiles) == pytest.approx(cost.decode.at(keys), rel=1e-9)


# Profiles.


def test_a_profile_survives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    profile().save(path)
    assert Profile.load(path) == profile()
    assert [file.name for file in tmp_path.iterdir()] == ["profile.json"], "a draft was left behind"


def damaged(change: Any) -> str:
    values = profile().model_dump(mode="json")
    change(values)
    return json.dumps(values)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            damaged(lambda v: v["linear"][0]["decode"].update(points=[[2, 1.0], [2, 1.0]])),
            "points must be of growing n",
        ),
        ("", "damaged at its text"),
        ("{", "damaged at its text"),
        ("[]", "damaged at its text"),
        (json.dumps(profile().model_dump(mode="json"))[:-20], "damaged at its text"),
        (damaged(lambda v: v.update(version=PROFILE_VERSION + 1, more=1)), f"has version {PROFILE_VERSION + 1}"),
        (damaged(lambda v: v.update(surprise=1)), "damaged at surprise"),
        (damaged(lambda v: v.pop("link")), "damaged at link"),
        (damaged(lambda v: v.update(attention=[])), "damaged at attention"),
        (damaged(lambda v: v["linear"][0]["prefill"].update(b=float("nan"))), "damaged at linear.0.prefill.b"),
        (damaged(lambda v: v["linear"][0]["prefill"].update(b=float("inf"))), "damaged at linear.0.prefill.b"),
        (damaged(lambda v: v["linear"][0]["prefill"].update(b=-1.0)), "damaged at linear.0.prefill.b"),
        (damaged(lambda v: v["linear"][0].update(threads="1")), "damaged at linear.0.threads"),
        (damaged(lambda v: v["shape"].update(layers=0)), "damaged at shape.layers"),
    ],
)
def test_a_damaged_profile_is_refused(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "profile.json"
    path.write_text(text)
    with pytest.raises(ProfileError) as caught:
        Profile.load(path)
    for part in (str(path), told, "fapool calibrate"):
        assert part in str(caught.value), f"{part!r} is not in {caught.value}"


def test_no_profile_is_an_error_too(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(ProfileError, match="cannot be read"):
            Profile.load(path)
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ProfileError, match="cannot be read"):
        Profile.load(tmp_path / "bytes.json")


def test_a_profile_of_another_machine_does_not_fit() -> None:
    mine = profile()
    assert mine.misfit(mine.machine, mine.shape) is None
    other = mine.machine.model_copy(update={"cores": 8})
    assert mine.misfit(other, mine.shape) == "cores was 4, is 8"
    deeper = mine.shape.model_copy(update={"layers": 5})
    assert mine.misfit(other, deeper) == "cores was 4, is 8; layers was 2, is 5"
    adapted = mine.shape.model_copy(update={"parameters": 1290})
    assert mine.misfit(mine.machine, adapted) is None, "adapters are added to a model, not another model"
    larger = mine.shape.model_copy(update={"parameters": 1300})
    assert mine.misfit(mine.machine, larger) == "parameters was 1234, is 1300"
    newer = mine.model_copy(update={"version": PROFILE_VERSION + 1})
    assert f"version {PROFILE_VERSION + 1}" in str(newer.misfit(mine.machine, mine.shape))


def test_costs_are_found_by_threads_and_speed() -> None:
    slow, fast = attention("slow", c=2e-9), attention("fast", c=1e-9)
    wide, other = attention("slow", threads=4, c=1e-9), attention("fast", "bfloat16", c=1e-12)
    mine = profile(attention=(slow, fast, wide, other))
    assert mine.attention_for(1) == fast, "the other dtype's are not this model's"
    assert mine.attention_for(2) == fast
    assert mine.attention_for(16) == wide
    assert mine.attention_for(1, "slow") == slow
    with pytest.raises(ProfileError, match="absent"):
        mine.attention_for(1, "absent")
    costs = tuple(LinearCost(threads=t, prefill=fit(b=1.0), decode=fit(a=1.0)) for t in (1, 4))
    assert [profile(linear=costs).linear_for(t).threads for t in (1, 2, 3, 64)] == [1, 1, 4, 4]
