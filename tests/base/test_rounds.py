"""The rotation of blocks in flight: its order against a sorted list of (round, block), its errors, its state."""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fapool_plugin.base.rounds import run_rounds
from fapool_plugin.plan.shares import block_edges

pytestmark = pytest.mark.usefixtures("one_thread_each")

HandOver = Callable[[], None]


class Blocks:
    """Blocks that hand over so often each, and note what they do and how they end."""

    def __init__(self, hand_overs: list[int], failing: tuple[int, int] | None = None, error: type = ValueError) -> None:
        self.hand_overs, self.failing, self.error = hand_overs, failing, error
        self.steps: list[tuple[int, int]] = []
        self.closed: list[int] = []

    def run(self) -> list[str]:
        return run_rounds([self._block(index, times) for index, times in enumerate(self.hand_overs)])

    def _block(self, index: int, times: int) -> Callable[[HandOver], str]:
        def run(hand_over: HandOver) -> str:
            try:
                for turn in range(times + 1):
                    self.steps.append((turn, index))
                    if (index, turn) == self.failing:
                        raise self.error(f"block {index} in round {turn}")
                    if turn < times:
                        hand_over()
                return f"result {index}"
            finally:
                self.closed.append(index)

        return run

    def in_order(self) -> list[tuple[int, int]]:
        """All steps, round after round, and in each round block after block."""
        return sorted((turn, index) for index, times in enumerate(self.hand_overs) for turn in range(times + 1))


HAND_OVERS = st.lists(st.integers(0, 6), max_size=9)


@settings(deadline=None, max_examples=150)
@given(HAND_OVERS)
def test_blocks_take_turns_whatever_each_one_does(hand_overs: list[int]) -> None:
    blocks = Blocks(hand_overs)
    assert blocks.run() == [f"result {index}" for index in range(len(hand_overs))]
    assert blocks.steps == blocks.in_order()


@settings(deadline=None, max_examples=150)
@given(HAND_OVERS.filter(len), st.data(), st.sampled_from([ValueError, KeyboardInterrupt, SystemExit]))
def test_an_error_cancels_the_others_where_they_stood(hand_overs: list[int], data: st.DataObject, error: type) -> None:
    index = data.draw(st.integers(0, len(hand_overs) - 1))
    turn = data.draw(st.integers(0, hand_overs[index]))
    blocks = Blocks(hand_overs, (index, turn), error)
    with pytest.raises(error, match=f"block {index} in round {turn}"):
        blocks.run()
    before = [step for step in blocks.in_order() if step <= (turn, index)]
    assert blocks.steps == before, "something ran after the error"
    assert sorted(blocks.closed) == sorted({block for _, block in before}), "a block was left where it stood"


@pytest.mark.parametrize("how", ["raises", "hands over", "goes on"])
def test_a_cancelled_block_that_will_not_end_hides_neither_the_error_nor_the_others(how: str) -> None:
    ended: list[int] = []

    def unwilling(index: int) -> Callable[[HandOver], None]:
        def run(hand_over: HandOver) -> None:
            try:
                hand_over()
            except BaseException:
                if how == "goes on":
                    for _ in range(3):
                        hand_over()
                raise
            finally:
                ended.append(index)
                if how == "raises":
                    raise OSError("while it was cancelled")
                if how == "hands over":
                    hand_over()

        return run

    def fails(_: HandOver) -> None:
        raise ValueError("the first error")

    with pytest.raises(ValueError, match="the first error"):
        run_rounds([unwilling(0), unwilling(1), fails, unwilling(3)])
    assert ended == [0, 1]


def test_context_variables_are_each_blocks_own() -> None:
    variable: contextvars.ContextVar[Any] = contextvars.ContextVar("variable")
    variable.set("caller")

    def block(index: int) -> Callable[[HandOver], list[Any]]:
        def run(hand_over: HandOver) -> list[Any]:
            seen = [variable.get()]
            variable.set(index)
            for _ in range(2):
                hand_over()
                seen.append(variable.get())
            return seen

        return run

    assert run_rounds([block(index) for index in range(3)]) == [["caller", index, index] for index in range(3)]
    assert variable.get() == "caller"


@pytest.mark.parametrize("state", [nullcontext, torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("autocast", [False, True])
def test_torchs_state_is_the_callers(state: Callable[[], Any], autocast: bool) -> None:
    def now() -> tuple[bool, ...]:
        cast = torch.is_autocast_enabled("cpu")
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), cast, torch.get_num_threads() == 1

    def block(hand_over: HandOver) -> list[tuple[bool, ...]]:
        seen = [now()]
        hand_over()
        return [*seen, now()]

    with state(), torch.autocast("cpu", enabled=autocast):
        expected = now()
        assert run_rounds([block] * 3) == [[expected] * 2] * 3
        assert now() == expected


def test_rounds_inside_a_round() -> None:
    inner = Blocks([2, 1])

    def outer(hand_over: HandOver) -> list[str]:
        hand_over()
        return inner.run()

    assert run_rounds([outer, lambda _: ["other"]]) == [["result 0", "result 1"], ["other"]]
    assert inner.steps == inner.in_order()


@given(st.integers(0, 500), st.integers(1, 2000), st.integers(1, 12), st.integers(1, 70))
def test_edges_cover_the_positions_in_order(start: int, length: int, blocks: int, multiple: int) -> None:
    edges = block_edges(start, start + length, blocks, multiple)
    positions = [position for first, last in edges for position in range(first, last)]
    assert positions == list(range(start, start + length))
    assert len(edges) == min(blocks, len(range(0, length, multiple)))
    assert not [edge for edge in edges if (edge[0] - start) % multiple]
    units = [len(range(first, last, multiple)) for first, last in edges]
    assert max(units) - min(units) <= 1, f"blocks of {units} multiples"


@pytest.mark.parametrize("wrong", [(5, 5, 1, 1), (5, 4, 1, 1), (0, 5, 0, 1), (0, 5, 1, 0)])
def test_edges_of_nothing_are_refused(wrong: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match=rf"\[{wrong[0]}, {wrong[1]}\) cannot be cut into {wrong[2]} blocks"):
        block_edges(*wrong)
