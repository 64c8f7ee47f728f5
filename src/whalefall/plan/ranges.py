"""Ranges that several of the room's options share."""

from __future__ import annotations

from whalefall.options import within

__all__ = ["DOLLARS", "HOURS", "SHARE", "TOKENS"]

# Far above whatever exists, far below where float arithmetic overflows.
DOLLARS = within(0, 1e9)
HOURS = within(0, 1e12)
TOKENS = within(0, 1e21)
SHARE = within(0, 1)
