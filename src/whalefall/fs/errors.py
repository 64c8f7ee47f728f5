"""File-system room: what can go wrong, by class and by errno."""

from __future__ import annotations

import errno
import os

from whalefall.errors import WhalefallError

__all__ = ["ClusterError", "FsError", "Stale", "StorageError", "fs_error"]


class FsError(WhalefallError, OSError):
    """A file operation was refused; `errno` says how, as POSIX would."""


class NotFound(FsError, FileNotFoundError):
    """No such file or directory."""


class Exists(FsError, FileExistsError):
    """The name is taken."""


class NotADirectory(FsError, NotADirectoryError):
    """A directory is needed here."""


class IsADirectory(FsError, IsADirectoryError):
    """A directory is in the way."""


class NoPermission(FsError, PermissionError):
    """The user may not do this."""


class FileTooLarge(FsError):
    """No file of its chunk size reaches so far."""


class Stale(FsError):
    """The file was removed, and its content collected, while it was read without being open."""


class StorageError(WhalefallError, OSError):
    """Data could not be read or written; says which target, what was tried, for how long."""


class ClusterError(WhalefallError, ConnectionError):
    """The cluster cannot be reached, or does not know us."""


_CLASSES: dict[int, type[FsError]] = {
    errno.ENOENT: NotFound,
    errno.EEXIST: Exists,
    errno.ENOTDIR: NotADirectory,
    errno.EISDIR: IsADirectory,
    errno.EACCES: NoPermission,
    errno.EPERM: NoPermission,
    errno.EFBIG: FileTooLarge,
    errno.ESTALE: Stale,
}


def fs_error(number: int, path: str, detail: str = "") -> FsError:
    """The error for an errno at a path; `detail` says what would be right."""
    text = os.strerror(number) + (f": {detail}" if detail else "")
    return _CLASSES.get(number, FsError)(number, text, path)
