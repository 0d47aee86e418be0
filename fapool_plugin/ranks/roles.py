"""A launched process takes its place: a pool rank serves until the job is over, a base rank goes on without pool ranks.

Errors about settings are told once, not by every rank. It knows no framework and no script.
"""

from __future__ import annotations

import atexit
import functools
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType

import torch.distributed as dist

from fapool_plugin.config import FAPoolConfig, FAPoolConfigError
from fapool_plugin.pool.process import run_to_end
from fapool_plugin.ranks.launch import Launch, is_first, join
from fapool_plugin.ranks.supervise import supervise

_FAREWELL_S = 5.0
"""Rank 0, which hosts the store, waits this long at its end for all others to end, too."""
_FAILED_S = 1.5
_LAST_WORDS_S = 3.0
"""Others wait this long with an error of theirs: rank 0 may have the same to say, and a launcher ends all at the first
rank that fails."""


def take_role(settings: FAPoolConfig) -> Launch | None:
    """Joins the launch, if pool ranks are to come from it. Returns on base ranks only; a pool rank's process serves
    and ends with code 0, here.

    Raises:
        SystemExit: with code 2, the launch does not fit and rank 0 has said why.
    """
    launch = None
    if settings.enabled and settings.pool == "launch":
        try:
            launch, store = join(settings)
        except FAPoolConfigError as error:
            say_once(error, None)
            raise SystemExit(2) from None
        if launch.is_pool:
            run_to_end(functools.partial(supervise, launch, settings))
        atexit.register(_leave, launch, store)
    sys.excepthook = functools.partial(_say_settings_once, sys.excepthook, launch)
    return launch


def say_once(error: FAPoolConfigError, launch: Launch | None) -> None:
    """Prints an error once: by rank 0, or by another rank if rank 0 has nothing to say."""
    key = f"{launch.run}/told" if launch is not None else ""
    if not (is_first() if launch is None else launch.number == 0):
        time.sleep(_LAST_WORDS_S)
        with suppress(RuntimeError):
            if launch is None or launch.store(1.0).check([key]):
                return
    print(f"fa_pool: {error}", file=sys.stderr, flush=True)
    if launch is not None:
        with suppress(RuntimeError):
            launch.store(1.0).set(key, "1")


def _say_settings_once(
    default: Callable[..., object],
    launch: Launch | None,
    kind: type[BaseException],
    error: BaseException,
    trace: TracebackType | None,
) -> None:
    """In place of a traceback from every rank, one paragraph from one, if the error is about settings."""
    sys.last_value = error
    if isinstance(error, FAPoolConfigError):
        say_once(error, launch)
    else:
        default(kind, error, trace)


def _leave(launch: Launch, store: dist.TCPStore) -> None:
    """A base rank's last word: pool ranks end when all have said it. Rank 0, whose store it is, waits for all."""
    failed = getattr(sys, "last_value", None) is not None
    with suppress(RuntimeError):
        # One that fails ends the job: the others' work is not waited for then.
        store.add(launch.over_key, launch.base_ranks if failed else 1)
        deadline = time.monotonic() + (_FAILED_S if failed else _FAREWELL_S)
        for key, ranks in ((launch.over_key, launch.base_ranks), (launch.gone_key, launch.pool_ranks)):
            while launch.number == 0 and store.add(key, 0) < ranks and time.monotonic() < deadline:
                time.sleep(0.05)
