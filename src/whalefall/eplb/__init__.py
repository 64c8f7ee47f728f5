"""Eplb: which expert sits on which GPU, with replicas of the hot ones.

Follows DeepSeek's EPLB: `rebalance_experts` has its signature and is never worse than its greedy
algorithm. `rebalance` also says how far from the best possible it is, starts from an earlier
placement with few moves, and weighs replicas. Statistics and traffic feed and judge it.
"""

from whalefall.eplb.placement import Placement, gpu_loads, rebalance, rebalance_experts
from whalefall.eplb.statistics import DayForecast, MovingAverage, Window, count_experts
from whalefall.eplb.traffic import Traffic, count_traffic

__all__ = [
    "DayForecast",
    "MovingAverage",
    "Placement",
    "Traffic",
    "Window",
    "count_experts",
    "count_traffic",
    "gpu_loads",
    "rebalance",
    "rebalance_experts",
]
