"""Where a running model's profile comes from: a file, the one kept, or a measurement; and the threshold it gives.

Nothing is measured here: what would measure is replaced, and counted.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fapool_plugin.integrations.huggingface import calibrate as huggingface_calibrate
from fapool_plugin.integrations.huggingface import profile as huggingface_profile
from fapool_plugin.plan.clocks import Cores
from fapool_plugin.plan.forecast import auto_threshold
from fapool_plugin.plan.profile import Fit, Profile, ProfileError
from fapool_plugin.plan.shares import MOST_BLOCKS
from tests.base.test_advisor import DEAR, LAYERS, LENGTH, calls, kinds, planned, profile_of
from tests.models import THRESHOLD, load_pooled, one_thread, plain, random_ids, save_model


@pytest.fixture(autouse=True)
def _one_thread_of_eight_cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    with one_thread():
        yield


class Measuring:
    """Stands for both ways to measure; answers with ``profile``."""

    def __init__(self, profile: Profile) -> None:
        self.profile, self.times = profile, 0

    def __call__(self, model: Any, *args: Any, **keys: Any) -> Profile:
        self.times += 1
        return self.profile


@pytest.fixture
def measuring(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Measuring:
    """Profiles are kept in a folder of this test's own."""
    stand_in = Measuring(profile_of(plain(folder), linear=Fit(b=1.0)))
    monkeypatch.setattr(huggingface_calibrate, "user_cache_dir", lambda name: str(tmp_path / "kept"))
    monkeypatch.setattr(huggingface_profile, "make_profile", stand_in)
    monkeypatch.setattr(huggingface_profile, "calibrate_model", stand_in)
    return stand_in


def kept(folder: Path) -> list[Path]:
    return sorted((folder / "kept").rglob("*.json"))


def run(model: Any, length: int = LENGTH) -> None:
    with torch.no_grad():
        model(random_ids(1, length))


@pytest.mark.parametrize("linear", [0.2, 2.0, 20.0])
def test_the_measured_threshold_is_the_forecasts(tmp_path: Path, linear: float) -> None:
    """Attention of one sequence takes 2 (n + n * n) seconds, the rest ``linear * 100 * n``."""
    folder = save_model("llama", tmp_path, max_position_embeddings=1024)
    reference = plain(folder)
    profile = profile_of(reference, linear=Fit(b=100 * linear))
    with planned(folder, profile, threshold="auto", blocks=1) as model:
        expected = auto_threshold(profile, ranks=1, cores=Cores(1, 1, 7), longest=1024, max_blocks=MOST_BLOCKS).auto
        crossing = next((n for n in range(64, 1025, 64) if 2 * (n + n * n) > 100 * linear * n), 1024)
        assert model.fa_pool.threshold == (expected or 1024) == crossing
        assert model.fa_pool.stats()["threshold"] == crossing
        assert f"measured: {crossing} tokens" in [event["reason"] for event in model.fa_pool.stats()["events"]]
        if crossing < 600:
            for length, pooled in ((crossing, 0), (crossing + 1, LAYERS)):
                run(model, length)
                assert calls(model)["prefill"][0] == pooled, f"{length} tokens, threshold {crossing}"


@pytest.mark.parametrize("activation", ["cost", "length"])
def test_where_attention_never_rules_nothing_is_pooled(folder: Path, activation: str) -> None:
    profile = profile_of(plain(folder), linear=Fit(b=1e9))
    with planned(folder, profile, threshold="auto", activation=activation) as model:
        for length in (LENGTH, 256):
            run(model, length)
        assert calls(model)["prefill"] == (0, 2 * LAYERS)
        assert model.fa_pool.leases.pool is None


def test_an_automatic_threshold_measures_at_load_if_there_is_no_profile(folder: Path, measuring: Measuring) -> None:
    for _ in range(2):
        with planned(folder, threshold="auto") as model:
            assert measuring.times == 1, "the second load has the kept one"
            assert isinstance(model.fa_pool.threshold, int)
            assert model.fa_pool.advisor.profile == measuring.profile


def test_a_measurement_is_kept_for_the_next_load(folder: Path, tmp_path: Path, measuring: Measuring) -> None:
    for activations in (1, 0):
        with planned(folder) as model:
            run(model)
            run(model)
            assert measuring.times == 1
            assert kinds(model).count("profile") == activations
            assert calls(model)["prefill"] == (2 * LAYERS, 0)
    [path] = kept(tmp_path)
    assert Profile.load(path) == measuring.profile


