"""What works on whole frames: sort, group_by, join, distinct, SQL over several frames.

On one host each is one DuckDB query with all cores, which spills beyond its memory. With
`npartitions`, or on a cluster, rows are exchanged first and each partition is a query of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from whalefall.data.dataset import identifier
from whalefall.data.errors import PlanError
from whalefall.data.nodes import ConsolidateNode, HashPartitionNode, Node, SqlEngineNode
from whalefall.data.template import escape, fragment

if TYPE_CHECKING:
    from whalefall.data.frame import DataFrame
    from whalefall.data.session import Session

__all__ = ["GroupBy", "RelationalMixin", "whole_sql"]


def whole(session: Session, node: Node) -> Node:
    """The node as one partition."""
    return node if not node.dimensions else ConsolidateNode(session._ctx, node, [])


def whole_machine(session: Session) -> dict[str, Any]:
    """Limits of a task that takes this host."""
    ctx = session._runtime_ctx
    return {"cpu_limit": ctx.usable_cpu_count, "memory_limit": ctx.usable_memory_size}


def whole_sql(session: Session, query: str, frames: Mapping[str, DataFrame]) -> DataFrame:
    """`Session.sql`: views of the names, then the query."""
    nodes = [whole(session, session._node_of(frame, "sql")) for frame in frames.values()]
    views = [
        f"create or replace temp view {identifier(name)} as select * from {{{index}}}"
        for index, name in enumerate(frames)
    ]
    node = SqlEngineNode(session._ctx, nodes, [*views, escape(query)], **whole_machine(session))
    return session._frame(node)


class RelationalMixin:
    """The methods of `DataFrame` that go beyond the original."""

    session: Session
    plan: Node

    def _partition_count(self, npartitions: int | None) -> int | None:
        """None for: one query on this host."""
        if npartitions is not None or self.session.single_host:
            return npartitions
        ctx = self.session._runtime_ctx
        return max(2, ctx.usable_cpu_count * max(1, ctx.num_executors))

    def _one_query(self, query: str, *others: Node) -> DataFrame:
        session = self.session
        nodes = [whole(session, node) for node in (self.plan, *others)]
        node = SqlEngineNode(session._ctx, nodes, query, **whole_machine(session))
        return session._frame(node)

    def _hashed(
        self, node: Node, keys: Sequence[str], npartitions: int, by_value: bool = False
    ) -> Node:
        made = HashPartitionNode(
            self.session._ctx, (node,), npartitions, list(keys), drop_partition_column=True
        )
        made.by_value = by_value
        return made

    def sort(self, by: str | Sequence[str], npartitions: int | None = None) -> DataFrame:
        """Sort all rows: partition i's keys are not above partition i + 1's.

        Args:
            by: SQL order items ("b desc", "a nulls first").
            npartitions: range partitions, by splitters sampled from the data; default one query on
                one host.
        """
        items = expressions(by, "sort")
        count = self._partition_count(npartitions)
        if count is None or count == 1:
            return self._one_query(f"select * from {{0}} order by {', '.join(items)}")
        from whalefall.data.rangesort import range_sorted

        return self.session._frame(range_sorted(self.session, self.plan, items, count))

    def group_by(self, keys: str | Sequence[str], npartitions: int | None = None) -> GroupBy:
        """Group by SQL expressions; `.agg(total="sum(x)")` makes one row a group."""
        return GroupBy(self, expressions(keys, "group_by"), npartitions)

    def distinct(self, npartitions: int | None = None) -> DataFrame:
        """Each row once."""
        count = self._partition_count(npartitions)
        if count is None or count == 1:
            return self._one_query("select distinct * from {0}")
        ctx = self.session._ctx
        local = SqlEngineNode(ctx, (self.plan,), "select distinct * from {0}")
        node = self._hashed(local, ["__row"], count, by_value=True)
        return self.session._frame(SqlEngineNode(ctx, (node,), "select distinct * from {0}"))

    def join(
        self,
        other: DataFrame,
        on: str | Sequence[str],
        how: str = "inner",
        npartitions: int | None = None,
    ) -> DataFrame:
        """Join two frames on columns that both have; these columns come out once.

        Args:
            on: names of columns.
            how: inner, left, right, full, semi or anti.
            npartitions: hash partitions; default one query on one host.
        """
        kinds = ("inner", "left", "right", "full", "semi", "anti")
        if how not in kinds:
            raise PlanError(f"join: how is {how!r}, wanted one of {', '.join(kinds)}")
        names = [identifier(name) for name in _listed(on, "join")]
        right = self.session._node_of(other, "join")
        query = f"select * from {{0}} {how} join {{1}} using ({', '.join(names)})"
        count = self._partition_count(npartitions)
        if count is None or count == 1:
            return self._one_query(query, right)
        keys = [_comparable(name) for name in names]
        sides = [self._hashed(node, keys, count) for node in (self.plan, right)]
        return self.session._frame(SqlEngineNode(self.session._ctx, sides, query))


class GroupBy:
    """A frame and its keys, waiting for `agg`."""

    def __init__(self, frame: Any, keys: Sequence[str], npartitions: int | None) -> None:
        self.frame, self.keys, self.npartitions = frame, list(keys), npartitions

    def agg(self, **aggregates: str) -> DataFrame:
        """One row a group: the keys, and each aggregate under its name.

        Args:
            aggregates: name → SQL aggregate ("sum(x)", "count(*)", "max(y) - min(y)").
        """
        if not aggregates:
            raise PlanError('agg: no aggregate given, wanted e.g. total="sum(x)"')
        aggregates = {name: fragment(text, f"agg: {name}") for name, text in aggregates.items()}
        items = [f"{text} as {identifier(name)}" for name, text in aggregates.items()]
        query = f"select {', '.join([*self.keys, *items])} from {{0}} group by all"
        count = self.frame._partition_count(self.npartitions)
        if count is None or count == 1:
            made: DataFrame = self.frame._one_query(query)
            return made
        from whalefall.data.aggregates import expression, two_phase

        split = two_phase(self.keys, aggregates)
        session, node = self.frame.session, self.frame.plan
        keys, final = [expression(key) for key in self.keys], query
        if split is not None:
            # a hot key leaves each producer as one row, so it cannot overload its partition
            node = SqlEngineNode(session._ctx, (node,), split.partial)
            keys, final = split.keys, split.final
        hashed = self.frame._hashed(node, keys, count, by_value=True)
        return session._frame(SqlEngineNode(session._ctx, (hashed,), final))


def _comparable(name: str) -> str:
    """A text that is equal for values that a join finds equal, whatever types its sides have.

    Numbers (and texts of them) as DOUBLE, dates and times as TIMESTAMP, all else as text: values
    that differ may share a partition, equal ones never part.
    """
    # -0.0 equals 0.0, and NaNs of either sign are equal
    number = f"replace(cast(try_cast({name} as double) + 0.0 as varchar), '-nan', 'nan')"
    moment = f"cast(try_cast(cast({name} as varchar) as timestamp) as varchar)"
    return f"coalesce({number}, {moment}, cast({name} as varchar))"


def expressions(value: str | Sequence[str], where: str) -> list[str]:
    """A list of SQL expressions (order items, keys), without comments."""
    return [fragment(item, where) for item in _listed(value, where)]


def _listed(value: str | Sequence[str], where: str) -> list[str]:
    items = [value] if isinstance(value, str) or not isinstance(value, Sequence) else list(value)
    if not items or not all(isinstance(item, str) and item.strip() for item in items):
        raise PlanError(f"{where}: got {value!r}, wanted SQL text or a list of it")
    return items
