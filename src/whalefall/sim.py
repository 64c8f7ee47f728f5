"""Seeded simulation: a clock, a network and processes that fail in every way the real ones do.

In: a seed. Out: the same run for the same seed, and a transcript of it. Nothing here knows what is
simulated: a process is a name, a message is a callback, a disk operation is a delay.
Source: the deterministic simulators of FoundationDB and etcd's raft tests.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field

__all__ = ["Faults", "Network", "Simulation"]


class Simulation:
    """An event loop on virtual time.

    Args:
        seed: decides everything random.
        keep_transcript: whether `note` keeps its lines.
    Attributes:
        now: virtual seconds.
        random: the only source of chance.
    """

    def __init__(self, seed: int, keep_transcript: bool = False) -> None:
        self.seed = seed
        self.now = 0.0
        self.random = random.Random(seed)
        self.steps = 0
        self.transcript: list[str] = []
        self.keep_transcript = keep_transcript
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0

    def clock(self) -> float:
        """The virtual time, as a function."""
        return self.now

    def after(self, delay_s: float, event: Callable[[], None]) -> None:
        """Run `event` after a delay; events at the same time run in the order they were added."""
        self._count += 1
        heapq.heappush(self._events, (self.now + delay_s, self._count, event))

    def step(self) -> bool:
        """Run the next event; False if there is none."""
        if not self._events:
            return False
        self.now, _, event = heapq.heappop(self._events)
        self.steps += 1
        event()
        return True

    def run(self, until_s: float, check: Callable[[], None] | None = None) -> None:
        """Run all events up to a time, with `check` after each."""
        while self._events and self._events[0][0] <= until_s:
            self.step()
            if check is not None:
                check()
        self.now = max(self.now, until_s)

    def note(self, text: str) -> None:
        """One line of the transcript."""
        if self.keep_transcript:
            self.transcript.append(f"{self.now:9.3f}  {text}")


@dataclass
class Faults:
    """How bad the network is: probabilities per message, and what is cut off.

    Attributes:
        loss: share of messages that vanish.
        duplicate: share that arrive twice.
        slow: share that take up to `slow_s`.
        cut: (sender, receiver) pairs that are cut, one way each.
    """

    loss: float = 0.0
    duplicate: float = 0.0
    slow: float = 0.0
    slow_s: float = 1.0
    delay_s: float = 0.003
    cut: set[tuple[str, str]] = field(default_factory=set)


class Network:
    """Carries callbacks between named processes: late, twice, out of order, or never."""

    def __init__(self, simulation: Simulation, faults: Faults) -> None:
        self.simulation, self.faults = simulation, faults
        self.sent = self.lost = self.doubled = 0

    def send(self, sender: str, receiver: str, deliver: Callable[[], None]) -> None:
        """Send one message."""
        chance, faults = self.simulation.random, self.faults
        self.sent += 1
        if (sender, receiver) in faults.cut or chance.random() < faults.loss:
            self.lost += 1
            return
        copies = 2 if chance.random() < faults.duplicate else 1
        self.doubled += copies - 1
        for _ in range(copies):
            longest = faults.slow_s if chance.random() < faults.slow else faults.delay_s
            self.simulation.after(
                chance.uniform(0.0001, longest), lambda: self._arrive(sender, receiver, deliver)
            )

    def _arrive(self, sender: str, receiver: str, deliver: Callable[[], None]) -> None:
        if (sender, receiver) in self.faults.cut:
            self.lost += 1
        else:
            deliver()

    def isolate(self, name: str, others: list[str], into: bool = True, out: bool = True) -> None:
        """Cut `name` off from others, in one direction or both."""
        for other in others:
            if into:
                self.faults.cut.add((other, name))
            if out:
                self.faults.cut.add((name, other))
