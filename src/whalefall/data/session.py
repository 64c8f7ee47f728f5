"""A session: reads data, holds what has been computed, and runs frames' plans.

Source: smallpond `Session`.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from whalefall.data.config import Config
from whalefall.data.context import Context
from whalefall.data.errors import PlanError, writing
from whalefall.data.executor.base import Executor
from whalefall.data.executor.local import LocalExecutor
from whalefall.data.job import Job
from whalefall.data.nodes import DataSourceNode, Node, RootNode, SqlEngineNode
from whalefall.data.optimizer import optimize
from whalefall.data.plan import LogicalPlan
from whalefall.data.planner import ExecutionPlan, Planner
from whalefall.data.runtime import RuntimeContext
from whalefall.errors import ConfigError

if TYPE_CHECKING:
    from whalefall.data.frame import DataFrame

__all__ = ["Session", "init"]

log = logging.getLogger(__name__)


def init(
    job_id: str | None = None,
    job_time: datetime | float | None = None,
    job_name: str | None = None,
    data_root: str | None = None,
    num_executors: int | None = None,
    ray_address: str | None = None,
    bind_numa_node: bool | None = None,
    platform: str | None = None,
    _remove_output_root: bool = True,
    **kwargs: Any,
) -> Session:
    """Start a session; it ends with `shutdown()`, at the latest with the script.

    Args:
        job_id, job_time: name the job's folder `{data_root}/{job_time}.{job_id}`; with both given
            again, and `_remove_output_root=False`, finished tasks are not run again.
        job_name: unused, as in the original.
        data_root: where jobs keep their files; default SP_DATA_ROOT or ~/.smallpond/data.
        num_executors: workers of a Ray cluster; 0 (the default) is this host only.
        ray_address: a running Ray cluster ("local" starts one); needs `whalefall[ray]`.
        bind_numa_node: taken for the original's sake, without effect.
        platform: None, "local" or "ray".
        _remove_output_root: whether ending after a success removes results that were not written
            elsewhere.
        kwargs: `memory` (bytes or "4GB": what tasks may take together; they spill beyond),
            `cpus`, `progress`.
    Source: smallpond `init`.
    """
    return Session(
        job_id=job_id, job_time=job_time, job_name=job_name, data_root=data_root,
        num_executors=num_executors, ray_address=ray_address, bind_numa_node=bind_numa_node,
        platform=platform, _remove_output_root=_remove_output_root, **kwargs,
    )  # fmt: skip


class Session:
    """Takes the arguments of `init`."""

    def __init__(self, **kwargs: Any) -> None:
        config = Config.from_args_and_env(**kwargs)
        self.config = config
        ctx = RuntimeContext(
            config.job_id, config.job_time, config.data_root, num_executors=config.num_executors
        )
        ctx.usable_cpu_count = min(ctx.usable_cpu_count, config.cpus or ctx.usable_cpu_count)
        ctx.usable_memory_size = min(
            ctx.usable_memory_size, config.memory or ctx.usable_memory_size
        )
        with writing(ctx.job_root):
            ctx.initialize("driver")
        self._runtime_ctx = ctx
        self._ctx = Context()
        self._optimized: dict[int, Node] = {}
        self._lock = threading.RLock()
        self._open = True
        self._job = Job(ctx, self._make_executor())
        self._roots: list[Node] = []
        # its import takes as long as the workers take to come up
        threading.Thread(target=_import_arrow, daemon=True).start()
        atexit.register(self.shutdown)

    def _make_executor(self) -> Executor:
        if self.config.ray_address is not None:
            from whalefall.data.executor.ray import RayExecutor

            return RayExecutor(self.config.ray_address, self._runtime_ctx.usable_cpu_count)
        return LocalExecutor(self._runtime_ctx.usable_cpu_count, self._runtime_ctx.log_root)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self.shutdown()

    @property
    def runtime_ctx(self) -> RuntimeContext:
        """The job: its id and folders."""
        return self._runtime_ctx

    @property
    def single_host(self) -> bool:
        """Whether all tasks run here, so that one query may take the whole machine."""
        return self.config.ray_address is None

    # -- sources
    def _frame(self, node: Node) -> DataFrame:
        from whalefall.data.frame import DataFrame

        return DataFrame(self, node)

    def read_csv(
        self, paths: str | list[str], schema: Mapping[str, str], delim: str = ","
    ) -> DataFrame:
        """Read CSV files without header lines.

        Args:
            paths: files, patterns, folders, fsspec URLs; relative to the current folder.
            schema: column name → DuckDB type, in the columns' order.
            delim: with DuckDB's escapes (r"\\t").
        """
        from whalefall.data.dataset import CsvDataSet

        return self._frame(
            DataSourceNode(self._ctx, CsvDataSet(_anchored(paths), schema=schema, delim=delim))
        )

    def read_parquet(
        self,
        paths: str | list[str],
        recursive: bool = False,
        columns: list[str] | None = None,
        union_by_name: bool = False,
    ) -> DataFrame:
        """Read Parquet files.

        Args:
            paths: files, patterns, folders, fsspec URLs.
            recursive: whether `**` and folders reach into sub-folders.
            columns: only these.
            union_by_name: match the files' columns by name.
        """
        from whalefall.data.parquet import ParquetDataSet

        dataset = ParquetDataSet(
            _anchored(paths), recursive=recursive, columns=columns, union_by_name=union_by_name
        )
        return self._frame(DataSourceNode(self._ctx, dataset))

    def read_json(self, paths: str | list[str], schema: Mapping[str, str]) -> DataFrame:
        """Read JSON files with one object a line; `schema`: key → DuckDB type."""
        from whalefall.data.dataset import JsonDataSet

        return self._frame(DataSourceNode(self._ctx, JsonDataSet(_anchored(paths), schema=schema)))

    def read_ffrecord(self, paths: str | list[str], check_data: bool = True) -> DataFrame:
        """Read FFRecord files: rows of `file`, `index`, `sample` (BLOB); a partition a file.

        Args:
            paths: files, patterns, folders, fsspec URLs.
            check_data: compare checksums.
        Raises: MissingError where no file matches.
        """
        from whalefall.data.ffrecord import source_node

        return self._frame(source_node(self, paths, check_data))

    def from_items(self, items: list[Any]) -> DataFrame:
        """A frame of dicts (one column a key), or of plain values (one column `item`)."""
        import pyarrow as pa

        if not isinstance(items, list) or not items:
            raise PlanError(f"from_items: got {items!r}, wanted a list with at least one item")
        if isinstance(items[0], Mapping):
            names = list(dict.fromkeys(name for item in items for name in item))
            table = pa.table({n: pa.array([item.get(n) for item in items]) for n in names})
        else:
            table = pa.table({"item": pa.array(items)})
        return self.from_arrow(table)

    def from_pandas(self, df: Any) -> DataFrame:
        """A frame of a `pandas.DataFrame`."""
        import pandas as pd

        from whalefall.data.memory import PandasDataSet

        if not isinstance(df, pd.DataFrame):
            raise PlanError(f"from_pandas: got {type(df).__name__}, wanted a pandas.DataFrame")
        return self._frame(DataSourceNode(self._ctx, PandasDataSet(df)))

    def from_arrow(self, table: Any) -> DataFrame:
        """A frame of a `pyarrow.Table`."""
        import pyarrow as pa

        from whalefall.data.memory import ArrowTableDataSet

        if not isinstance(table, pa.Table):
            raise PlanError(f"from_arrow: got {type(table).__name__}, wanted a pyarrow.Table")
        return self._frame(DataSourceNode(self._ctx, ArrowTableDataSet(table)))

    # -- queries
    def partial_sql(
        self, query: str | Sequence[str], *inputs: DataFrame, **kwargs: Any
    ) -> DataFrame:
        """Run SQL on each partition.

        Args:
            query: `{0}`, `{1}` stand for the inputs; of a list all run, the last is the output.
            inputs: frames with the same partitions; an unpartitioned one goes with every partition.
            kwargs: to `SqlEngineNode` (cpu_limit, memory_limit, udfs …).
        """
        nodes = [self._node_of(item, "partial_sql") for item in inputs]
        return self._frame(SqlEngineNode(self._ctx, nodes, query, **kwargs))

    def sql(self, query: str, /, **frames: DataFrame) -> DataFrame:
        """Run SQL over whole frames, by their names, as one DuckDB query.

        Args:
            query: DuckDB SQL; `from orders` reads the frame given as `orders=`.
            frames: name → frame.
        Returns: a frame with one partition, in the query's order.
        """
        from whalefall.data.relational import whole_sql

        return whole_sql(self, query, frames)

    def _node_of(self, item: Any, where: str) -> Node:
        from whalefall.data.frame import DataFrame

        if not isinstance(item, DataFrame):
            raise PlanError(f"{where}: got {type(item).__name__}, wanted a DataFrame")
        if item.session is not self:
            raise PlanError(f"{where}: the frame belongs to another session")
        return item.plan

    # -- running
    def _plan(self, node: Node) -> ExecutionPlan:
        root = optimize(node, self._optimized)
        return Planner(self._runtime_ctx).create_exec_plan(LogicalPlan(self._ctx, root))

    def _run(self, node: Node) -> ExecutionPlan:
        """Compute a node; what is known already is not computed again."""
        from whalefall.data.progress import shown

        with self._lock:
            if not self._open:
                raise ConfigError("this session has been shut down; start another with init()")
            self._roots.append(node)
            try:
                plan = self._plan(node)
                with shown(self._job, self.config.progress):
                    return self._job.run(plan)
            except BaseException:
                self._job.failed = True
                raise

    def wait(self, *dfs: DataFrame) -> None:
        """Compute several frames, their tasks side by side."""
        nodes = [self._node_of(df, "wait") for df in dfs]
        self._run(RootNode(self._ctx, nodes))

    # -- looking at it
    def graph(self) -> Any:
        """All plans that have run, as one `graphviz.Digraph`."""
        return LogicalPlan(self._ctx, RootNode(Context(), self._roots)).graph()

    def dump_graph(self, path: str | None = None) -> str:
        """Write the plans that have run as an SVG; returns its path (default: in the job's log)."""
        from whalefall.data.explain import plan_svg

        target = path or os.path.join(self._runtime_ctx.log_root, "graph.svg")
        with open(target, "w", encoding="utf-8") as file:
            file.write(plan_svg(RootNode(Context(), self._roots)))
        return target

    def dump_timeline(self, path: str | None = None) -> str:
        """Write which task ran when as a trace-event JSON; returns its path."""
        from whalefall.data.explain import write_timeline

        target = path or os.path.join(self._runtime_ctx.log_root, "timeline.json")
        write_timeline(target, self._job.spans)
        return target

    @property
    def num_tasks_executed(self) -> int:
        """How many tasks worker processes have run to the end in this session."""
        return self._job.executed

    def shutdown(self) -> None:
        """End the workers; after a success, remove what only a running job needs."""
        with self._lock:
            if not self._open:
                return
            self._open = False
            atexit.unregister(self.shutdown)
            self._job.executor.close()
            status = "failure" if self._job.failed else "success"
            stamp = time.strftime("%Y-%m-%d %H:%M:%S")
            try:
                with open(self._runtime_ctx.job_status_path, "a", encoding="utf-8") as file:
                    file.write(f"{status}@{stamp}\n")
            except OSError as error:  # a full disk; the job's own outcome stands
                log.warning("%s: %s", self._runtime_ctx.job_status_path, error.strerror)
            if not self._job.failed:
                self._runtime_ctx.cleanup(self.config.remove_output_root)
            log.info("%s: %s", status, self._runtime_ctx.job_root)


def _import_arrow() -> None:
    import pyarrow.parquet  # noqa: F401


def _anchored(paths: str | Iterable[str]) -> list[str]:
    """The paths made absolute now, since the current folder may change before they are read."""
    from whalefall.data.paths import to_absolute

    alone = isinstance(paths, str | os.PathLike) or not isinstance(paths, Iterable)
    listed: list[Any] = [paths] if alone else list(paths)
    if not all(isinstance(path, str | os.PathLike) for path in listed):
        raise PlanError(f"paths are {paths!r}, wanted a path or a list of paths")
    return [to_absolute(os.fspath(path)) for path in listed]


def interactive() -> bool:
    """Whether someone watches standard error."""
    return sys.stderr.isatty()
