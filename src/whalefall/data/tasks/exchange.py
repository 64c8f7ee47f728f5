"""The task that gives each row to a partition, by a hash or by a number that the row holds.

DuckDB's partitioned COPY writes one folder a partition; a partition that gets no row gets a range
of no rows of a file that holds only the schema, so that later tasks still know its columns.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from whalefall.data.dataset import DataSet, identifier, quote
from whalefall.data.duck import execute
from whalefall.data.errors import PartitionError, SqlError
from whalefall.data.parquet import ParquetDataSet
from whalefall.data.reading import explained
from whalefall.data.rowrange import RowRange
from whalefall.data.runtime import PartitionKey
from whalefall.data.tasks.base import Input, Task
from whalefall.data.tasks.parquet_out import ParquetOptions, file_in

__all__ = ["HashPartitionTask", "RangePartitionTask"]

# The column that names the partition while it is written, where the output must not have one.
SCRATCH = "__part__"


class HashPartitionTask(Task):
    """Writes the rows of its input into `num_outputs` partitions.

    Args:
        key: SQL expression of the partition number.
        column: name of the column that holds it in the output; None for none.
        replaces: whether a column of that name in the input is replaced.
        checked: whether the number may be NULL or out of range, which is an error.
        dimension: the exchange's, which files note.
        hive: leave the folders `column=number`.
    """

    def __init__(
        self,
        node: Any,
        inputs: Sequence[Input],
        num_outputs: int,
        key: str,
        column: str | None,
        options: ParquetOptions,
        dimension: str,
        replaces: bool = False,
        checked: bool = False,
        hive: bool = False,
        partition_key: PartitionKey = (),
    ) -> None:
        super().__init__(node, inputs, partition_key, num_outputs)
        self.partition_sql, self.column, self.options = key, column, options
        self.dimension, self.replaces, self.checked, self.hive = dimension, replaces, checked, hive
        self.volatile = node.volatile_id

    def content(self) -> Sequence[Any]:
        return (
            self.partition_sql, self.column, self.options, self.dimension, self.replaces,
            self.checked, self.hive, self.volatile,
        )  # fmt: skip

    def _query(self, conn: Any, views: Sequence[str]) -> str:
        number = f"cast(({self.number(conn, views)}) as bigint)"
        if self.checked:
            last = self.num_outputs - 1
            number = (
                f"(case when {number} between 0 and {last} then {number} "
                f"when {number} is null then error('partition key is NULL, wanted 0-{last}') "
                f"else error('partition key ' || {number} || ' is out of range 0-{last}') end)"
            )
        name = identifier(self.column or SCRATCH)
        star = f"* exclude ({name})" if self.replaces else "*"
        kind = "::ubigint" if self.column else ""
        return f"select {star}, {number}{kind} as {name} from {views[0]} as __row"

    def number(self, conn: Any, views: Sequence[str]) -> str:
        """The SQL expression of a row's partition number (`__row` is the row as a struct)."""
        return self.partition_sql

    def run(self, inputs: list[DataSet]) -> list[DataSet]:
        folder = os.path.join(self.runtime_output_abspath, "parts")
        schema_file = file_in(self.runtime_output_abspath, f"{self.output_filename}.schema.parquet")
        conn = self.connect()
        try:
            for dataset in inputs:
                dataset.require_files()
            views = self.create_input_views(conn, inputs)
            name, query = identifier(self.column or SCRATCH), self._query(conn, views)
            options = self.options.copy_options(self.parquet_metadata())
            stats = self._execute(
                conn,
                f"copy ({query}) to {quote(folder)} ({options}, partition_by ({name}), "
                f"write_partition_columns {bool(self.column)}, overwrite_or_ignore true)",
            )
            columns = "*" if self.column else f"* exclude ({name})"
            self._execute(
                conn,
                f"copy (select {columns} from ({query}) limit 0) to {quote(schema_file)} "
                f"({options})",
            )
        except SqlError as error:
            raise explained(error, inputs) from None
        finally:
            conn.close()
        made = self._outputs(stats, schema_file)
        for part in made:
            part._union_by_name = inputs[0]._union_by_name
        return made

    def _execute(self, conn: Any, statement: str) -> list[tuple[Any, ...]]:
        place = ", ".join(str(info) for info in self.partition_key)
        where = f"exchange node {self.node_id}" + (f", partition {place}" if place else "")
        try:
            rows: list[tuple[Any, ...]] = execute(conn, statement, where)
        except SqlError as error:
            head = str(error).partition("\n")[0]  # below it is the query, with both texts
            if "partition key" in head and ("out of range" in head or "is NULL" in head):
                begin = head.index("partition key ")
                raise PartitionError(f"{where}: {head[begin:]}") from None
            shown = f"select {self.partition_sql} from __input_0"
            raise SqlError(str(error).replace(statement, shown)) from None
        return rows

    def _outputs(self, stats: Sequence[Sequence[Any]], schema_file: str) -> list[DataSet]:
        """One data set a partition, its files renamed flat and numbered (unless hive)."""
        ranges: list[list[RowRange]] = [[] for _ in range(self.num_outputs)]
        for path, rows, file_bytes, *_ in sorted(stats, key=lambda row: str(row[0])):
            number = int(os.path.basename(os.path.dirname(path)).rsplit("=", 1)[1])
            part = RowRange(path, int(file_bytes), int(rows), 0, int(rows))
            ranges[number].append(
                part if self.hive else self._flatten(part, number, len(ranges[number]))
            )
        if not self.hive:
            _remove_empty(os.path.join(self.runtime_output_abspath, "parts"))
        none = [RowRange(schema_file, 0, 0, 0, 0)]
        return [ParquetDataSet.of_ranges(part or none) for part in ranges]

    def _flatten(self, part: RowRange, number: int, index: int) -> RowRange:
        name = f"{self.output_filename}-{number}.{index}.parquet"
        path = os.path.join(self.runtime_output_abspath, name)
        os.rename(part.path, path)
        return replace(part, path=path)


