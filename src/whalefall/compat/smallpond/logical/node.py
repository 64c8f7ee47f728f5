"""smallpond.logical.node: the nodes and the plan."""

from whalefall.data.nodes import *  # noqa: F403
from whalefall.data.nodes import __all__ as _nodes
from whalefall.data.plan import LogicalPlan

__all__ = [*_nodes, "LogicalPlan"]
