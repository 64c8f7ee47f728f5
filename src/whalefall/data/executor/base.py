"""What an executor does: starts a task in some process, and says later how it ended."""

from __future__ import annotations

import sys
import traceback
import types
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cloudpickle

from whalefall.data.dataset import DataSet
from whalefall.data.errors import PlanError
from whalefall.data.fingerprint import _installed
from whalefall.data.runtime import RuntimeContext
from whalefall.data.tasks.base import Task

__all__ = ["Died", "Done", "Executor", "Outcome", "Raised", "Work", "pack", "perform"]


@dataclass(frozen=True)
class Work:
    """One attempt at a task.

    Attributes:
        output_dir: an empty folder of its own, made when it writes.
    """

    task: Task
    inputs: Sequence[DataSet]
    runtime_ctx: RuntimeContext
    attempt: int
    output_dir: str
    temp_dir: str


@dataclass(frozen=True)
class Done:
    """It finished: its outputs, seconds, and which worker did it."""

    key: str
    outputs: list[DataSet]
    seconds: float
    worker: str = ""


@dataclass(frozen=True)
class Raised:
    """Its code raised."""

    key: str
    error: BaseException | None
    text: str
    worker: str = ""


@dataclass(frozen=True)
class Died:
    """Its process is gone."""

    key: str
    reason: str
    worker: str = ""


Outcome = Done | Raised | Died


class Executor(ABC):
    """Runs tasks in other processes, each of which may die without harm to the rest.

    Attributes:
        slots: how many cores there are for tasks.
    """

    slots: int

    @abstractmethod
    def start(self, work: Work) -> None:
        """Start an attempt. At most `slots` cores are asked for at once.

        Raises: PlanError for a task that cannot be pickled.
        """

    @abstractmethod
    def wait(self, timeout_s: float) -> list[Outcome]:
        """What ended; blocks until something has, or the time is over."""

    @abstractmethod
    def cancel(self) -> None:
        """Stop all attempts; none of them is heard of again."""

    @abstractmethod
    def close(self) -> None:
        """Stop everything."""


LOGURU_HINT = (
    "HINT: DO NOT use externally imported loguru logger in your task. Please import it within the "
    "task."
)


def pack(work: Work) -> bytes:
    """An attempt as bytes for another process of the job's own.

    Functions of modules that are not installed travel by value, so the other process need not find
    the script; by name where a global of theirs cannot travel.

    Raises: PlanError for what cannot be pickled either way.
    """
    spec = Work(
        work.task.detached(), work.inputs, work.runtime_ctx.for_worker(), work.attempt,
        work.output_dir, work.temp_dir,
    )  # fmt: skip
    by_value = []
    for module in _user_modules(work.task):
        try:
            cloudpickle.register_pickle_by_value(module)
            by_value.append(module)
        except ValueError:
            continue
    try:
        return bytes(cloudpickle.dumps(spec))
    except Exception as error:
        reason = error
    finally:
        for module in by_value:
            cloudpickle.unregister_pickle_by_value(module)
    try:
        if by_value:
            return bytes(cloudpickle.dumps(spec))
    except Exception as error:
        reason = error
    raise PlanError(f"Can't pickle task {work.task.label}: {reason}. {LOGURU_HINT}") from reason


def _user_modules(task: Task) -> list[types.ModuleType]:
    """Modules, other than installed ones and `__main__`, that define what the task calls."""
    names = {type(task).__module__}
    stack = [getattr(task, "function", None), *getattr(task, "udfs", ())]
    met: list[Any] = []  # held, so that no id is given out twice
    while stack:
        item = stack.pop()
        if item is None or any(item is other for other in met):
            continue
        met.append(item)
        names.add(getattr(item, "__module__", None) or type(item).__module__)
        names.add(type(item).__module__)
        stack += [getattr(item, name, None) for name in ("func", "__func__", "__self__")]
        if not hasattr(item, "__self__"):  # one of our wrappers around a row function
            stack.append(vars(item).get("function") if hasattr(item, "__dict__") else None)
        stack += [arg for arg in getattr(item, "args", ()) if callable(arg)]
    found = [sys.modules[n] for n in names if n in sys.modules]
    return [
        m for m in found
        if m.__name__ != "__main__"
        and m.__name__.split(".")[0] != "whalefall"
        and not _installed(m.__name__)
    ]  # fmt: skip


def perform(work: Work) -> list[DataSet]:
    """Run an attempt in this process."""
    work.task.prepare(work.runtime_ctx, work.attempt, work.output_dir, work.temp_dir)
    return work.task.run(list(work.inputs))


def portable_error(error: BaseException) -> tuple[BaseException | None, str]:
    """An exception that can travel (or None), and its traceback's text from the user's code on."""
    frames = traceback.extract_tb(error.__traceback__)
    inner = [f for f in frames if "/whalefall/data/" not in f.filename] or list(frames)[-1:]
    last = traceback.format_exception_only(error)
    if isinstance(error, SystemExit):
        last = [f"the function called exit({error.code!r}); it is to return or to raise"]
    text = "".join(
        ["Traceback (most recent call last):\n", *traceback.format_list(inner), *last]
    ).rstrip()
    try:
        import pickle

        bare: Any = error.with_traceback(None)
        bare.__cause__ = bare.__context__ = None
        pickle.loads(cloudpickle.dumps(bare))
        return bare, text
    except Exception:
        return None, text
