"""The last minutes of a server as numbers, one point every two seconds, for the dashboard."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from whalefall.serve.metrics import Metrics

if TYPE_CHECKING:
    from whalefall.engine import Engine

__all__ = ["History", "Point"]

PERIOD_S = 2.0
POINTS = 180


@dataclass(frozen=True)
class Point:
    """What happened since the point before.

    Attributes:
        age_s: seconds from the start of the server.
        tokens_s: tokens generated a second.
        ttft_s: mean time to first token; None: no request began to answer.
        running, waiting: requests now.
        kv_use: share of the KV cache's blocks in use now.
        prefix_hits: share of prompt tokens found in the prefix cache; None: no prompt.
        spec_accepted: share of drafts accepted; None: nothing was drafted.
        overlapped: share of communication between ranks under compute; None: there was none.
    """

    age_s: float
    tokens_s: float
    ttft_s: float | None
    running: int
    waiting: int
    kv_use: float
    prefix_hits: float | None
    spec_accepted: float | None
    overlapped: float | None


class History:
    """Takes the points; `points` holds the last ones."""

    def __init__(self, engine: Engine, metrics: Metrics) -> None:
        self.points: deque[Point] = deque(maxlen=POINTS)
        self._engine = engine
        self._metrics = metrics
        self._before = self._counters(engine.stats())
        self._time = metrics.start

    def _counters(self, stats: Any) -> dict[str, float]:
        count, seconds = self._metrics.first_tokens
        return {
            "out": self._metrics.out, "first": count, "first_s": seconds,
            "queries": stats.prefix_queries, "hits": stats.prefix_hits,
            "drafted": stats.spec_drafted, "accepted": stats.spec_accepted,
            "moved_s": stats.communication_s, "under_s": stats.overlapped_s,
        }  # fmt: skip

    def sample(self, now_s: float) -> Point:
        """Add the point of `now_s` (time.monotonic)."""
        stats = self._engine.stats()
        counters = self._counters(stats)
        new = {name: value - self._before[name] for name, value in counters.items()}
        point = Point(
            age_s=now_s - self._metrics.start,
            tokens_s=new["out"] / max(1e-9, now_s - self._time),
            ttft_s=_share(new["first_s"], new["first"]),
            running=stats.running,
            waiting=stats.waiting,
            kv_use=stats.kv_used / max(1, stats.kv_total),
            prefix_hits=_share(new["hits"], new["queries"]),
            spec_accepted=_share(new["accepted"], new["drafted"]),
            overlapped=_share(new["under_s"], new["moved_s"]),
        )
        self._before, self._time = counters, now_s
        self.points.append(point)
        return point

    async def run(self) -> None:
        """Sample for ever."""
        while True:
            await asyncio.sleep(PERIOD_S)
            self.sample(time.monotonic())


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None
