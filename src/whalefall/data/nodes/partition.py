"""Nodes that divide a data set by naming files or row ranges: no row moves."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from whalefall.arguments import whole
from whalefall.data.constants import DATA_PARTITION_COLUMN_NAME
from whalefall.data.context import Context
from whalefall.data.dataset import DataSet, PartitionedDataSet
from whalefall.data.errors import PlanError
from whalefall.data.nodes.base import ConsolidateNode, Node, TaskGroup
from whalefall.data.parquet import ParquetDataSet
from whalefall.data.runtime import PartitionInfo, PartitionKey
from whalefall.data.tasks.arrow import PartitionFunctionTask
from whalefall.data.tasks.base import Input, Ref, Task
from whalefall.data.tasks.source import DivideTask

if TYPE_CHECKING:
    from whalefall.data.planner import Planner

__all__ = [
    "DataSetPartitionNode",
    "EvenlyDistributedPartitionNode",
    "LoadPartitionedDataSetNode",
    "PartitionNode",
    "RepeatPartitionNode",
    "UserDefinedPartitionNode",
    "UserPartitionedDataSourceNode",
]


class PartitionNode(Node):
    """Divides into `npartitions` along `dimension`.

    Not nested, all inputs are divided anew, and earlier dimensions are gone. Nested, each input
    partition is divided, which adds a dimension.
    """

    max_num_producer_tasks = 100

    def __init__(
        self,
        ctx: Context,
        input_deps: Sequence[Node],
        npartitions: int,
        dimension: str | None = None,
        nested: bool = False,
        output_name: str | None = None,
        output_path: str | None = None,
        cpu_limit: int | None = None,
        memory_limit: int | None = None,
    ) -> None:
        super().__init__(
            ctx, input_deps, output_name, output_path, cpu_limit, memory_limit=memory_limit
        )
        kind = type(self).__name__
        self.npartitions = whole(f"{kind}: npartitions", npartitions, 1, error=PlanError)
        self.dimension = dimension or DATA_PARTITION_COLUMN_NAME
        self.nested = nested
        if nested and self.dimension in self.input_deps[0].dimensions:
            raise PlanError(f"{kind}: the input is already partitioned along {self.dimension!r}")

    def describe(self) -> str:
        return f"{self.npartitions} along {self.dimension}{', nested' if self.nested else ''}"

    @property
    def dimensions(self) -> tuple[str, ...]:
        outer = self.input_deps[0].dimensions if self.nested else ()
        return tuple(sorted({*outer, self.dimension}))

    @property
    def num_partitions(self) -> int:
        return self.npartitions * (super().num_partitions if self.nested else 1)

    def info(self, index: int) -> PartitionInfo:
        """Part number `index` of this node's dimension."""
        return PartitionInfo(index, self.npartitions, self.dimension)

    def producers(self, planner: Planner, refs: Input) -> Sequence[Input]:
        """How the input of a non-nested division is spread over producer tasks; here, one."""
        return [refs]

    def make_producer(self, refs: Input, key: PartitionKey) -> Task:
        """The task that divides one input into `npartitions` outputs."""
        raise NotImplementedError(type(self).__name__)

    def expand(self, planner: Planner, groups: Sequence[TaskGroup]) -> TaskGroup:
        made = TaskGroup(self.dimensions)
        if self.nested:
            jobs = [(key, [groups[0].parts[key]]) for key in sorted(groups[0].parts)]
        else:
            merged = tuple(ref for group in groups for ref in group.all_refs)
            jobs = [((), list(self.producers(planner, merged)))]
        for key, inputs in jobs:
            tasks = [planner.add(self.make_producer(refs, key)) for refs in inputs]
            for index in range(self.npartitions):
                part = tuple(sorted((*key, self.info(index))))
                made.parts[part] = tuple(Ref(task, index) for task in tasks)
        return made


class EvenlyDistributedPartitionNode(PartitionNode):
    """Contiguous runs of whole files, or row ranges, of nearly equal number.

    Args:
        partition_by_rows: by rows (Parquet only).
        random_shuffle: of the files (or row ranges) first.
    """

    def __init__(
        self,
        ctx: Context,
        input_deps: Sequence[Node],
        npartitions: int,
        dimension: str | None = None,
        nested: bool = False,
        *,
        partition_by_rows: bool = False,
        random_shuffle: bool = False,
        output_name: str | None = None,
        output_path: str | None = None,
        cpu_limit: int = 1,
        memory_limit: int | None = None,
    ) -> None:
        super().__init__(
            ctx, input_deps, npartitions, dimension, nested, output_name, output_path, cpu_limit,
            memory_limit,
        )  # fmt: skip
        self.partition_by_rows, self.random_shuffle = partition_by_rows, random_shuffle

    def describe(self) -> str:
        return super().describe() + (" by rows" if self.partition_by_rows else " by files")

    def make_producer(self, refs: Input, key: PartitionKey) -> Task:
        name = "partition_by_rows" if self.partition_by_rows else "partition_by_files"
        divide = functools.partial(_divide, name, self.npartitions, self.random_shuffle)
        tag = (name, int(self.id) if self.random_shuffle else None)
        return DivideTask(self, [refs], self.npartitions, divide, tag, key)


