"""Launch room: a group of processes — started together, watched, drained.

A process dies with its parent (the kernel kills it), so even `kill -9` of the parent leaves no
orphan. The kernel ties that to the *thread* that started it, so one thread that lives as long as
this process starts them all.
"""

from __future__ import annotations

import contextlib
import os
import queue
import re
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import IO, Any

import msgspec

from whalefall.errors import ConfigError, RankFailure
from whalefall.launch.task import Task

__all__ = ["Exit", "Group", "Member", "run"]

KEPT_LINES = 20
POLL_S = 0.02


@dataclass(frozen=True)
class Exit:
    """How a process ended.

    Attributes:
        name: its task's name.
        pid: its process id.
        code: exit status; negative: the signal that killed it.
        seconds: how long it ran.
        last_lines: the end of its stderr.
    """

    name: str
    pid: int
    code: int
    seconds: float
    last_lines: tuple[str, ...] = ()

    def __str__(self) -> str:
        how = f"exit status {self.code}" if self.code >= 0 else signal.Signals(-self.code).name
        text = f"{self.name} (pid {self.pid}) ended with {how} after {self.seconds:.1f} s"
        return "\n  ".join(
            [text + ("; its last lines:" if self.last_lines else ""), *self.last_lines]
        )


class Member:
    """One running (or ended) process of a group."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.began_s = time.monotonic()
        self.ended_s: float | None = None
        self.lines: deque[str] = deque(maxlen=KEPT_LINES)
        self.result = bytearray()
        reader, writer = os.pipe()
        try:
            log = open(task.log, "ab") if task.log else None  # noqa: SIM115 closed below
            try:
                self.process = subprocess.Popen(
                    task.command(os.getpid(), writer), env=task.environment(), pass_fds=(writer,),
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log or subprocess.PIPE,
                )  # fmt: skip
            finally:
                if log:
                    log.close()
        except BaseException:
            os.close(reader)
            raise
        finally:
            os.close(writer)
        self._threads = [threading.Thread(target=self._read_result, args=(reader,), daemon=True)]
        if self.process.stderr is not None:
            words = self.process.stderr
            self._threads.append(threading.Thread(target=self._read, args=(words,), daemon=True))
        for thread in self._threads:
            thread.start()

    def _read_result(self, descriptor: int) -> None:
        with open(descriptor, "rb") as pipe:
            self.result += pipe.read()

    def _read(self, words: IO[bytes]) -> None:
        with words:
            for line in words:
                self.lines.append(line.decode(errors="replace").rstrip())
                if self.task.heard is not None:
                    self.task.heard(self.task.name, self.lines[-1])

    def exit(self) -> Exit | None:
        """How it ended, or None while it runs."""
        code = self.process.poll()
        if code is None:
            return None
        if self.ended_s is None:
            self.ended_s = time.monotonic()
            for thread in self._threads:
                thread.join(1.0)  # a grandchild may hold the pipe open: do not wait for it
        seconds = self.ended_s - self.began_s
        return Exit(self.task.name, self.process.pid, code, seconds, tuple(self._last_words()))

    def _last_words(self) -> list[str]:
        if self.task.log is None:
            return list(self.lines)
        with contextlib.suppress(OSError), self.task.log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            return file.read().decode(errors="replace").splitlines()[-KEPT_LINES:]
        return []

    def value(self) -> Any:
        """What the function returned; None for a module."""
        return msgspec.json.decode(self.result) if self.result else None


class Group:
    """Processes that live and end together; as a context manager it drains at the end.

    Args:
        tasks: what to start, at once; their names must differ.
        grace_s: how long a process may take to end after SIGTERM before SIGKILL.
    Attributes:
        members: name → process.
    """

    def __init__(self, tasks: Sequence[Task] = (), grace_s: float = 5.0) -> None:
        self.grace_s = grace_s
        self.members: dict[str, Member] = {}
        try:
            for task in tasks:
                self.add(task)
        except BaseException:
            self.drain(0.0)
            raise

    def add(self, task: Task) -> Member:
        """Start one more process; the name of one that has ended may be used again.

        Raises: ConfigError if a process of that name runs.
        """
        old = self.members.get(task.name)
        if old is not None and old.exit() is None:
            raise ConfigError(f"launch: {task.name} runs already (pid {old.process.pid})")
        member = _in_starter(task)
        self.members[task.name] = member
        return member

    def exits(self) -> list[Exit]:
        """The processes that have ended so far."""
        return [e for m in self.members.values() if (e := m.exit()) is not None]

    def check(self) -> None:
        """Raise RankFailure with a readable report if any process has failed; never waits."""
        failed = [e for e in self.exits() if e.code]
        if failed:
            # A process that was told to stop, or died of a neighbour's death, is not the culprit.
            failed = _culprits_first(failed)
            report = "launch: " + "\n".join(str(e) for e in failed)
            raise RankFailure(report, rank=_rank(failed[0].name))

    def wait(self, timeout_s: float | None = None) -> list[Any]:
        """Wait until all have ended well; the results, in the order of the tasks.

        The first failure ends the others (SIGTERM, SIGKILL).

        Args:
            timeout_s: None: for ever.
        Raises: RankFailure naming the process that failed, or those that still ran at the timeout.
        """
        end = None if timeout_s is None else time.monotonic() + timeout_s
        try:
            while len(self.exits()) < len(self.members):
                self.check()
                if end is not None and time.monotonic() > end:
                    raise self._late(timeout_s)
                time.sleep(POLL_S)
            self.check()
        except BaseException:
            self.drain()
            raise
        return [member.value() for member in self.members.values()]

    def _late(self, timeout_s: float | None) -> RankFailure:
        late = [m for m in self.members.values() if m.exit() is None]
        lines = [f"launch: after {timeout_s} s these still ran:"]
        for member in late:
            lines.append(f"{member.task.name} (pid {member.process.pid})")
            lines += [f"  {line}" for line in member._last_words()]
        rank = _rank(late[0].task.name) if late else None
        return RankFailure("\n".join(lines), rank=rank)

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        """Send a signal to one process by name; nothing if it has ended."""
        self.members[name].process.send_signal(number)

    def drain(self, grace_s: float | None = None) -> list[Exit]:
        """Ask all to end (SIGTERM), kill (SIGKILL) those that have not after `grace_s`.

        Returns: how each ended.
        """
        alive = [m for m in self.members.values() if m.exit() is None]
        for member in alive:
            member.process.send_signal(signal.SIGTERM)
            member.process.send_signal(signal.SIGCONT)  # a stopped process cannot hear SIGTERM
        end = time.monotonic() + (self.grace_s if grace_s is None else grace_s)
        while any(m.exit() is None for m in alive) and time.monotonic() < end:
            time.sleep(POLL_S)
        for member in alive:
            member.process.kill()
            member.process.wait()
        return self.exits()

    def __enter__(self) -> Group:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.drain()


def run(tasks: Sequence[Task], timeout_s: float | None = None) -> list[Any]:
    """Start the tasks, wait for all, return their results in order.

    Raises: RankFailure as `Group.wait`.
    """
    with Group(tasks) as group:
        return group.wait(timeout_s)


def _rank(name: str) -> int | None:
    """The number in a task's name "rank 3"; None for tasks of other names."""
    found = re.fullmatch(r"rank (\d+)", name)
    return int(found[1]) if found else None


def _culprits_first(failed: list[Exit]) -> list[Exit]:
    return sorted(failed, key=lambda e: (e.code == -signal.SIGTERM, e.seconds))


_orders: queue.SimpleQueue[tuple[Task, Future[Member]]] = queue.SimpleQueue()
_starter: tuple[int, threading.Thread] | None = None
_starter_lock = threading.Lock()


def _in_starter(task: Task) -> Member:
    global _starter, _orders
    with _starter_lock:
        if _starter is None or _starter[0] != os.getpid():  # a fork has no threads of its parent
            _orders = queue.SimpleQueue()
            thread = threading.Thread(target=_serve, args=(_orders,), name="launch", daemon=True)
            thread.start()
            _starter = (os.getpid(), thread)
    future: Future[Member] = Future()
    _orders.put((task, future))
    return future.result()


def _serve(orders: queue.SimpleQueue[tuple[Task, Future[Member]]]) -> None:
    while True:
        task, future = orders.get()
        try:
            future.set_result(Member(task))
        except BaseException as error:
            future.set_exception(error)
