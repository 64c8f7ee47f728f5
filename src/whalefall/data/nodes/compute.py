"""Nodes that run a user's Python function on each partition.

Give `process_func`, or override `process` in a subclass, or override `spawn` to make a task of a
class of your own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from whalefall.arguments import whole
from whalefall.data.constants import DEFAULT_BATCH_SIZE
from whalefall.data.context import Context
from whalefall.data.errors import PlanError
from whalefall.data.nodes.base import Node, TaskGroup
from whalefall.data.runtime import PartitionKey
from whalefall.data.tasks import arrow as tasks
from whalefall.data.tasks.base import Input
from whalefall.data.tasks.parquet_out import ParquetOptions

if TYPE_CHECKING:
    from whalefall.data.planner import Planner

__all__ = [
    "ArrowBatchNode",
    "ArrowComputeNode",
    "ArrowStreamNode",
    "PandasBatchNode",
    "PandasComputeNode",
    "PythonScriptNode",
]


class FunctionNode(Node):
    """What the nodes below share."""

    task_class: ClassVar[type[tasks.FunctionTask]]

    def __init__(
        self,
        ctx: Context,
        input_deps: Sequence[Node],
        process_func: Callable[..., Any] | None,
        **limits: Any,
    ) -> None:
        super().__init__(ctx, input_deps, **limits)
        if process_func is not None and not callable(process_func):
            raise PlanError(
                f"{type(self).__name__}: process_func is {process_func!r}, not callable"
            )
        self.process_func = process_func

    def describe(self) -> str:
        function = self.process_func
        return "" if function is None else str(getattr(function, "__name__", function))

    def function(self) -> Callable[..., Any] | None:
        """What the task calls: `process_func`, or the subclass's `process`; None for its own."""
        if self.process_func is not None:
            return self.process_func
        method = getattr(self.slim_copy(), "process", None)
        if method is None and type(self).spawn is FunctionNode.spawn:
            raise PlanError(f"{self!r}: neither process_func nor a `process` method")
        return method

    def arguments(self) -> dict[str, Any]:
        """What else the task is made with."""
        return {}

    def spawn(self, *args: Any, **kwargs: Any) -> tasks.FunctionTask:
        """Make the task; a subclass may make one of its own class."""
        return self.task_class(*args, **kwargs)

    def make_task(self, inputs: Sequence[Input], key: PartitionKey) -> tasks.FunctionTask:
        """The task of one partition."""
        return self.spawn(self, inputs, key, self.function(), **self.arguments())

    def expand(self, planner: Planner, groups: Sequence[TaskGroup]) -> TaskGroup:
        return self.per_partition(planner, groups, self.make_task)


class PythonScriptNode(FunctionNode):
    """`process(runtime_ctx, [DataSet], output_dir)` → bool; what it writes is the output."""

    task_class = tasks.PythonScriptTask

    def __init__(
        self,
        ctx: Context,
        input_deps: Sequence[Node],
        *,
        process_func: Callable[..., Any] | None = None,
        output_name: str | None = None,
        output_path: str | None = None,
        cpu_limit: int = 1,
        gpu_limit: float = 0,
        memory_limit: int | None = None,
    ) -> None:
        super().__init__(
            ctx, input_deps, process_func, output_name=output_name, output_path=output_path,
            cpu_limit=cpu_limit, gpu_limit=gpu_limit, memory_limit=memory_limit,
        )  # fmt: skip


class ArrowComputeNode(FunctionNode):
    """`process(runtime_ctx, [Table])` → Table.

    Args:
        process_func: the function; or override `process`.
        use_duckdb_reader: read through DuckDB, so that a projection may hold SQL.
        parquet_…: how the output is written.
    """

    task_class: ClassVar[type[tasks.FunctionTask]] = tasks.ArrowComputeTask

    def __init__(
        self,
        ctx: Context,
        input_deps: Sequence[Node],
        *,
        process_func: Callable[..., Any] | None = None,
        parquet_row_group_size: int | None = None,
        parquet_dictionary_encoding: bool = False,
        parquet_compression: str | None = "ZSTD",
        parquet_compression_level: int | None = 3,
        use_duckdb_reader: bool = False,
        output_name: str | None = None,
        output_path: str | None = None,
        cpu_limit: int = 1,
        gpu_limit: float = 0,
        memory_limit: int | None = None,
    ) -> None:
        super().__init__(
            ctx, input_deps, process_func, output_name=output_name, output_path=output_path,
            cpu_limit=cpu_limit, gpu_limit=gpu_limit, memory_limit=memory_limit,
        )  # fmt: skip
        self.use_duckdb_reader = use_duckdb_reader
        self.options = ParquetOptions(
            parquet_row_group_size or self.default_row_group_size,
            parquet_dictionary_encoding,
            parquet_compression,
            parquet_compression_level,
        )

    def arguments(self) -> dict[str, Any]:
        return {"options": self.options, "use_duckdb_reader": self.use_duckdb_reader}


class PandasComputeNode(ArrowComputeNode):
    """`process(runtime_ctx, [DataFrame])` → DataFrame."""

    task_class = tasks.PandasComputeTask


class ArrowStreamNode(ArrowComputeNode):
    """`process(runtime_ctx, [RecordBatchReader])` yields Tables or StreamOutputs.

    Args:
        streaming_batch_size: rows a batch.
        background_io_thread, secs_checkpoint_interval: taken for the original's sake; a stream
            whose process dies starts over.
    """

    task_class: ClassVar[type[tasks.FunctionTask]] = tasks.ArrowStreamTask
    default_batch_size: ClassVar[int] = DEFAULT_BATCH_SIZE

    def __init__(
        self,
        ctx: Context,
        input_deps: Sequence[Node],
        *,
        process_func: Callable[..., Any] | None = None,
        background_io_thread: bool = True,
        streaming_batch_size: int | None = None,
        secs_checkpoint_interval: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(ctx, input_deps, process_func=process_func, **options)
        size = self.default_batch_size if streaming_batch_size is None else streaming_batch_size
        what = f"{type(self).__name__}: streaming_batch_size"
        self.batch_size = whole(what, size, 1, error=PlanError)

    def arguments(self) -> dict[str, Any]:
        return super().arguments() | {"batch_size": self.batch_size}


class ArrowBatchNode(ArrowStreamNode):
    """`process(runtime_ctx, [Table])` → Table, once a batch."""

    task_class = tasks.ArrowBatchTask


class PandasBatchNode(ArrowStreamNode):
    """`process(runtime_ctx, [DataFrame])` → DataFrame, once a batch."""

    task_class = tasks.PandasBatchTask
