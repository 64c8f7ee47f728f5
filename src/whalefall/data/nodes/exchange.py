"""Nodes that move each row to a partition: by hash, at random, by a number it holds, by range."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from whalefall.data.constants import DATA_PARTITION_COLUMN_NAME
from whalefall.data.context import Context
from whalefall.data.errors import PlanError
from whalefall.data.nodes.base import Node, TaskGroup
from whalefall.data.nodes.partition import PartitionNode
from whalefall.data.runtime import PartitionKey
from whalefall.data.tasks.base import Input, Ref, Task
from whalefall.data.tasks.exchange import HashPartitionTask, RangePartitionTask
from whalefall.data.tasks.parquet_out import ParquetOptions
from whalefall.data.template import fragment

if TYPE_CHECKING:
    from whalefall.data.planner import Planner

__all__ = ["HashPartitionNode", "RangePartitionNode", "ShuffleNode"]

ENGINES = (None, "duckdb", "arrow")


class ExchangeNode(PartitionNode):
    """What the nodes below share: producers that each write a part of the rows."""

    max_num_producer_tasks = 1000

    def producers(self, planner: Planner, refs: Input) -> Sequence[Input]:
        return planner.spread(self, refs, self.max_num_producer_tasks)


class HashPartitionNode(ExchangeNode):
    """Gives a row to partition `hash(columns) % npartitions`, or to the one that a column names.

    Args:
        hash_columns: SQL expressions; NULLs get a partition. None with `random_shuffle` or
            `shuffle_only`.
        data_partition_column: name of the UINT64 column with the partition's number that the
            output gets; with `shuffle_only`, the input's column (or expression) that holds it.
        dimension: default `data_partition_column`.
        engine_type: duckdb; "arrow" means the same here, rows go where duckdb puts them.
        random_shuffle: to a random partition.
        shuffle_only: to the partition that the column names; it adds no column.
        drop_partition_column: the output gets no such column.
        use_parquet_writer: taken for the original's sake.
        hive_partitioning: leave files in folders `column=number`.
    """

    default_data_partition_column = DATA_PARTITION_COLUMN_NAME

    def __init__(
        self,
        ctx: Context,
        input_deps: Sequence[Node],
        npartitions: int,
        hash_columns: Sequence[str] | None = None,
        data_partition_column: str | None = None,
        *,
        dimension: str | None = None,
        nested: bool = False,
        engine_type: str | None = None,
        random_shuffle: bool = False,
        shuffle_only: bool = False,
        drop_partition_column: bool = False,
        use_parquet_writer: bool = False,
        hive_partitioning: bool = False,
        parquet_row_group_size: int | None = None,
        parquet_dictionary_encoding: bool = False,
        parquet_compression: str | None = "ZSTD",
        parquet_compression_level: int | None = 3,
        output_name: str | None = None,
        output_path: str | None = None,
        cpu_limit: int | None = None,
        memory_limit: int | None = None,
    ) -> None:
        column = data_partition_column or self.default_data_partition_column
        column = fragment(column, type(self).__name__) if shuffle_only else column
        super().__init__(
            ctx, input_deps, npartitions, dimension or column, nested, output_name, output_path,
            cpu_limit, memory_limit,
        )  # fmt: skip
        kind = type(self).__name__
        if engine_type not in ENGINES:
            raise PlanError(f"{kind}: engine_type is {engine_type!r}, wanted duckdb or arrow")
        if isinstance(hash_columns, str):
            hash_columns = [hash_columns]
        if not hash_columns and not random_shuffle and not shuffle_only:
            raise PlanError(f"{kind}: hash_columns is {hash_columns!r}, wanted SQL expressions")
        self.hash_columns = [fragment(item, kind) for item in hash_columns or ()]
        self.column, self.random_shuffle, self.shuffle_only = column, random_shuffle, shuffle_only
        self.drop_partition_column, self.hive_partitioning = (
            drop_partition_column,
            hive_partitioning,
        )
        # hash values, not their text: then what SQL finds equal, such as -0.0 and 0.0, is
        self.by_value = False
        self.options = ParquetOptions(
            parquet_row_group_size or self.default_row_group_size,
            parquet_dictionary_encoding,
            parquet_compression,
            parquet_compression_level,
        )
        if random_shuffle:
            self.volatile_id = int(self.id)

    def describe(self) -> str:
        by = "random" if self.random_shuffle else ", ".join(self.hash_columns) or self.column
        return f"{super().describe()} by {by}"

    def partition_sql(self) -> str:
        """The SQL expression of a row's partition number."""
        if self.shuffle_only:
            return self.column
        if self.random_shuffle:
            return f"cast(floor(random() * {self.npartitions}) as ubigint) % {self.npartitions}"
        if self.by_value:
            joined = ", ".join(self.hash_columns)
            return f"cast(hash({joined}) as uint64) % {self.npartitions}"
        joined = ", ".join(map(comparable_text, self.hash_columns))
        return f"cast(hash(concat_ws('##', {joined})) as uint64) % {self.npartitions}"

    def make_producer(self, refs: Input, key: PartitionKey) -> Task:
        adds = not self.shuffle_only and not self.drop_partition_column
        return HashPartitionTask(
            self, [refs], self.npartitions, self.partition_sql(),
            column=self.column if adds else None, options=self.options, dimension=self.dimension,
            checked=self.shuffle_only, hive=self.hive_partitioning, partition_key=key,
        )  # fmt: skip


