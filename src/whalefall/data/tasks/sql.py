"""The task that runs SQL in DuckDB and leaves the last query's rows as one Parquet file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from whalefall.data.dataset import DataSet, identifier, quote
from whalefall.data.duck import execute
from whalefall.data.errors import SqlError
from whalefall.data.parquet import ParquetDataSet
from whalefall.data.reading import explained
from whalefall.data.rowrange import RowRange
from whalefall.data.runtime import PartitionKey
from whalefall.data.tasks.base import Input, Task
from whalefall.data.tasks.parquet_out import ParquetOptions, file_in
from whalefall.data.template import render

__all__ = ["SqlEngineTask", "written"]

TOO_WIDE = "128-bit numbers are kept as BIGINT; cast what does not fit, such as sum(x)::double"
TEMPORARY = re.compile(r"\s*create\s+or\s+replace\s+temp(orary)?\s+(view|table)\b", re.I)


class SqlEngineTask(Task):
    """Runs a node's queries over one partition.

    Args:
        queries: templates; all run, the last one's rows are the output.
        udfs: user functions to bind first.
    """

    def __init__(
        self,
        node: Any,
        inputs: Sequence[Input],
        partition_key: PartitionKey,
        queries: Sequence[str],
        options: ParquetOptions,
        udfs: Sequence[Any] = (),
    ) -> None:
        super().__init__(node, inputs, partition_key)
        self.queries, self.options, self.udfs = list(queries), options, list(udfs)
        self.volatile = node.volatile_id

    def content(self) -> Sequence[Any]:
        return (self.queries, self.options, self.udfs, self.volatile)

    def names(self) -> dict[str, object]:
        """The named fields that a query may use."""
        return {
            "batch_index": 0,
            "query_index": 0,
            "rand_seed": self.random_seed,
            "cpu_limit": self.cpu_limit,
            "memory_limit": self.memory_limit,
            "output_filename": self.output_filename,
            **self.partition_infos_as_dict,
        }

    def where(self) -> str:
        """The task, for an error."""
        place = ", ".join(str(info) for info in self.partition_key)
        return f"SQL node {self.node_id}" + (f", partition {place}" if place else "")

    def _leaves_traces(self) -> bool:
        """Whether functions, settings or tables would stay in the database."""
        return bool(self.udfs) or not all(map(TEMPORARY.match, self.queries[:-1]))

    def run(self, inputs: list[DataSet]) -> list[DataSet]:
        path = file_in(self.runtime_output_abspath, f"{self.output_filename}.parquet")
        conn = self.connect(private=self._leaves_traces())
        try:
            for udf in self.udfs:
                udf.bind(conn)
            for dataset in inputs:
                dataset.require_files()
            views = self.create_input_views(conn, inputs)
            for index, template in enumerate(self.queries):
                names = self.names() | {"query_index": index}
                query = render(template, views, names).strip().rstrip(";").rstrip()
                if index + 1 < len(self.queries):
                    execute(conn, query, self.where())
            made = self._copy(conn, query, path)
            made._union_by_name = any(d._union_by_name for d in inputs)
            return [made]
        except SqlError as error:
            raise explained(error, inputs) from None
        finally:
            conn.close()

    def _copy(self, conn: Any, query: str, path: str) -> ParquetDataSet:
        made = whole_numbers(conn, query, self.where())
        options = self.options.copy_options(self.parquet_metadata())
        statement = f"copy ({made}\n) to {quote(path)} ({options})"
        try:
            return written(execute_as(query, conn, statement, self.where()))
        except SqlError as error:
            if made != query and "INT128" in str(error):
                raise SqlError(f"{error}\n{TOO_WIDE}") from None
            raise


def execute_as(shown: str, conn: Any, statement: str, where: str) -> Any:
    """`execute`, with the user's query in the place of the whole statement in an error."""
    try:
        return execute(conn, statement, where)
    except SqlError as error:
        raise SqlError(str(error).replace(statement, shown)) from None


def whole_numbers(conn: Any, query: str, where: str) -> str:
    """The query with its 128-bit integers, such as sums of integers, as BIGINT.

    Parquet has no such type, and DuckDB would write them as DOUBLE, which rounds them; a number
    that does not fit a BIGINT is an error.
    """
    described = execute_as(query, conn, f"describe select * from ({query}\n)", where)
    wide = [identifier(row[0]) for row in described if row[1] in ("HUGEINT", "UHUGEINT")]
    if not wide:
        return query
    casts = ", ".join(f"cast({name} as bigint) as {name}" for name in wide)
    return f"select * replace ({casts}) from ({query}\n)"


def written(stats: Sequence[Sequence[Any]]) -> ParquetDataSet:
    """The data set of the files that a COPY with return_stats reports."""
    ranges = []
    for name, rows, file_bytes, *_ in sorted(stats, key=lambda row: str(row[0])):
        ranges.append(RowRange(name, int(file_bytes), int(rows), 0, int(rows)))
    return ParquetDataSet.of_ranges(ranges)
