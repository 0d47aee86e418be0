"""Turns of a benchmark: A B C A B C, so that whatever else happens on the machine happens to all.

Answers are compared before times are: a wrong one of ours ends the benchmark, a peer loses its place. Knows contenders
by what they answer, not by what they are.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from fapool_plugin.tools.bench.contenders import Contender, ContenderError, Team
from fapool_plugin.tools.bench.report import Result

Progress = Callable[[str, int, int | None], object]
"""Called with what is being done, how much of it is done, and of how much (None: not known)."""

TOLERANCE = 1e-3
"""Largest difference of two answers: absolute, and relative to the largest value where that is below 1."""


class WrongAnswerError(RuntimeError):
    """A contender computed something else than the first one did, or not in the way that it stands for."""


def compare(groups: list[list[Contender]], runs: int, progress: Progress) -> list[Result]:
    """Starts every group's processes, gives every contender ``runs`` turns, ends the processes. Those that start
    anew run in their turns only, by themselves.

    Args:
        groups: contenders that share their processes; the first contender of all is the one that answers are
            compared with.
        progress: told what is being done.

    Raises:
        ContenderError: one that is no peer could not start, or broke down.
        WrongAnswerError: one that is no peer computed something else, or not where it should.
    """
    results = [Result(contender) for group in groups for contender in group]
    of = {id(result.contender): result for result in results}
    reference: dict[str, Any] | None = None
    with tempfile.TemporaryDirectory(prefix="fapool-bench-") as folder, ExitStack() as stack:
        teams = [Team(group, Path(folder) / str(at)) for at, group in enumerate(groups)]
        for team in teams:
            if team.contenders[0].starts_anew:
                continue
            progress(f"starting {team.label}", 0, None)
            stack.enter_context(team)
            _or_refused(team, [of[id(contender)] for contender in team.contenders], team.start)
        stage, turns = f"{runs} turn(s) of {len(results)} contenders", 0
        for _ in range(runs):
            for team in teams:
                for contender in team.contenders:
                    progress(stage, turns, runs * len(results))
                    turns += 1
                    result = of[id(contender)]
                    if result.refused is not None:
                        continue
                    answer = _or_refused(team, [result], partial(_turn, team, contender))
                    if answer is None:
                        continue
                    reference = reference or answer["checksum"]
                    _keep(result, answer, reference)
                    if result.refused is not None:
                        team.close()
    return results


def _turn(team: Team, contender: Contender) -> dict[str, Any]:
    """As :meth:`Team.turn`."""
    if not contender.starts_anew:
        return team.turn(contender)
    with team:
        team.start()
        return team.turn(contender)


def _or_refused(team: Team, results: list[Result], work: Callable[[], Any]) -> Any:
    """What ``work`` returns; where a peer breaks down in it, its reason is kept and its processes end."""
    try:
        return work()
    except ContenderError as error:
        team.close()
        if not all(result.contender.is_peer for result in results):
            raise ContenderError(f"{team.label}: {error}") from None
        for result in results:
            result.refused = str(error)
        return None


def _keep(result: Result, answer: dict[str, Any], reference: dict[str, Any]) -> None:
    """Takes a turn's numbers if they are those of a right answer. Raises WrongAnswerError unless it is a peer's."""
    label, facts = result.contender.label, answer["facts"]
    wrong = difference(answer["checksum"], reference)
    pooled, outside = facts.get("pooled_calls", 0), facts.get("local_forwards", 0)
    if facts.get("faults"):
        wrong = f"it lost {facts['faults']} pool rank(s)"
    elif result.contender.claims == "pooled" and (outside or not pooled):
        wrong = f"{pooled} attention calls were pooled, and {outside} forwards were local"
    elif result.contender.claims == "local" and pooled:
        wrong = f"{pooled} attention calls were pooled"
    if wrong is None:
        result.seconds.append(answer["seconds"])
        result.facts.append(facts)
    elif result.contender.is_peer:
        result.refused = wrong
    else:
        raise WrongAnswerError(f"{label}: {wrong}; nothing is reported")


def difference(checksum: dict[str, Any], reference: dict[str, Any]) -> str | None:
    """How two answers differ by more than :data:`TOLERANCE`, if they do."""
    scale = max(abs(value) for value in reference["values"])
    allowed = TOLERANCE * min(1.0, scale)
    pairs = zip(checksum["values"], reference["values"], strict=True)
    # Written so that a value that is no number counts as wrong.
    apart = [abs(value - expected) for value, expected in pairs if not abs(value - expected) <= allowed]
    if apart:
        return f"its answer differs from the first contender's by {max(apart):.3g}, {allowed:.3g} is allowed"
    if checksum["argmax"] != reference["argmax"] and reference["margin"] > 2 * allowed:
        return f"its largest value is at {checksum['argmax']}, the first contender's at {reference['argmax']}"
    return None
