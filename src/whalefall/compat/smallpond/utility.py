"""smallpond.utility: an iterator read ahead by a thread, and a command's output line by line."""

from __future__ import annotations

import queue
import shlex
import subprocess
import threading
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Generic, TypeVar

__all__ = ["ConcurrentIter", "ConcurrentIterError", "execute_command"]

V = TypeVar("V")
END = object()


class ConcurrentIterError(Exception):
    """The iterable raised; the cause says what."""


class ConcurrentIter(Generic[V]):
    """Iterates in a thread of its own, at most `max_buffer_size` items ahead.

    Raises: ConcurrentIterError where the iterable raises.
    """

    def __init__(self, iterable: Iterable[V], max_buffer_size: int = 1) -> None:
        self._iterable = iterable
        self._items: queue.Queue[Any] = queue.Queue(max(1, max_buffer_size))
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._produce, daemon=True)

    def __enter__(self) -> ConcurrentIter[V]:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._stopped.set()
        self._thread.join()

    def _put(self, item: Any) -> bool:
        while not self._stopped.is_set():
            try:
                self._items.put(item, timeout=0.05)
                return True
            except queue.Full:
                continue
        return False

    def _produce(self) -> None:
        try:
            for item in self._iterable:
                if not self._put((item, None)):
                    return
            self._put((END, None))
        except BaseException as error:
            self._put((END, error))

    def __iter__(self) -> Iterator[V]:
        while True:
            item, error = self._items.get()
            if error is not None:
                raise ConcurrentIterError(f"{type(error).__name__}: {error}") from error
            if item is END:
                return
            yield item


def execute_command(
    cmd: str, env: Mapping[str, str] | None = None, shell: bool = False
) -> Iterator[str]:
    """Run a command; yields the lines of its output.

    Raises: subprocess.CalledProcessError where it ends with an error.
    """
    arguments: Any = cmd if shell else shlex.split(cmd)
    with subprocess.Popen(
        arguments, env=dict(env) if env else None, shell=shell, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        if process.stdout is not None:
            yield from process.stdout
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, arguments)
