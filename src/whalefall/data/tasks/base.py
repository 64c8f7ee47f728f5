"""The task interface, and how a task names its inputs."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from whalefall.data.constants import (
    DEFAULT_MAX_RETRY_COUNT,
    PARQUET_METADATA_KEY_PREFIX,
    TOPLEVEL_DIMENSION,
)
from whalefall.data.dataset import DataSet, PartitionedDataSet
from whalefall.data.duck import forget_remote
from whalefall.data.errors import PlanError
from whalefall.data.fingerprint import Memo, fingerprint
from whalefall.data.parquet import ParquetDataSet
from whalefall.data.runtime import PartitionInfo, PartitionKey, RuntimeContext
from whalefall.data.template import fragment

__all__ = ["Input", "Ref", "Task", "resolve_input"]


@dataclass(frozen=True)
class Projection:
    """Columns to read of a data set; None leaves them as they are."""

    columns: tuple[str, ...] | None = None
    generated_columns: tuple[str, ...] | None = None
    union_by_name: bool | None = None

    def apply(self, dataset: DataSet) -> DataSet:
        """The data set, read with these columns."""
        import copy

        made = copy.copy(dataset)
        if self.columns is not None:
            made.columns = [fragment(item, "columns") for item in self.columns]
        if self.generated_columns is not None:
            if not isinstance(made, ParquetDataSet):
                raise PlanError(f"{dataset}: only Parquet files have {self.generated_columns}")
            made.generated_columns = list(self.generated_columns)
        if self.union_by_name is not None:
            made._union_by_name = self.union_by_name
        return made


@dataclass(frozen=True)
class Ref:
    """Output number `index` of a task, perhaps projected."""

    task: Task
    index: int = 0
    projection: Projection | None = None


# What one input of a task is made of: the data sets named, merged in this order.
Input = tuple[Ref, ...]


def resolve_input(refs: Input, results: Mapping[str, Sequence[DataSet]]) -> DataSet:
    """The data set that an input stands for, from the finished tasks' results by key."""
    parts: list[DataSet] = []
    for ref in refs:
        dataset = results[ref.task.key][ref.index]
        parts.append(ref.projection.apply(dataset) if ref.projection else dataset)
    if not parts:
        raise PlanError("a task has an input without any data set")
    if len({type(part) for part in parts}) > 1:
        return PartitionedDataSet(parts)
    return DataSet.merge(parts)


