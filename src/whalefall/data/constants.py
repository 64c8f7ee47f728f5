"""Sizes, defaults and names that plans and data sets share, and splitting of lists.

Source: smallpond `common`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

__all__ = [
    "DATA_PARTITION_COLUMN_NAME",
    "DEFAULT_BATCH_SIZE",
    "DEFAULT_MAX_RETRY_COUNT",
    "DEFAULT_ROW_GROUP_SIZE",
    "GB",
    "KB",
    "MB",
    "PARQUET_METADATA_KEY_PREFIX",
    "TB",
    "TOPLEVEL_DIMENSION",
    "split_into_cols",
    "split_into_rows",
]

KB = 1024
MB = 1024 * KB
GB = 1024 * MB
TB = 1024 * GB
DEFAULT_MAX_RETRY_COUNT = 5
DEFAULT_ROW_GROUP_SIZE = 122880  # DuckDB's own
DEFAULT_BATCH_SIZE = 122880
DATA_PARTITION_COLUMN_NAME = "__data_partition__"
PARQUET_METADATA_KEY_PREFIX = "SMALLPOND:"
TOPLEVEL_DIMENSION = "@toplevel@"

V = TypeVar("V")


def split_into_rows(items: Sequence[V], npartitions: int) -> list[list[V]]:
    """Split into contiguous runs whose lengths differ by at most one, the longer first."""
    quotient, rest = divmod(len(items), npartitions)
    parts, begin = [], 0
    for index in range(npartitions):
        end = begin + quotient + (index < rest)
        parts.append(list(items[begin:end]))
        begin = end
    return parts


def split_into_cols(items: Sequence[V], npartitions: int) -> list[list[V]]:
    """Deal the items out in turn: part i takes items i, i + n, i + 2n, …"""
    return [list(items[index::npartitions]) for index in range(npartitions)]
