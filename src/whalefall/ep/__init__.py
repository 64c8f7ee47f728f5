"""Ep room: tokens travel to the ranks that hold their experts, and back. Follows DeepEP.

`route` is the gate.
"""

from whalefall.ep.routing import RoutingError, hosts_touched, route

__all__ = ["RoutingError", "hosts_touched", "route"]
