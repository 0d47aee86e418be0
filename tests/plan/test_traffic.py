"""Traffic against sums by hand, and against a queue's known mean."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from math import inf
from statistics import mean

import numpy as np
import pytest

from fapool_plugin.plan.arrivals import Request, arrivals
from fapool_plugin.plan.jobs import Setting
from fapool_plugin.plan.outcome import percentiles
from fapool_plugin.plan.traffic import simulate


@dataclass(frozen=True)
class Plain:
    """A prompt takes a second for each 1,000 tokens, with ranks half; a step 10 ms, with ranks 5."""

    most: float = inf
    more: float = inf

    def prompt_s(self, tokens: int, ranks: int, far: bool = False) -> float:
        return tokens / 1000 / (2 if ranks else 1)

    def step_s(self, rows: int, tokens: float, ranks: int, far: bool = False) -> float:
        return 0.005 if ranks else 0.01

    def room(self, ranks: int) -> float:
        return self.more if ranks else self.most


ALONE = Setting(jobs=1, pool=0, lease=0, threshold=5000)
POOLED = Setting(jobs=1, pool=4, lease=4, threshold=5000, activation_s=0.5)


def test_two_requests_by_hand() -> None:
    """The second comes while the first is in its tenth step, which ends; then its prompt is computed."""
    found = simulate([Request(0, 1000, 101), Request(1.095, 2000, 11)], ALONE, Plain())
    by = {one.request.at_s: one for one in found.served}
    assert by[0].first_s == pytest.approx(1.0)
    assert by[1.095].first_s == pytest.approx(1.1 + 2.0 - 1.095)
    assert by[1.095].token_s == pytest.approx(0.01)
    assert by[0].token_s == pytest.approx((2.0 + 100 * 0.01) / 100), "a prompt makes the other wait"
    assert found.seconds == pytest.approx(1.0 + 2.0 + 100 * 0.01)
    assert found.base_busy_s == pytest.approx(found.seconds)
    assert found.leased_s == 0


def test_a_lease_lasts_as_long_as_what_is_long() -> None:
    found = simulate([Request(0, 8000, 101), Request(0, 1000, 301)], POOLED, Plain())
    long, short = sorted(found.served, key=lambda one: -one.request.prompt)
    assert (long.long, short.long) == (True, False)
    # Requests that come together are served shortest first, as they sort.
    assert short.first_s == pytest.approx(1.0)
    assert long.first_s == pytest.approx(1.0 + 0.5 + 4.0)
    assert found.leased_s == pytest.approx(4 * (0.5 + 4.0 + 100 * 0.005))
    assert short.token_s == pytest.approx((4.5 + 100 * 0.005 + 200 * 0.01) / 300)
    assert found.leases == 1


def test_a_short_prompt_is_not_pooled_beside_a_long_one() -> None:
    found = simulate([Request(0, 8000, 500), Request(1, 1000, 2)], POOLED, Plain())
    (short,) = [one for one in found.served if not one.long]
    assert short.first_s == pytest.approx(0.5 + 4.0 + 1.0 - 1.0)


def test_jobs_share_the_pool() -> None:
    two = Setting(jobs=2, pool=4, lease=4, threshold=5000)
    found = simulate([Request(0, 8000, 2), Request(0, 8000, 2)], two, Plain())
    assert sorted(round(one.first_s, 2) for one in found.served) == [4.0, 8.0], "one of them found no ranks"
    assert (found.leases, found.unleased) == (1, 1)
    # With too little room alone they wait for the ranks, however many wait.
    four = Setting(jobs=4, pool=4, lease=4, threshold=5000)
    found = simulate([Request(0, 8000, 2)] * 4, four, Plain(most=5000, more=10_000))
    assert sorted(round(one.first_s, 1) for one in found.served) == [4.0, 8.0, 12.0, 16.0]
    found = simulate([Request(0, 8000, 2), Request(0, 8000, 2)], two, Plain(most=5000, more=10_000))
    assert sorted(round(one.first_s, 2) for one in found.served) == [4.0, pytest.approx(8.01, abs=0.01)]
    assert (found.leases, found.unleased, found.refused) == (2, 0, 0)


def test_a_prompt_waits_for_ranks_as_long_as_they_save() -> None:
    two = replace(POOLED, jobs=2, waits=True)
    found = simulate([Request(0, 8000, 1), Request(2, 8000, 1)], two, Plain())
    # The ranks are free at 4.5; without them the second would have been done at 10.
    assert [one.first_s for one in found.served] == pytest.approx([4.5, 2.5 + 4.5])
    assert found.waited_s == pytest.approx(2.5)
    assert found.unleased == 0
    never = simulate([Request(0, 8000, 1), Request(2, 8000, 1)], replace(two, waits=False), Plain())
    assert [one.first_s for one in never.served] == pytest.approx([4.5, 8.0])
    # They come too late for one of 6,000 tokens, which waits the 3 s that they save. Steps go on meanwhile.
    requests = [Request(0, 20_000, 1), Request(0.1, 1000, 1000), Request(0.2, 1, 1), Request(1.105, 6000, 1)]
    found = simulate(requests, two, Plain())
    by = {one.request.prompt: one for one in found.served}
    assert found.waited_s == pytest.approx(3.0, abs=0.011), "up to a step more"
    assert by[6000].first_s == pytest.approx(0.005 + 3.0 + 6.0, abs=0.011), "it asks after the step that it came in"
    assert by[1000].token_s == pytest.approx((6.0 + 999 * 0.01) / 999)


def test_who_waits_longest_is_next() -> None:
    """Three jobs and one lease; the first one's next prompt asks behind those that wait."""
    requests = [Request(0, 8000, 1), Request(1.0, 9000, 1), Request(1.1, 7000, 1), Request(1.2, 50_000, 1)]
    found = simulate(requests, replace(POOLED, jobs=3, waits=True), Plain())
    begun = list(dict.fromkeys((one.start, one.job) for one in sorted(found.lent, key=lambda one: one.start)))
    # The third waits for 3.5 s at most, and computes alone from 4.6 on.
    assert begun == [(0.0, 0), (4.5, 1), (9.5, 0)]
    assert found.waited_s == pytest.approx(3.5 + 3.5 + 5.0)


