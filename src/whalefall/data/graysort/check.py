"""Checking sorted records: order, duplicates, the 128-bit sum of the records' CRCs.

Summaries of the parts of a sorted set, in order, merge into the summary of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from whalefall.data.graysort.library import library
from whalefall.data.graysort.records import (
    BLOCK_RECORDS,
    KEY_BYTES,
    RECORD_BYTES,
    count_records,
    read_all,
)

__all__ = ["Summary", "summarize", "valsort"]


@dataclass(frozen=True)
class Summary:
    """What there is to say of a run of records.

    Attributes:
        unordered: how many keys are below the one before.
        first_unordered: the index of the first of them; None where all is in order.
        duplicates: how many keys equal the one before.
        checksum: sum of the records' CRC-32, modulo 2^128.
        first_key, last_key: empty where there are no records.
    """

    records: int = 0
    unordered: int = 0
    first_unordered: int | None = None
    duplicates: int = 0
    checksum: int = 0
    first_key: bytes = b""
    last_key: bytes = b""

    @property
    def ok(self) -> bool:
        """Whether all keys are in order."""
        return self.unordered == 0

    def __add__(self, other: Summary) -> Summary:
        """The summary of these records followed by the other's."""
        if not self.records or not other.records:
            return other if not self.records else self
        border = self.last_key > other.first_key
        first = self.first_unordered
        if first is None and border:
            first = self.records
        if first is None and other.first_unordered is not None:
            first = self.records + other.first_unordered
        return Summary(
            self.records + other.records,
            self.unordered + other.unordered + border,
            first,
            self.duplicates + other.duplicates + (self.last_key == other.first_key),
            (self.checksum + other.checksum) % (1 << 128),
            self.first_key,
            other.last_key,
        )


def summarize(records: np.ndarray) -> Summary:
    """The summary of records in memory: [N, 100] uint8."""
    count = len(records)
    if count == 0:
        return Summary()
    totals = np.zeros(5, np.uint64)
    library().wf_graysort_check(records.ctypes.data, count, totals.ctypes.data)
    low, high, unordered, equal, first = (int(t) for t in totals)
    return Summary(
        count, unordered, first if unordered else None, equal, (high << 64) + low,
        records[0, :KEY_BYTES].tobytes(), records[-1, :KEY_BYTES].tobytes(),
    )  # fmt: skip


def valsort(
    paths: Iterable[str], watch: Callable[[int, int], None] | None = None
) -> Summary:  # fmt: skip
    """The summary of files, one after the other.

    Args:
        watch: called with (records read, all).
    """
    files = [(path, count_records(path)) for path in paths]
    total, done = sum(count for _, count in files), 0
    whole = Summary()
    buffer = np.empty((BLOCK_RECORDS, RECORD_BYTES), np.uint8)
    for path, count in files:
        with open(path, "rb", buffering=0) as file:
            for at in range(0, count, BLOCK_RECORDS):
                block = buffer[: min(BLOCK_RECORDS, count - at)]
                read_all(file.fileno(), block, at * RECORD_BYTES)
                whole += summarize(block)
                done += len(block)
                if watch is not None:
                    watch(done, total)
    return whole
