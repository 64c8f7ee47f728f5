"""smallpond.contrib.copy_table: nodes that copy their input."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from whalefall.data.nodes import ArrowComputeNode, ArrowStreamNode

__all__ = ["CopyArrowTable", "StreamCopy"]


class CopyArrowTable(ArrowComputeNode):
    """Copies each partition as one table."""

    def process(self, runtime_ctx: Any, input_tables: Sequence[Any]) -> Any:
        """The first input."""
        return input_tables[0]


class StreamCopy(ArrowStreamNode):
    """Copies each partition batch by batch."""

    def process(self, runtime_ctx: Any, input_readers: Sequence[Any]) -> Iterator[Any]:
        """The first input's batches as tables."""
        import pyarrow as pa

        for batch in input_readers[0]:
            yield pa.Table.from_batches([batch])
        yield input_readers[0].schema.empty_table()
