"""smallpond.common: sizes, defaults, splitting of lists, error classes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

from whalefall.data.constants import (
    DATA_PARTITION_COLUMN_NAME,
    DEFAULT_BATCH_SIZE,
    DEFAULT_MAX_RETRY_COUNT,
    DEFAULT_ROW_GROUP_SIZE,
    GB,
    KB,
    MB,
    PARQUET_METADATA_KEY_PREFIX,
    TB,
    split_into_cols,
    split_into_rows,
)
from whalefall.data.parquet import GENERATED as GENERATED_COLUMNS
from whalefall.data.udf import (
    UDFAnyParameters,
    UDFListType,
    UDFMapType,
    UDFStructType,
    UDFType,
    udf,
)

__all__ = [
    "DATA_PARTITION_COLUMN_NAME",
    "DEFAULT_BATCH_SIZE",
    "DEFAULT_MAX_FAIL_COUNT",
    "DEFAULT_MAX_RETRY_COUNT",
    "DEFAULT_ROW_GROUP_BYTES",
    "DEFAULT_ROW_GROUP_SIZE",
    "GB",
    "GENERATED_COLUMNS",
    "KB",
    "MAX_NUM_ROW_GROUPS",
    "MAX_PARQUET_FILE_BYTES",
    "MAX_ROW_GROUP_BYTES",
    "MAX_ROW_GROUP_SIZE",
    "MB",
    "PARQUET_METADATA_KEY_PREFIX",
    "TB",
    "InjectedFault",
    "NonzeroExitCode",
    "OutOfMemory",
    "SmallpondError",
    "UDFAnyParameters",
    "UDFListType",
    "UDFMapType",
    "UDFStructType",
    "UDFType",
    "get_nth_partition",
    "next_power_of_two",
    "pytest_running",
    "round_up",
    "split_into_cols",
    "split_into_rows",
    "udf",
]

DEFAULT_MAX_FAIL_COUNT = 3
DEFAULT_ROW_GROUP_BYTES = DEFAULT_ROW_GROUP_SIZE * 4 * KB
MAX_ROW_GROUP_SIZE = 10 * 1024 * 1024
MAX_ROW_GROUP_BYTES = 2 * GB
MAX_NUM_ROW_GROUPS = 256
MAX_PARQUET_FILE_BYTES = 8 * GB

V = TypeVar("V")


class SmallpondError(Exception):
    """The root of the original's errors."""


class InjectedFault(SmallpondError):
    """A fault that a test asked for."""


class OutOfMemory(SmallpondError):
    """A task exceeded its memory."""


class NonzeroExitCode(SmallpondError):
    """A task's process ended with an error."""


def get_nth_partition(items: Sequence[V], n: int, npartitions: int) -> list[V]:
    """Part n of `split_into_rows`."""
    return split_into_rows(items, npartitions)[n]


def next_power_of_two(x: int) -> int:
    """The smallest power of two that is not below x."""
    return 1 << max(0, x - 1).bit_length()


def round_up(x: int, align_size: int = MB) -> int:
    """The smallest multiple of align_size that is not below x."""
    return -(-x // align_size) * align_size


def pytest_running() -> bool:
    """Whether a pytest test runs."""
    return "PYTEST_CURRENT_TEST" in os.environ
