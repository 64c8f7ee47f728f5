"""Making records.

# N records
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np

from whalefall.data.errors import writing
from whalefall.data.graysort.library import library
from whalefall.data.scratch import scratch_folder
from whalefall.data.storage import fsync_path
from whalefall.errors import ConfigError

__all__ = ["KEY_BYTES", "RECORD_BYTES", "gensort", "make_records"]

RECORD_BYTES, KEY_BYTES = 100, 10
BLOCK_RECORDS = 160_000  # 16 MB: a block fits the L3 cache while it is written

Watch = Callable[[int, int], None] | None


def make_records(
    count: int, begin: int = 0, ascii: bool = False, skewed: bool = False, out: Any = None
) -> np.ndarray:
    """Records `begin` to `begin + count`.

    Args:
        ascii: printable characters, as PennySort wants.
        skewed: keys of which three quarters begin alike.
        out: [N, 100] uint8 to write to.
    Returns: [N, 100] uint8.
    """
    if count < 0 or begin < 0 or begin + count >= 1 << 64:
        raise ConfigError(f"gensort: records {begin} to {begin + count}, wanted 0 to 2^64")
    records: np.ndarray = np.empty((count, RECORD_BYTES), np.uint8) if out is None else out[:count]
    library().wf_graysort_generate(records.ctypes.data, begin, count, ascii, skewed)
    return records


def gensort(
    path: str, count: int, begin: int = 0, ascii: bool = False, skewed: bool = False,
    watch: Watch = None,
) -> None:  # fmt: skip
    """Write records into a file, which is there completely or not at all.

    Args:
        watch: called with (records written, all).
    Raises: WriteError.
    """
    buffer = np.empty((min(count, BLOCK_RECORDS), RECORD_BYTES), np.uint8)
    with writing(path), scratch_folder(path) as folder:
        temporary = os.path.join(folder, "records")
        with open(temporary, "wb", buffering=0) as file:
            for at in range(0, count, BLOCK_RECORDS):
                block = make_records(
                    min(BLOCK_RECORDS, count - at), begin + at, ascii, skewed, buffer
                )
                write_all(file.fileno(), block, at * RECORD_BYTES)
                if watch is not None:
                    watch(at + len(block), count)
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync_path(os.path.dirname(os.path.abspath(path)))


def write_all(handle: int, data: np.ndarray, offset: int) -> None:
    """Write a whole array at an offset."""
    view = memoryview(data.data).cast("B")
    while len(view):
        count = os.pwrite(handle, view, offset)
        view, offset = view[count:], offset + count


def read_all(handle: int, out: np.ndarray, offset: int) -> None:
    """Fill an array from an offset.

    Raises: ConfigError if the file ends before.
    """
    view = memoryview(out.data).cast("B")
    while len(view):
        count = os.preadv(handle, [view], offset)
        if count == 0:
            raise ConfigError(f"the file ended at byte {offset}: did something shorten it?")
        view, offset = view[count:], offset + count


def count_records(path: str) -> int:
    """How many records a file holds.

    Raises: MissingError; ConfigError if its size is no multiple of 100.
    """
    from whalefall.errors import MissingError

    try:
        size = os.path.getsize(path)
    except OSError as error:
        raise MissingError(f"{path}: {error.strerror}") from None
    if os.path.isdir(path):
        raise ConfigError(f"{path} is a folder, wanted a file of records")
    if size % RECORD_BYTES:
        raise ConfigError(f"{path}: {size} bytes, wanted a multiple of {RECORD_BYTES}")
    return size // RECORD_BYTES
