"""The decode balancer: KV cache use and request count, even over the units.

Source: published system, "Decode Load Balancer": balance KVCache usage across ranks (which is core
attention's work) and the number of requests per rank (which is what dispatch sends).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["DecodeLoad", "choose_decode"]


@dataclass(frozen=True)
class DecodeLoad:
    """What a unit (or rank) holds.

    Attributes:
        kv_used, kv_total: KV cache in tokens.
        requests, max_requests: sequences under way, and the most it takes.
    """

    kv_used: float
    kv_total: float
    requests: float
    max_requests: float

    def fits(self, kv_tokens: float) -> bool:
        """Whether a request that will hold `kv_tokens` has room."""
        return self.requests < self.max_requests and self.kv_used + kv_tokens <= self.kv_total

    def pressure(self, kv_tokens: float) -> float:
        """The fuller of the two with one more request of `kv_tokens`, as a share of its limit."""
        kv = (self.kv_used + kv_tokens) / self.kv_total
        return max(kv, (self.requests + 1) / self.max_requests)


def choose_decode(loads: Sequence[DecodeLoad], kv_tokens: float) -> int | None:
    """The unit that a request goes to, or None when none has room (it waits).

    Args:
        loads: the units' loads.
        kv_tokens: KV tokens the request will hold, its answer reserved.
    Returns: an index into `loads`; the lowest of equals.
    """
    able = [index for index, load in enumerate(loads) if load.fits(kv_tokens)]
    if not able:
        return None
    return min(able, key=lambda index: loads[index].pressure(kv_tokens))
