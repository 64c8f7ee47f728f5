"""File-system room: one owner a folder — whoever serves it holds a lock for as long as it lives.

What a process has loaded from a folder is the truth only while nobody else writes there. The kernel
frees the lock with the process, however it ends.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

from whalefall.errors import ConfigError

__all__ = ["FolderLock"]

POLL_S = 0.02


class FolderLock:
    """An exclusive lock on a folder, held until `release` or the process's end.

    Args:
        folder: made where missing.
        name: the file in it that is locked; it holds the owner's process id.
        wait_s: how long to wait for an owner that is about to end.

    Raises: ConfigError, naming the owner.
    """

    def __init__(self, folder: Path, name: str = "lock", wait_s: float = 0.0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # Never removed: a lock on a file that has lost its name keeps nobody out.
        self._file = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self._take(folder, time.monotonic() + wait_s)
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, str(os.getpid()).encode(), 0)
        except BaseException:
            os.close(self._file)
            raise

    def _take(self, folder: Path, end_s: float) -> None:
        while True:
            try:
                return fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= end_s:
                    owner = os.pread(self._file, 32, 0).decode(errors="replace") or "(unknown)"
                    raise ConfigError(
                        f"fs: {folder} is in use by pid {owner}; stop it first"
                    ) from None
            except OSError as error:
                raise ConfigError(
                    f"fs: {folder} cannot be locked ({error.strerror}); wanted a file system with "
                    "locks"
                ) from None
            time.sleep(POLL_S)

    def release(self) -> None:
        """Let others in; may be called again."""
        if self._file >= 0:
            fcntl.flock(self._file, fcntl.LOCK_UN)  # a fork may have the descriptor open still
            os.close(self._file)
            self._file = -1
