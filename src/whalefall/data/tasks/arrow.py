"""Tasks that run a user's function on Arrow tables, pandas frames, batches or files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from whalefall.data.dataset import DataSet, FileSet
from whalefall.data.errors import PlanError, TaskFailed
from whalefall.data.parquet import ParquetDataSet
from whalefall.data.runtime import PartitionKey
from whalefall.data.tasks.base import Input, Task
from whalefall.data.tasks.parquet_out import ParquetOptions, TableWriter, file_in

__all__ = [
    "ArrowBatchTask",
    "ArrowComputeTask",
    "ArrowStreamTask",
    "PandasBatchTask",
    "PandasComputeTask",
    "PythonScriptTask",
    "StreamOutput",
]


@dataclass
class StreamOutput:
    """What a stream function may yield in the place of a table.

    Attributes:
        batch_indices: which input batches led to it; kept for the original's signature, a stream
            that failed starts over.
    """

    output_table: Any
    batch_indices: list[int] = field(default_factory=list)
    force_checkpoint: bool = False


class FunctionTask(Task):
    """What the tasks below share: a function of the user's.

    Args:
        function: called as `function(runtime_ctx, inputs)`; None where a subclass of the user's,
            made by a node's `spawn`, has a method `process`.
        use_duckdb_reader: read the inputs through DuckDB, so that columns may be SQL.
    """

    def __init__(
        self,
        node: Any,
        inputs: Sequence[Input],
        partition_key: PartitionKey,
        function: Callable[..., Any] | None,
        options: ParquetOptions | None = None,
        use_duckdb_reader: bool = False,
        batch_size: int = 0,
    ) -> None:
        super().__init__(node, inputs, partition_key)
        self.function, self.options = function, options or ParquetOptions()
        self.use_duckdb_reader, self.batch_size = use_duckdb_reader, batch_size
        self._ours = {*vars(self), "_ours"}

    def content(self) -> Sequence[Any]:
        theirs = {k: v for k, v in sorted(vars(self).items()) if k not in self._ours}
        what = type(self) if self.function is None else self.function
        return (what, theirs, self.options, self.use_duckdb_reader, self.batch_size)

    def call(self, inputs: Sequence[Any], *more: Any) -> Any:
        """What the user's function makes of the inputs."""
        function = self.function if self.function is not None else self.process
        return function(self.runtime_ctx, inputs, *more)

    def process(self, runtime_ctx: Any, inputs: Any, *more: Any) -> Any:
        """For a subclass of the user's to override."""
        raise NotImplementedError(f"{type(self).__name__}.process")

    def _tables(self, inputs: Sequence[DataSet]) -> list[Any]:
        conn = self.connect() if self.use_duckdb_reader else None
        workers = max(1, int(self.cpu_limit))
        return [dataset.to_arrow_table(workers, conn=conn) for dataset in inputs]

    def _readers(self, inputs: Sequence[DataSet]) -> list[Any]:
        # a connection for each, since an open reader holds its own
        connections = [self.connect() if self._by_sql(dataset) else None for dataset in inputs]
        return [
            dataset.to_batch_reader(self.batch_size, conn=conn)
            for dataset, conn in zip(inputs, connections, strict=True)
        ]

    def _by_sql(self, dataset: DataSet) -> bool:
        return self.use_duckdb_reader or not isinstance(dataset, ParquetDataSet)

    def _write(self, tables: Iterable[Any]) -> list[DataSet]:
        path = file_in(self.runtime_output_abspath, f"{self.output_filename}.parquet")
        writer = TableWriter(path, self.options, self.parquet_metadata())
        empty = None
        for item in tables:
            table = self._checked(item)
            empty = table if empty is None and not table.num_rows else empty
            if table.num_rows:
                writer.write(table)
        if not writer.num_rows and empty is not None and empty.num_columns:
            writer.write(empty)
        made = writer.close()
        made._union_by_name = True  # a function may give each partition other columns
        return [made]

    def _checked(self, item: Any) -> Any:
        import pyarrow as pa

        if isinstance(item, StreamOutput):
            item = item.output_table
        if isinstance(item, pa.RecordBatch):
            item = pa.Table.from_batches([item])
        if not isinstance(item, pa.Table):
            raise TaskFailed(
                f"{self.label}: the function returned {type(item).__name__}, wanted pyarrow.Table"
            )
        return item


