"""What a pool rank wishes of the job that has its lease, in the answers to that job's heartbeats.

    base ── BEAT ──────────────────────────────────▶ rank
    base ◀── BEAT: jobs wait, it leaves, it was recalled ── rank      acted on between two forwards

Heartbeats go out whether anything is asked or not, so a job that does nothing hears of it, too. Knows headers only.
"""

from __future__ import annotations

from typing import NamedTuple

from fapool_plugin.wire.messages import Header, Op, Status


class Wishes(NamedTuple):
    """What a pool rank says with every heartbeat of the lease that the other end has, or had."""

    waiting: int = 0
    """Jobs that asked for the rank lately, and were refused."""
    least: int = 0
    """The fewest ranks that one of them has."""
    leaving: int = 0
    """1: the rank leaves as soon as the lease is given back."""
    recalled: int = 0
    """The token of a lease that was taken from the other end, 0 for none."""

    @classmethod
    def of(cls, beat: Header) -> Wishes:
        """Said by an answer to BEAT."""
        return cls(max(0, beat.number), max(0, beat.peers), beat.extra, beat.token)

    def beat(self, steps: int) -> Header:
        """The answer to BEAT that says so."""
        said = {"number": self.waiting, "peers": self.least, "extra": self.leaving, "token": self.recalled}
        return Header(op=Op.BEAT, status=Status.OK, clock=steps, **said)
