"""File-system room: runs the cores' procedures on real locks, disks and sockets.

A procedure's steps run under its core's mutex, one at a time; what it yields runs outside it.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from whalefall.fs.core import effects
from whalefall.fs.core.effects import Procedure, Refused, Unreachable
from whalefall.fs.core.messages import Code
from whalefall.fs.core.replica import StorageNode
from whalefall.fs.storage.engine import ChunkEngine

__all__ = ["StorageDriver", "drive"]
T = TypeVar("T")
log = logging.getLogger("whalefall.fs")


def drive(
    procedure: Procedure[T], perform: Callable[[Any], Any], mutex: threading.RLock | None = None
) -> T:
    """Run a procedure to its end; `perform` does each effect and returns its result.

    Raises: Refused, Unreachable, as the procedure does.
    """
    mutex = mutex or threading.RLock()
    value: Any = None
    error: Exception | None = None
    while True:
        with mutex:
            try:
                effect = procedure.send(value) if error is None else procedure.throw(error)
            except StopIteration as stop:
                return stop.value  # type: ignore[no-any-return]
        value, error = None, None
        try:
            value = perform(effect)
        except (Refused, Unreachable) as failure:
            error = failure


class StorageDriver:
    """Performs the effects of a storage node.

    Args:
        call: sends a `Call` and returns (answer, payload), or raises Unreachable.
        engines: target → its engine.
    """

    def __init__(
        self,
        node: StorageNode,
        engines: dict[int, ChunkEngine],
        call: Callable[[effects.Call], tuple[Any, Any]],
    ) -> None:
        self.node, self.engines, self.call = node, engines, call
        self.mutex = threading.RLock()

    def run(self, procedure: Procedure[T]) -> T:
        """Run a procedure of this node to its end in this thread."""
        return drive(procedure, self.perform, self.mutex)

    def perform(self, effect: effects.Effect) -> Any:
        """Do one effect."""
        if isinstance(effect, effects.Call):
            return self.call(effect)
        if isinstance(effect, effects.Sleep):
            return time.sleep(effect.seconds)
        if isinstance(effect, effects.Acquire):
            return self._acquire(effect)
        target = effect.target  # type: ignore[union-attr]
        try:
            return self._on_disk(self.engines[target], effect)
        except (OSError, sqlite3.Error) as error:
            log.error("fs: the disk of target %d failed: %s; taken out", target, error)
            with self.mutex:
                self.node.targets[target].wanted_offline = True
                self.node.drop(self.node.targets[target])
            raise Refused(Code.DISK, f"the disk of target {target} failed: {error}") from None

    def _acquire(self, effect: effects.Acquire) -> None:
        granted = threading.Event()
        with self.mutex:
            self.node.targets[effect.target].locks.acquire(effect.chunk, granted.set)
        granted.wait()

    def _on_disk(self, engine: ChunkEngine, effect: Any) -> Any:
        if isinstance(effect, effects.Store):
            return engine.store(effect.update, effect.data, effect.version, effect.chain_version)
        if isinstance(effect, effects.Commit):
            return engine.commit(effect.chunk, effect.chain_version, effect.tag)
        if isinstance(effect, effects.Abort):
            return engine.abort(effect.chunk)
        if isinstance(effect, effects.Load):
            return engine.load(effect.chunk, effect.pending)
        if isinstance(effect, effects.Merge):
            return engine.merge(effect.tags)
        raise TypeError(f"no such effect: {effect!r}")
