"""How tasks write Parquet: the options that nodes take, and a writer for Arrow tables."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import Any

from whalefall.data.constants import DEFAULT_ROW_GROUP_SIZE
from whalefall.data.dataset import identifier, quote
from whalefall.data.errors import WriteError, writing
from whalefall.data.parquet import ParquetDataSet
from whalefall.data.rowrange import RowRange

__all__ = ["ParquetOptions", "TableWriter"]


@dataclass(frozen=True)
class ParquetOptions:
    """Row group size (rows), dictionary encoding, compression and its level."""

    row_group_size: int | None = None
    dictionary_encoding: bool = False
    compression: str | None = "ZSTD"
    compression_level: int | None = 3

    def copy_options(self, metadata: dict[str, str] | None = None) -> str:
        """The options of DuckDB's COPY … TO."""
        items = ["format parquet", "return_stats true"]
        items.append(f"row_group_size {self.row_group_size or DEFAULT_ROW_GROUP_SIZE}")
        compression = (self.compression or "uncompressed").lower()
        items.append(f"compression {compression}")
        if compression == "zstd" and self.compression_level is not None:
            items.append(f"compression_level {self.compression_level}")
        if metadata:
            notes = ", ".join(f"{identifier(k)}: {quote(v)}" for k, v in metadata.items())
            items.append(f"kv_metadata {{{notes}}}")
        return ", ".join(items)


class TableWriter:
    """Writes Arrow tables into one Parquet file, opened at the first table.

    Args:
        path: the file.
        options: how.
        metadata: what the file's footer notes.
    """

    def __init__(self, path: str, options: ParquetOptions, metadata: dict[str, str]) -> None:
        self.path, self.options, self.metadata = path, options, metadata
        self._writer: Any = None
        self._schema: Any = None
        self.num_rows = self.num_bytes = 0

    def write(self, table: Any) -> None:
        """Append a table; later ones are cast to the first one's types.

        Raises: WriteError where the disk takes no more.
        """
        try:
            with writing(self.path):
                self._write(table)
        except WriteError:
            if self._writer is not None:
                with contextlib.suppress(OSError):  # or its destructor would try, and complain
                    self._writer.close()
            raise

    def _write(self, table: Any) -> None:
        import pyarrow.parquet as pq

        if self._writer is None:
            schema = table.schema
            notes = {k.encode(): v.encode() for k, v in self.metadata.items()}
            self._schema = schema.with_metadata({**(schema.metadata or {}), **notes})
            level = self.options.compression_level
            compression = self.options.compression or "NONE"
            self._writer = pq.ParquetWriter(
                self.path, self._schema, compression=compression,
                compression_level=level if compression.upper() == "ZSTD" else None,
                use_dictionary=self.options.dictionary_encoding or True,
            )  # fmt: skip
        if not table.schema.equals(self._schema):
            table = table.select(self._schema.names).cast(self._schema)
        self.num_rows += table.num_rows
        self.num_bytes += table.nbytes
        size = self.options.row_group_size or DEFAULT_ROW_GROUP_SIZE
        self._writer.write_table(table.replace_schema_metadata(self._schema.metadata), size)

    def close(self) -> ParquetDataSet:
        """End the file; returns the data set, without any file where nothing was written."""
        if self._writer is None:
            return ParquetDataSet.of_ranges([])
        with writing(self.path):
            self._writer.close()
        rows = self.num_rows
        return ParquetDataSet.of_ranges([RowRange(self.path, self.num_bytes, rows, 0, rows)])


def file_in(folder: str, name: str) -> str:
    """A path in a folder that is made where missing."""
    os.makedirs(folder, exist_ok=True)
    return os.path.join(folder, name)
