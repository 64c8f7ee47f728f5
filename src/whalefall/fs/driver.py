"""File-system room: runs the cores' procedures on real locks, disks and sockets.

A procedure's steps run under its core's mutex, one at a time; what it yields runs outside it.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from whalefall.fs.core import effects
from whalefall.fs.core.effects import Procedure, Refused, Unreachable
from whalefall.fs.core.messages import Code, Many, ManyDone, Update
from whalefall.fs.core.replica import StorageNode
from whalefall.fs.storage.engine import ChunkEngine

__all__ = ["StorageDriver", "attempt", "call_all", "drive", "drive_all"]
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


def drive_all(
    procedures: Sequence[Procedure[T]],
    perform_all: Callable[[list[Any]], list[Any]],
    mutex: threading.RLock,
) -> list[T | Exception]:
    """Run procedures in step: what they ask for in a round is done by one `perform_all`.

    Args:
        perform_all: does each effect of a list and returns its result or its exception.
    Returns: each one's result, or the Refused or Unreachable that ended it.
    """
    results: list[Any] = [None] * len(procedures)
    outcomes: dict[int, Any] = dict.fromkeys(range(len(procedures)))
    try:
        while outcomes:
            asked: dict[int, Any] = {}
            with mutex:
                for index, outcome in outcomes.items():
                    procedure, failed = procedures[index], isinstance(outcome, Exception)
                    try:
                        asked[index] = (
                            procedure.throw(outcome) if failed else procedure.send(outcome)
                        )
                    except StopIteration as stop:
                        results[index] = stop.value
                    except (Refused, Unreachable) as failure:
                        results[index] = failure
            done = perform_all(list(asked.values())) if asked else []
            outcomes = dict(zip(asked, done, strict=True))
    finally:
        with mutex:
            for procedure in procedures:
                procedure.close()  # gives back what it holds, if something unforeseen ended this
    return results


def attempt(perform: Callable[[Any], Any], effect: Any) -> Any:
    """What an effect gives, or the Refused or Unreachable that it ends with."""
    try:
        return perform(effect)
    except (Refused, Unreachable) as failure:
        return failure


def call_all(calls: Sequence[effects.Call], call: Callable[[effects.Call], Any]) -> list[Any]:
    """Make calls, all updates for one node as one call; each one's (answer, data) or exception."""
    results: dict[int, Any] = {}
    groups: dict[int, list[int]] = {}
    for index, one in enumerate(calls):
        key = one.node if isinstance(one.message, Update) else -1 - index
        groups.setdefault(key, []).append(index)
    for group in groups.values():
        if len(group) == 1:
            results[group[0]] = attempt(call, calls[group[0]])
            continue
        mine = [calls[index] for index in group]
        message = Many([c.message for c in mine], [len(c.data) for c in mine])
        data = [c.data for c in mine if len(c.data)]
        timeout_s = max(c.timeout_s for c in mine)
        answer = attempt(call, effects.Call(mine[0].node, message, data, timeout_s))
        if not isinstance(answer, Exception) and isinstance(answer[0], ManyDone):
            results |= zip(group, ((reply, b"") for reply in answer[0].replies), strict=True)
        else:
            results |= dict.fromkeys(group, answer)
    return [results[index] for index in range(len(calls))]


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
        if isinstance(effect, effects.Together):
            return drive_all(effect.procedures, self._perform_all, self.mutex)
        if isinstance(effect, effects.Sleep):
            return time.sleep(effect.seconds)
        if isinstance(effect, effects.Acquire):
            return self._acquire(effect)
        target = effect.target  # type: ignore[union-attr]
        return self._or_out(target, lambda: self._on_disk(self.engines[target], effect))

    def _or_out(self, target: int, work: Callable[[], T]) -> T:
        """Do something with a target's disk; if the disk fails the target is taken out."""
        try:
            return work()
        except (OSError, sqlite3.Error) as error:
            log.error("fs: the disk of target %d failed: %s; taken out", target, error)
            with self.mutex:
                self.node.targets[target].wanted_offline = True
                self.node.drop(self.node.targets[target])
            raise Refused(Code.DISK, f"the disk of target {target} failed: {error}") from None

    def _perform_all(self, asked: list[effects.Effect]) -> list[Any]:
        """Do the effects of procedures that run together; each one's result or exception."""
        results: dict[int, Any] = {}
        kinds: dict[type, list[int]] = {}
        for index, effect in enumerate(asked):
            kinds.setdefault(type(effect), []).append(index)
        for kind, mine in kinds.items():
            group: list[Any] = [asked[index] for index in mine]
            if kind is effects.Call:
                results |= zip(mine, call_all(group, self.call), strict=True)
            elif kind is effects.Store:
                results |= zip(mine, self._store_all(group), strict=True)
            elif kind is effects.Acquire:
                # In one order everywhere: see `Together`.
                for index in sorted(mine, key=lambda i: (asked[i].target, asked[i].chunk)):  # type: ignore[union-attr]
                    results[index] = self.perform(asked[index])
            elif kind is effects.Sleep:
                time.sleep(max(effect.seconds for effect in group))
                results |= dict.fromkeys(mine)
            else:
                results |= ((i, attempt(self.perform, asked[i])) for i in mine)
        return [results[index] for index in range(len(asked))]

    def _store_all(self, stores: list[effects.Store]) -> list[Any]:
        """Store what goes to one target together; each one's result or exception."""
        results: dict[int, Any] = {}
        for target in {store.target for store in stores}:
            mine = [index for index, store in enumerate(stores) if store.target == target]
            group = [stores[index] for index in mine]
            engine = self.engines[target]
            done = attempt(lambda g: self._or_out(target, lambda: engine.store_all(g)), group)  # noqa: B023
            results |= dict.fromkeys(mine, done) if isinstance(done, Exception) else zip(
                mine, done, strict=True
            )  # fmt: skip
        return [results[index] for index in range(len(stores))]

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
        if isinstance(effect, effects.Forget):
            return engine.forget()
        raise TypeError(f"no such effect: {effect!r}")
