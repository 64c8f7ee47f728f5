"""Ep room: tokens travel to the ranks that hold their experts, and back. Follows DeepEP.

`Engine` is one rank of a group and works on arrays without torch: shared memory within a host, TCP
between hosts. `Buffer` is the original's API on a `torch.distributed` group; it and `TorchGroup`
import torch when asked for. `route` is the gate.
"""

from __future__ import annotations

from typing import Any

from whalefall.ep.config import Config
from whalefall.ep.engine import Engine
from whalefall.ep.events import EventHandle, EventOverlap
from whalefall.ep.group import FileGroup, Group, TcpGroup
from whalefall.ep.handle import Handle, Layout, Received
from whalefall.ep.routing import RoutingError, hosts_touched, route

__all__ = [
    "Buffer",
    "Config",
    "Engine",
    "EventHandle",
    "EventOverlap",
    "FileGroup",
    "Group",
    "Handle",
    "Layout",
    "Received",
    "RoutingError",
    "TcpGroup",
    "TorchGroup",
    "hosts_touched",
    "route",
]


def __getattr__(name: str) -> Any:
    if name in ("Buffer", "TorchGroup"):
        from whalefall.ep import torch

        return getattr(torch, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
