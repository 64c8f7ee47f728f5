"""The units on the page of metrics: one line for each rank and figure."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from whalefall.serve.units.gateway import Gateway

__all__ = ["UnitsCollector"]

COUNTERS = {
    "prompt_tokens": "Prompt tokens that a rank computed",
    "generated_tokens": "Tokens that a rank sampled",
    "rounds": "Steps that a rank took part in",
    "disk_hits": "Prompt tokens that a rank read from the disk cache",
}
GAUGES = {
    "running": "Answers in the batch",
    "waiting": "Answers that wait on the rank",
    "kv_used": "KV blocks in use",
}


class UnitsCollector(Collector):
    """Reads the gateway's books when the page is asked for."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway

    def collect(self) -> Iterator[Metric]:
        """Yield one family a figure."""
        stats = self.gateway.unit_stats()
        families: list[Metric] = []
        for name, text in COUNTERS.items():
            counter = CounterMetricFamily(f"whalefall_unit_{name}", text, labels=["unit", "rank"])
            for place, each in stats.items():
                counter.add_metric([place.unit, str(place.rank)], getattr(each, name))
            families.append(counter)
        for name, text in GAUGES.items():
            gauge = GaugeMetricFamily(f"whalefall_unit_{name}", text, labels=["unit", "rank"])
            for place, each in stats.items():
                gauge.add_metric([place.unit, str(place.rank)], getattr(each, name))
            families.append(gauge)
        yield from families
        yield from self._overlap()
        yield from self._experts()
        units = GaugeMetricFamily("whalefall_units", "Units that run", labels=["kind"])
        for kind in ("prefill", "decode"):
            running = [u for u in list(self.gateway.fleet.units.values()) if u.kind == kind]
            units.add_metric([kind], len(running))
        yield units
        yield CounterMetricFamily(
            "whalefall_unit_restarts", "Units that died", value=self.gateway.fleet.restarts
        )

    def _overlap(self) -> Iterator[Metric]:
        family = GaugeMetricFamily(
            "whalefall_overlap_ratio",
            "Share of communication time under compute, since the unit's start",
            labels=["unit"],
        )
        sums: dict[str, list[float]] = {}
        for place, each in self.gateway.unit_stats().items():
            both = sums.setdefault(place.unit, [0.0, 0.0])
            both[0] += each.overlapped_s
            both[1] += each.communication_s
        for unit, (under, whole) in sums.items():
            family.add_metric([unit], under / whole if whole else 0.0)
        yield family

    def _experts(self) -> Iterator[Metric]:
        texts = {
            "now": "Largest rank load over the mean, worst layer, at the last look",
            "before": "The same before the last new placement",
            "after": "The same under the last new placement",
            "moves": "Experts that ranks took over so far",
        }
        for name, text in texts.items():
            family = GaugeMetricFamily(f"whalefall_expert_balance_{name}", text, labels=["unit"])
            for unit, balance in list(self.gateway.experts.units.items()):
                family.add_metric([unit], getattr(balance, name))
            yield family
