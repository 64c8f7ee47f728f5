"""Runs an execution plan: the scheduler decides, an executor runs, results are committed.

A finished task's folder is renamed from staging to its place and noted in `results/{key}.json`; a
later run with the same job root finds it there, if the files still have the sizes and times noted.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from whalefall.data import dataset as datasets
from whalefall.data import storage
from whalefall.data.dataset import DataSet
from whalefall.data.errors import TaskFailed, WorkerLost, failure_like, within, writing
from whalefall.data.executor.base import Died, Done, Executor, Outcome, Raised, Work, perform
from whalefall.data.parquet import ParquetDataSet
from whalefall.data.paths import is_url, stamp
from whalefall.data.planner import ExecutionPlan
from whalefall.data.runtime import RuntimeContext
from whalefall.data.scheduler import Scheduler, Start
from whalefall.data.tasks.base import Task, resolve_input
from whalefall.errors import WhalefallError

__all__ = ["Job", "Span"]

log = logging.getLogger(__name__)
KINDS = {kind.__name__: kind for kind in (
    ParquetDataSet, datasets.FileSet, datasets.CsvDataSet, datasets.JsonDataSet
)}  # fmt: skip


@dataclass(frozen=True)
class Span:
    """One task's run, for the timeline: seconds since the job began."""

    label: str
    worker: str
    begin_s: float
    end_s: float
    attempt: int


