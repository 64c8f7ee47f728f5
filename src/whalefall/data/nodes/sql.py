"""SQL nodes: a query a partition, and the first n rows of all."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from whalefall.arguments import whole
from whalefall.data.constants import MB
from whalefall.data.context import Context
from whalefall.data.errors import PlanError
from whalefall.data.memory import SqlQueryDataSet
from whalefall.data.nodes.base import Node, TaskGroup
from whalefall.data.tasks.base import Input, Ref
from whalefall.data.tasks.parquet_out import ParquetOptions
from whalefall.data.tasks.sql import SqlEngineTask
from whalefall.data.template import escape, fragment

if TYPE_CHECKING:
    from whalefall.data.planner import Planner

__all__ = ["LimitNode", "SqlEngineNode", "query_task"]

VOLATILE = re.compile(
    r"\b(random|uuid|gen_random_uuid|now|current_timestamp)\b|using\s+sample", re.I
)


class SqlEngineNode(Node):
    """Runs DuckDB SQL over each partition.

    Args:
        sql_query: a template (`{0}`, `{1}` are the inputs); of a list all run, the last one's
            rows are the output.
        udfs: user functions that the queries call.
        parquet_row_group_size: rows.
        per_thread_output, materialize_output, materialize_in_memory, batched_processing,
        relax_memory_if_oom, enable_temp_directory, cpu_overcommit_ratio, memory_overcommit_ratio:
            taken for the original's sake, without effect: the output is one file a task, queries
            stream, and what exceeds the memory always spills.
        extension_paths: DuckDB extensions to load first.
        udf_module_paths: Python modules with `@udf` functions.
    """

    default_memory_limit = None

    def __init__(
        self,
        ctx: Context,
        input_deps: Sequence[Node],
        sql_query: str | Sequence[str],
        *,
        udfs: Sequence[Any] | None = None,
        per_thread_output: bool = True,
        materialize_output: bool = True,
        materialize_in_memory: bool = False,
        relax_memory_if_oom: bool | None = None,
        batched_processing: bool = False,
        extension_paths: Sequence[str] | None = None,
        udf_module_paths: Sequence[str] | None = None,
        enable_temp_directory: bool = False,
        parquet_row_group_size: int | None = None,
        parquet_dictionary_encoding: bool = False,
        parquet_compression: str | None = "ZSTD",
        parquet_compression_level: int | None = 3,
        output_name: str | None = None,
        output_path: str | None = None,
        cpu_limit: int | None = None,
        memory_limit: int | None = None,
        cpu_overcommit_ratio: float = 1.0,
        memory_overcommit_ratio: float = 0.9,
    ) -> None:
        super().__init__(
            ctx, input_deps, output_name, output_path, cpu_limit, memory_limit=memory_limit
        )
        self.sql_queries = [sql_query] if isinstance(sql_query, str) else list(sql_query)
        if not self.sql_queries or not all(isinstance(q, str) for q in self.sql_queries):
            raise PlanError(f"SqlEngineNode: sql_query is {sql_query!r}, wanted SQL text or a list")
        self.sql_queries = [fragment(query, "SqlEngineNode") for query in self.sql_queries]
        if memory_limit is not None and memory_limit < 1 * MB:
            raise PlanError(f"SqlEngineNode: memory_limit is {memory_limit} bytes, wanted >= {MB}")
        names = list(udfs or ())
        names += [ctx.create_duckdb_extension(path) for path in extension_paths or ()]
        names += [ctx.create_external_module(path) for path in udf_module_paths or ()]
        self.udfs = ctx.udf_contexts(names)
        self.options = ParquetOptions(
            parquet_row_group_size or self.default_row_group_size,
            parquet_dictionary_encoding,
            parquet_compression,
            parquet_compression_level,
        )
        if any(VOLATILE.search(query) for query in self.sql_queries):
            self.volatile_id = int(self.id)

    def describe(self) -> str:
        return self.oneline_query

    @property
    def oneline_query(self) -> str:
        """The queries, on one line."""
        return "; ".join(" ".join(query.split()) for query in self.sql_queries)

    def make_task(self, inputs: Sequence[Input], key: Any) -> SqlEngineTask:
        """The task of one partition."""
        return SqlEngineTask(self, inputs, key, self.sql_queries, self.options, self.udfs)

    def expand(self, planner: Planner, groups: Sequence[TaskGroup]) -> TaskGroup:
        if not groups:
            return TaskGroup((), {(): (Ref(planner.add(self.make_task((), ()))),)})
        return self.per_partition(planner, groups, self.make_task)


class LimitNode(SqlEngineNode):
    """The first `limit` rows of all partitions together; the output is not partitioned."""

    def __init__(self, ctx: Context, input_dep: Node, limit: int) -> None:
        limit = whole("LimitNode: limit", limit, 0, error=PlanError)
        super().__init__(ctx, [input_dep], f"select * from {{0}} limit {limit}")
        self.limit = limit

    @property
    def dimensions(self) -> tuple[str, ...]:
        return ()

    @property
    def num_partitions(self) -> int:
        return 1

    def expand(self, planner: Planner, groups: Sequence[TaskGroup]) -> TaskGroup:
        local = super().expand(planner, groups)
        if len(local.parts) == 1:
            return TaskGroup((), {(): local.all_refs})
        merge = SqlEngineTask(
            self, [local.all_refs], (), [f"select * from {{0}} limit {self.limit}"], self.options
        )
        return TaskGroup((), {(): (Ref(planner.add(merge)),)})


def query_task(node: Node, dataset: SqlQueryDataSet) -> SqlEngineTask:
    """The task that writes the rows of a query without inputs."""
    text = dataset.query_builder() if dataset.query_builder else dataset.sql_query
    return SqlEngineTask(node, (), (), [escape(fragment(text, repr(node)))], ParquetOptions())
