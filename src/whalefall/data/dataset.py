"""Data sets: lists of files (or a table, or a query) that a task reads, and how to divide them.

In: paths, patterns, URLs. Out: a SQL fragment that DuckDB reads them by, Arrow tables, batches,
parts. A data set is immutable in use: what tasks hand on is a new one.
Source: smallpond `logical.dataset`.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from whalefall.data import paths as names
from whalefall.data.constants import DEFAULT_BATCH_SIZE, GB, split_into_rows
from whalefall.data.errors import PlanError
from whalefall.data.reading import guarded, reading
from whalefall.data.template import fragment
from whalefall.errors import MissingError

__all__ = ["CsvDataSet", "DataSet", "FileSet", "JsonDataSet", "PartitionedDataSet", "quote"]

D = TypeVar("D", bound="DataSet")


def quote(text: str) -> str:
    """A SQL string literal."""
    return "'" + text.replace("'", "''") + "'"


def identifier(name: str) -> str:
    """A quoted SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


class DataSet:
    """Files of one kind, named by paths, patterns or URLs.

    Args:
        paths: what to read.
        root_dir: what relative paths are relative to; default the current folder.
        recursive: whether `**` reaches into sub-folders.
        columns: only these columns, as SQL select items.
        union_by_name: match the files' columns by name instead of position.
    """

    suffix: ClassVar[str] = ""

    def __init__(
        self,
        paths: Iterable[str],
        root_dir: str = "",
        recursive: bool = False,
        columns: Sequence[str] | None = None,
        union_by_name: bool = False,
    ) -> None:
        self.paths = [paths] if isinstance(paths, str) else [str(p) for p in paths]
        self.root_dir = root_dir
        self.recursive = recursive
        self.columns = None if columns is None else [fragment(c, "columns") for c in columns]
        self._union_by_name = union_by_name
        self._resolved: list[str] | None = None

    def __str__(self) -> str:
        head = ", ".join(self.paths[:3]) + (", …" if len(self.paths) > 3 else "")
        return f"{type(self).__name__}({head})"

    @property
    def union_by_name(self) -> bool:
        """Whether files' columns are matched by name: also where `columns` are given."""
        return self._union_by_name or self.columns is not None

    @property
    def udfs(self) -> list[str]:
        """Names of user functions that the data set's columns need."""
        return []

    @property
    def resolved_paths(self) -> list[str]:
        """Absolute paths (or URLs), sorted; duplicates stay."""
        if self._resolved is None:
            self._resolved = names.resolve(self.paths, self.root_dir, self.recursive, self.suffix)
        return self._resolved

    @property
    def absolute_paths(self) -> list[str]:
        """The paths as given, made absolute, patterns unexpanded."""
        return [names.to_absolute(path, self.root_dir) for path in self.paths]

    @property
    def num_files(self) -> int:
        """How many files there are."""
        return len(self.resolved_paths)

    @property
    def num_rows(self) -> int:
        """How many rows there are; reads the files where their footers do not tell.

        Raises: MissingError, CorruptError, PlanError, as all that reads does.
        """
        with reading(self):
            return int(self._query("select count(*) from {}").fetchall()[0][0])

    @property
    def empty(self) -> bool:
        """Whether there is no row."""
        return self.num_files == 0

    def reset(
        self, paths: Sequence[str] | None = None, root_dir: str = "", recursive: bool | None = None
    ) -> None:
        """Name other files, forgetting what was resolved."""
        self.paths = list(paths or [])
        self.root_dir = root_dir
        self.recursive = self.recursive if recursive is None else recursive
        self._resolved = None

    def _settings(self) -> dict[str, Any]:
        return {"columns": self.columns, "union_by_name": self._union_by_name}

    def with_paths(self: D, paths: Sequence[str]) -> D:
        """The same kind of data set over other files, which are taken as resolved."""
        made = type(self)(list(paths), **self._settings())
        made._resolved = list(paths)
        return made

    @staticmethod
    def merge(datasets: Sequence[DataSet]) -> DataSet:
        """One data set with the files of several of the same kind, in the order given."""
        first = datasets[0]
        if len(datasets) == 1:
            return first
        other = [d for d in datasets if type(d) is not type(first)]
        if other:
            raise PlanError(f"cannot merge {first} with {other[0]}: they are of different kinds")
        return first._merge(datasets)

    def _merge(self, datasets: Sequence[Any]) -> DataSet:
        merged = self.with_paths([path for d in datasets for path in d.resolved_paths])
        merged._union_by_name = any(d._union_by_name for d in datasets)
        return merged

    def partition_by_files(self, npartition: int, random_shuffle: bool = False) -> list[DataSet]:
        """Contiguous runs of whole files, in path order, whose lengths differ by at most one."""
        if npartition < 1:
            raise PlanError(f"partition by files: npartition is {npartition}, wanted at least 1")
        files = list(self.resolved_paths)
        if random_shuffle:
            random.shuffle(files)
        return [self.with_paths(part) for part in split_into_rows(files, npartition)]

    def partition_by_rows(self, npartition: int, random_shuffle: bool = False) -> list[DataSet]:
        """Contiguous row ranges; only Parquet files can be cut without reading them."""
        raise PlanError(
            f"{self} cannot be divided by rows: only Parquet files can; select from it first "
            f'(`.map("*")`)'
        )

    def sql_query_fragment(self, filesystem: Any = None, conn: Any = None) -> str:
        """What stands for the data set in the FROM clause of a DuckDB query."""
        raise PlanError(f"{type(self).__name__} is no table: it has no SQL form")

    def _query(self, template: str, conn: Any = None) -> Any:
        from whalefall.data.duck import connect

        self.require_files()
        connection = conn if conn is not None else connect()
        return connection.sql(template.format(self.sql_query_fragment(conn=connection)))

    def require_files(self) -> None:
        """MissingError for a local file that is not there."""
        import os

        for path in self.resolved_paths:
            if not names.is_url(path) and not os.path.isfile(path):
                kind = "is a folder" if os.path.isdir(path) else "no such file"
                raise MissingError(f"{path}: {kind}")

    def to_arrow_table(
        self, max_workers: int = 16, filesystem: Any = None, conn: Any = None
    ) -> Any:
        """All rows as a `pyarrow.Table`."""
        from whalefall.data.arrowio import cast_columns_to_large_string

        with reading(self):
            table = self._query("select * from {}", conn).to_arrow_table()
        return cast_columns_to_large_string(table)

    def to_batch_reader(
        self, batch_size: int = DEFAULT_BATCH_SIZE, filesystem: Any = None, conn: Any = None
    ) -> Any:
        """All rows as a `pyarrow.RecordBatchReader` of `batch_size` rows a batch."""
        import pyarrow as pa

        from whalefall.data.arrowio import rebatch

        with reading(self):
            reader = self._query("select * from {}", conn).to_arrow_reader(batch_size)
        batches = rebatch(guarded(reader, self), batch_size)
        return pa.RecordBatchReader.from_batches(reader.schema, batches)

    def to_pandas(self) -> Any:
        """All rows as a `pandas.DataFrame`."""
        return self.to_arrow_table().to_pandas()

    def log(self, num_rows: int = 200) -> None:
        """Write the first rows to the log."""
        import logging

        table = self._query(f"select * from {{}} limit {num_rows}")
        logging.getLogger(__name__).info("%s\n%s", self, table)

    # -- what a finished task leaves: a JSON object that names its files
    def describe(self) -> dict[str, Any]:
        """A JSON object from which `from_description` makes the data set again."""
        return {"kind": type(self).__name__, "paths": self.resolved_paths, **self._settings()}

    @classmethod
    def revive(cls, description: Mapping[str, Any]) -> DataSet:
        """The data set that `describe` described."""
        settings = {k: v for k, v in description.items() if k not in ("kind", "paths")}
        made = cls(description["paths"], **settings)
        made._resolved = list(description["paths"])
        return made

    def relocated(self, old: str, new: str) -> DataSet:
        """The data set after its folder `old` was renamed to `new`."""
        return self.with_paths([names.move(path, old, new) for path in self.resolved_paths])

    def identity(self) -> list[Any]:
        """What a task's content hash takes of its input: names, sizes and times of the files."""
        return [
            type(self).__name__,
            self._settings(),
            [names.stamp(p) for p in self.resolved_paths],
        ]