class ShuffleNode(HashPartitionNode):
    """Gives a row to the partition that its column `data_partition_column` names."""

    def __init__(
        self,
        ctx: Context,
        input_deps: Sequence[Node],
        npartitions: int,
        data_partition_column: str | None = None,
        *,
        dimension: str | None = None,
        nested: bool = False,
        engine_type: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            ctx, input_deps, npartitions, None, data_partition_column, dimension=dimension,
            nested=nested, engine_type=engine_type, shuffle_only=True, **options,
        )  # fmt: skip


class RangePartitionNode(ExchangeNode):
    """Gives a row to the range that its key lies in: partition i holds keys below split point i.

    Args:
        split_points: ascending keys, one fewer than there are partitions; or a node whose column
            `k` holds them.
        column: SQL expression of the key (the original, whose node does not work, has none).
        npartitions: where the split points are a node: how many partitions.
    """

    def __init__(
        self,
        ctx: Context,
        input_deps: Sequence[Node],
        split_points: Sequence[Any] | Node,
        dimension: str | None = None,
        nested: bool = False,
        output_name: str | None = None,
        output_path: str | None = None,
        cpu_limit: int | None = None,
        memory_limit: int | None = None,
        column: str | None = None,
        npartitions: int | None = None,
    ) -> None:
        if column is None:
            raise PlanError("RangePartitionNode: column is None, wanted SQL of the key")
        sampled = isinstance(split_points, Node)
        if isinstance(split_points, Node):
            count, deps = npartitions or 0, [*input_deps, split_points]
        else:
            count, deps = len(split_points) + 1, list(input_deps)
        super().__init__(
            ctx, deps, count, dimension, nested, output_name, output_path, cpu_limit, memory_limit
        )
        self.column, self.sampled = fragment(column, "RangePartitionNode"), sampled
        self.split_points = [] if isinstance(split_points, Node) else list(split_points)

    def describe(self) -> str:
        return f"{super().describe()} by range of {self.column}"

    def expand(self, planner: Planner, groups: Sequence[TaskGroup]) -> TaskGroup:
        self_splits = groups[-1].all_refs if self.sampled else ()
        made = TaskGroup(self.dimensions)
        merged = tuple(r for g in (groups[:-1] if self.sampled else groups) for r in g.all_refs)
        tasks = [
            planner.add(
                RangePartitionTask(
                    self,
                    [refs, self_splits] if self.sampled else [refs],
                    self.npartitions,
                    self.column,
                    self.split_points,
                    self.dimension,
                )
            )
            for refs in self.producers(planner, merged)
        ]
        for index in range(self.npartitions):
            made.parts[(self.info(index),)] = tuple(Ref(task, index) for task in tasks)
        return made


def comparable_text(expression: str) -> str:
    """A column's text, the same for zeros and for NaNs of either sign; else as it is."""
    if not re.fullmatch(r'"[^"]+"|[A-Za-z_]\w*', expression):
        return expression
    text = f"cast({expression} as varchar)"
    return f"case {text} when '-0.0' then '0.0' when '-nan' then 'nan' else {text} end"
