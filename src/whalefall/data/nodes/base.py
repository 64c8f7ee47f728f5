"""The node interface, and the nodes that move no rows."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from whalefall.data.context import Context
from whalefall.data.dataset import DataSet
from whalefall.data.errors import PlanError
from whalefall.data.memory import ArrowTableDataSet, SqlQueryDataSet
from whalefall.data.parquet import ParquetDataSet
from whalefall.data.runtime import PartitionKey
from whalefall.data.tasks.base import Input, Projection, Ref
from whalefall.data.tasks.sink import DataSinkTask, SinkOptions
from whalefall.data.tasks.source import DataSourceTask, TableSourceTask

if TYPE_CHECKING:
    from whalefall.data.planner import Planner

__all__ = [
    "ConsolidateNode",
    "DataSinkNode",
    "DataSourceNode",
    "Node",
    "ProjectionNode",
    "RootNode",
    "TaskGroup",
    "UnionNode",
]

N = TypeVar("N", bound="Node")


@dataclass
class TaskGroup:
    """What a node becomes: for each partition, which tasks' outputs hold its rows."""

    dimensions: tuple[str, ...] = ()
    parts: dict[PartitionKey, Input] = field(default_factory=dict)

    @property
    def all_refs(self) -> Input:
        """Every partition's outputs, in the partitions' order."""
        return tuple(ref for key in sorted(self.parts) for ref in self.parts[key])


class Node:
    """A step of a plan.

    Args:
        ctx: the plan's context.
        input_deps: the nodes read.
        output_name: names the output's folder, and lets `ExecutionPlan.get_output` find it.
        output_path: absolute folder for it, in the place of the job's own.
        cpu_limit: threads of one task.
        gpu_limit: GPUs of one task (a request, not a reservation).
        memory_limit: bytes of one task; default its share of the machine.
    """

    default_cpu_limit: ClassVar[int] = 1
    default_gpu_limit: ClassVar[float] = 0
    default_memory_limit: ClassVar[int | None] = None
    default_row_group_size: ClassVar[int | None] = None
    # A query or function whose result differs each time is never taken for another node's.
    volatile_id: int | None = None

    def __init__(
        self,
        ctx: Context,
        input_deps: Sequence[Node],
        output_name: str | None = None,
        output_path: str | None = None,
        cpu_limit: int | None = None,
        gpu_limit: float | None = None,
        memory_limit: int | None = None,
    ) -> None:
        kind = type(self).__name__
        if output_name is not None and not re.match("[a-zA-Z0-9_]+", output_name):
            raise PlanError(f"{kind}: output_name is {output_name!r}, wanted [a-zA-Z0-9_]+")
        if output_path is not None and not output_path.startswith("/"):
            raise PlanError(f"{kind}: output_path is {output_path!r}, wanted an absolute path")
        for item in input_deps:
            if not isinstance(item, Node):
                raise PlanError(f"{kind}: input {item!r} is no node")
        self.ctx = ctx
        self.input_deps: tuple[Node, ...] = tuple(input_deps)
        self.id = ctx.new_node_id(self.input_deps)
        self.output_name, self.output_path = output_name, output_path
        self.cpu_limit = self.default_cpu_limit if cpu_limit is None else cpu_limit
        self.gpu_limit = self.default_gpu_limit if gpu_limit is None else gpu_limit
        self.memory_limit = self.default_memory_limit if memory_limit is None else memory_limit

    def __repr__(self) -> str:
        return f"{type(self).__name__}-{self.id}"

    def __str__(self) -> str:
        return f"{self!r}: {self.describe()}".rstrip(": ")

    def describe(self) -> str:
        """What the node does, in a line."""
        return ""

    @property
    def dimensions(self) -> tuple[str, ...]:
        """The dimensions of its output's partitions, sorted."""
        found: tuple[str, ...] = ()
        for node in self.input_deps:
            found = max(found, node.dimensions, key=len)
        return found

    @property
    def num_partitions(self) -> int:
        """How many partitions the output has."""
        return max((node.num_partitions for node in self.input_deps), default=1)

    def slim_copy(self: N) -> N:
        """A copy without context and inputs, to send to a worker."""
        made = copy.copy(self)
        made.ctx = None  # type: ignore[assignment]
        made.input_deps = ()
        return made

    def with_inputs(self: N, inputs: Sequence[Node]) -> N:
        """The same node reading other nodes."""
        if tuple(inputs) == self.input_deps:
            return self
        made = copy.copy(self)
        made.input_deps = tuple(inputs)
        return made

    def expand(self, planner: Planner, groups: Sequence[TaskGroup]) -> TaskGroup:
        """Make the node's tasks (through `planner.add`) from its inputs' groups."""
        raise NotImplementedError(type(self).__name__)

    def per_partition(
        self,
        planner: Planner,
        groups: Sequence[TaskGroup],
        make: Callable[[Sequence[Input], PartitionKey], Any],
    ) -> TaskGroup:
        """One task a partition of the input with the most dimensions; the others are matched."""
        group = TaskGroup(max((g.dimensions for g in groups), key=len, default=()))
        for key, inputs in planner.align(self, groups):
            task = planner.add(make(inputs, key))
            group.parts[key] = (Ref(task),)
        return group


