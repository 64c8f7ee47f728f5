"""FFRecord files as a source and a sink of frames: a row is a sample.

Each file is read, and each partition written, by one task; see the `record` room for the format.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from whalefall.data import paths as names
from whalefall.data.dataset import FileSet
from whalefall.data.errors import PlanError, TaskFailed
from whalefall.data.nodes import (
    ArrowStreamNode,
    DataSinkNode,
    DataSourceNode,
    EvenlyDistributedPartitionNode,
    Node,
    PythonScriptNode,
)
from whalefall.data.storage import check_target
from whalefall.errors import MissingError

if TYPE_CHECKING:
    from whalefall.data.session import Session

__all__ = ["SampleReader", "SampleWriter", "source_node", "sink_node"]

BATCH_SAMPLES = 1024


@dataclass(frozen=True)
class SampleReader:
    """Stream function: files named by `resolved_paths` to rows (file, index, sample)."""

    check_data: bool = True

    def __call__(self, runtime_ctx: Any, readers: Sequence[Any]) -> Iterator[Any]:
        import pyarrow as pa

        from whalefall.record import FileReader

        schema = pa.schema(
            [("file", pa.large_string()), ("index", pa.int64()), ("sample", pa.large_binary())]
        )
        yield schema.empty_table()
        for path in (name for batch in readers[0] for name in batch.column(0).to_pylist()):
            reader = FileReader(path, check_data=self.check_data)
            try:
                for begin in range(0, len(reader), BATCH_SAMPLES):
                    index = list(range(begin, min(begin + BATCH_SAMPLES, len(reader))))
                    samples = [sample.tobytes() for sample in reader.read(index)]
                    yield pa.table([[path] * len(index), index, samples], schema=schema)
            finally:
                reader.close()


@dataclass(frozen=True)
class SampleWriter:
    """Script: one column's values of a partition into one file."""

    column: str

    def __call__(self, runtime_ctx: Any, datasets: Sequence[Any], folder: str) -> bool:
        from whalefall.record import FileWriter

        dataset = datasets[0]
        path = os.path.join(folder, f"{runtime_ctx.task.output_filename}.ffr")
        with FileWriter(path, dataset.num_rows) as writer:
            for batch in dataset.to_batch_reader(BATCH_SAMPLES):
                if self.column not in batch.schema.names:
                    have = ", ".join(batch.schema.names)
                    raise PlanError(f"write_ffrecord: no column {self.column!r}; there are {have}")
                for value in batch.column(self.column).to_pylist():
                    writer.write_one(_as_bytes(value))
        return True


def _as_bytes(value: Any) -> bytes:
    if isinstance(value, str):
        return value.encode()
    if not isinstance(value, bytes):
        raise TaskFailed(f"write_ffrecord: a sample is {value!r}, wanted BLOB or VARCHAR")
    return value


def source_node(session: Session, paths: str | Sequence[str], check_data: bool) -> Node:
    """The node of `Session.read_ffrecord`.

    Raises: MissingError where no file matches.
    """
    listed = [paths] if isinstance(paths, str) else list(paths)
    files = names.resolve(listed, suffix=".ffr")
    if not files:
        raise MissingError(f"read_ffrecord: no file matches {', '.join(listed)}")
    ctx = session._ctx
    dataset = FileSet([]).with_paths(files)
    dataset.require_files()
    node: Node = DataSourceNode(ctx, dataset)
    if len(files) > 1:
        node = EvenlyDistributedPartitionNode(ctx, (node,), len(files))
    return ArrowStreamNode(ctx, (node,), process_func=SampleReader(check_data))


def sink_node(session: Session, node: Node, path: str, column: str) -> Node:
    """The node of `DataFrame.write_ffrecord`."""
    check_target(path)
    script = PythonScriptNode(session._ctx, (node,), process_func=SampleWriter(column))
    return DataSinkNode(session._ctx, (script,), names.to_absolute(path))