def test_a_disturbed_measurement_is_not_kept(folder: Path, tmp_path: Path, measuring: Measuring) -> None:
    measuring.profile = profile_of(plain(folder), linear=Fit(b=1.0, spread=0.6))
    for times in (1, 2):
        with planned(folder) as model:
            run(model)
            run(model)
            assert measuring.times == times
    assert kept(tmp_path) == []


def test_ranks_borrowed_to_measure_are_given_back_if_the_plan_does_without(folder: Path, measuring: Measuring) -> None:
    measuring.profile = profile_of(plain(folder), link=DEAR)
    with planned(folder) as model:
        run(model)
        assert kinds(model) == ["activating", "active", "profile", "draining", "idle"]
        run(model)
        assert calls(model)["prefill"] == (0, 2 * LAYERS)
        assert (model.fa_pool.stats()["state"], model.fa_pool.stats()["activations"]) == ("idle", 1)


def test_the_length_rule_measures_nothing(folder: Path, measuring: Measuring) -> None:
    with planned(folder, activation="length") as model:
        run(model)
        assert calls(model)["prefill"] == (LAYERS, 0)
    assert measuring.times == 0


@pytest.mark.parametrize(
    ("part", "change", "told"),
    [
        ("machine", {"processor": "another"}, "processor was another, is"),
        ("machine", {"cores": 99}, "cores was 99, is"),
        ("machine", {"torch": "1.0"}, "torch was 1.0, is"),
        ("shape", {"hidden": 99}, "hidden was 99, is 48"),
        (None, {"version": 99}, "version 99"),
    ],
)
@pytest.mark.parametrize("threshold", [THRESHOLD, "auto"])
def test_a_profile_of_something_else_is_measured_anew(
    folder: Path, measuring: Measuring, part: str | None, change: dict[str, Any], told: str, threshold: Any
) -> None:
    profile = measuring.profile
    wrong = {part: getattr(profile, part).model_copy(update=change)} if part else change
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with planned(folder, profile.model_copy(update=wrong), threshold=threshold) as model:
            run(model)
            run(model)
            assert measuring.times == 1
            assert model.fa_pool.advisor.profile == profile
    [text] = [str(warning.message) for warning in caught if warning.category is RuntimeWarning]
    assert told in text
    assert "measured anew" in text


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 1}'])
def test_a_damaged_file_is_told_before_any_forward(folder: Path, tmp_path: Path, text: str) -> None:
    path = tmp_path / "profile.json"
    path.write_text(text)
    with pytest.raises(ProfileError, match=r"profile\.json .*fapool calibrate"):
        load_pooled(folder, profile=str(path), activation="cost")
    with pytest.raises(ProfileError, match="cannot be read"):
        load_pooled(folder, profile=str(tmp_path / "missing.json"))


def test_a_damaged_kept_file_is_measured_anew(folder: Path, tmp_path: Path, measuring: Measuring) -> None:
    path = huggingface_calibrate.keep(measuring.profile)
    path.write_text("{")
    with pytest.warns(RuntimeWarning, match="damaged.*measured anew"), planned(folder) as model:
        run(model)
    assert measuring.times == 1
    assert Profile.load(path) == measuring.profile


def test_where_no_rank_can_be_had_it_is_tried_once(folder: Path, measuring: Measuring) -> None:
    """Each forward is told of once, and is computed without a profile."""

    class NoPool:
        def __init__(self, config: Any) -> None:
            raise RuntimeError("no ranks here")

    with planned(folder) as model, torch.no_grad():
        model.fa_pool.leases.source = NoPool
        with pytest.warns(RuntimeWarning, match="no ranks here"):
            cache = model(random_ids(1, LENGTH)).past_key_values
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for seed in (1, 2):
                model(random_ids(1, 1, seed=seed), past_key_values=cache)
        assert model.fa_pool.stats()["local_reasons"] == {"no pool rank was to be had for this sequence": 3}
        assert model.fa_pool.stats()["state"] == "idle"
    assert measuring.times == 0


def test_new_columns_that_are_all_padding_are_no_question_of_cost(folder: Path) -> None:
    ids, mask = random_ids(1, LENGTH + 20), torch.ones(1, LENGTH + 20, dtype=torch.int64)
    mask[:, LENGTH:] = 0
    with planned(folder, profile_of(plain(folder)), kv_block=4) as model, torch.no_grad():
        cache = model(ids[:, :LENGTH], attention_mask=mask[:, :LENGTH]).past_key_values
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(ids[:, LENGTH:], attention_mask=mask, past_key_values=cache)
