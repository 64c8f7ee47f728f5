"""From nodes to tasks: pure, and the same for the same plan.

In: a logical plan. Out: the tasks in an order in which each comes after its inputs, and which of
their outputs are the plan's result. Equal tasks (by content hash) are one task.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from whalefall.data.constants import split_into_rows
from whalefall.data.dataset import DataSet, PartitionedDataSet
from whalefall.data.errors import PlanError
from whalefall.data.fingerprint import Memo
from whalefall.data.nodes.base import Node, TaskGroup
from whalefall.data.nodes.partition import PartitionNode
from whalefall.data.plan import LogicalPlan
from whalefall.data.runtime import PartitionKey, RuntimeContext
from whalefall.data.tasks.base import Input, Ref, Task, resolve_input
from whalefall.data.tasks.source import DataSourceTask, DivideTask, by_rows_or_files

__all__ = ["ExecutionPlan", "Planner"]

PRODUCER_BYTES = 128 << 20  # a second or two of one core's work
MAX_FILES = 1 << 16  # that an exchange writes on account of its input's size


@dataclass
class ExecutionPlan:
    """Tasks to run, and afterwards their results.

    Attributes:
        ctx: the job.
        tasks: in an order in which each comes after its inputs.
        group: the result, by partition.
        named: output_name → the group of the node of that name.
        results: task key → its data sets, of the tasks that have finished.
    """

    ctx: RuntimeContext
    logical_plan: LogicalPlan
    tasks: list[Task]
    group: TaskGroup
    named: dict[str, TaskGroup] = field(default_factory=dict)
    results: dict[str, list[DataSet]] = field(default_factory=dict)

    @property
    def successful(self) -> bool:
        """Whether every task has finished."""
        return all(task.key in self.results for task in self.tasks)

    def partitions(self, group: TaskGroup | None = None) -> list[DataSet]:
        """The result's partitions, in order; the plan must have run."""
        return [dataset for _, dataset in self.named_partitions(group)]

    def named_partitions(self, group: TaskGroup | None = None) -> list[tuple[str, DataSet]]:
        """As `partitions`, each with the task and partition that it comes from, for errors."""
        chosen = self.group if group is None else group
        found = []
        for key in sorted(chosen.parts):
            where = ", ".join(map(str, key)) or "the only partition"
            refs = chosen.parts[key]
            name = f"{refs[0].task.label} ({where})"
            found.append((name, resolve_input(refs, self.results)))
        return found

    @property
    def final_output(self) -> DataSet:
        """The whole result."""
        return merge_all(self.partitions())

    @property
    def final_output_path(self) -> str:
        """The folder with the manifest of the whole result."""
        return os.path.join(self.ctx.output_root, "FinalResults")

    def get_output(self, output_name: str) -> DataSet:
        """The result of the node that was given this output_name."""
        if output_name not in self.named:
            known = ", ".join(self.named) or "none"
            raise PlanError(f"no node has the output_name {output_name!r}; there are: {known}")
        return merge_all(self.partitions(self.named[output_name]))

    @property
    def named_outputs(self) -> dict[str, DataSet]:
        """output_name → result."""
        return {name: self.get_output(name) for name in self.named}


def merge_all(parts: Sequence[DataSet]) -> DataSet:
    """One data set of all parts; parts of different kinds stay apart."""
    if len({type(part) for part in parts}) > 1:
        return PartitionedDataSet(parts)
    try:
        return DataSet.merge(list(parts))
    except PlanError:
        return PartitionedDataSet(parts)


