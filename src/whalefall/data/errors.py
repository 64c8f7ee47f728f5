"""What the data room refuses, each with the node, partition or query that it is about."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from whalefall.errors import ConfigError, WhalefallError

__all__ = [
    "PartitionError",
    "PlanError",
    "SqlError",
    "TaskFailed",
    "WorkerLost",
    "WriteError",
    "failure_like",
    "within",
    "writing",
]

REMEDIES = {
    errno.ENOSPC: "free space there, or choose another place",
    errno.EDQUOT: "free space there, or choose another place",
    errno.EACCES: "choose a folder that this user may write to",
    errno.EPERM: "choose a folder that this user may write to",
    errno.EROFS: "choose a folder that can be written to",
    errno.ENOENT: "make the folder first",
    errno.EISDIR: "it is a folder, wanted a file",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EEXIST: "a part of the path is a file, not a folder",
}


class PlanError(ConfigError, AssertionError):
    """A plan makes no sense: inputs whose partitions do not fit, an argument of the wrong kind."""


class PartitionError(WhalefallError, AssertionError):
    """A row cannot be given to a partition: its key is NULL or out of range."""


class SqlError(WhalefallError, RuntimeError):
    """DuckDB refused a query; the message holds the query."""


class TaskFailed(WhalefallError, RuntimeError):
    """A function of the user's raised; the message holds its traceback.

    What is raised is a subclass that also derives from the user's exception class, so that
    `except ZeroDivisionError` catches it.
    """


class WorkerLost(WhalefallError, RuntimeError):
    """A task's process died more often than the job allows."""


class WriteError(WhalefallError, OSError):
    """A result cannot be written: a full disk, no permission, a store that refuses."""


@contextmanager
def writing(target: str) -> Iterator[None]:
    """Make a `WriteError` that names `target` of what the operating system refuses."""
    try:
        yield
    except OSError as error:
        if isinstance(error, WhalefallError):
            raise
        reason = error.strerror or str(error).splitlines()[0]
        remedy = REMEDIES.get(error.errno or 0, "what was there before is untouched")
        made = WriteError(f"{target}: not written: {reason}; {remedy}")
        made.errno = error.errno
        raise made from None


@contextmanager
def within(place: str) -> Iterator[None]:
    """Put the task and partition before our errors that do not begin with one."""
    try:
        yield
    except WhalefallError as error:
        if str(error).startswith((place.split(" (")[0], "SQL node", "exchange node")):
            raise
        try:
            made = type(error)(f"{place}: {error}")
        except TypeError:  # a class that takes more than a message
            raise error from None
        if isinstance(error, OSError) and isinstance(made, OSError):
            made.errno = error.errno
        raise made from None


def failure_like(message: str, cause: BaseException | None) -> TaskFailed:
    """A `TaskFailed` that is also an instance of `cause`'s class, where Python can build one."""
    if not isinstance(cause, Exception) or isinstance(cause, TaskFailed):
        return TaskFailed(message)  # never a SystemExit, which would end the script in silence
    kind = type(cause)
    try:
        merged = type(f"TaskFailed({kind.__name__})", (TaskFailed, kind), {"__init__": _plain_init})
        error: TaskFailed = merged(message)
    except TypeError:  # two layouts that do not mix, as OSError's and another's
        error = TaskFailed(message)
    error.__cause__ = cause
    return error


def _plain_init(self: BaseException, message: str) -> None:
    Exception.__init__(self, message)
