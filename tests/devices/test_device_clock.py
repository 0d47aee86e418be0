"""Time that a device takes: read when it is over, never before, and never as the time of a launch."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

from fapool_plugin.devices.clock import Clock
from fapool_plugin.devices.gpu import CPU
from fapool_plugin.observe.metrics import PhaseCounters
from fapool_plugin.observe.timeline import ATTENTION, LINEAR, MERGE, SEND, WAIT, Timeline
from tests.base.test_advisor import DEAR, FREE, LENGTH, planned, profile_of
from tests.models import one_thread, plain, random_ids, save_model
from tests.recorded_streams import Ticks

GPU = torch.device("cuda:0")


def test_on_a_cpu_a_moment_is_there_at_once() -> None:
    clock = Clock(CPU)
    first = clock.now()
    time.sleep(0.01)
    last = clock.now()
    assert last.since(first) == (last.ns - first.ns) / 1e9 > 0.009


def test_on_a_device_it_is_there_when_the_device_is() -> None:
    ticks = Ticks(2.0)
    clock = Clock(GPU, ticks)
    first, last = clock.now(), clock.now()
    assert last.since(first) is None, "it has not begun"
    ticks.now = 1
    assert last.since(first) is None, "the device has only begun"
    assert last.waited_since(first) == 2.0
    assert last.since(first) == 2.0


def test_a_clock_moves_with_the_model() -> None:
    ticks = Ticks()
    clock = Clock(CPU, ticks)
    clock.now()
    assert ticks.launched == 0
    clock.move_to(GPU)
    clock.now()
    assert ticks.launched > 0


def test_activities_are_counted_when_the_device_has_done_them() -> None:
    ticks = Ticks(0.5)
    timeline, counters = Timeline(Clock(GPU, ticks).now), PhaseCounters()
    ticks.launched = 0
    timeline.begin(counters)
    for activity in (ATTENTION, WAIT, MERGE):
        timeline.switch(activity)
    timeline.end()
    assert counters.base_s == {}, "the time of launches"
    ticks.now = 3  # past the second switch
    timeline.begin(PhaseCounters())
    assert counters.base_s == {LINEAR: 0.5, ATTENTION: 0.5}
    ticks.now = 100
    timeline.read()
    assert counters.base_s == {LINEAR: 0.5, ATTENTION: 0.5, WAIT: 0.5, MERGE: 0.5}


@pytest.mark.parametrize("pooled", [False, True])
def test_the_plan_learns_what_a_forward_took_on_its_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pooled: bool
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    folder, ticks = save_model("llama", tmp_path, max_position_embeddings=1024), Ticks(0.25)
    link = FREE if pooled else DEAR
    with one_thread(), planned(folder, profile_of(plain(folder), link=link)) as model, torch.no_grad():
        manager = model.fa_pool
        manager.clock._events = ticks
        manager.clock.move_to(GPU)
        before = ticks.launched
        model(random_ids(1, LENGTH))
        phase = manager.stats()["prefill"]
        assert phase["pooled_forwards"] == pooled
        assert (phase["measured_s"], phase["base_s"]) == (0.0, {}), "it is not over on the device"
        ticks.now = launched = ticks.launched
        with pytest.MonkeyPatch.context() as patch:
            # Predictions are far from made-up seconds, which is told, and not what is tested.
            patch.setattr(manager.advisor, "_judge", lambda *args: None)
            model(random_ids(1, 5))
        phase = manager.stats()["prefill"]
        if pooled:
            assert 0.25 < phase["measured_s"] < 0.25 * (launched - before)
            assert set(phase["base_s"]) == {LINEAR, SEND, ATTENTION, WAIT, MERGE}
            assert all(seconds % 0.25 == 0 for seconds in phase["base_s"].values()), "some host's time"
        else:
            assert (phase["measured_s"], phase["base_s"]) == (0.25, {})