class Planner:
    """Makes an execution plan.

    Args:
        runtime_ctx: the job: its size bounds how many producers an exchange gets.
    """

    def __init__(self, runtime_ctx: RuntimeContext) -> None:
        self.runtime_ctx = runtime_ctx
        self.slots = max(1, runtime_ctx.usable_cpu_count * max(1, runtime_ctx.num_executors))
        self._tasks: dict[str, Task] = {}
        self._memo = Memo()
        self._groups: dict[int, TaskGroup] = {}
        self._node_of: dict[int, Node] = {}

    def create_exec_plan(
        self, logical_plan: LogicalPlan, manifest_only_final_results: bool = True
    ) -> ExecutionPlan:
        """The tasks of a plan.

        Raises: PlanError for inputs whose partitions do not fit.
        """
        group = self.group_of(logical_plan.root_node)
        named = {}
        for node_id, made in self._groups.items():
            node = self._node_of[node_id]
            if node.output_name is not None:
                named[node.output_name] = made
        return ExecutionPlan(
            self.runtime_ctx, logical_plan, list(self._tasks.values()), group, named
        )

    def group_of(self, root: Node) -> TaskGroup:
        """The group of a node, its inputs' first; plans may be deep, so without recursion."""
        stack = [root]
        while stack:
            node = stack[-1]
            waiting = [d for d in node.input_deps if id(d) not in self._groups]
            if waiting:
                stack += reversed(waiting)
                continue
            stack.pop()
            if id(node) not in self._groups:
                self._node_of[id(node)] = node
                groups = [self._groups[id(d)] for d in node.input_deps]
                self._groups[id(node)] = node.expand(self, groups)
        return self._groups[id(root)]

    def add(self, task: Any) -> Any:
        """Take up a task; returns the equal one where there is one already."""
        if task.memory_limit is None:
            share = self.runtime_ctx.usable_memory_size / self.runtime_ctx.usable_cpu_count
            task.memory_limit = int(
                share * max(1, min(task.cpu_limit, self.runtime_ctx.usable_cpu_count))
            )
        task.seal(self._memo)
        return self._tasks.setdefault(task.key, task)

    def align(
        self, node: Node, groups: Sequence[TaskGroup]
    ) -> Iterator[tuple[PartitionKey, list[Input]]]:
        """For each partition of the group with the most dimensions, the inputs that go with it.

        An unpartitioned group goes with every partition.
        """
        main = max(groups, key=lambda group: len(group.dimensions))
        for group in groups:
            if not set(group.dimensions) <= set(main.dimensions):
                raise self._unfit(node, groups)
            self._check_counts(node, main, group, groups)
        for key in sorted(main.parts):
            inputs = []
            for group in groups:
                wanted = tuple(info for info in key if info.dimension in group.dimensions)
                if wanted not in group.parts:
                    raise self._unfit(node, groups)
                inputs.append(group.parts[wanted])
            yield key, inputs

    def _check_counts(
        self, node: Node, main: TaskGroup, group: TaskGroup, groups: Sequence[TaskGroup]
    ) -> None:
        counts = partition_counts(main)
        for dimension, count in partition_counts(group).items():
            if counts[dimension] != count:
                raise self._unfit(node, groups)

    def _unfit(self, node: Node, groups: Sequence[TaskGroup]) -> PlanError:
        shown = "; ".join(
            f"{dep!r} {partition_counts(group) or 'unpartitioned'}"
            for dep, group in zip(node.input_deps, groups, strict=True)
        )
        return PlanError(
            f"{node!r}: partitions of the inputs are not compatible: {shown}; wanted the same "
            f"dimension and number of partitions, or an unpartitioned input"
        )

    def spread(self, node: PartitionNode, refs: Input, limit: int) -> list[Input]:
        """Spread an exchange's input over producers: as many as can run at once, more of a source
        so big that one which is killed would lose much work.
        """
        slots = self.slots // max(1, int(node.cpu_limit))
        pieces = min(-(-source_bytes(refs) // PRODUCER_BYTES), MAX_FILES // node.npartitions)
        count = max(1, min(limit, max(slots, pieces)))
        if count == 1:
            return [refs]
        if len(refs) >= count:
            return [tuple(part) for part in split_into_rows(refs, count)]
        divide = DivideTask(
            node, [refs], count, lambda d: by_rows_or_files(d, count), ("spread", count)
        )
        divide.output_name = divide.output_path = None
        task = self.add(divide)
        return [(Ref(task, index),) for index in range(count)]


def source_bytes(refs: Input) -> int:
    """The size of the local files that are read as they are; 0 where a task makes the rows."""
    sources = [ref.task for ref in refs if isinstance(ref.task, DataSourceTask)]
    paths = [path for task in sources for path in task.dataset.resolved_paths]
    return sum(os.path.getsize(path) for path in paths if os.path.isfile(path))


def partition_counts(group: TaskGroup) -> Mapping[str, int]:
    """Dimension → number of partitions."""
    key = next(iter(group.parts), ())
    return {info.dimension: info.npartitions for info in key}
