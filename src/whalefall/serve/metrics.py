"""Prometheus metrics of the server and its ledger."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from whalefall.plan.live import live_ledger

if TYPE_CHECKING:
    from whalefall.engine import Engine

__all__ = ["Metrics"]

TTFT_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
TPOT_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 1)


class Metrics:
    """Counters and histograms of one server; `page` renders them with the engine's gauges.

    Args:
        engine: whose `stats()` are shown.
        node_hour: dollars an hour that this machine costs.
    """

    def __init__(self, engine: Engine, node_hour: float) -> None:
        self.node_hour = node_hour
        self.start = time.monotonic()
        self.hit = self.miss = self.out = 0
        self.first_tokens = (0, 0.0)  # how many times to first token were recorded, and their sum
        self.registry = CollectorRegistry()
        make: dict[str, Any] = {"registry": self.registry}
        self._requests = Counter(
            "whalefall_http_requests", "Requests by path and status", ["path", "status"], **make
        )
        self._prompt = Counter("whalefall_prompt_tokens", "Prompt tokens of requests", **make)
        self._output = Counter("whalefall_generation_tokens", "Tokens generated", **make)
        self._ttft = Histogram(
            "whalefall_time_to_first_token_seconds", "From request to first token",
            buckets=TTFT_BUCKETS, **make,
        )  # fmt: skip
        self._tpot = Histogram(
            "whalefall_time_per_output_token_seconds", "Between tokens after the first",
            buckets=TPOT_BUCKETS, **make,
        )  # fmt: skip
        self.registry.register(EngineCollector(engine))
        self.registry.register(LedgerCollector(self))

    def request(self, path: str, status: int) -> None:
        """Count an answered HTTP request."""
        self._requests.labels(path, str(status)).inc()

    def prompt(self, tokens: int, cached: int) -> None:
        """Count a prompt, and how many of its tokens the prefix cache had."""
        self._prompt.inc(tokens)
        self.hit += cached
        self.miss += tokens - cached

    def output(self, tokens: int) -> None:
        """Count generated tokens."""
        self._output.inc(tokens)
        self.out += tokens

    def first_token(self, seconds: float) -> None:
        """Record a time to first token."""
        self._ttft.observe(seconds)
        count, total = self.first_tokens
        self.first_tokens = (count + 1, total + seconds)

    def next_tokens(self, seconds: float, tokens: int) -> None:
        """Record the time between tokens, once for each."""
        for _ in range(tokens):
            self._tpot.observe(seconds)

    def ledger(self) -> dict[str, float]:
        """The ledger since start, line by line, in tokens, seconds and dollars."""
        uptime_s = time.monotonic() - self.start
        traffic, result = live_ledger(self.hit, self.miss, self.out, uptime_s, self.node_hour)
        lines = {
            "uptime_seconds": uptime_s,
            "hit_tokens": traffic.hit_tokens,
            "miss_tokens": traffic.miss_tokens,
            "output_tokens": traffic.output_tokens,
            "revenue_hit_dollars": result.revenue_hit,
            "revenue_miss_dollars": result.revenue_miss,
            "revenue_output_dollars": result.revenue_output,
            "revenue_dollars": result.revenue,
            "cost_dollars": result.cost,
            "profit_dollars": result.profit,
        }
        if result.margin is not None:
            lines["margin"] = result.margin
        return lines

    def page(self) -> bytes:
        """The text of /metrics."""
        return generate_latest(self.registry)


class EngineCollector(Collector):
    """The engine's state as gauges, read when the page is asked for."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def collect(self) -> Iterator[Metric]:
        """Yield one family a figure."""
        stats = self.engine.stats()
        gauges = {
            "num_requests_running": stats.running,
            "num_requests_waiting": stats.waiting,
            "kv_cache_usage_ratio": stats.kv_used / max(1, stats.kv_total),
        }
        for name, value in gauges.items():
            yield GaugeMetricFamily(f"whalefall_{name}", name.replace("_", " "), value=value)
        counters = {
            "prefix_cache_queries": stats.prefix_queries,
            "prefix_cache_hits": stats.prefix_hits,
            "preemptions": stats.preemptions,
            "disk_cache_hits": getattr(stats, "disk_hits", 0),
            "disk_cache_failures": getattr(stats, "disk_failures", 0),
            "spec_drafted_tokens": stats.spec_drafted,
            "spec_accepted_tokens": stats.spec_accepted,
        }
        for name, value in counters.items():
            yield CounterMetricFamily(f"whalefall_{name}", name.replace("_", " "), value=value)
        load = stats.expert_load
        if load is not None and load.size and load.sum() > 0:
            busiest = load.sum(axis=0)
            yield GaugeMetricFamily(
                "whalefall_expert_load_max_over_mean",
                "Busiest expert over the mean, summed over layers",
                value=float(busiest.max() / busiest.mean()),
            )


class LedgerCollector(Collector):
    """The ledger's lines as gauges."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics

    def collect(self) -> Iterator[Metric]:
        """Yield one family a line."""
        for name, value in self.metrics.ledger().items():
            text = f"ledger since start: {name.replace('_', ' ')}"
            yield GaugeMetricFamily(f"whalefall_ledger_{name}", text, value=value)