class DataSourceNode(Node):
    """Reads a data set; None is an empty list of files."""

    def __init__(self, ctx: Context, dataset: DataSet | None) -> None:
        super().__init__(ctx, ())
        self.dataset = dataset if dataset is not None else ParquetDataSet([])

    def describe(self) -> str:
        return str(self.dataset)

    @property
    def num_partitions(self) -> int:
        return 1

    def expand(self, planner: Planner, groups: Sequence[TaskGroup]) -> TaskGroup:
        if isinstance(self.dataset, SqlQueryDataSet):
            from whalefall.data.nodes.sql import query_task

            task = planner.add(query_task(self, self.dataset))
        elif isinstance(self.dataset, ArrowTableDataSet):
            task = planner.add(TableSourceTask(self, self.dataset))
        else:
            task = planner.add(DataSourceTask(self, self.dataset))
        return TaskGroup((), {(): (Ref(task),)})


class UnionNode(Node):
    """All inputs' rows; their partitions' dimensions are equal."""

    def expand(self, planner: Planner, groups: Sequence[TaskGroup]) -> TaskGroup:
        if len({group.dimensions for group in groups}) > 1:
            shown = ", ".join(str(group.dimensions) for group in groups)
            raise PlanError(f"{self!r}: dimensions of the inputs are not compatible: {shown}")
        made = TaskGroup(groups[0].dimensions)
        for group in groups:
            for key, refs in group.parts.items():
                made.parts[key] = made.parts.get(key, ()) + refs
        return made


class RootNode(Node):
    """Holds several results in one plan."""

    def expand(self, planner: Planner, groups: Sequence[TaskGroup]) -> TaskGroup:
        return TaskGroup((), {(): tuple(ref for group in groups for ref in group.all_refs)})

    @property
    def dimensions(self) -> tuple[str, ...]:
        return ()


class ConsolidateNode(Node):
    """Keeps only some dimensions: partitions that differ in the others alone become one."""

    def __init__(self, ctx: Context, input_dep: Node, dimensions: Sequence[str]) -> None:
        super().__init__(ctx, [input_dep])
        self.kept = tuple(sorted(dimensions))

    def describe(self) -> str:
        return ", ".join(self.kept) or "one partition"

    @property
    def dimensions(self) -> tuple[str, ...]:
        return tuple(d for d in self.input_deps[0].dimensions if d in self.kept)

    @property
    def num_partitions(self) -> int:
        return self.input_deps[0].num_partitions if self.kept else 1

    def expand(self, planner: Planner, groups: Sequence[TaskGroup]) -> TaskGroup:
        missing = [d for d in self.kept if d not in groups[0].dimensions]
        if missing:
            raise PlanError(f"{self!r}: no dimension {missing[0]!r} in {groups[0].dimensions}")
        made = TaskGroup(self.dimensions)
        for key in sorted(groups[0].parts):
            short = tuple(info for info in key if info.dimension in self.kept)
            made.parts[short] = made.parts.get(short, ()) + groups[0].parts[key]
        return made


class ProjectionNode(Node):
    """Reads only some columns; no task, no data moved.

    Args:
        columns: SQL select items (plain names where the reader is not DuckDB); None for all.
        generated_columns: of `filename` and `file_row_number`.
        union_by_name: match files' columns by name.
    """

    def __init__(
        self,
        ctx: Context,
        input_dep: Node,
        columns: Sequence[str] | None = None,
        generated_columns: Sequence[str] | None = None,
        union_by_name: bool | None = None,
    ) -> None:
        super().__init__(ctx, [input_dep])
        if columns is None and generated_columns is not None:
            columns = ["*"]
        self.projection = Projection(
            tuple(columns) if columns is not None else None,
            tuple(generated_columns) if generated_columns is not None else None,
            union_by_name,
        )

    def describe(self) -> str:
        return ", ".join(self.projection.columns or ("*",))

    def expand(self, planner: Planner, groups: Sequence[TaskGroup]) -> TaskGroup:
        made = TaskGroup(groups[0].dimensions)
        for key, refs in groups[0].parts.items():
            made.parts[key] = tuple(Ref(r.task, r.index, self.projection) for r in refs)
        return made


class DataSinkNode(Node):
    """Hands the inputs' files over in one folder, all there or not at all.

    Args:
        output_path: absolute folder or fsspec URL.
        type: link (hard link, copy across mounts), copy, link_or_copy, or manifest.
        manifest_only: only list the files.
    """

    def __init__(
        self,
        ctx: Context,
        input_deps: Sequence[Node],
        output_path: str,
        type: str = "link",
        manifest_only: bool = False,
        is_final_node: bool = False,
    ) -> None:
        super().__init__(ctx, input_deps)
        kinds = ("link", "copy", "link_or_copy", "manifest")
        if type not in kinds:
            raise PlanError(f"DataSinkNode: type is {type!r}, wanted one of {', '.join(kinds)}")
        if not output_path.startswith("/") and "://" not in output_path:
            raise PlanError(
                f"DataSinkNode: output_path is {output_path!r}, wanted absolute or a URL"
            )
        self.options = SinkOptions(output_path, type, manifest_only or type == "manifest")

    def describe(self) -> str:
        return self.options.path

    @property
    def dimensions(self) -> tuple[str, ...]:
        return ()

    def expand(self, planner: Planner, groups: Sequence[TaskGroup]) -> TaskGroup:
        inputs = [refs for g in groups for refs in (g.parts[key] for key in sorted(g.parts))]
        task = planner.add(DataSinkTask(self, inputs, self.options))
        return TaskGroup((), {(): (Ref(task),)})
