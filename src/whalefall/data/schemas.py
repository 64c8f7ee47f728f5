"""Whether Parquet files can be read as one table, from their footers.

Files of one data set have the same columns, in any order; types that differ are widened (INT32 and
INT64, BIGINT and DOUBLE), never cut to the first file's. With `union_by_name` a column that a file
lacks is NULL there.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa

from whalefall.data.arrowio import convert_types_to_large_string, open_parquet
from whalefall.data.errors import PlanError

__all__ = ["common_schema", "fitted", "same_columns"]


def common_schema(
    paths: Sequence[str],
    columns: Sequence[str] | None,
    union_by_name: bool,
    filesystem: Any = None,
) -> tuple[pa.Schema, bool]:
    """The schema of all files together, and whether it is each one's.

    Args:
        columns: only these; all where None.
    Raises: PlanError where the files have different columns (and not `union_by_name`), a column
        that no file has, or types that do not go together.
    """
    unique = list(dict.fromkeys(paths))

    def footer(path: str) -> pa.Schema:
        with open_parquet(path, filesystem) as file:
            schema = convert_types_to_large_string(file.schema_arrow).remove_metadata()
        return schema if columns is None else _chosen(schema, path, columns, union_by_name)

    with ThreadPoolExecutor(min(16, len(unique))) as pool:
        schemas = list(pool.map(footer, unique))
    first = schemas[0]
    if all(schema.equals(first) for schema in schemas):
        return first, True
    if not union_by_name:
        same_columns([(path, s.names) for path, s in zip(unique, schemas, strict=True)])
    merged = first
    for path, schema in zip(unique, schemas, strict=True):
        try:
            merged = pa.unify_schemas([merged, schema], promote_options="permissive")
        except (pa.ArrowTypeError, pa.ArrowInvalid):
            raise _clash(merged, schema, path, unique[0]) from None
    if columns is not None:
        missing = [name for name in columns if name not in merged.names]
        if missing:
            raise PlanError(f"{unique[0]} and {len(unique) - 1} more: no column {missing[0]}")
        merged = pa.schema([merged.field(name) for name in columns])
    return merged, False


def _chosen(schema: pa.Schema, path: str, columns: Sequence[str], union_by_name: bool) -> pa.Schema:
    missing = [name for name in columns if name not in schema.names]
    if missing and not union_by_name:
        raise PlanError(
            f"{path}: no column {', '.join(missing)}; there are {', '.join(schema.names)}"
        )
    return pa.schema([schema.field(name) for name in columns if name in schema.names])


def same_columns(parts: Sequence[tuple[str, Sequence[str]]]) -> None:
    """Refuse parts of different columns.

    Args:
        parts: (its name, its columns) each.
    Raises: PlanError.
    """
    first, wanted = parts[0]
    for name, columns in parts[1:]:
        if sorted(columns) != sorted(wanted):
            raise PlanError(
                f"{name} has the columns {', '.join(columns)}, but {first} has "
                f"{', '.join(wanted)}; union_by_name=True reads what each has, columns=[…] what "
                "all have"
            )


def _clash(merged: pa.Schema, schema: pa.Schema, path: str, first: str) -> PlanError:
    for field in schema:
        if field.name not in merged.names:
            continue
        other = merged.field(field.name)
        try:
            pa.unify_schemas([pa.schema([other]), pa.schema([field])], promote_options="permissive")
        except (pa.ArrowTypeError, pa.ArrowInvalid):
            return PlanError(
                f"{path}: column {field.name} is {field.type}, but in {first} (and files after it) "
                f"it is {other.type}; read them apart and cast it to one type"
            )
    return PlanError(f"{path}: its columns do not go with those of {first}")


def fitted(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """The batch with the schema's columns, widened to its types; NULL where it lacks one."""
    if batch.schema.equals(schema):
        return batch
    arrays = [
        batch.column(field.name).cast(field.type)
        if field.name in batch.schema.names
        else pa.nulls(batch.num_rows, field.type)
        for field in schema
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)
