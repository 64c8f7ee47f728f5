"""A spinner on a terminal for work that turns out to take longer than a second."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

__all__ = ["announce"]


@contextmanager
def announce(text: str, stream: TextIO, after_s: float = 1.0) -> Iterator[None]:
    """Show `text` with a spinner on `stream` once the block has run for `after_s` seconds.

    Nothing is written where the stream is no terminal, so logs and pipes stay clean.
    """
    if not stream.isatty():
        yield
        return
    done = threading.Event()

    def spin() -> None:
        if done.wait(after_s):
            return
        for mark in itertools.cycle("|/-\\"):
            stream.write(f"\r{text} {mark}")
            stream.flush()
            if done.wait(0.1):
                break
        stream.write("\r" + " " * (len(text) + 2) + "\r")
        stream.flush()

    thread = threading.Thread(target=spin, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