class FileSet(DataSet):
    """Files of any kind, as Python scripts write them; as a table: one column `resolved_paths`."""

    def sql_query_fragment(self, filesystem: Any = None, conn: Any = None) -> str:
        listed = ", ".join(quote(path) for path in self.resolved_paths)
        return f"(select unnest([{listed}]::varchar[]) as resolved_paths)"


class TextDataSet(DataSet):
    """What CSV and JSON files share: a schema that the caller gives."""

    def __init__(self, paths: Iterable[str], schema: Mapping[str, str], **kwargs: Any) -> None:
        super().__init__(paths, **kwargs)
        if not schema:
            raise PlanError(f"{type(self).__name__}: schema is {schema!r}, wanted name → SQL type")
        self.schema = dict(schema)

    @property
    def selected(self) -> str:
        return ", ".join(self.columns) if self.columns is not None else "*"

    def no_rows(self) -> str:
        """The fragment where there are no files: the schema, without rows."""
        columns = ", ".join(f"null::{t} as {identifier(n)}" for n, t in self.schema.items())
        return f"(select {self.selected} from (select {columns} where false))"

    @property
    def struct(self) -> str:
        """The schema as DuckDB's `columns` option."""
        return "{" + ", ".join(f"{quote(n)}: {quote(t)}" for n, t in self.schema.items()) + "}"