def test_what_fits_nowhere_is_refused_and_what_has_no_room_waits() -> None:
    found = simulate([Request(0, 3000, 100), Request(0, 2500, 100), Request(1, 9000, 1)], ALONE, Plain(most=4000))
    assert found.refused == 1
    assert [one.request.prompt for one in found.served] == [2500, 3000]
    assert found.served[1].first_s == pytest.approx(2.5 + 99 * 0.01 + 3.0)


def test_a_queues_mean_wait() -> None:
    """Poisson arrivals, equal service, one server: rho s / (2 (1 - rho)) (Pollaczek 1930, Khinchine 1932)."""
    draw, rho = np.random.default_rng(0), 0.7
    times = np.cumsum(draw.exponential(1 / rho, 40_000))
    found = simulate([Request(float(at), 1000, 1) for at in times], ALONE, Plain())
    waited, expected = mean(one.first_s for one in found.served) - 1.0, rho / (2 * (1 - rho))
    assert waited == pytest.approx(expected, rel=0.06), f"{waited}, not {expected}"
    assert found.base_busy_s / found.seconds == pytest.approx(rho, rel=0.03)


@pytest.mark.parametrize("bursts", [1.0, 5.0])
def test_arrivals_are_as_many_and_as_long_as_asked(bursts: float) -> None:
    made = arrivals(3.0, 4000, seed=1, long_part=0.1, bursts=bursts)
    assert made == arrivals(3.0, 4000, seed=1, long_part=0.1, bursts=bursts)
    assert len(made) / 4000 == pytest.approx(3.0, rel=0.08)
    assert mean(one.prompt >= 16_384 for one in made) == pytest.approx(0.1, rel=0.1)
    together = mean(a.at_s == b.at_s for a, b in pairwise(made))
    assert together == pytest.approx(1 - 1 / bursts, abs=0.03)


def test_what_cannot_be_simulated_is_refused() -> None:
    with pytest.raises(ValueError, match="leases of 8 of 4 pool ranks"):
        simulate([Request(0, 1, 1)], Setting(jobs=1, pool=4, lease=8, threshold=1), Plain())
    with pytest.raises(ValueError, match="0 requests"):
        simulate([], ALONE, Plain())
    assert percentiles([1.0, 2.0, 3.0])[0] == 2.0