class RangePartitionTask(HashPartitionTask):
    """Writes the rows of its input into ranges of a key.

    Args:
        key: SQL expression of the key.
        split_points: ascending; where empty, the second input's column `k` holds them.
    """

    def __init__(
        self, node: Any, inputs: Sequence[Input], num_outputs: int, key: str,
        split_points: Sequence[Any], dimension: str,
    ) -> None:  # fmt: skip
        super().__init__(node, inputs, num_outputs, key, None, ParquetOptions(), dimension)
        self.split_points = list(split_points)

    def content(self) -> Sequence[Any]:
        return (*super().content(), self.split_points)

    def number(self, conn: Any, views: Sequence[str]) -> str:
        points = self.split_points
        if len(views) > 1:
            query = f"select k from {views[1]} order by k"
            points = [row[0] for row in execute(conn, query, self.label)]
        return range_number(self.partition_sql, points)


def range_number(key: str, points: Sequence[Any]) -> str:
    """The SQL expression of how many split points are not above the key; NULL keys go last.

    A tree of CASEs halves the points at each step. Points that are equal leave partitions that can
    hold this key alone: its rows are dealt out among them.
    """

    def tree(low: int, high: int) -> str:
        if low == high:
            return str(low)
        middle = (low + high) // 2
        return (
            f"case when __key < {literal(points[middle])} then {tree(low, middle)} "
            f"else {tree(middle + 1, high)} end"
        )

    cases = [f"when __key is null then {len(points)}"]
    begin = 0
    for end in range(1, len(points) + 1):
        if end == len(points) or points[end] != points[begin]:
            if end - begin > 1:
                spread = f"{begin + 1} + cast(floor(random() * {end - begin}) as bigint)"
                cases.append(f"when __key = {literal(points[begin])} then {spread}")
            begin = end
    body = f"case {' '.join(cases)} else {tree(0, len(points))} end"
    return re.sub(r"\b__key\b", lambda _: f"({key})", body)


def literal(value: Any) -> str:
    """A Python value as SQL text."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, bytes):
        return "'" + "".join(f"\\x{byte:02X}" for byte in value) + "'::blob"
    return quote(str(value))


def _remove_empty(folder: str) -> None:
    for root, _, _ in os.walk(folder, topdown=False):
        os.rmdir(root)
