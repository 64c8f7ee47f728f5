"""A range of the rows of one Parquet file, and dividing such ranges without moving data.

Source: smallpond `io.arrow.RowRange`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from whalefall.data.errors import PlanError

__all__ = ["RowRange", "divide", "file_ranges"]


@dataclass(frozen=True)
class RowRange:
    """Rows `begin` to `end` (exclusive) of the Parquet file `path`.

    Attributes:
        path: absolute path or URL.
        data_size: bytes of the whole file's columns before compression.
        file_num_rows: rows of the whole file.
    """

    path: str
    data_size: int
    file_num_rows: int
    begin: int
    end: int

    @property
    def num_rows(self) -> int:
        """Rows in the range."""
        return self.end - self.begin

    @property
    def whole(self) -> bool:
        """Whether the range is its whole file."""
        return self.begin == 0 and self.end == self.file_num_rows

    @property
    def estimated_data_size(self) -> int:
        """Bytes before compression, if rows were of equal size."""
        return self.data_size * self.num_rows // self.file_num_rows if self.file_num_rows else 0

    def take(self, num_rows: int) -> tuple[RowRange, RowRange]:
        """Cut after `num_rows` rows: (head, rest)."""
        cut = self.begin + min(num_rows, self.num_rows)
        return replace(self, end=cut), replace(self, begin=cut)

    @staticmethod
    def partition_by_rows(row_ranges: list[RowRange], npartition: int) -> list[list[RowRange]]:
        """As `divide`."""
        return divide(row_ranges, npartition)


def divide(ranges: Iterable[RowRange], npartitions: int) -> list[list[RowRange]]:
    """Divide rows into contiguous parts whose sizes differ by at most one, the larger first."""
    if npartitions < 1:
        raise PlanError(f"partition by rows: npartitions is {npartitions}, wanted at least 1")
    queue = [r for r in ranges if r.num_rows]
    queue.reverse()
    quotient, rest = divmod(sum(r.num_rows for r in queue), npartitions)
    parts: list[list[RowRange]] = []
    for index in range(npartitions):
        wanted, part = quotient + (index < rest), []
        while wanted:
            head, tail = queue.pop().take(wanted)
            part.append(head)
            wanted -= head.num_rows
            if tail.num_rows:
                queue.append(tail)
        parts.append(part)
    return parts


def file_ranges(paths: Iterable[str], max_workers: int = 16) -> list[RowRange]:
    """Whole-file ranges, from the files' footers.

    Raises: MissingError for a file that is not there, CorruptError for one that is no Parquet file.
    """
    from concurrent.futures import ThreadPoolExecutor

    names = list(paths)
    if len(names) <= 1:
        return [_file_range(name) for name in names]
    unique = sorted(set(names))
    with ThreadPoolExecutor(min(max_workers, len(unique))) as pool:
        by_name = dict(zip(unique, pool.map(_file_range, unique), strict=True))
    return [by_name[name] for name in names]


def _file_range(path: str) -> RowRange:
    from whalefall.data.arrowio import open_parquet

    with open_parquet(path) as file:
        footer: Any = file.metadata
        size = sum(footer.row_group(i).total_byte_size for i in range(footer.num_row_groups))
        return RowRange(path, size, footer.num_rows, 0, footer.num_rows)
