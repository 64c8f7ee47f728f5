"""Parquet files and Arrow tables: reading whole files, row ranges and batches, writing tables.

Strings come out as `large_string`, so that files written with either kind load together.
Source: smallpond `io.arrow`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from whalefall.data.constants import DEFAULT_BATCH_SIZE, DEFAULT_ROW_GROUP_SIZE, KB
from whalefall.data.errors import PlanError
from whalefall.data.paths import is_url
from whalefall.data.reading import reading
from whalefall.data.rowrange import RowRange, file_ranges
from whalefall.errors import CorruptError, MissingError

__all__ = [
    "build_batch_reader_from_files",
    "cast_columns_to_large_string",
    "convert_type_to_large",
    "convert_types_to_large_string",
    "dump_to_parquet_files",
    "filter_schema",
    "iterate_batches",
    "load_from_parquet_files",
    "open_parquet",
    "rebatch",
]


def open_parquet(path: str, filesystem: Any = None) -> Any:
    """A `pyarrow.parquet.ParquetFile` of a local path or fsspec URL."""
    try:
        if filesystem is not None:
            return pq.ParquetFile(path, filesystem=filesystem)
        if is_url(path):
            import fsspec

            return pq.ParquetFile(fsspec.open(path).open())
        return pq.ParquetFile(path)
    except FileNotFoundError:
        raise MissingError(f"no such file: {path}") from None
    except IsADirectoryError:
        raise MissingError(f"{path} is a folder, wanted a Parquet file") from None
    except pa.ArrowInvalid as error:
        raise CorruptError(f"{path} is no readable Parquet file: {error}") from None


def convert_type_to_large(type_: pa.DataType) -> pa.DataType:
    """`large_string` for string, `large_binary` for binary, also within lists and structs."""
    if pa.types.is_string(type_):
        return pa.large_string()
    if pa.types.is_binary(type_):
        return pa.large_binary()
    return _convert_nested(type_, convert_type_to_large)


def _convert_type_to_large_string(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_string(kind) or pa.types.is_string_view(kind):
        return pa.large_string()
    return _convert_nested(kind, _convert_type_to_large_string)


def _convert_nested(kind: pa.DataType, convert: Any) -> pa.DataType:
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(convert(kind.value_type)))
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(convert(field.type)) for field in kind])
    if pa.types.is_map(kind):
        return pa.map_(convert(kind.key_type), convert(kind.item_type))
    return kind


def convert_types_to_large_string(schema: pa.Schema) -> pa.Schema:
    """The schema with `large_string` in the place of every string type, all fields nullable.

    DuckDB marks a column without NULLs as such, so files of one table may differ in it.
    """
    fields = [
        field.with_type(_convert_type_to_large_string(field.type)).with_nullable(True)
        for field in schema
    ]
    return pa.schema(fields, metadata=schema.metadata)


def cast_columns_to_large_string(table: pa.Table) -> pa.Table:
    """The table with `large_string` in the place of every string type."""
    schema = convert_types_to_large_string(table.schema)
    return table if schema.equals(table.schema) else table.cast(schema)


def filter_schema(
    schema: pa.Schema,
    included_cols: Sequence[str] | None = None,
    excluded_cols: Sequence[str] | None = None,
) -> pa.Schema:
    """The schema with only, or without, some columns; its metadata stays."""
    if included_cols is not None:
        fields = [schema.field(name) for name in included_cols]
    else:
        fields = [field for field in schema if field.name not in (excluded_cols or ())]
    return pa.schema(fields, metadata=schema.metadata)


def _ranges(paths_or_ranges: Sequence[str | RowRange]) -> list[RowRange]:
    if paths_or_ranges and isinstance(paths_or_ranges[0], RowRange):
        return [item for item in paths_or_ranges if isinstance(item, RowRange)]
    return file_ranges([str(item) for item in paths_or_ranges])


def _checked_columns(
    file: Any, path: str, columns: Sequence[str] | None, missing_ok: bool = False
) -> list[str]:
    names = list(file.schema_arrow.names)
    if columns is None:
        return names
    missing = [name for name in columns if name not in names]
    if missing and missing_ok:
        return [name for name in columns if name in names]
    if missing:
        raise PlanError(f"{path}: no column {', '.join(missing)}; there are {', '.join(names)}")
    return list(columns)


def _read_range(
    part: RowRange, columns: Sequence[str] | None, filesystem: Any, missing_ok: bool
) -> pa.Table:
    with open_parquet(part.path, filesystem) as file, reading(part.path):
        names = _checked_columns(file, part.path, columns, missing_ok)
        first, groups = None, []
        position = 0
        for index in range(file.metadata.num_row_groups):
            rows = file.metadata.row_group(index).num_rows
            if position < part.end and position + rows > part.begin:
                first = position if first is None else first
                groups.append(index)
            position += rows
        if not groups:
            table = file.schema_arrow.empty_table().select(names)
        else:
            table = file.read_row_groups(groups, columns=names).select(names)
            table = table.slice(part.begin - (first or 0), part.num_rows)
        return cast_columns_to_large_string(table)


def load_from_parquet_files(
    paths_or_ranges: Sequence[str | RowRange],
    columns: Sequence[str] | None = None,
    max_workers: int = 16,
    filesystem: Any = None,
    missing_ok: bool = False,
) -> pa.Table:
    """Read files or row ranges into one table, in the order given.

    Args:
        columns: which, in this order; all where None.
        missing_ok: whether a column that a file lacks is NULL there.
    Raises: CorruptError; PlanError (an AssertionError) for a column that a file lacks.
    Source: smallpond `io.arrow.load_from_parquet_files`.
    """
    parts = _ranges(paths_or_ranges)
    workers = max(1, min(max_workers, len(parts), os.cpu_count() or 1))
    with ThreadPoolExecutor(workers) as pool:
        tables = list(
            pool.map(lambda part: _read_range(part, columns, filesystem, missing_ok), parts)
        )
    return concat(tables)


def concat(tables: Sequence[pa.Table]) -> pa.Table:
    """One table of several, types widened where they differ; the first one's metadata."""
    if not tables:
        return pa.table({})
    if len(tables) == 1 or all(t.schema.equals(tables[0].schema) for t in tables):
        return pa.concat_tables(tables)
    metadata = tables[0].schema.metadata
    merged = pa.concat_tables(
        [t.replace_schema_metadata(None) for t in tables], promote_options="permissive"
    )
    return merged.replace_schema_metadata(metadata)


