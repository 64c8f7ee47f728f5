"""Data sets that are no files yet: an Arrow table, a pandas frame, a query.

A source task writes the first two as Parquet before any other task reads them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from whalefall.data.constants import DEFAULT_BATCH_SIZE
from whalefall.data.dataset import DataSet
from whalefall.data.template import fragment

__all__ = ["ArrowTableDataSet", "PandasDataSet", "SqlQueryDataSet"]


class ArrowTableDataSet(DataSet):
    """A `pyarrow.Table` (deep-copied by nobody: do not change its buffers)."""

    def __init__(self, table: Any) -> None:
        super().__init__([])
        self.table = table

    @property
    def num_rows(self) -> int:
        return int(self.table.num_rows)

    @property
    def empty(self) -> bool:
        return self.num_rows == 0

    def to_arrow_table(
        self, max_workers: int = 16, filesystem: Any = None, conn: Any = None
    ) -> Any:
        return self.table

    def to_batch_reader(
        self, batch_size: int = DEFAULT_BATCH_SIZE, filesystem: Any = None, conn: Any = None
    ) -> Any:
        return self.table.to_reader(batch_size)

    def sql_query_fragment(self, filesystem: Any = None, conn: Any = None) -> str:
        name = f"__table_{id(self.table)}"
        if conn is None:
            return super().sql_query_fragment(filesystem, conn)
        conn.register(name, self.table)
        return name

    def identity(self) -> list[Any]:
        """A hash of the table's content."""
        import hashlib

        import pyarrow as pa

        digest = hashlib.sha256()
        sink = pa.PythonFile(_HashingFile(digest), mode="w")
        with pa.ipc.new_stream(sink, self.table.schema) as writer:
            writer.write_table(self.table.combine_chunks())
        return [type(self).__name__, digest.hexdigest()]


class _HashingFile:
    """A file that only hashes what is written to it."""

    closed = False

    def __init__(self, digest: Any) -> None:
        self.digest = digest

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return len(data)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


class PandasDataSet(ArrowTableDataSet):
    """A `pandas.DataFrame`."""

    def __init__(self, df: Any) -> None:
        import pyarrow as pa

        super().__init__(pa.Table.from_pandas(df))
        self.df = df

    def to_pandas(self) -> Any:
        return self.df.copy()


class SqlQueryDataSet(DataSet):
    """The rows of a query that reads no input.

    Args:
        sql_query: DuckDB SQL.
        query_builder: makes the query's text when it runs, in the place of `sql_query`; called
            with no argument.
    """

    def __init__(self, sql_query: str, query_builder: Callable[[], str] | None = None) -> None:
        super().__init__([])
        self.sql_query = sql_query
        self.query_builder = query_builder

    @property
    def empty(self) -> bool:
        return self.num_rows == 0

    def sql_query_fragment(self, filesystem: Any = None, conn: Any = None) -> str:
        query = self.query_builder() if self.query_builder else self.sql_query
        return f"({fragment(query, 'SqlQueryDataSet')})"

    def identity(self) -> list[Any]:
        return [type(self).__name__, self.sql_query]
