"""Parquet data sets: files, or ranges of their rows, that are divided without moving data.

Source: smallpond `logical.dataset.ParquetDataSet`.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, replace
from typing import Any

from whalefall.data import rowrange
from whalefall.data.constants import (
    DEFAULT_BATCH_SIZE,
    PARQUET_METADATA_KEY_PREFIX,
    split_into_rows,
)
from whalefall.data.dataset import DataSet, quote
from whalefall.data.errors import PlanError
from whalefall.data.paths import move
from whalefall.data.rowrange import RowRange

__all__ = ["ParquetDataSet"]

# What DuckDB can add to each row that it reads.
GENERATED = ("filename", "file_row_number")


class ParquetDataSet(DataSet):
    """Parquet files.

    Args:
        columns: SQL select items; plain names where the data set is read as Arrow.
        generated_columns: of `filename` and `file_row_number`, added to each row.
        The others: as `DataSet`.
    """

    suffix = ".parquet"

    def __init__(
        self,
        paths: Iterable[str],
        root_dir: str = "",
        recursive: bool = False,
        columns: Sequence[str] | None = None,
        generated_columns: Sequence[str] | None = None,
        union_by_name: bool = False,
    ) -> None:
        super().__init__(paths, root_dir, recursive, columns, union_by_name)
        self.generated_columns = list(generated_columns) if generated_columns else None
        unknown = [name for name in self.generated_columns or () if name not in GENERATED]
        if unknown:
            raise PlanError(
                f"ParquetDataSet: generated column {unknown[0]!r}, wanted of {GENERATED}"
            )
        self._ranges: list[RowRange] | None = None

    @staticmethod
    def create_from(table: Any, output_dir: str, filename: str = "data") -> ParquetDataSet:
        """Write an Arrow table into files and name them."""
        from whalefall.data.arrowio import dump_to_parquet_files

        os.makedirs(output_dir, exist_ok=True)
        dump_to_parquet_files(table, output_dir, filename)
        return ParquetDataSet([os.path.join(output_dir, f"{filename}-*.parquet")])

    @classmethod
    def of_ranges(
        cls, ranges: Sequence[RowRange], like: ParquetDataSet | None = None
    ) -> ParquetDataSet:
        """The data set of exactly these row ranges, with the columns of `like`."""
        settings = like._settings() if like is not None else {}
        made = cls([r.path for r in ranges], **settings)
        made._resolved = [r.path for r in ranges]
        made._ranges = list(ranges)
        return made

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | {"generated_columns": self.generated_columns}

    def reset(
        self, paths: Sequence[str] | None = None, root_dir: str = "", recursive: bool | None = None
    ) -> None:
        super().reset(paths, root_dir, recursive)
        self._ranges = None

    @property
    def resolved_row_ranges(self) -> list[RowRange]:
        """The rows as ranges of files; reads the files' footers the first time."""
        if self._ranges is None:
            self._ranges = rowrange.file_ranges(self.resolved_paths)
        return self._ranges

    @property
    def num_rows(self) -> int:
        return sum(r.num_rows for r in self.resolved_row_ranges)

    @property
    def empty(self) -> bool:
        return not self.resolved_paths or self.num_rows == 0

    @property
    def estimated_data_size(self) -> int:
        """Bytes before compression."""
        return sum(r.estimated_data_size for r in self.resolved_row_ranges)

    def remove_empty_files(self) -> None:
        """Forget the files without rows, but one, which keeps the schema."""
        full = [r for r in self.resolved_row_ranges if r.num_rows]
        kept = full or self.resolved_row_ranges[:1]
        self._ranges = kept
        self.paths = self._resolved = [r.path for r in kept]

    def _merge(self, datasets: Sequence[Any]) -> DataSet:
        columns = {tuple(d.columns) if d.columns is not None else None for d in datasets}
        if len(columns) > 1:
            raise PlanError(
                f"cannot merge data sets with columns {', '.join(map(str, columns))}; "
                "project each to the same columns first"
            )
        if all(d._ranges is None for d in datasets):
            merged = self.with_paths([path for d in datasets for path in d.resolved_paths])
        else:
            ranges = [r for d in datasets for r in d.resolved_row_ranges]
            merged = self.of_ranges([r for r in ranges if r.num_rows] or ranges[:1], self)
        merged._union_by_name = any(d._union_by_name for d in datasets)
        return merged

    # -- reading
    def sql_query_fragment(self, filesystem: Any = None, conn: Any = None) -> str:
        if conn is not None:
            from whalefall.data.duck import register_remote

            register_remote(conn, self.resolved_paths)
        if not self.resolved_paths:
            raise PlanError(f"{self}: no Parquet file matches, so there is no schema to read by")
        pieces = list(self._pieces(self._differ()))
        return pieces[0] if len(pieces) == 1 else "(" + " union all by name ".join(pieces) + ")"

    def _differ(self) -> bool:
        """Whether the files' types (or, by name, columns) differ; PlanError where they may not."""
        if len(set(self.resolved_paths)) < 2:
            return False
        from whalefall.data.schemas import common_schema

        columns = self.columns if self._plain_columns() else None
        by_name = self._union_by_name or (self.columns is not None and columns is None)
        return not common_schema(self.resolved_paths, columns, by_name)[1]

    def _pieces(self, differ: bool) -> Iterable[str]:
        """One `select` for each run of whole files, and for each part of a file."""
        run: list[str] = []
        for path, part in self._path_ranges():
            if part is None:
                run.append(path)
                continue
            if run:
                yield self._select(run, differ)
                run = []
            yield self._select([path], differ, part)
        if run:
            yield self._select(run, differ)

    def _path_ranges(self) -> Iterable[tuple[str, RowRange | None]]:
        if self._ranges is None:
            return [(path, None) for path in self.resolved_paths]
        return [(r.path, None if r.whole else r) for r in self._ranges]

    def _select(self, files: Sequence[str], differ: bool, part: RowRange | None = None) -> str:
        generated = self.generated_columns or []
        options = ["hive_partitioning=false"]
        if self.union_by_name or differ:
            options.append("union_by_name=true")
        options += [f"{name}=true" for name in generated if name != "file_row_number" or not part]
        where, star = "", "*"
        if part is not None:
            options.append("file_row_number=true")
            where = f" where file_row_number >= {part.begin} and file_row_number < {part.end}"
            star = "*" if "file_row_number" in generated else "* exclude (file_row_number)"
        items = star
        if self.columns is not None:
            chosen = [star if item.strip() == "*" else item for item in self.columns]
            items = ", ".join([*chosen, *(n for n in generated if n not in chosen)])
        listed = ", ".join(quote(path) for path in files)
        return f"(select {items} from read_parquet([{listed}], {', '.join(options)}){where})"

    def to_arrow_table(
        self, max_workers: int = 16, filesystem: Any = None, conn: Any = None
    ) -> Any:
        """All rows as a `pyarrow.Table`; by DuckDB where `conn` is given or columns are SQL."""
        if conn is not None or self.generated_columns or not self._plain_columns():
            return super().to_arrow_table(max_workers, filesystem, conn)
        from whalefall.data.arrowio import load_from_parquet_files
        from whalefall.data.schemas import common_schema

        parts = self.resolved_row_ranges
        if not parts:
            raise PlanError(f"{self}: no Parquet file matches, so there is no schema to read by")
        by_name = self._union_by_name
        schema, _ = common_schema([p.path for p in parts], self.columns, by_name, filesystem)
        table = load_from_parquet_files(parts, schema.names, max_workers, filesystem, by_name)
        return table.replace_schema_metadata(without_task_keys(table.schema.metadata))

    def _plain_columns(self) -> bool:
        return self.columns is None or all(name.isidentifier() for name in self.columns)

    def to_batch_reader(
        self, batch_size: int = DEFAULT_BATCH_SIZE, filesystem: Any = None, conn: Any = None
    ) -> Any:
        if conn is not None or self.generated_columns or not self._plain_columns():
            return super().to_batch_reader(batch_size, filesystem, conn)
        from whalefall.data.arrowio import build_batch_reader_from_files

        return build_batch_reader_from_files(
            self.resolved_row_ranges, columns=self.columns, batch_size=batch_size,
            filesystem=filesystem, union_by_name=self._union_by_name,
        )  # fmt: skip

    # -- dividing
    def without_rows(self) -> ParquetDataSet:
        """The schema alone."""
        return self.of_ranges(self._none_of(), self)

    def _none_of(self) -> list[RowRange]:
        """A range without rows, which keeps the schema; nothing where there is no file."""
        if not self.resolved_paths:
            return []
        if self._ranges is not None:
            return [replace(self._ranges[0], end=self._ranges[0].begin)]
        return [replace(r, end=0) for r in rowrange.file_ranges(self.resolved_paths[:1])]

    def _parts(self, parts: Iterable[Sequence[RowRange]]) -> list[DataSet]:
        none: list[RowRange] | None = None
        made: list[DataSet] = []
        for part in parts:
            if not part:
                none = self._none_of() if none is None else none
            made.append(self.of_ranges(list(part) or none or [], self))
        return made

    def partition_by_files(self, npartition: int, random_shuffle: bool = False) -> list[DataSet]:
        if self._ranges is not None and not all(r.whole for r in self._ranges):
            return self.partition_by_rows(npartition, random_shuffle)
        if self._ranges is None and len(self.resolved_paths) >= npartition:
            return super().partition_by_files(npartition, random_shuffle)
        if npartition < 1:
            raise PlanError(f"partition by files: npartition is {npartition}, wanted at least 1")
        ranges = list(self.resolved_row_ranges)
        if random_shuffle:
            random.shuffle(ranges)
        return self._parts(split_into_rows(ranges, npartition))

    def partition_by_rows(self, npartition: int, random_shuffle: bool = False) -> list[DataSet]:
        ranges = list(self.resolved_row_ranges)
        if random_shuffle:
            random.shuffle(ranges)
        return self._parts(rowrange.divide(ranges, npartition))

    def partition_by_size(self, max_partition_size: int) -> list[DataSet]:
        """Row ranges of at most about `max_partition_size` bytes before compression."""
        return self.partition_by_rows(self.estimated_data_size // max_partition_size + 1)

    def load_partitioned_datasets(
        self, npartition: int, data_partition_column: str, hive_partitioning: bool = False
    ) -> list[DataSet]:
        """Give each file to the partition that its metadata, its folder or its column names.

        Args:
            data_partition_column: name of the dimension; also of the column that is read where a
                file's metadata lack it.
            hive_partitioning: take the number from the folder's name (`column=3`).
        Raises: PlanError where a file holds rows of several partitions, or a number out of range.
        """
        parts: list[list[RowRange]] = [[] for _ in range(npartition)]
        for part in self.resolved_row_ranges:
            key = _partition_of(part.path, data_partition_column, hive_partitioning)
            if key is None:
                continue
            if not 0 <= key < npartition:
                raise PlanError(
                    f"{part.path}: partition {key} of {data_partition_column} is out of range "
                    f"0-{npartition - 1}"
                )
            parts[key].append(part)
        return self._parts(parts)

    # -- what a finished task leaves
    def describe(self) -> dict[str, Any]:
        ranges = [list(astuple(r)) for r in self._ranges] if self._ranges is not None else None
        return super().describe() | {"ranges": ranges}

    @classmethod
    def revive(cls, description: Mapping[str, Any]) -> DataSet:
        ranges = description["ranges"]
        made = super().revive({k: v for k, v in description.items() if k != "ranges"})
        if ranges is not None and isinstance(made, ParquetDataSet):
            made._ranges = [RowRange(*r) for r in ranges]
        return made

    def relocated(self, old: str, new: str) -> DataSet:
        if self._ranges is None:
            return super().relocated(old, new)
        return self.of_ranges([replace(r, path=move(r.path, old, new)) for r in self._ranges], self)

    def identity(self) -> list[Any]:
        parts = [r for r in self._ranges or () if not r.whole]
        return [*super().identity(), [[r.path, r.begin, r.end] for r in parts]]


def without_task_keys(metadata: Mapping[bytes, bytes] | None) -> dict[bytes, bytes] | None:
    """Schema metadata without what tasks note in their files."""
    prefix = PARQUET_METADATA_KEY_PREFIX.encode()
    kept = {k: v for k, v in (metadata or {}).items() if not k.startswith(prefix)}
    return kept or None


def _partition_of(path: str, column: str, hive_partitioning: bool) -> int | None:
    """The partition number of a file; None for a file without rows that does not tell."""
    if hive_partitioning:
        for name in path.split("/"):
            if name.startswith(f"{column}="):
                return int(name.split("=", 1)[1])
    from whalefall.data.arrowio import open_parquet

    with open_parquet(path) as file:
        noted = (file.metadata.metadata or {}).get((PARQUET_METADATA_KEY_PREFIX + column).encode())
        if noted is not None:
            return int(noted)
        if column not in file.schema_arrow.names:
            raise PlanError(f"{path}: neither its metadata nor its columns name {column}")
        values = file.read(columns=[column]).column(0).unique().to_pylist()
    if len(values) > 1:
        raise PlanError(
            f"{path}: rows of partitions {sorted(values)[:4]}, wanted one partition a file"
        )
    return int(values[0]) if values else None
