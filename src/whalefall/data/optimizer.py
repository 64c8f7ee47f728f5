"""Fuses SQL nodes that follow one another within a partition into one DuckDB query. Pure.

A node is drawn into its reader where the reader alone reads it, its text occurs there once, and
both work on the same partitions; so DuckDB sees the whole chain and nothing is written in between.
"""

from __future__ import annotations

import copy
from collections.abc import MutableMapping

from whalefall.data.nodes.base import Node
from whalefall.data.nodes.sql import LimitNode, SqlEngineNode
from whalefall.data.plan import walk
from whalefall.data.template import inline, input_uses

__all__ = ["optimize"]


def optimize(root: Node, known: MutableMapping[int, Node] | None = None) -> Node:
    """The plan with chains fused.

    Args:
        known: node id → its optimised form in earlier plans of the session, which is kept, so that
            results computed for it are found again; what this plan materialises is added.
    """
    memo: dict[int, Node] = {}
    earlier = known if known is not None else {}
    for node in walk(root):
        if int(node.id) in earlier:
            memo[id(node)] = earlier[int(node.id)]
            continue
        made = node.with_inputs([memo[id(dep)] for dep in node.input_deps])
        memo[id(node)] = _fuse(made, earlier) if isinstance(made, SqlEngineNode) else made
    result = memo[id(root)]
    for node in walk(result):
        earlier.setdefault(int(node.id), node)
    return result


def _fuse(node: SqlEngineNode, earlier: MutableMapping[int, Node]) -> SqlEngineNode:
    for position in range(len(node.input_deps) - 1, -1, -1):
        child = node.input_deps[position]
        if _fusable(node, position, child, earlier):
            node = _drawn_in(node, position, child)
    return node


def _fusable(
    node: SqlEngineNode, position: int, child: Node, earlier: MutableMapping[int, Node]
) -> bool:
    return (
        isinstance(child, SqlEngineNode)
        and not isinstance(child, LimitNode)
        and int(child.id) not in earlier
        and len(child.sql_queries) == 1
        and child.output_name is None
        and child.output_path is None
        and child.ctx.consumers[int(child.id)] <= 1
        and (len(node.input_deps) == 1 or child.dimensions == _main(node))
        and sum(input_uses(query, position) for query in node.sql_queries) == 1
        and bool(child.input_deps or not node.dimensions)
    )


def _main(node: Node) -> tuple[str, ...]:
    return max((dep.dimensions for dep in node.input_deps), key=len)


def _drawn_in(node: SqlEngineNode, position: int, child: Node) -> SqlEngineNode:
    """`node` with `child`'s query in the place of its input `position`."""
    assert isinstance(child, SqlEngineNode)
    before = node.input_deps[:position]
    after = node.input_deps[position + 1 :]
    shift = len(child.input_deps) - 1
    moved = {i: f"{{{i + len(before)}}}" for i in range(len(child.input_deps))}
    text = child.sql_queries[0].strip().rstrip(";").rstrip()
    inner = inline(text, moved)
    places = {position: f"({inner}\n)"}
    places |= {i: f"{{{i + shift}}}" for i in range(position + 1, len(node.input_deps))}
    made = copy.copy(node)
    made.input_deps = (*before, *child.input_deps, *after)
    made.sql_queries = [inline(query, places) for query in node.sql_queries]
    made.udfs = [*child.udfs, *(udf for udf in node.udfs if udf not in child.udfs)]
    made.cpu_limit = max(node.cpu_limit, child.cpu_limit)
    limits = [m for m in (node.memory_limit, child.memory_limit) if m is not None]
    made.memory_limit = max(limits) if limits else None
    made.volatile_id = node.volatile_id or child.volatile_id
    return made
