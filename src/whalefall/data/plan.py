"""A logical plan: a root node and all that it reads; as text, as a graph, as a picture.

Source: smallpond `logical.node.LogicalPlan`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from whalefall.data.context import Context
from whalefall.data.nodes.base import Node

__all__ = ["LogicalPlan", "explain_text", "walk"]


def walk(root: Node) -> Iterator[Node]:
    """Every node once, inputs before their readers."""
    seen: set[int] = set()
    stack = [(root, False)]
    while stack:
        node, ready = stack.pop()
        if ready:
            yield node
        elif id(node) not in seen:
            seen.add(id(node))
            stack.append((node, True))
            stack += [(d, False) for d in reversed(node.input_deps) if id(d) not in seen]


class LogicalPlan:
    """A root node with its context."""

    def __init__(self, ctx: Context, root_node: Node) -> None:
        self.ctx, self.root_node = ctx, root_node

    def __str__(self) -> str:
        return self.explain_str()

    @property
    def nodes(self) -> dict[int, Node]:
        """Id → node."""
        return {int(node.id): node for node in walk(self.root_node)}

    def explain_str(self) -> str:
        """The plan as indented text, the root first."""
        return explain_text(self.root_node)

    def graph(self) -> Any:
        """The plan as a `graphviz.Digraph` (drawing it needs Graphviz's `dot`)."""
        import graphviz

        made = graphviz.Digraph(comment="LogicalPlan")
        for node in walk(self.root_node):
            made.node(repr(node), str(node)[:200])
            for dep in node.input_deps:
                made.edge(repr(dep), repr(node))
        return made


def explain_text(root: Node) -> str:
    """Indented lines, the root first; a node that is read twice is spelled out once."""
    lines: list[str] = []
    seen: set[int] = set()
    stack = [(root, 0)]
    while stack:
        node, depth = stack.pop()
        count = f" [{node.num_partitions} partitions]" if node.num_partitions > 1 else ""
        again = " (above)" if id(node) in seen and node.input_deps else ""
        lines.append("  " * depth + str(node) + count + again)
        if id(node) not in seen:
            seen.add(id(node))
            stack += [(dep, depth + 1) for dep in reversed(node.input_deps)]
    return "\n".join(lines)