def iterate_batches(
    parts: Sequence[RowRange],
    columns: Sequence[str] | None,
    batch_size: int,
    filesystem: Any = None,
    missing_ok: bool = False,
) -> Iterator[pa.RecordBatch]:
    """Record batches of at most `batch_size` rows, one file after the other."""
    for part in parts:
        with open_parquet(part.path, filesystem) as file, reading(part.path):
            names = _checked_columns(file, part.path, columns, missing_ok)
            position, skip = 0, []
            for index in range(file.metadata.num_row_groups):
                rows = file.metadata.row_group(index).num_rows
                if position + rows > part.begin and position < part.end:
                    skip.append((index, position))
                position += rows
            if not skip:
                continue
            position = skip[0][1]
            batches = file.iter_batches(batch_size, [i for i, _ in skip], columns=names)
            for batch in batches:
                low, high = max(part.begin - position, 0), min(part.end - position, batch.num_rows)
                position += batch.num_rows
                if high > low:
                    piece = pa.Table.from_batches([batch.slice(low, high - low)]).select(names)
                    yield from cast_columns_to_large_string(piece).to_batches()


def rebatch(batches: Iterable[pa.RecordBatch], batch_size: int) -> Iterator[pa.RecordBatch]:
    """The same rows in batches of exactly `batch_size`, but the last."""
    held: list[pa.RecordBatch] = []
    rows = 0
    for batch in batches:
        while batch.num_rows:
            piece = batch.slice(0, batch_size - rows)
            batch = batch.slice(piece.num_rows)
            held.append(piece)
            rows += piece.num_rows
            if rows == batch_size:
                yield _one_batch(held)
                held, rows = [], 0
    if rows:
        yield _one_batch(held)


def _one_batch(pieces: Sequence[pa.RecordBatch]) -> pa.RecordBatch:
    if len(pieces) == 1:
        return pieces[0]
    return concat([pa.Table.from_batches([p]) for p in pieces]).combine_chunks().to_batches()[0]


def build_batch_reader_from_files(
    paths_or_ranges: Sequence[str | RowRange],
    *,
    columns: Sequence[str] | None = None,
    batch_size: int = DEFAULT_BATCH_SIZE,
    max_batch_byte_size: int | None = None,
    filesystem: Any = None,
    union_by_name: bool = False,
) -> pa.RecordBatchReader:
    """A reader of exactly `batch_size` rows a batch, but the last.

    Args:
        union_by_name: whether a column that a file lacks is NULL there.
        max_batch_byte_size: lowers `batch_size` so that a batch stays below this many bytes.
    Source: smallpond `io.arrow.build_batch_reader_from_files`.
    """
    parts = _ranges(paths_or_ranges)
    if not parts:
        raise PlanError("build_batch_reader_from_files: no files, so no schema")
    size, rows = (
        sum(getattr(p, name) for p in parts) for name in ("estimated_data_size", "num_rows")
    )
    if max_batch_byte_size and rows and size > 0:
        batch_size = max(1, min(batch_size, max_batch_byte_size * rows // size))
    from whalefall.data.schemas import common_schema, fitted

    schema, _ = common_schema([p.path for p in parts], columns, union_by_name, filesystem)
    read = iterate_batches(parts, schema.names, batch_size, filesystem, union_by_name)
    fit = (fitted(batch, schema) for batch in read)
    return pa.RecordBatchReader.from_batches(schema, rebatch(fit, batch_size))


def dump_to_parquet_files(
    table: pa.Table,
    output_dir: str,
    filename: str = "data",
    compression: str | None = "ZSTD",
    compression_level: int | None = 3,
    row_group_size: int = DEFAULT_ROW_GROUP_SIZE,
    row_group_bytes: int = DEFAULT_ROW_GROUP_SIZE * 4 * KB,
    use_dictionary: bool = False,
    max_workers: int = 16,
    filesystem: Any = None,
) -> bool:
    """Write a table as `{filename}-{i}.parquet`, several files at a time where it is large.

    Returns: True.
    Source: smallpond `io.arrow.dump_to_parquet_files`.
    """
    per_row = table.nbytes / max(1, table.num_rows)
    group = max(1, min(row_group_size, int(row_group_bytes / max(1.0, per_row))))
    num_files = max(1, min(max_workers, os.cpu_count() or 1, -(-table.num_rows // group)))
    rows = -(-table.num_rows // num_files)

    def write(index: int) -> None:
        path = os.path.join(output_dir, f"{filename}-{index}.parquet")
        pq.write_table(
            table.slice(index * rows, rows),
            path,
            row_group_size=group,
            compression=compression or "NONE",
            compression_level=compression_level if _has_levels(compression) else None,
            use_dictionary=use_dictionary,
            filesystem=filesystem,
        )

    with ThreadPoolExecutor(num_files) as pool:
        list(pool.map(write, range(num_files)))
    return True


def _has_levels(compression: str | None) -> bool:
    return (compression or "").upper() in ("ZSTD", "GZIP", "BROTLI")
