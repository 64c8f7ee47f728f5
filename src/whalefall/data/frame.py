"""Data frames: lazy; each method makes a node, an action computes.

Source: smallpond `DataFrame`; what goes beyond it is in `relational.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from whalefall.arguments import whole
from whalefall.data.constants import DEFAULT_BATCH_SIZE
from whalefall.data.dataset import DataSet
from whalefall.data.errors import PlanError, within
from whalefall.data.memory import ArrowTableDataSet, PandasDataSet
from whalefall.data.nodes import (
    ArrowBatchNode,
    ArrowStreamNode,
    DataSinkNode,
    DataSourceNode,
    EvenlyDistributedPartitionNode,
    HashPartitionNode,
    LimitNode,
    Node,
    ShuffleNode,
    SqlEngineNode,
)
from whalefall.data.parquet import ParquetDataSet
from whalefall.data.relational import RelationalMixin, expressions
from whalefall.data.rowfuncs import BatchCall, RowFilter, RowMap
from whalefall.data.template import escape, fragment

if TYPE_CHECKING:
    from whalefall.data.session import Session

__all__ = ["DataFrame"]

MAX_PARTITIONS = 1 << 20


class DataFrame(RelationalMixin):
    """Rows in partitions, not yet computed.

    Args:
        session: where it runs.
        plan: its node.
    """

    def __init__(self, session: Session, plan: Node, recompute: bool = False) -> None:
        self.session, self.plan = session, plan

    def __str__(self) -> str:
        return self.explain()

    def _next(self, node: Node) -> DataFrame:
        return DataFrame(self.session, node)

    # -- computing
    def _run(self) -> list[tuple[str, DataSet]]:
        """Compute; the data set of each partition, with its name for errors."""
        return self.session._run(self.plan).named_partitions()

    def is_computed(self) -> bool:
        """Whether the result is there, so that an action costs nothing."""
        return self.session._job.computed(self.session._plan(self.plan))

    def compute(self) -> None:
        """Compute and keep the result."""
        self._run()

    def recompute(self) -> DataFrame:
        """Forget what was computed for this frame and all that it came from; returns the frame."""
        plan = self.session._plan(self.plan)
        self.session._job.forget(task.key for task in plan.tasks)
        return self

    # -- partitions
    def repartition(
        self,
        npartitions: int,
        hash_by: str | Sequence[str] | None = None,
        by: str | None = None,
        by_rows: bool = False,
        **kwargs: Any,
    ) -> DataFrame:
        """Divide anew: by whole files, by rows, by the hash of columns, or by a number in a column.

        Args:
            npartitions: how many.
            hash_by: SQL expressions; rows of equal values get one partition, and all a UINT64
                column `__data_partition__` (without it: `drop_partition_column=True`).
            by: SQL expression of the partition's number, 0 to npartitions - 1.
            by_rows: row ranges of nearly equal size, no data moved.
            kwargs: to the node.
        """
        what = "repartition: npartitions"
        npartitions = whole(what, npartitions, 1, MAX_PARTITIONS, error=PlanError)
        if by is not None and hash_by is not None:
            raise PlanError(f"repartition: both by={by!r} and hash_by={hash_by!r} are given")
        ctx = self.session._ctx
        if by is not None:
            node: Node = ShuffleNode(ctx, (self.plan,), npartitions, by, **kwargs)
        elif hash_by is not None:
            columns = [hash_by] if isinstance(hash_by, str) else list(hash_by)
            node = HashPartitionNode(ctx, (self.plan,), npartitions, columns, **kwargs)
        else:
            source = self._as_parquet() if by_rows else self.plan
            node = EvenlyDistributedPartitionNode(
                ctx, (source,), npartitions, partition_by_rows=by_rows, **kwargs
            )
        return self._next(node)

    def _as_parquet(self) -> Node:
        """The node, after a copy into Parquet where it reads text files as they are."""
        node = self.plan
        if isinstance(node, DataSourceNode) and not isinstance(
            node.dataset, ParquetDataSet | ArrowTableDataSet
        ):
            return SqlEngineNode(self.session._ctx, (node,), "select * from {0}")
        return node

    def random_shuffle(self, **kwargs: Any) -> DataFrame:
        """Give each row to a random partition, and put each partition's rows in random order."""
        ctx = self.session._ctx
        count = self.plan.num_partitions
        node = HashPartitionNode(ctx, (self.plan,), count, random_shuffle=True, **kwargs)
        limits = {k: v for k, v in kwargs.items() if k in ("cpu_limit", "memory_limit")}
        return self._next(
            SqlEngineNode(ctx, (node,), "select * from {0} order by random()", **limits)
        )

    def partial_sort(self, by: str | Sequence[str], **kwargs: Any) -> DataFrame:
        """Sort each partition; `by`: SQL order items ("b desc")."""
        items = expressions(by, "partial_sort")
        return self._sql(f"select * from {{0}} order by {', '.join(items)}", **kwargs)

    # -- rows
    def _sql(self, query: str, **kwargs: Any) -> DataFrame:
        return self._next(SqlEngineNode(self.session._ctx, (self.plan,), query, **kwargs))

    def _stream(self, function: Callable[..., Any], **kwargs: Any) -> DataFrame:
        return self._next(
            ArrowStreamNode(self.session._ctx, (self.plan,), process_func=function, **kwargs)
        )

    def filter(
        self, sql_or_func: str | Callable[[dict[str, Any]], Any], **kwargs: Any
    ) -> DataFrame:
        """Keep the rows for which an SQL condition, or a function of the row as a dict, is true."""
        if isinstance(sql_or_func, str):
            condition = fragment(sql_or_func, "filter")
            return self._sql(f"select * from {{0}} where ({condition})", **kwargs)
        return self._stream(RowFilter(_function(sql_or_func, "filter")), **kwargs)

    def map(
        self,
        sql_or_func: str | Callable[[dict[str, Any]], Any],
        *,
        schema: Any = None,
        **kwargs: Any,
    ) -> DataFrame:
        """Make each row anew: an SQL select list, or a function from dict to dict.

        Args:
            schema: `pyarrow.Schema` of the function's rows; default as the values are.
        """
        if isinstance(sql_or_func, str):
            return self._sql(f"select {fragment(sql_or_func, 'map')} from {{0}}", **kwargs)
        return self._stream(RowMap(_function(sql_or_func, "map"), False, schema), **kwargs)

    def flat_map(
        self,
        sql_or_func: str | Callable[[dict[str, Any]], Any],
        *,
        schema: Any = None,
        **kwargs: Any,
    ) -> DataFrame:
        """As `map`, but the function returns several dicts (and SQL may unnest)."""
        if isinstance(sql_or_func, str):
            return self._sql(f"select {fragment(sql_or_func, 'flat_map')} from {{0}}", **kwargs)
        return self._stream(RowMap(_function(sql_or_func, "flat_map"), True, schema), **kwargs)

    def map_batches(
        self, func: Callable[[Any], Any], *, batch_size: int = DEFAULT_BATCH_SIZE, **kwargs: Any
    ) -> DataFrame:
        """Apply a function from `pyarrow.Table` to Table to runs of `batch_size` rows."""
        node = ArrowBatchNode(
            self.session._ctx, (self.plan,),
            process_func=BatchCall(_function(func, "map_batches")),
            streaming_batch_size=_batch_size(batch_size), **kwargs,
        )  # fmt: skip
        return self._next(node)

    def limit(self, limit: int) -> DataFrame:
        """The first rows, in the partitions' order; the result has one partition."""
        return self._next(LimitNode(self.session._ctx, self.plan, limit))

    # -- results
    def write_parquet(self, path: str) -> None:
        """Write Parquet files into a folder (or fsspec URL), all of them or none.

        An earlier result there is replaced; files that whalefall did not write stay.
        Raises: ConfigError for a target that is no folder, an unknown protocol, and a folder that
            holds Parquet files that no manifest of ours lists; WriteError where it cannot be
            written.
        """
        self.write_parquet_lazy(path).compute()

    def write_parquet_lazy(self, path: str) -> DataFrame:
        """As `write_parquet`, when it is computed, and anew where the folder has changed since."""
        from whalefall.data.paths import to_absolute
        from whalefall.data.storage import check_target

        check_target(path)
        ctx = self.session._ctx
        node = self.plan
        if isinstance(node, DataSourceNode):  # never a link to the user's own file
            node = SqlEngineNode(ctx, (node,), "select * from {0}")
        return self._next(DataSinkNode(ctx, (node,), to_absolute(path)))

    def write_ffrecord(self, path: str, column: str) -> None:
        """Write one column's values (BLOB or VARCHAR) as samples, a file a partition; as
        `write_parquet`, all of them or none.
        """
        from whalefall.data.ffrecord import sink_node

        self._next(sink_node(self.session, self.plan, path, column)).compute()

    def count(self) -> int:
        """How many rows; from the files' footers where there are any."""
        total = 0
        for name, dataset in self._run():
            with within(name):
                total += dataset.num_rows
        return total

    def take(self, limit: int) -> list[dict[str, Any]]:
        """The first rows as dicts."""
        return self.limit(limit).take_all()

    def take_all(self) -> list[dict[str, Any]]:
        """All rows as dicts."""
        rows: list[dict[str, Any]] = self.to_arrow().to_pylist()
        return rows

    def to_pandas(self) -> Any:
        """All rows as a `pandas.DataFrame`; the index counts on through the partitions."""
        if isinstance(self.plan, DataSourceNode) and isinstance(self.plan.dataset, PandasDataSet):
            return self.plan.dataset.to_pandas()
        return self.to_arrow().to_pandas()

    def to_arrow(self) -> Any:
        """All rows as a `pyarrow.Table`; strings are `large_string`."""
        from whalefall.data.arrowio import cast_columns_to_large_string, concat

        parts = [
            (name, dataset)
            for name, dataset in self._run()
            if not isinstance(dataset, ParquetDataSet) or dataset.resolved_paths
        ]
        tables = []
        for name, dataset in parts:
            with within(name):
                tables.append((name, dataset.to_arrow_table()))
        full = [item for item in tables if item[1].num_rows] or tables[:1]
        if full and not any(dataset._union_by_name for _, dataset in parts):
            from whalefall.data.schemas import same_columns

            same_columns([(name, table.column_names) for name, table in full])
        return cast_columns_to_large_string(concat([table for _, table in full]))

    # -- looking at it
    def explain(self) -> str:
        """The plan as it will run, as text: chains fused, the last step first."""
        from whalefall.data.explain import explain

        return explain(self.session, self.plan)

    def explain_svg(self) -> str:
        """The plan as it will run, as an SVG picture."""
        from whalefall.data.explain import plan_svg
        from whalefall.data.optimizer import optimize

        return plan_svg(optimize(self.plan, dict(self.session._optimized)))


def _function(item: Any, where: str) -> Callable[..., Any]:
    if not callable(item):
        raise PlanError(f"{where}: got {item!r}, wanted SQL text or a function")
    return item  # type: ignore[no-any-return]


def _batch_size(value: Any) -> int:
    return whole("map_batches: batch_size", value, 1, error=PlanError)


def escaped(text: str) -> str:
    """SQL text whose braces are its own."""
    return escape(text)
