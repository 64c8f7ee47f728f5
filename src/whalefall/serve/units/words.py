"""What ranks log: one line each on their stderr, which the gateway's own log passes on."""

from __future__ import annotations

import logging
import re

__all__ = ["pass_on", "speak"]

_FORMAT = "%(levelname)s %(name)s: %(message)s"
_LINE = re.compile(r"(WARNING|ERROR|CRITICAL) (whalefall[\w.]*): (.*)")


def speak() -> None:
    """In a rank: log to stderr in the form that `pass_on` knows."""
    logging.basicConfig(level=logging.WARNING, format=_FORMAT)


def pass_on(rank: str, line: str) -> None:
    """In the gateway: log what a rank logged; other lines (a traceback) are left to the report.

    Args:
        rank: who said it ("prefill-0 rank 1").
        line: of its stderr.
    """
    found = _LINE.fullmatch(line)
    if found is not None:
        level, logger, text = found.groups()
        logging.getLogger(logger).log(getattr(logging, level), "%s: %s", rank, text)
