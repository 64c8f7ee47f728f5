"""File-system room: finds bits that rotted and puts good ones in their place.

Reads every chunk in the background, a little at a time; what does not match its checksum (found
here, by a client's read, or by a write or a recovery that needs it) is fetched from another replica
and written to a fresh slot.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Callable
from typing import Any

from whalefall.fs.core.effects import Acquire, Refused
from whalefall.fs.core.messages import Code
from whalefall.fs.driver import StorageDriver
from whalefall.fs.storage.engine import ChunkEngine

__all__ = ["Scrubber"]
log = logging.getLogger("whalefall.fs")
RETRY_S = 0.05
Fetch = Callable[[int, bytes], tuple[Any, bytes] | None]


class Scrubber:
    """Checks the chunks of a node's targets, and mends them.

    Args:
        fetch: (target, chunk) → (version, bytes) of another replica, or None.
        every_s: seconds a pass over all chunks should take; 0: only what is reported.
    """

    def __init__(
        self, driver: StorageDriver, engines: dict[int, ChunkEngine], fetch: Fetch, every_s: float
    ) -> None:
        self.driver, self.engines, self.fetch, self.every_s = driver, engines, fetch, every_s
        self.checked = self.damaged = self.repaired = 0
        self._bad: queue.SimpleQueue[tuple[int, bytes] | None] = queue.SimpleQueue()
        self._waiting: set[tuple[int, bytes]] = set()
        self._counted: set[tuple[int, bytes]] = set()
        self._mutex = threading.Lock()
        self._stop = threading.Event()

    def start(self) -> None:
        """Begin mending, and passing if asked for."""
        threading.Thread(target=self._mend, name="mend", daemon=True).start()
        if self.every_s:
            threading.Thread(target=self._passes, name="scrub", daemon=True).start()

    def stop(self) -> None:
        """End after the chunk at hand."""
        self._stop.set()
        self._bad.put(None)

    def report(self, target: int, chunk: bytes) -> None:
        """A chunk whose committed content did not match its checksum; counted once until mended."""
        item = (target, chunk)
        with self._mutex:
            if item not in self._counted:
                self._counted.add(item)
                self.damaged += 1
                log.error("fs: chunk %s of target %d is damaged", chunk.hex(), target)
            if item not in self._waiting:
                self._waiting.add(item)
                self._bad.put(item)

    def counters(self) -> dict[str, int]:
        """Chunks checked, found damaged, repaired since the start."""
        return {"checked": self.checked, "damaged": self.damaged, "repaired": self.repaired}

    def start_pass(self) -> int:
        """Check every chunk now, in the background; returns how many there are."""
        count = sum(len(engine.entries()) for engine in self.engines.values())
        threading.Thread(target=self._one_pass, args=(0.0,), name="scrub", daemon=True).start()
        return count

    def _passes(self) -> None:
        while not self._stop.is_set():
            chunks = sum(len(engine.entries()) for engine in list(self.engines.values()))
            self._one_pass(self.every_s / max(chunks, 1))
            self._stop.wait(min(self.every_s, 60))

    def _one_pass(self, pause_s: float) -> None:
        with self._mutex:  # another replica may be back, or the chunk written anew or gone
            again = self._counted - self._waiting
            self._waiting |= again
        for item in again:
            self._bad.put(item)
        for engine in list(self.engines.values()):
            for chunk in list(engine.entries()):
                if self._stop.wait(pause_s):
                    return
                with contextlib.suppress(Refused):  # the engine reports what is damaged
                    engine.load(chunk, pending=False)
                self.checked += 1  # after it: whoever waits for the count sees what was found

    def _mend(self) -> None:
        while (item := self._bad.get()) is not None:
            if self._stop.is_set():
                return
            fixed = False
            try:
                fixed = self._mend_one(*item)
            except Refused as refusal:
                log.error("fs: could not mend chunk %s: %s", item[1].hex(), refusal)
            except Exception:
                log.exception("fs: could not mend chunk %s", item[1].hex())
            with self._mutex:
                self._waiting.discard(item)
                if fixed:
                    self._counted.discard(item)
            if fixed:
                self.repaired += 1
                log.warning("fs: mended chunk %s of target %d", item[1].hex(), item[0])
            else:
                self._stop.wait(RETRY_S)

    def _mend_one(self, target: int, chunk: bytes) -> bool:
        """Under the chunk's lock alone: other nodes, and other chunks, are served meanwhile."""
        locks = self.driver.node.targets[target].locks
        self.driver.perform(Acquire(target, chunk))
        try:
            if self._healed(target, chunk):
                return True
            found = self.fetch(target, chunk)
            if found is None:
                raise Refused(Code.CORRUPT, "no other replica could give it")
            # `mend` takes only bytes of the very length and checksum that are recorded here.
            return self.engines[target].mend(chunk, found[1])
        finally:
            with self.driver.mutex:
                locks.release(chunk)

    def _healed(self, target: int, chunk: bytes) -> bool:
        """Whether it was written anew, or removed, since it was reported."""
        try:
            self.engines[target].load(chunk, pending=False)
        except Refused as refusal:
            return refusal.code is Code.NOT_FOUND
        return True
