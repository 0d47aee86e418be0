"""Lost ranks, ranks that join, pools and leaf switches in simulated traffic: sums by hand, and what always holds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fapool_plugin.plan.arrivals import Request, arrivals
from fapool_plugin.plan.jobs import Setting
from fapool_plugin.plan.lending import Pool, Wear, places
from fapool_plugin.plan.outcome import Outcome
from fapool_plugin.plan.traffic import simulate


@dataclass(frozen=True)
class Plain:
    """A prompt takes a second for each 1,000 tokens, with ranks half, with far ones three quarters; a step 10 ms, with
    ranks 5."""

    most: float = inf
    more: float = inf

    def prompt_s(self, tokens: int, ranks: int, far: bool) -> float:
        return tokens / 1000 * ((0.75 if far else 0.5) if ranks else 1)

    def step_s(self, rows: int, tokens: float, ranks: int, far: bool) -> float:
        return 0.005 if ranks else 0.01

    def room(self, ranks: int) -> float:
        return self.more if ranks else self.most


@dataclass(frozen=True)
class Told(Wear):
    """Ranks live as long as is told, then for ever."""

    told: dict[int, list[float]] = field(default_factory=dict)

    def lives(self, rank: int) -> Iterator[float]:
        yield from self.told.get(rank, [])
        while True:
            yield inf


def setting(**others) -> Setting:
    return replace(Setting(jobs=1, pool=4, lease=4, threshold=5000, activation_s=0.5), **others)


def lose(told: dict[int, list[float]]) -> Wear:
    return Told(restart_s=1.0, told=told)


def test_a_prompt_begins_again_with_the_ranks_that_are_left() -> None:
    found = simulate([Request(0, 8000, 1)], setting(wear=lose({2: [2.0], 3: [3.0]})), Plain())
    (one,) = found.served
    assert one.first_s == pytest.approx(0.5 + 1.5 + 1.0 + 4.0), "abandoned after 1.5 s, and after 1 s more"
    assert (found.losses, found.replays) == (2, 0)
    assert found.lost_s == pytest.approx(2.5)
    assert found.leased_s == pytest.approx(2 * 7.0 + 2.0 + 3.0)


def test_a_lost_step_costs_a_replay() -> None:
    found = simulate([Request(0, 8000, 101)], setting(wear=lose({0: [4.5125]})), Plain())
    # The prompt is done at 4.5, two steps at 4.51; then 8,003 tokens have keys.
    end = 4.5125 + 8.003 / 2 + 98 * 0.005
    assert found.seconds == pytest.approx(end)
    assert (found.losses, found.replays) == (1, 1)
    assert found.lost_s == pytest.approx(0.0025 + 8.003 / 2)


def test_without_ranks_the_base_computes_alone_and_short_ones_lose_nothing() -> None:
    requests = [Request(0, 8000, 11), Request(0.1, 1000, 11)]
    found = simulate(requests, setting(pool=1, lease=1, wear=lose({0: [5.0]})), Plain())
    by = {one.request.prompt: one for one in found.served}
    # The short prompt is computed from 4.5 to 5.5 without ranks; the loss is known then, and the long one replayed.
    assert by[1000].first_s == pytest.approx(5.5 - 0.1)
    assert found.seconds == pytest.approx(5.5 + 8.001 + 10 * 0.01)
    assert (found.replays, found.leases, found.unleased) == (1, 1, 0)


def test_who_waits_for_a_lost_rank_waits_until_that_is_known() -> None:
    wear = replace(lose({0: [4.5125], 1: [5.0]}), restart_s=9.0, detect_s=2.0)
    found = simulate([Request(0, 8000, 101)], setting(wear=wear), Plain())
    # Known at 6.5125; the next one is dead by then, which is known at 7, and only then keys are computed again.
    assert found.seconds == pytest.approx(7.0 + 8.003 / 2 + 98 * 0.005)
    assert (found.losses, found.replays) == (2, 1)
    assert found.lost_s == pytest.approx(7.0 - 4.51 + 8.003 / 2)
    # Heartbeats go on while the base computes a short prompt, from 4.5 to 5.5.
    requests = [Request(0, 8000, 11), Request(0.1, 1000, 11)]
    found = simulate(requests, setting(wear=replace(lose({0: [4.75]}), restart_s=9.0, detect_s=0.5)), Plain())
    assert found.seconds == pytest.approx(5.5 + 8.001 / 2 + 10 * 0.005)


def test_a_lost_base_begins_again_and_its_ranks_are_free_meanwhile() -> None:
    base = Told(restart_s=10.0, detect_s=1.0, told={1 << 32: [4.6]})
    requests = [Request(0, 8000, 101), Request(1, 6000, 1)]
    found = simulate(requests, setting(jobs=2, base_wear=base, waits=True), Plain())
    by = {one.request.prompt: one for one in found.served}
    # The other job waited from 1 on, for at most the 3 s that ranks save it; then it began alone.
    assert found.waited_s == pytest.approx(3.0)
    assert by[6000].first_s == pytest.approx(3.0 + 6.0)
    # Twenty steps are done when the base is lost; its 8,020 tokens are computed again, and 80 more follow.
    assert by[8000].first_s == pytest.approx(4.5)
    assert found.seconds == pytest.approx(14.6 + 0.5 + 8.020 / 2 + 80 * 0.005 - 0.005, abs=0.006)
    assert (found.base_losses, found.replays, found.losses) == (1, 1, 0)
    assert [one.stop for one in found.lent][:4] == pytest.approx([5.6] * 4)


def test_a_lease_grows_again() -> None:
    requests = [Request(0, 8000, 401), Request(6.0, 6000, 2)]
    found = simulate(requests, setting(wear=lose({0: [4.5]})), Plain())
    assert (found.losses, found.grown, found.leases) == (1, 1, 1)
    again = [one for one in found.lent if one.rank == 0]
    # Lost at the very end of the prompt, which takes 4 s again; back after one, asked for with the next long prompt.
    assert [one.start for one in again] == [0.0, pytest.approx(8.5)]


def test_what_has_no_room_goes_back_to_the_queue() -> None:
    requests = [Request(0, 8000, 101), Request(0, 8100, 101)]
    found = simulate(requests, setting(pool=1, lease=1, wear=lose({0: [8.602]})), Plain(most=9000, more=20_000))
    # Both prompts are done at 8.55; after ten steps the rank is lost, and the base has room for one.
    assert (found.evicted, found.replays) == (1, 2)
    alone = 8.602 + 8.011
    # The rank is back, and computes the other again, with the 11 tokens that it had said. It goes on with 89 steps.
    ends = alone + 0.5 + 8.111 / 2 + 89 * 0.005
    assert sorted(one.token_s for one in found.served) == pytest.approx(
        [(ends - 8.55) / 100, (ends + 0.005 - 4.5) / 100]
    )


def test_a_prompt_that_goes_back_leaves_the_others_to_be_replayed() -> None:
    requests = [Request(0, 8000, 101), Request(0, 8100, 101)]
    found = simulate(requests, setting(pool=1, lease=1, wear=lose({0: [6.0]})), Plain(most=9000, more=20_000))
    # The second prompt is abandoned after 1.5 s; the first one's 8,001 tokens are computed again, alone.
    began = 6.0 + 8.001
    assert (found.evicted, found.replays) == (1, 1)
    assert found.lost_s == pytest.approx(1.5 + 8.001)
    by = {one.request.prompt: one for one in found.served}
    assert by[8100].first_s == pytest.approx(began + 0.5 + 8.1 / 2)
    assert by[8000].token_s == pytest.approx((began + 0.5 + 8.1 / 2 + 100 * 0.005 - 4.5) / 100)


@dataclass(frozen=True)
class Roomy(Plain):
    """Each rank has as much room as the base."""

    def room(self, ranks: int) -> float:
        return 5000 * (1 + ranks)


def test_two_jobs_that_wait_for_ranks_do_not_wait_for_each_other() -> None:
    """The second has lost one of two and cannot go on with the other; the first has one, and needs two next."""
    requests = [Request(0, 10, 1), Request(0.1, 12_000, 5), Request(1.5, 6000, 3), Request(1.6, 10, 1)]
    requests.append(Request(1.7, 12_000, 2))
    found = simulate(requests, setting(jobs=2, pool=2, lease=2, wear=lose({0: [1.0]})), Roomy())
    assert len(found.served) == len(requests), f"{found.served}"
    assert found.evicted >= 1


def test_ranks_that_join() -> None:
    early = setting(jobs=2, pool=0, joins=((2.0, 4),))
    found = simulate([Request(1, 8000, 1), Request(3, 8000, 1)], early, Plain())
    assert [one.first_s for one in found.served] == pytest.approx([8.0, 0.5 + 4.0])
    assert found.unleased == 1
    # What has no room without them waits.
    found = simulate([Request(1, 8000, 1)], replace(early, jobs=1), Plain(most=5000))
    assert found.served[0].first_s == pytest.approx(1.0 + 0.5 + 4.0)


def test_fixed_ranks_are_never_lent_to_others() -> None:
    two = setting(jobs=2, lease=2, fixed=True)
    found = simulate([Request(0, 8000, 1), Request(0, 1000, 1), Request(1, 8000, 1)], two, Plain())
    assert {(one.job, one.start, one.stop) for one in found.lent} == {(0, 0.0, 5.0), (1, 0.0, 5.0)}
    assert found.leases == 0
    assert found.seconds == pytest.approx(5.0), "1 s alone, then 4 s with ranks, and no activation"


def test_chunks_let_steps_through() -> None:
    requests = [Request(0, 1000, 101), Request(1.0, 4000, 1)]
    found = simulate(requests, setting(pool=0, lease=0, chunk=1000), Plain())
    by = {one.request.prompt: one for one in found.served}
    assert by[4000].first_s == pytest.approx(4.0 + 3 * 0.01), "a step after each chunk but the last"
    assert by[1000].token_s == pytest.approx((4.0 + 100 * 0.01) / 100)
    whole = simulate(requests, setting(pool=0, lease=0), Plain())
    assert whole.seconds == pytest.approx(found.seconds), "nothing is lost or won"


def test_bases_and_ranks_laid_out_under_leaves() -> None:
    # 2 bases of 4 GPUs and 6 ranks, 8 GPUs a leaf: base, 3 ranks, a gap, base, 3 ranks.
    assert places(2, 4, 6, 8) == ([0, 1], [0, 0, 0, 1, 1, 1], 15)
    bases, ranks, _ = places(3, 2, 3, 4, first=5)
    assert bases == [1, 2, 3]
    assert len(ranks) == 3


def test_near_ranks_are_lent_first_and_far_ones_are_slower() -> None:
    leaves = setting(jobs=2, pool=8, lease=4, base=4, leaf=8)
    found = simulate([Request(0, 8000, 1), Request(0, 8000, 1)], leaves, Plain())
    assert [round(one.first_s, 2) for one in found.served] == [4.5, 4.5]
    owners = {one.rank // 4: one.job for one in found.lent}
    assert owners == {0: 0, 1: 1}, "each has the ranks of its own leaf"
    found = simulate([Request(0, 8000, 1)], replace(leaves, lease=8), Plain())
    assert found.seconds == pytest.approx(0.5 + 6.0), "half of them are under the other leaf"


def test_pools_are_apart() -> None:
    """Two pools for four jobs do what two clusters would do, each with half of the requests."""
    traffic = arrivals(2.0, 60, seed=3, long_part=0.3)
    wear = Wear(mtbf_s=50, restart_s=5, seed=1)
    both = simulate(traffic, setting(jobs=4, pools=2, lease=3, wear=wear, threshold=16_383), Plain())
    ordered = sorted(traffic)
    half = sorted(ordered[0::4] + ordered[1::4])
    apart = simulate(half, setting(jobs=2, lease=3, wear=wear, threshold=16_383), Plain())
    ours = [one for one in both.lent if one.job < 2]
    assert {one.rank for one in ours} <= set(range(4))
    assert {one.rank for one in both.lent if one.job > 1} <= set(range(4, 8))
    assert len(both.served) == len(traffic)
    assert sorted(ours) == sorted(apart.lent)
    assert apart.losses > 3


REQUESTS = st.lists(
    st.builds(Request, st.floats(0, 30), st.integers(1, 9000), st.integers(1, 60)), min_size=1, max_size=14
)
WEARS = st.builds(
    Wear,
    mtbf_s=st.floats(2.1, 40),
    restart_s=st.floats(0.1, 2),
    seed=st.integers(0, 99),
    detect_s=st.sampled_from([0.0, 0.1]),
)
BASES = st.builds(Wear, mtbf_s=st.floats(100, 400), restart_s=st.floats(0.1, 9), detect_s=st.sampled_from([0.0, 0.1]))
SETTINGS = st.builds(
    Setting,
    jobs=st.integers(2, 4),
    pool=st.integers(2, 5),
    lease=st.integers(0, 2),
    threshold=st.integers(0, 6000),
    pools=st.integers(1, 2),
    joins=st.sampled_from([(), ((3.0, 2), (9.0, 1))]),
    wear=WEARS,
    chunk=st.sampled_from([0, 700]),
    base=st.just(2),
    base_wear=BASES,
    waits=st.booleans(),
    leaf=st.sampled_from([3, 6, 1 << 40]),
)
SPEEDS = st.builds(Plain, most=st.sampled_from([6000, 9060, inf]), more=st.sampled_from([9060, 20_000, inf]))


def check(requests: list[Request], made: Setting, found: Outcome) -> None:
    served = [one.request for one in found.served]
    assert len(served) + found.refused == len(requests), f"{len(served)} served, {found.refused} refused"
    left = list(requests)
    for one in served:
        left.remove(one)  # each exactly once
    by_rank, by_job = defaultdict(list), defaultdict(list)
    for lent in found.lent:
        by_rank[lent.rank].append((lent.start, lent.stop))
        assert lent.stop >= lent.start
    for busy in found.busy:
        by_job[busy.job].append((busy.start, busy.stop))
    for spans in (*by_rank.values(), *by_job.values()):
        for (_, stop), (start, _) in pairwise(sorted(spans)):
            assert start >= stop, f"two at once: {sorted(spans)}"
    each = made.pool + sum(ranks for _, ranks in made.joins)
    for rank, spans in by_rank.items():
        late = [at for at, ranks in made.joins for _ in range(ranks)]
        place = rank % each - made.pool
        for up, lost in ups(made.wear, rank, late[place] if place >= 0 else 0.0, found.seconds + 1):
            spans = [span for span in spans if not (up <= span[0] and span[1] <= lost)]
        assert not spans, f"rank {rank} was lent while it was down: {spans}"
    assert all(one.first_s >= 0 and one.token_s >= 0 for one in found.served)
    assert sum(one.stop - one.start for one in found.busy) + 1e-6 >= found.lost_s >= 0


def ups(wear: Wear, rank: int, at: float, until: float) -> list[tuple[float, float]]:
    found = []
    for life in wear.lives(rank):
        found.append((at, at + life))
        at = at + life + wear.restart_s
        if at > until:
            return found
    raise AssertionError


@settings(max_examples=100, deadline=None)
@given(REQUESTS, SETTINGS, SPEEDS)
def test_each_request_is_served_once_and_each_rank_lent_to_one_job(requests, made: Setting, speeds: Plain) -> None:
    found = simulate(requests, made, speeds)
    check(requests, made, found)
    assert found == simulate(list(reversed(requests)), made, speeds), "the same seed gives the same"
    made = replace(made, wear=Wear(), base_wear=Wear())
    never = simulate(requests, made, speeds)
    rarely = replace(made, wear=Wear(mtbf_s=1e15, detect_s=3.0), base_wear=Wear(mtbf_s=1e15))
    assert never == simulate(requests, rarely, speeds), "nothing lost, nothing changed"
    check(requests, made, never)
    assert never.losses == never.base_losses == never.replays == never.evicted == never.lost_s == 0


@settings(max_examples=40, deadline=None)
@given(REQUESTS, SETTINGS)
def test_fixed_ranks_too(requests, made: Setting) -> None:
    fixed = replace(made, lease=min(made.lease, made.each), fixed=True)
    check(requests, fixed, simulate(requests, fixed, Plain()))


def test_ranks_are_lost_as_often_as_told() -> None:
    wear = Wear(mtbf_s=3600, restart_s=60, seed=5)
    found = [sum(1 for _ in ups(wear, rank, 0.0, 100 * 3600)) - 1 for rank in range(40)]
    assert sum(found) / (40 * 100) == pytest.approx(3600 / 3660, rel=0.05)
    assert len(set(found)) > 5, "ranks have streams of their own"


def test_a_pool_by_hand() -> None:
    pool = Pool(lose({1: [5.0, 1.0]}))
    for number in range(3):
        pool.join(number, leaf=number // 2, at_s=0.0)
    (far,) = pool.lease(0.0, 1, leaf=1)
    assert far.number == 2
    assert {one.number for one in pool.lease(5.5, 9, leaf=0)} == {0}, "the other is down"
    assert pool.next_up(5.5) == 6.0
    assert pool.next_up(7.5) == 8.0, "up from 6 to 7, and down again"
    assert pool.lease(8.0, 9, leaf=0)[0].number == 1
    assert pool.next_up(9.0) == inf


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"jobs": 0}, "0 jobs"),
        ({"lease": 5}, "leases of 5 of 4 pool ranks"),
        ({"pools": 2}, "2 pools for 1 jobs"),
        ({"wear": Wear(mtbf_s=0.0)}, "lost after 0 s"),
        ({"wear": Wear(mtbf_s=10.0, restart_s=20.0)}, "back after 20 s"),
        ({"base": 8, "leaf": 4}, "4 GPUs under a leaf switch, 8 of a base"),
        ({"joins": ((-1.0, 2),)}, "nothing below 0"),
        ({"jobs": 2, "lease": 3, "fixed": True}, "give at most 2"),
    ],
)
def test_what_cannot_be_simulated_is_told(wrong, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        setting(**wrong)
