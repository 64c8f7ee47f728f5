"""How many nodes run when: a step function over a day, and the node-hours it makes."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from whalefall.errors import ConfigError
from whalefall.plan import published

__all__ = ["Fleet", "published_fleet"]


@dataclass(frozen=True)
class Fleet:
    """Nodes in use as steps over one day.

    Attributes:
        steps: (hour, nodes) pairs, hours rising; a step lasts until the next one's hour.
        start_hour: the hour the day starts at; it ends 24 hours later.
        gpus_per_node: GPUs in a node.
        gpu_hour: price of a GPU for an hour, in dollars.
    """

    steps: tuple[tuple[float, float], ...]
    start_hour: float = 0.0
    gpus_per_node: int = published.GPUS_PER_NODE
    gpu_hour: float = published.GPU_HOUR_USD

    def __post_init__(self) -> None:
        hours = [hour for hour, _ in self.steps]
        if not hours or hours[0] != self.start_hour or hours[-1] >= self.start_hour + 24:
            raise ConfigError(
                f"fleet: steps at hours {hours}, wanted the first at {self.start_hour} "
                f"and all before {self.start_hour + 24}"
            )
        if any(b <= a for a, b in itertools.pairwise(hours)):
            raise ConfigError(f"fleet: hours {hours} do not rise")
        if not all(0 <= nodes < math.inf for _, nodes in self.steps):
            raise ConfigError(f"fleet: nodes in {self.steps}, wanted 0 or more each")
        if self.gpus_per_node < 1 or not 0 <= self.gpu_hour < math.inf:
            raise ConfigError(
                f"fleet: {self.gpus_per_node} GPUs a node at {self.gpu_hour} dollars an hour, "
                "wanted at least 1 GPU and a price of 0 or more"
            )

    def spans(self) -> list[tuple[float, float, float]]:
        """(from hour, to hour, nodes) of each step."""
        ends = [hour for hour, _ in self.steps[1:]] + [self.start_hour + 24]
        return [(hour, end, n) for (hour, n), end in zip(self.steps, ends, strict=True)]

    def node_hours(self, window: tuple[float, float] | None = None) -> float:
        """Node-hours of the day, or of a window of hours within it."""
        low, high = window or (self.start_hour, self.start_hour + 24)
        return sum(max(0.0, min(b, high) - max(a, low)) * n for a, b, n in self.spans())

    @property
    def average_nodes(self) -> float:
        """Nodes averaged over the day."""
        return self.node_hours() / 24

    @property
    def peak_nodes(self) -> float:
        """The most nodes at any time."""
        return max(nodes for _, nodes in self.steps)

    @property
    def cost(self) -> float:
        """Dollars a day."""
        return self.node_hours() * self.gpus_per_node * self.gpu_hour


def published_fleet(
    gpus_per_node: int = published.GPUS_PER_NODE, gpu_hour: float = published.GPU_HOUR_USD
) -> Fleet:
    """The published node chart, with its own or other prices."""
    return Fleet(published.NODE_STEPS, published.DAY_START_HOUR, gpus_per_node, gpu_hour)
