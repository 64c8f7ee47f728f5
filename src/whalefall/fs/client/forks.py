"""File-system room: what of a client is made anew in a forked child.

A child has its parent's memory, but none of its threads, and shares its sockets: with the parent's
client id and counters its writes would be taken for repetitions of the parent's. So all of it is
made anew in the child at once, locks included, since a thread that is not there may hold them.
"""

from __future__ import annotations

import os
import weakref
from typing import Any, Protocol

__all__ = ["renew_in_children"]


class Renewable(Protocol):
    """Has state that a forked child must not share."""

    def after_fork(self) -> None:
        """Make it anew, in the child; waits for nothing and nobody."""


_live: weakref.WeakSet[Any] = weakref.WeakSet()


def renew_in_children(thing: Renewable) -> None:
    """From now on a forked child calls `thing.after_fork()` before anything else runs there."""
    _live.add(thing)


def _after_fork() -> None:
    for thing in list(_live):
        thing.after_fork()


os.register_at_fork(after_in_child=_after_fork)
