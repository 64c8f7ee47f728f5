"""Ep room: tokens travel to the ranks that hold their experts, and back. Follows DeepEP.

`Engine` is one rank of a group and works on arrays without torch: shared memory within a host, TCP
between hosts. `route` is the gate.
"""

from whalefall.ep.engine import Engine
from whalefall.ep.group import FileGroup, Group, TcpGroup
from whalefall.ep.handle import Handle, Layout, Received
from whalefall.ep.routing import RoutingError, hosts_touched, route

__all__ = [
    "Engine",
    "FileGroup",
    "Group",
    "Handle",
    "Layout",
    "Received",
    "RoutingError",
    "TcpGroup",
    "hosts_touched",
    "route",
]
