"""Ep room, on torch: the original's `Buffer`, its events, and differentiable dispatch and combine.

The work is the engine's; here tensors become arrays and results become tensors, without copies.
Source: DeepEP `deep_ep`.
"""

from whalefall.ep.config import Config
from whalefall.ep.events import EventHandle, EventOverlap
from whalefall.ep.torch.autograd import combine, dispatch
from whalefall.ep.torch.buffer import Buffer
from whalefall.ep.torch.group import TorchGroup

__all__ = [
    "Buffer",
    "Config",
    "EventHandle",
    "EventOverlap",
    "TorchGroup",
    "combine",
    "dispatch",
]