class Task:
    """One unit of work.

    Attributes:
        in_driver: whether it is so small that the driver runs it itself.
        kept: whether its result is noted on disk, for a re-run to find.
        is_sink: whether it writes where others write too.
        num_outputs: how many data sets `run` returns.
        key: 32 hex digits: hash of what it does and of its inputs' keys.
        label: kind, node and partition, for people; the head of its files' names.
        partition_key: the partition it works on.
        inputs: what it reads; empty in the copy that a worker gets.
    """

    in_driver: ClassVar[bool] = False
    kept: ClassVar[bool] = True
    is_sink: ClassVar[bool] = False

    def __init__(
        self,
        node: Any,
        inputs: Sequence[Input],
        partition_key: PartitionKey = (),
        num_outputs: int = 1,
    ) -> None:
        self.node_id = node.id
        self.inputs = list(inputs)
        self.partition_key = tuple(sorted(partition_key))
        self.num_outputs = num_outputs
        self.output_name: str | None = node.output_name
        self.output_path: str | None = node.output_path
        self.cpu_limit: int = node.cpu_limit
        self.gpu_limit: float = node.gpu_limit
        self.memory_limit: int | None = node.memory_limit
        index = ".".join(str(info.index) for info in self.partition_key) or "0"
        self.label = f"{type(self).__name__}.{node.id!s}.{index}"
        self.key = ""
        # set by `prepare`, where it runs
        self.retry_count = 0
        self.runtime_output_abspath = ""
        self.temp_abspath = ""
        self.runtime_ctx: RuntimeContext | None = None
        self.perf_metrics: Counter[str] = Counter()
        self._lap = 0.0

    def content(self) -> Sequence[Any]:
        """What, beside class, partition and inputs, decides the result."""
        return ()

    def seal(self, memo: Memo) -> None:
        """Compute `key`; the inputs' tasks have theirs."""
        read = [[(r.task.key, r.index, r.projection) for r in refs] for refs in self.inputs]
        infos = [(i.dimension, i.index, i.npartitions) for i in self.partition_key]
        self.key = fingerprint(
            type(self).__qualname__, self.output_name, self.output_path, infos, self.num_outputs,
            read, [memo.short(item) for item in self.content()],
        )  # fmt: skip

    def evidence(self, outputs: Sequence[DataSet]) -> Any:
        """What tells, compared with itself later, whether a result is still as the task left it.

        None where it lies in the job's own folders, which nobody else writes to.
        """
        return None

    def detached(self) -> Task:
        """A copy without links to other tasks, to send to a worker."""
        import copy

        made = copy.copy(self)
        made.inputs = []
        return made

    # -- in the process that runs it
    def prepare(
        self, runtime_ctx: RuntimeContext, retry_count: int, output_dir: str, temp_dir: str
    ) -> None:
        """Say where the task runs and writes; called before `run`."""
        self.runtime_ctx, self.retry_count = runtime_ctx, retry_count
        self.runtime_output_abspath, self.temp_abspath = output_dir, temp_dir
        runtime_ctx.task = self
        forget_remote()
        self._lap = time.perf_counter()

    def run(self, inputs: list[DataSet]) -> list[DataSet]:
        """Do the work.

        Args:
            inputs: one data set an input.
        Returns: `num_outputs` data sets, whose new files lie in `runtime_output_abspath`.
        """
        raise NotImplementedError(type(self).__name__)

    # -- what user functions may ask of `runtime_ctx.task`
    @property
    def output_filename(self) -> str:
        """The head of the names of the task's files."""
        return f"{self.output_name}-{self.label}" if self.output_name else self.label

    @property
    def partition_infos(self) -> tuple[PartitionInfo, ...]:
        """The partition, never empty."""
        return self.partition_key or (PartitionInfo(),)

    @property
    def partition_infos_as_dict(self) -> dict[str, int]:
        """Dimension → index."""
        return {info.dimension: info.index for info in self.partition_infos}

    @property
    def local_rank(self) -> int:
        """Always 0: GPUs are not divided among tasks."""
        return 0

    @property
    def local_gpu_ranks(self) -> list[int]:
        """The GPUs given to the task: none."""
        return []

    @property
    def random_seed(self) -> int:
        """A number that depends on the job's seed and the task's key alone."""
        seed = self.runtime_ctx.random_seed if self.runtime_ctx else b""
        return int(fingerprint(seed, self.key)[:8], 16)

    @property
    def python_random_gen(self) -> random.Random:
        """A generator seeded for this task (the same one each time it is asked for)."""
        if not hasattr(self, "_random"):
            self._random = random.Random(self.random_seed)
        return self._random

    @property
    def numpy_random_gen(self) -> Any:
        """As `python_random_gen`, numpy's."""
        if not hasattr(self, "_numpy_random"):
            import numpy as np

            self._numpy_random = np.random.default_rng(self.random_seed)
        return self._numpy_random

    def random_uint32(self) -> int:
        """A random 32-bit number."""
        return self.python_random_gen.randint(0, 0xFFFFFFFF)

    def random_float(self) -> float:
        """A random number in [0, 1)."""
        return self.python_random_gen.random()

    def add_elapsed_time(self, metric_name: str | None = None) -> None:
        """Add the seconds since the last call to `perf_metrics[metric_name]`."""
        now = time.perf_counter()
        if metric_name is not None:
            self.perf_metrics[metric_name] += now - self._lap  # type: ignore[assignment]
        self._lap = now

    def inject_fault(self) -> None:
        """Kill this process, with the job's `fault_inject_prob`; the last attempt is spared."""
        chance = random.Random(f"{self.random_seed} {self.retry_count}").random()
        prob = self.runtime_ctx.fault_inject_prob if self.runtime_ctx else 0.0
        if chance < prob and self.retry_count < DEFAULT_MAX_RETRY_COUNT:
            os.kill(os.getpid(), signal.SIGKILL)

    def parquet_metadata(self) -> dict[str, str]:
        """What the task notes in its Parquet files: `LoadPartitionedDataSetNode` reads it."""
        notes = {"__task_key__": self.key, "__node_id__": str(self.node_id)}
        for info in self.partition_key:
            if info.dimension != TOPLEVEL_DIMENSION:
                notes[info.dimension] = str(info.index)
        return {PARQUET_METADATA_KEY_PREFIX + name: value for name, value in notes.items()}

    # -- DuckDB
    def connect(self, private: bool = False) -> Any:
        """A connection with the task's threads, memory and spill folder.

        Args:
            private: to a database of its own, for queries that leave more than temporary views.
        """
        from whalefall.data import duck

        os.makedirs(self.temp_abspath, exist_ok=True)
        memory = int(self.memory_limit * 0.9) if self.memory_limit else None
        opened = duck.connect if private else duck.task_cursor
        return opened(max(1, int(self.cpu_limit)), memory, self.temp_abspath)

    def prepare_connection(self, conn: Any) -> None:
        """Give a connection of the caller's own the task's limits."""
        from whalefall.data.duck import limit

        memory = int(self.memory_limit * 0.9) if self.memory_limit else None
        limit(conn, max(1, int(self.cpu_limit)), memory, self.temp_abspath)

    def create_input_views(self, conn: Any, inputs: Sequence[DataSet]) -> list[str]:
        """Make a view of each input; returns their names."""
        from whalefall.data.reading import reading

        views = []
        for index, dataset in enumerate(inputs):
            name = f"__input_{index}"
            with reading(dataset):
                source = dataset.sql_query_fragment(conn=conn)
                statement = f"create or replace temp view {name} as select * from {source}"
                conn.execute(statement).fetchall()
            views.append(name)
        return views