class CsvDataSet(TextDataSet):
    """CSV files without a header line unless `header`.

    Args:
        schema: column name → DuckDB type, in the order of the columns.
        delim: the delimiter, with DuckDB's escapes (`\\\\t`).
        max_line_size: longest line in bytes.
        parallel: whether one file may be read by several threads.
    """

    def __init__(
        self,
        paths: Iterable[str],
        schema: Mapping[str, str],
        delim: str = ",",
        max_line_size: int | None = None,
        parallel: bool = True,
        header: bool = False,
        root_dir: str = "",
        recursive: bool = False,
        columns: Sequence[str] | None = None,
        union_by_name: bool = False,
    ) -> None:
        super().__init__(
            paths, schema, root_dir=root_dir, recursive=recursive, columns=columns,
            union_by_name=union_by_name,
        )  # fmt: skip
        self.delim, self.max_line_size = delim, max_line_size
        self.parallel, self.header = parallel, header

    def _settings(self) -> dict[str, Any]:
        own = {
            n: getattr(self, n) for n in ("schema", "delim", "max_line_size", "parallel", "header")
        }
        return super()._settings() | own

    def sql_query_fragment(self, filesystem: Any = None, conn: Any = None) -> str:
        if not self.resolved_paths:
            return self.no_rows()
        listed = ", ".join(quote(path) for path in self.resolved_paths)
        options = [
            f"[{listed}]",
            f"columns={self.struct}",
            f"delim={quote(self.delim)}",
            f"header={self.header}",
            "auto_detect=false",
            "quote='\"'",
            "escape='\"'",
            f"parallel={self.parallel}",
        ]
        if self.max_line_size:
            options.append(f"max_line_size={self.max_line_size}")
        return f"(select {self.selected} from read_csv({', '.join(options)}))"


class JsonDataSet(TextDataSet):
    """JSON files, one object a line by default.

    Args:
        schema: key → DuckDB type.
        format: DuckDB's: newline_delimited, array, unstructured or auto.
        max_object_size: largest object in bytes.
    """

    def __init__(
        self,
        paths: Iterable[str],
        schema: Mapping[str, str],
        format: str = "newline_delimited",
        max_object_size: int = 1 * GB,
        root_dir: str = "",
        recursive: bool = False,
        columns: Sequence[str] | None = None,
        union_by_name: bool = False,
    ) -> None:
        super().__init__(
            paths, schema, root_dir=root_dir, recursive=recursive, columns=columns,
            union_by_name=union_by_name,
        )  # fmt: skip
        self.format, self.max_object_size = format, max_object_size

    def _settings(self) -> dict[str, Any]:
        own = {n: getattr(self, n) for n in ("schema", "format", "max_object_size")}
        return super()._settings() | own

    def sql_query_fragment(self, filesystem: Any = None, conn: Any = None) -> str:
        if not self.resolved_paths:
            return self.no_rows()
        listed = ", ".join(quote(path) for path in self.resolved_paths)
        # DuckDB allocates by the limit, so ask for no more than the files could need
        limit = min(self.max_object_size, max(16 << 20, 2 * max(map(_size, self.resolved_paths))))
        return (
            f"(select {self.selected} from read_json([{listed}], columns={self.struct}, "
            f"format={quote(self.format)}, maximum_object_size={limit}))"
        )


def _size(path: str) -> int:
    facts = names.stamp(path)
    return int(facts[1] or 0) if len(facts) > 1 else 0


class PartitionedDataSet(DataSet):
    """Several data sets, kept apart: what a partitioning leaves."""

    def __init__(self, datasets: Sequence[DataSet]) -> None:
        self.datasets = list(datasets)
        super().__init__([])

    def __getitem__(self, key: int) -> DataSet:
        return self.datasets[key]

    def __len__(self) -> int:
        return len(self.datasets)

    @property
    def resolved_paths(self) -> list[str]:
        return [path for d in self.datasets for path in d.resolved_paths]

    def _merge(self, datasets: Sequence[Any]) -> DataSet:
        return PartitionedDataSet([d for part in datasets for d in part.datasets])
