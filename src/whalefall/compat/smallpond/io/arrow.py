"""smallpond.io.arrow: Parquet files and Arrow tables."""

from collections.abc import Sequence
from typing import Any

from whalefall.data.arrowio import (
    build_batch_reader_from_files,
    cast_columns_to_large_string,
    convert_type_to_large,
    convert_types_to_large_string,
    dump_to_parquet_files,
    filter_schema,
    load_from_parquet_files,
)
from whalefall.data.rowrange import RowRange

__all__ = [
    "RowRange",
    "build_batch_reader_from_files",
    "cast_columns_to_large_string",
    "convert_type_to_large",
    "convert_types_to_large_string",
    "dump_to_parquet_files",
    "filter_schema",
    "load_from_parquet_files",
    "read_parquet_files_into_table",
]


def read_parquet_files_into_table(
    paths_or_ranges: Sequence[str | RowRange],
    columns: Sequence[str] | None = None,
    filesystem: Any = None,
) -> Any:
    """`load_from_parquet_files` with one thread."""
    return load_from_parquet_files(paths_or_ranges, columns, 1, filesystem)
