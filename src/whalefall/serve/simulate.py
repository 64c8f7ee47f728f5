"""A cluster's day in a minute: the server's own balancers and autoscaler over simulated units.

Prefill units are first-in first-out queues at the peak rate that `plan capacity` gives; a decode
unit advances all its sequences together, at the step time its batch has by the same roofline. One
simulated request stands for `weight` real ones that travel together, which is about one prefill
step of a unit. The autoscaler sees tokens per second and nothing else: neither the published node
chart nor the day's totals. So the run checks the control loop; it predicts nothing.
"""

from __future__ import annotations

import bisect
import heapq
import math
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from whalefall.serve.core import (
    DecodeLoad,
    PrefillLoad,
    ScaleRule,
    ScaleState,
    choose_decode,
    choose_prefill,
    scale,
)
from whalefall.serve.simulated_cluster import (
    DAY_S,
    ClusterSpec,
    Day,
    DecodeUnit,
    Outcome,
    PrefillUnit,
)
from whalefall.serve.simulated_experts import Choices, ExpertFigures, SimulatedExperts

__all__ = ["Cluster", "resize", "simulate"]


class Cluster:
    """The event loop of one run."""

    def __init__(self, spec: ClusterSpec, day: Day, seed: int) -> None:
        self.spec, self.day = spec, day
        self.rng = random.Random(seed)
        self.events: list[tuple[float, int, str, tuple[Any, ...]]] = []
        self.count = 0
        now = day.rate(0.0) * day.weight
        prefill = now * day.prompt / (spec.prefill_set_point * spec.prefill_nodes)
        decode = now * day.answer / (spec.decode_set_point * spec.decode_nodes)
        self.prefill_state = ScaleState(max(1, round(prefill)))
        self.decode_state = ScaleState(max(1, round(decode)))
        self.choices = None if spec.experts is None else Choices(spec.experts, seed)
        kinds = () if spec.experts is None else ("prefill", "decode")
        self.experts = {kind: ExpertFigures() for kind in kinds}
        self.topic_rng = random.Random(seed)  # of its own: experts change no arrival
        self.prefill = [self.prefill_unit(0.0) for _ in range(self.prefill_state.units)]
        self.decode = [self.decode_unit(0.0) for _ in range(self.decode_state.units)]
        self.waiting: list[tuple[float, float, float, int]] = []
        self.ttft: list[float] = []
        self.tpot: list[float] = []
        self.seen_in = self.seen_out = 0.0
        self.busy_prefill = self.busy_decode = 0.0
        self.node_s = self.prefill_node_s = self.decode_node_s = 0.0
        self.steps: dict[int, float] = {}
        full = spec.decode_max_requests
        self.full_rate = full / spec.decode_step_s(full)
        self.samples: list[tuple[float, int]] = []
        self.totals = [0.0, 0.0, 0.0]
        self.requests = self.waited = 0
        self.peak = 0

    def prefill_unit(self, ready_s: float) -> PrefillUnit:
        """A new unit."""
        return PrefillUnit(ready_s, experts=self.unit_experts("prefill"))

    def decode_unit(self, ready_s: float) -> DecodeUnit:
        """A new unit."""
        return DecodeUnit(ready_s, experts=self.unit_experts("decode"))

    def unit_experts(self, kind: str) -> SimulatedExperts | None:
        """A new unit's experts, evenly placed."""
        spec = self.spec.experts
        if spec is None or self.choices is None:
            return None
        ranks = spec.prefill_ranks if kind == "prefill" else spec.decode_ranks
        return SimulatedExperts(spec, ranks, self.choices, self.experts[kind])

    def push(self, at_s: float, kind: str, data: tuple[Any, ...] = ()) -> None:
        """Add an event."""
        self.count += 1
        heapq.heappush(self.events, (at_s, self.count, kind, data))

    def run(self, seconds: float) -> None:
        """Process events until `seconds`."""
        self.push(self.rng.expovariate(1.0) / self.day.rate(0.0), "arrive")
        self.push(self.spec.interval_s, "look")
        while self.events and self.events[0][0] < seconds:
            now, _, kind, data = heapq.heappop(self.events)
            getattr(self, "on_" + kind)(now, *data)

    def on_arrive(self, now: float) -> None:
        """A request comes in, and the prefill balancer places it."""
        weight = self.day.weight
        # What `weight` Poisson arrivals of exponential lengths add up to.
        gap = self.rng.gammavariate(weight, 1 / weight)
        self.push(now + gap / self.day.rate(now), "arrive")
        prompt = max(1.0, self.rng.gammavariate(weight, self.day.prompt / weight))
        cached = prompt * self.day.hit_rate
        answer = max(1.0, self.rng.expovariate(1 / self.day.answer))
        self.seen_in += weight * prompt
        self.totals[0] += weight * prompt
        self.totals[1] += weight * cached
        self.requests += weight
        able = [u for u in self.prefill if u.ready_s <= now and not u.draining]
        unit = able[choose_prefill([u.load for u in able], int(prompt), [int(cached)] * len(able))]
        unit.load = unit.load.plus(prompt, cached)
        service = weight * (prompt - cached) / self.spec.prefill_tokens_s
        unit.free_s = max(unit.free_s, now) + service
        self.busy_prefill += service
        topic = 0 if self.choices is None else self.choices.topic(now, self.topic_rng)
        if unit.experts is not None:
            unit.experts.see(topic, weight * (prompt - cached))
        self.push(unit.free_s, "prefilled", (unit, prompt, cached, now, answer, topic))

    def on_prefilled(
        self,
        now: float,
        unit: PrefillUnit,
        prompt: float,
        cached: float,
        came: float,
        answer: float,
        topic: int,
    ) -> None:
        """A prompt is done; the first token leaves, the rest wants a decode unit."""
        done = PrefillLoad().plus(prompt, cached)
        unit.load = PrefillLoad(
            max(0.0, unit.load.tokens - done.tokens), max(0.0, unit.load.attention - done.attention)
        )
        self.ttft.append(now - came)
        if not self.place(now, prompt, answer, now, topic):
            self.waited += 1
            self.waiting.append((prompt, answer, now, topic))

    def place(self, now: float, prompt: float, answer: float, since: float, topic: int = 0) -> bool:
        """Give a sequence to the decode unit that the balancer chooses, if one has room."""
        able = [u for u in self.decode if u.ready_s <= now and not u.draining]
        weight = self.day.weight
        for unit in able:
            self.advance(unit, now)
        spec = self.spec
        loads = [
            DecodeLoad(
                u.kv, spec.decode_kv_tokens, len(u.finish) * weight, spec.decode_max_requests
            )
            for u in able
        ]
        kv = weight * (prompt + answer)
        index = choose_decode(loads, kv)
        if index is None:
            return False
        unit = able[index]
        heapq.heappush(unit.finish, (unit.clock + answer, kv, since, answer, topic))
        unit.kv += kv
        self.schedule(unit)
        return True

    def step_s(self, unit: DecodeUnit) -> float:
        """The unit's step time at its batch."""
        batch = max(1, len(unit.finish)) * self.day.weight
        if batch not in self.steps:
            self.steps[batch] = self.spec.decode_step_s(batch)
        return self.steps[batch]

    def advance(self, unit: DecodeUnit, now: float) -> None:
        """Move a unit's sequences on to `now`."""
        if unit.finish and now > unit.now_s:
            tokens = (now - unit.now_s) / self.step_s(unit)
            unit.clock += tokens
            made = tokens * len(unit.finish) * self.day.weight
            self.seen_out += made
            self.totals[2] += made
            self.busy_decode += made / self.full_rate
        unit.now_s = max(unit.now_s, now)

    def schedule(self, unit: DecodeUnit) -> None:
        """Wake up when the unit's next sequence should be done."""
        if unit.finish:
            due = unit.now_s + max(0.0, unit.finish[0][0] - unit.clock) * self.step_s(unit)
            self.push(due + 1e-6, "decoded", (unit,))

    def on_decoded(self, now: float, unit: DecodeUnit) -> None:
        """Some sequences of a unit may be done; waiting ones take their place."""
        self.advance(unit, now)
        finished = False
        while unit.finish and unit.finish[0][0] <= unit.clock + 1e-3:
            _, kv, since, answer, topic = heapq.heappop(unit.finish)
            unit.kv -= kv
            if unit.experts is not None:
                unit.experts.see(topic, self.day.weight * answer)
            self.tpot.append((now - since) / answer)
            finished = True
        if finished:
            self.schedule(unit)
            while self.waiting and self.place(now, *self.waiting[0]):
                self.waiting.pop(0)

    def on_look(self, now: float) -> None:
        """The autoscaler's turn: it sees the tokens of the last interval."""
        spec = self.spec
        self.push(now + spec.interval_s, "look")
        for unit in self.decode:
            self.advance(unit, now)
        self.account(now)
        self.prefill = [u for u in self.prefill if not u.draining or u.free_s > now]
        self.decode = [u for u in self.decode if not u.draining or u.finish]
        came, made = self.seen_in / spec.interval_s, self.seen_out / spec.interval_s
        self.seen_in = self.seen_out = 0.0
        pace = ScaleRule(1.0, calm_s=spec.calm_s, smooth_s=spec.smooth_s)
        rule = replace(pace, set_point=spec.prefill_set_point * spec.prefill_nodes)
        self.prefill_state = scale(self.prefill_state, came, now, rule)
        resize(self.prefill, self.prefill_state.units, now, self.prefill_unit, spec.start_s)
        rule = replace(pace, set_point=spec.decode_set_point * spec.decode_nodes)
        self.decode_state = scale(self.decode_state, made, now, rule)
        resize(self.decode, self.decode_state.units, now, self.decode_unit, spec.start_s)

        self.balance_experts(now)

    def balance_experts(self, now: float) -> None:
        """The expert balancer's turn, in each unit that runs."""
        units: list[PrefillUnit | DecodeUnit] = [*self.prefill, *self.decode]
        for unit in units:
            if unit.experts is not None and unit.ready_s <= now:
                unit.experts.look(now)

    def account(self, now: float) -> None:
        """Add the interval's node-seconds; a drained unit costs until it is empty."""
        spec = self.spec
        prefill = sum(not u.draining or u.free_s > now for u in self.prefill) * spec.prefill_nodes
        decode = sum(not u.draining or bool(u.finish) for u in self.decode) * spec.decode_nodes
        self.prefill_node_s += prefill * spec.interval_s
        self.decode_node_s += decode * spec.interval_s
        self.peak = max(self.peak, prefill + decode)
        self.samples.append((now / 3600, prefill + decode))