class ArrowComputeTask(FunctionTask):
    """`function(ctx, [Table])` → Table."""

    def run(self, inputs: list[DataSet]) -> list[DataSet]:
        return self._write([self.call(self._tables(inputs))])


class PandasComputeTask(FunctionTask):
    """`function(ctx, [DataFrame])` → DataFrame."""

    def run(self, inputs: list[DataSet]) -> list[DataSet]:
        frames = [table.to_pandas() for table in self._tables(inputs)]
        return self._write([from_frame(self.call(frames), self.label)])


class ArrowStreamTask(FunctionTask):
    """`function(ctx, [RecordBatchReader])` yields Tables or StreamOutputs."""

    def run(self, inputs: list[DataSet]) -> list[DataSet]:
        return self._write(self.call(self._readers(inputs)))


class ArrowBatchTask(FunctionTask):
    """`function(ctx, [Table])` → Table, once a batch; an exhausted input is an empty table."""

    def run(self, inputs: list[DataSet]) -> list[DataSet]:
        return self._write(self._results(self._readers(inputs)))

    def _results(self, readers: Sequence[Any]) -> Iterator[Any]:
        for tables in batches_in_step(readers):
            yield self.call(tables)


class PandasBatchTask(ArrowBatchTask):
    """`function(ctx, [DataFrame])` → DataFrame, once a batch."""

    def _results(self, readers: Sequence[Any]) -> Iterator[Any]:
        for tables in batches_in_step(readers):
            frames = [table.to_pandas() for table in tables]
            yield from_frame(self.call(frames), self.label)


def batches_in_step(readers: Sequence[Any]) -> Iterator[list[Any]]:
    """One batch of each reader at a time, as tables, until all are exhausted."""
    import pyarrow as pa

    while True:
        batches = [next(reader, None) for reader in readers]
        if all(batch is None for batch in batches):
            return
        yield [
            reader.schema.empty_table() if batch is None else pa.Table.from_batches([batch])
            for reader, batch in zip(readers, batches, strict=True)
        ]


def from_frame(frame: Any, label: str) -> Any:
    """A pandas frame as an Arrow table, without its index."""
    import pandas as pd
    import pyarrow as pa

    if not isinstance(frame, pd.DataFrame):
        raise TaskFailed(
            f"{label}: the function returned {type(frame).__name__}, wanted pandas.DataFrame"
        )
    return pa.Table.from_pandas(frame, preserve_index=False)


class PythonScriptTask(FunctionTask):
    """`function(ctx, [DataSet], output_dir)` → bool; the files it leaves are the output."""

    def run(self, inputs: list[DataSet]) -> list[DataSet]:
        os.makedirs(self.runtime_output_abspath, exist_ok=True)
        for dataset in inputs:
            dataset.require_files()
        done = self.call(inputs, self.runtime_output_abspath)
        if not done:
            raise TaskFailed(f"{self.label}: the script returned {done!r}, wanted True")
        files = [
            os.path.join(root, name)
            for root, _, found in os.walk(self.runtime_output_abspath)
            for name in found
        ]
        return [FileSet([]).with_paths(sorted(files))]


class PartitionFunctionTask(Task):
    """`function(ctx, DataSet)` → one data set a partition, chosen by the user."""

    def __init__(
        self, node: Any, inputs: Sequence[Input], num_outputs: int, function: Callable[..., Any],
        partition_key: PartitionKey = (),
    ) -> None:  # fmt: skip
        super().__init__(node, inputs, partition_key, num_outputs)
        self.function = function

    def content(self) -> Sequence[Any]:
        return (self.function,)

    def run(self, inputs: list[DataSet]) -> list[DataSet]:
        parts = list(self.function(self.runtime_ctx, inputs[0]))
        if len(parts) != self.num_outputs:
            raise PlanError(
                f"{self.label}: partition() gave {len(parts)}, wanted {self.num_outputs}"
            )
        whole = inputs[0]
        if isinstance(whole, ParquetDataSet):  # a part without files keeps the schema
            none = whole.without_rows()
            parts = [
                p if p.resolved_paths or type(p) is not ParquetDataSet else none for p in parts
            ]
        return parts
