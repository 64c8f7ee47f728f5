"""Persistent worker processes on this host, started by `whalefall.launch`.

A worker runs one task at a time; one that dies is replaced, and its task reported as dead. None
outlives this process.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import socket
import tempfile
import time
from multiprocessing.connection import Connection, wait
from pathlib import Path

from whalefall.data.constants import DEFAULT_MAX_RETRY_COUNT
from whalefall.data.executor.base import Died, Done, Executor, Outcome, Raised, Work, pack
from whalefall.errors import RankFailure
from whalefall.launch import Exit, Group, Task

__all__ = ["LocalExecutor"]

START_TIMEOUT_S = 300.0  # for one worker to come up, however many are killed before


class Worker:
    """One process, the socket to it, and the task that it has."""

    def __init__(self, group: Group, name: str, folder: str, log: Path) -> None:
        self.name, self._group = name, group
        self.key: str | None = None
        path = os.path.join(folder, f"{name}.sock")
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(path)
        self.listener.listen(1)
        self.channel: Connection | None = None  # once it has come up
        self._member = group.add(
            Task(name, "whalefall.data.executor.worker", (path,), log=log, path=(os.getcwd(),))
        )

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._member.process.pid

    def accept(self) -> None:
        """Take the call of the process, which has come up."""
        accepted, _ = self.listener.accept()
        accepted.setblocking(True)
        self.channel = Connection(accepted.detach())
        self.listener.close()

    def exit(self) -> Exit | None:
        """How the process ended; None while it runs."""
        return self._member.exit()

    def death(self) -> str:
        """How the process ended; it is ended if it has not."""
        member = self._member
        end = time.monotonic() + 2
        while member.exit() is None and time.monotonic() < end:
            time.sleep(0.005)
        self.stop()
        code = member.process.returncode
        return f"killed by signal {-code}" if code < 0 else f"exit code {code}"

    def stop(self) -> None:
        """End the process."""
        if self.channel is not None:
            self.channel.close()
        self.listener.close()
        process = self._member.process
        process.kill()
        process.wait()


class LocalExecutor(Executor):
    """A pool of as many processes as there are slots.

    Args:
        slots: cores for tasks.
        log_dir: what the workers print goes to `worker-N.log` there.
    """

    def __init__(self, slots: int, log_dir: str) -> None:
        self.slots, self.log_dir = slots, Path(log_dir)
        self._folder = tempfile.mkdtemp(prefix="whalefall-")  # short: a socket's path has 107 bytes
        self._group = Group()
        self._started = 0
        self._workers = [self._spawn() for _ in range(slots)]

    def _spawn(self) -> Worker:
        name = f"worker-{self._started}"
        self._started += 1
        return Worker(self._group, name, self._folder, self.log_dir / f"{name}.log")

    @property
    def pids(self) -> list[int]:
        """The workers' process ids."""
        return [worker.pid for worker in self._workers]

    def start(self, work: Work) -> None:
        data = pack(work)
        while True:
            worker, channel = self._idle()
            try:
                channel.send_bytes(data)
            except OSError:  # it died while idle
                self._replace(worker)
                continue
            worker.key = work.task.key
            return

    def _idle(self) -> tuple[Worker, Connection]:
        """A worker without a task, the first that is up; those killed on the way are replaced.

        Raises: RankFailure where workers end by themselves, or none has come up in time.
        """
        end, failures = time.monotonic() + START_TIMEOUT_S, 0
        while True:
            idle = [worker for worker in self._workers if worker.key is None]
            for worker in idle:
                if worker.channel is not None:
                    return worker, worker.channel
            calling = wait([worker.listener for worker in idle], 0.2)
            for worker in idle:
                gone = worker.exit()
                failures += gone is not None and gone.code >= 0
                late = time.monotonic() > end
                if late or failures > DEFAULT_MAX_RETRY_COUNT:
                    raise RankFailure(f"data worker did not start: {gone or worker.name}")
                if worker.listener in calling:
                    worker.accept()
                elif gone is not None:
                    self._replace(worker)

    def wait(self, timeout_s: float) -> list[Outcome]:
        busy = {w.channel: w for w in self._workers if w.key is not None and w.channel}
        ready = wait(list(busy), timeout_s)
        return [self._outcome(busy[c], c) for c in ready if isinstance(c, Connection)]

    def _outcome(self, worker: Worker, channel: Connection) -> Outcome:
        key, worker.key = worker.key or "", None
        try:
            kind, *rest = pickle.loads(channel.recv_bytes())
        except (EOFError, OSError):
            return Died(key, self._replace(worker), worker.name)
        if kind == "done":
            return Done(key, rest[0], rest[1], worker.name)
        return Raised(key, rest[0], rest[1], worker.name)

    def _replace(self, worker: Worker) -> str:
        """Put a new worker in the place of a dead one; says how that one died."""
        reason = f"{worker.name} (pid {worker.pid}): {worker.death()}"
        self._workers[self._workers.index(worker)] = self._spawn()
        return reason

    def cancel(self) -> None:
        for index, worker in enumerate(self._workers):
            if worker.key is not None:
                worker.stop()
                self._workers[index] = self._spawn()

    def close(self) -> None:
        for worker in self._workers:
            with contextlib.suppress(OSError):
                worker.stop()
        self._workers = []
        shutil.rmtree(self._folder, ignore_errors=True)
