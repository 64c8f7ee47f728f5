"""Global sort over range partitions: sample the keys, split their range, exchange, sort each part.

The splitters are rows of a small node, which every producer of the exchange reads beside its
data. A key so frequent that several splitters equal it fills whole partitions: its rows are dealt
out among them at random, which keeps the order, since equal keys may come in any.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from whalefall.data.nodes import ConsolidateNode, Node, RangePartitionNode, SqlEngineNode
from whalefall.data.sortkey import parse_order, sort_key
from whalefall.data.template import escape

if TYPE_CHECKING:
    from whalefall.data.session import Session

__all__ = ["range_sorted"]

# Keys sampled of each input partition: with 4096, a part of 64 is at most ~1.5x its share (99 %).
SAMPLE = 4096


def range_sorted(session: Session, data: Node, items: Sequence[str], npartitions: int) -> Node:
    """The node whose partitions, one after the other, are the sorted rows of `data`."""
    ctx = session._ctx
    key = sort_key(parse_order(items))
    sample = SqlEngineNode(
        ctx, (data,), f"select {escape(key)} as k from {{0}} using sample reservoir({SAMPLE} rows) "
        "repeatable (1)",
    )  # fmt: skip
    merged = ConsolidateNode(ctx, sample, []) if sample.dimensions else sample
    quantile = f"keys[cast(floor(i * len(keys) / {npartitions}) as bigint) + 1]"
    splits = SqlEngineNode(
        ctx, (merged,),
        f"select unnest(list_transform(range(1, {npartitions}), lambda i: {quantile})) as k "
        "from (select list(k order by k) as keys from {0}) where len(keys) > 0",
    )  # fmt: skip
    ranges = RangePartitionNode(ctx, (data,), splits, npartitions=npartitions, column=key)
    return SqlEngineNode(ctx, (ranges,), f"select * from {{0}} order by {', '.join(items)}")
