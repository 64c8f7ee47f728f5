"""smallpond.io.arrow: Parquet files and Arrow tables."""

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

read_parquet_files_into_table = load_from_parquet_files