def resize(
    units: list[PrefillUnit] | list[DecodeUnit],
    wanted: int,
    now: float,
    make: Callable[[float], PrefillUnit | DecodeUnit],
    start_s: float,
) -> None:
    """Start or drain units until `wanted` are not draining; a draining one is taken back first."""
    live = [unit for unit in units if not unit.draining]
    for unit in live[wanted:]:
        unit.draining = True
    missing = wanted - len(live)
    for unit in [u for u in units if u.draining][: max(0, missing)]:
        unit.draining = False
        missing -= 1
    for _ in range(max(0, missing)):
        units.append(make(now + start_s))  # type: ignore[arg-type]


def percentiles(values: list[float]) -> list[float]:
    """Percentiles 50, 90 and 99."""
    ordered = sorted(values)
    if not ordered:
        return [math.nan] * 3
    return [ordered[min(len(ordered) - 1, int(p * len(ordered)))] for p in (0.5, 0.9, 0.99)]


def simulate(spec: ClusterSpec, day: Day, seconds: float = DAY_S, seed: int = 0) -> Outcome:
    """Run a cluster for some seconds of a day.

    Args:
        spec: units and set points.
        day: traffic.
        seconds: how long, from the day's start.
        seed: of arrivals and lengths; the same seed gives the same run.
    """
    cluster = Cluster(spec, day, seed)
    cluster.run(seconds)
    spent = cluster.samples[-1][0] * 3600 if cluster.samples else math.nan
    node_s = cluster.prefill_node_s + cluster.decode_node_s
    prefill_units_s = cluster.prefill_node_s / spec.prefill_nodes
    decode_units_s = cluster.decode_node_s / spec.decode_nodes
    hours = [hour for hour, _ in cluster.samples]
    every = max(1, bisect.bisect_left(hours, hours[0] + 0.25)) if hours else 1
    return Outcome(
        average_nodes=node_s / spent,
        peak_nodes=cluster.peak,
        curve=cluster.samples[::every],
        ttft_s=percentiles(cluster.ttft),
        tpot_s=percentiles(cluster.tpot),
        prefill_utilisation=cluster.busy_prefill / max(1e-9, prefill_units_s),
        decode_utilisation=cluster.busy_decode / max(1e-9, decode_units_s),
        input_tokens=cluster.totals[0],
        hit_tokens=cluster.totals[1],
        output_tokens=cluster.totals[2],
        requests=cluster.requests,
        waited=cluster.waited,
        experts=cluster.experts,
    )