def _divide(method: str, count: int, shuffle: bool, dataset: DataSet) -> list[DataSet]:
    parts: list[DataSet] = getattr(dataset, method)(count, random_shuffle=shuffle)
    return parts


class RepeatPartitionNode(PartitionNode):
    """Every partition is the whole input."""

    def __init__(
        self,
        ctx: Context,
        input_deps: Sequence[Node],
        npartitions: int,
        dimension: str,
        cpu_limit: int = 1,
        memory_limit: int | None = None,
    ) -> None:
        super().__init__(
            ctx, input_deps, npartitions, dimension, cpu_limit=cpu_limit, memory_limit=memory_limit
        )

    def make_producer(self, refs: Input, key: PartitionKey) -> Task:
        count = self.npartitions
        return DivideTask(self, [refs], count, lambda d: [d] * count, ("repeat",), key)


class LoadPartitionedDataSetNode(PartitionNode):
    """Gives files to the partitions that they were written for.

    Args:
        data_partition_column: the dimension; read from a file's metadata, else its column.
        hive_partitioning: read it from the folder's name.
    """

    def __init__(
        self,
        ctx: Context,
        input_deps: Sequence[Node],
        npartitions: int,
        dimension: str | None = None,
        nested: bool = False,
        data_partition_column: str | None = None,
        hive_partitioning: bool = False,
        cpu_limit: int = 1,
        memory_limit: int | None = None,
    ) -> None:
        super().__init__(
            ctx, input_deps, npartitions, dimension or data_partition_column, nested,
            cpu_limit=cpu_limit, memory_limit=memory_limit,
        )  # fmt: skip
        self.column = data_partition_column or self.dimension
        self.hive_partitioning = hive_partitioning

    def make_producer(self, refs: Input, key: PartitionKey) -> Task:
        divide = functools.partial(_load, self.npartitions, self.column, self.hive_partitioning)
        tag = ("load", self.column, self.hive_partitioning)
        return DivideTask(self, [refs], self.npartitions, divide, tag, key)


def _load(count: int, column: str, hive: bool, dataset: DataSet) -> list[DataSet]:
    if not isinstance(dataset, ParquetDataSet):
        raise PlanError(f"{dataset}: only Parquet files say which partition they are of")
    return dataset.load_partitioned_datasets(count, column, hive)


class UserDefinedPartitionNode(PartitionNode):
    """Override `partition(runtime_ctx, dataset)` → one data set a partition."""

    def __init__(
        self,
        ctx: Context,
        input_deps: Sequence[Node],
        npartitions: int,
        dimension: str | None = None,
        nested: bool = False,
        cpu_limit: int = 1,
        memory_limit: int | None = None,
    ) -> None:
        super().__init__(
            ctx, input_deps, npartitions, dimension, nested,
            cpu_limit=cpu_limit, memory_limit=memory_limit,
        )  # fmt: skip

    def partition(self, runtime_ctx: Any, dataset: DataSet) -> Sequence[DataSet]:
        """Divide the data set."""
        raise NotImplementedError(f"{type(self).__name__}.partition")

    def make_producer(self, refs: Input, key: PartitionKey) -> Task:
        function: Callable[..., Any] = self.slim_copy().partition
        return PartitionFunctionTask(self, [refs], self.npartitions, function, key)


class UserPartitionedDataSourceNode(UserDefinedPartitionNode):
    """A source whose partitions are given: one data set each."""

    def __init__(
        self, ctx: Context, partitioned_datasets: Sequence[DataSet], dimension: str | None = None
    ) -> None:
        from whalefall.data.nodes.base import DataSourceNode

        self.datasets = list(partitioned_datasets)
        source = DataSourceNode(ctx, PartitionedDataSet(self.datasets))
        super().__init__(ctx, [source], len(self.datasets), dimension)

    def make_producer(self, refs: Input, key: PartitionKey) -> Task:
        tag = [dataset.identity() for dataset in self.datasets]
        parts = self.datasets
        return DivideTask(self, [refs], self.npartitions, lambda _: parts, tag, key)


def DataSetPartitionNode(
    ctx: Context,
    input_deps: Sequence[Node],
    npartitions: int,
    *,
    partition_by_rows: bool = False,
    random_shuffle: bool = False,
    data_partition_column: str | None = None,
) -> Node:
    """Divide by files, by rows, or as the files' metadata say; 1 leaves nothing partitioned."""
    if data_partition_column is not None:
        return LoadPartitionedDataSetNode(
            ctx, input_deps, npartitions, data_partition_column=data_partition_column
        )
    node = EvenlyDistributedPartitionNode(
        ctx, input_deps, npartitions,
        partition_by_rows=partition_by_rows, random_shuffle=random_shuffle,
    )  # fmt: skip
    return ConsolidateNode(ctx, node, []) if npartitions == 1 else node