@dataclass
class Job:
    """What all plans of one session share: the executor and the results so far.

    Attributes:
        executed: how many tasks other processes have run to the end.
        failed: whether a plan has failed.
        watch: called with (finished, all, label) as tasks finish.
    """

    runtime_ctx: RuntimeContext
    executor: Executor
    results: dict[str, list[DataSet]] = field(default_factory=dict)
    spans: list[Span] = field(default_factory=list)
    executed: int = 0
    failed: bool = False
    watch: Any = None

    def __post_init__(self) -> None:
        self._epoch = time.perf_counter()
        self._begun: dict[str, float] = {}
        self._warned = False
        self._evidence: dict[str, Any] = {}  # of results that others can take away

    # -- results on disk
    def known(self, task: Task) -> bool:
        """Whether a task's result is there, in this process or from an earlier run."""
        if task.key in self.results:
            left = self._evidence.get(task.key)
            return left is None or left == task.evidence(self.results[task.key])
        if not task.kept:
            return False
        try:
            with open(self._note(task), encoding="utf-8") as file:
                noted = json.load(file)
        except (FileNotFoundError, json.JSONDecodeError):
            return False
        outputs = [KINDS[d["kind"]].revive(d) for d in noted["outputs"]]
        files = stamps(outputs)
        if None in files.values() or noted.get("files") != files:
            return False
        self.results[task.key] = outputs
        return True

    def _note(self, task: Task) -> str:
        return os.path.join(self.runtime_ctx.results_root, f"{task.key}.json")

    def _home(self, task: Task) -> str:
        name = f"{task.label}-{task.key[:12]}"
        if task.output_name or task.output_path:
            root = task.output_path or self.runtime_ctx.output_root
            return os.path.join(root, task.output_name or "", name)
        return os.path.join(self.runtime_ctx.results_root, name)

    def _commit(self, task: Task, outputs: list[DataSet], staging: str) -> None:
        """Move a finished attempt's files to their place and note the result."""
        if os.path.isdir(staging):
            home = self._home(task)
            with writing(home):
                os.makedirs(os.path.dirname(home), exist_ok=True)
                shutil.rmtree(home, ignore_errors=True)
                os.rename(staging, home)
            outputs = [d.relocated(staging, home) for d in outputs]
        self.results[task.key] = outputs
        self._evidence[task.key] = task.evidence(outputs)
        if task.kept and all(type(d).__name__ in KINDS for d in outputs):
            described = [d.describe() for d in outputs]
            note = {"task": task.label, "outputs": described, "files": stamps(outputs)}
            storage.write_atomic(self._note(task), json.dumps(note), sync=False)

    def forget(self, keys: Iterable[str]) -> None:
        """Drop results, so that their tasks run again."""
        for key in keys:
            self.results.pop(key, None)
            path = os.path.join(self.runtime_ctx.results_root, f"{key}.json")
            if os.path.exists(path):
                os.remove(path)

    # -- running
    def run(self, plan: ExecutionPlan) -> ExecutionPlan:
        """Run what of a plan has no result yet.

        Raises: TaskFailed, SqlError, PartitionError or MissingError from a task; WorkerLost when a
            task's process died too often.
        """
        plan.results = self.results
        needed = self._needed(plan)
        tasks = {task.key: task for task in plan.tasks if task.key in needed}
        self._cap(tasks.values())
        state = Scheduler(
            list(tasks),
            {k: [r.task.key for refs in t.inputs for r in refs] for k, t in tasks.items()},
            {k: 1 if t.in_driver else int(t.cpu_limit) for k, t in tasks.items()},
            self.executor.slots,
        )
        try:
            while not state.finished:
                self._start_all(state, tasks)
                if state.running and not state.finished:
                    for outcome in self.executor.wait(1.0):
                        self._take(outcome, state, tasks)
        except BaseException:
            self.failed = True
            self.executor.cancel()
            raise
        return plan

    def computed(self, plan: ExecutionPlan) -> bool:
        """Whether nothing is left to do but to name and divide files."""
        needed = self._needed(plan)
        return not any(t.kept or t.is_sink for t in plan.tasks if t.key in needed)

    def _needed(self, plan: ExecutionPlan) -> set[str]:
        """The tasks without a result that the plan's result depends on."""
        needed: set[str] = set()
        stack = [ref.task for ref in plan.group.all_refs]
        while stack:
            task = stack.pop()
            if task.key in needed or self.known(task):
                continue
            needed.add(task.key)
            stack += [ref.task for refs in task.inputs for ref in refs]
        return needed

    def _cap(self, tasks: Iterable[Task]) -> None:
        """Lower requests above the machine to it, with one warning a session."""
        memory = self.runtime_ctx.usable_memory_size
        for task in tasks:
            if task.cpu_limit <= self.executor.slots and (task.memory_limit or 0) <= memory:
                continue
            if not self._warned:
                log.warning(
                    "%s asks for %s CPUs and %s bytes; this machine has %s and %s, which it gets",
                    task.label, task.cpu_limit, task.memory_limit, self.executor.slots, memory,
                )  # fmt: skip
                self._warned = True
            task.cpu_limit = min(task.cpu_limit, self.executor.slots)
            task.memory_limit = min(task.memory_limit or memory, memory)

    def _start_all(self, state: Scheduler, tasks: dict[str, Task]) -> None:
        """Start what can start; the driver's own small tasks run here and now."""
        while True:
            starts = state.starts()
            if not starts:
                return
            ran = False
            for start in starts:
                task = tasks[start.key]
                work = self._work(task, start)
                self._begun[task.key] = time.perf_counter() - self._epoch
                if task.in_driver:
                    self._run_here(work)
                    state.succeeded(task.key)
                    ran = True
                else:
                    self.executor.start(work)
            if not ran:
                return

    def _work(self, task: Task, start: Start) -> Work:
        ctx = self.runtime_ctx
        name = f"{task.label}-{task.key[:12]}.{start.attempt}"
        staging, temp = os.path.join(ctx.staging_root, name), os.path.join(ctx.temp_root, name)
        shutil.rmtree(staging, ignore_errors=True)
        inputs = [resolve_input(refs, self.results) for refs in task.inputs]
        return Work(task, inputs, ctx, start.attempt, staging, temp)

    def _run_here(self, work: Work) -> None:
        try:
            with within(place_of(work.task)):
                outputs = perform(work)
                self._commit(work.task, outputs, work.output_dir)
        except BaseException:
            for folder in (work.output_dir, work.temp_dir):
                shutil.rmtree(folder, ignore_errors=True)
            raise

    def _take(self, outcome: Outcome, state: Scheduler, tasks: dict[str, Task]) -> None:
        task = tasks[outcome.key]
        attempt = state.running[task.key]
        now = time.perf_counter() - self._epoch
        self.spans.append(
            Span(task.label, outcome.worker, self._begun[task.key], now, attempt)
        )  # fmt: skip
        work = self._work_dirs(task, attempt)
        if isinstance(outcome, Done):
            self._commit(task, outcome.outputs, work[0])
            shutil.rmtree(work[1], ignore_errors=True)
            self.executed += 1
            state.succeeded(task.key)
            if self.watch is not None:
                self.watch(len(state.done), len(state.order), task.label)
            return
        for folder in work:
            shutil.rmtree(folder, ignore_errors=True)
        if isinstance(outcome, Died):
            log.warning("%s: %s", task.label, outcome.reason)
            state.died(task.key, outcome.reason)
            if state.failed:
                raise WorkerLost(f"{task.label}: {state.failed.reason}")
            return
        state.raised(task.key, outcome.text)
        with within(place_of(task)):
            raise task_error(task, outcome)

    def _work_dirs(self, task: Task, attempt: int) -> tuple[str, str]:
        name = f"{task.label}-{task.key[:12]}.{attempt}"
        return (
            os.path.join(self.runtime_ctx.staging_root, name),
            os.path.join(self.runtime_ctx.temp_root, name),
        )


def stamps(outputs: Iterable[DataSet]) -> dict[str, Any]:
    """What tells whether a result's local files have changed: path → size and time; None: gone."""
    paths = {path for dataset in outputs for path in dataset.resolved_paths}
    return {path: stamp(path)[1:] or None for path in paths if not is_url(path)}


def task_error(task: Task, outcome: Raised) -> WhalefallError:
    """What the driver raises: our own errors as they are, the user's with its traceback."""
    if isinstance(outcome.error, WhalefallError) and not isinstance(outcome.error, TaskFailed):
        return outcome.error
    return failure_like(f"{place_of(task)} failed\n{outcome.text}", outcome.error)


def place_of(task: Task) -> str:
    """The task and its partition, for an error."""
    where = ", ".join(str(info) for info in task.partition_key) or "the only partition"
    return f"{task.label} ({where})"
