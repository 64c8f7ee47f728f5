"""Engine core: how many tokens to draft, from what drafts cost and what they bring.

Generation is bound by what a step reads. A draft that is verified reads the experts that it alone
needs, and drafting reads the MTP layer: at batch 1 a step of a large model reads little more for
it, in a large batch of a model with many experts it may read twice as much. Source: kt-kernel's
and vLLM's notes on speculation with mixture-of-experts models.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

__all__ = ["DraftPolicy", "StepCosts", "distinct_experts", "gain"]

_PROBE_STEPS = 64  # one step in so many does what is not thought best
_MOST_STEPS = 4096  # while drafts are off, each probe doubles the interval up to this
_FIRST_PROBES = 8  # the interval until that was timed
_ENOUGH_TIMES, _KEPT_TIMES = 3, 15
_LOOK_STEPS = 16  # steps after which measured times are looked at again
_DECAY = 0.98  # weight of the past, for each draft that was judged
_ACCEPTANCE = 0.8  # believed before anything was seen


@dataclass(frozen=True)
class StepCosts:
    """What a step reads, in bytes (or in seconds: only ratios matter).

    Attributes:
        step: whatever the batch is: attention, dense and shared MLPs, gates, head.
        expert: one routed expert.
        draft: the MTP layer but for its routed experts, with its head.
        row: what one more token in a step takes besides, in the same unit.
        top_k: routed experts of a token in a layer.
        draft_experts: whether the MTP layer has experts.
    """

    step: float
    expert: float = 0.0
    draft: float = 0.0
    row: float = 0.0
    top_k: int = 0
    draft_experts: bool = False


def distinct_experts(load: Sequence[float], top_k: int, tokens: int) -> float:
    """How many experts of a layer `tokens` tokens are expected to need.

    Args:
        load: how often each expert was chosen so far; nothing yet: taken as equal.
    """
    total = sum(load)
    if not total:
        return len(load) * (1 - (1 - top_k / len(load)) ** tokens) if load else 0.0
    return sum(1 - (1 - min(1.0, top_k * each / total)) ** tokens for each in load)


def step_cost(costs: StepCosts, loads: Sequence[Sequence[float]], tokens: int) -> float:
    """What a step over `tokens` generated tokens costs."""
    experts = sum(distinct_experts(load, costs.top_k, tokens) for load in loads)
    return costs.step + costs.row * tokens + costs.expert * experts


def draft_cost(costs: StepCosts, loads: Sequence[Sequence[float]], batch: int) -> float:
    """What one call of the MTP layer for `batch` sequences costs; its load is taken as the mean."""
    experts = 0.0
    if costs.draft_experts and loads:
        experts = sum(distinct_experts(x, costs.top_k, batch) for x in loads) / len(loads)
    return costs.draft + costs.expert * experts


def gain(
    costs: StepCosts,
    loads: Sequence[Sequence[float]],
    batch: int,
    num_drafts: int,
    acceptance: float,
) -> float:
    """Tokens for the cost, as a multiple of what plain steps give.

    Args:
        loads: [layers with experts][experts], selections so far.
        batch: sequences that generate.
        acceptance: share of drafts accepted among those whose predecessors were.
    """
    tokens = sum(acceptance**i for i in range(num_drafts + 1))
    plain = step_cost(costs, loads, batch)
    drafted = step_cost(costs, loads, batch * (1 + num_drafts))
    return tokens * plain / (drafted + num_drafts * draft_cost(costs, loads, batch))


class DraftPolicy:
    """Decides for each step; learns what is accepted and how long steps take.

    `gain`, from what is read, decides until steps with and without drafts were timed; from then on
    their measured ratio replaces the estimated one (small models are bound by other things than
    reading). Now and then a step goes the other way, so that both stay known.

    Attributes:
        acceptance: running share of drafts accepted among those judged.
        is_on: whether drafts pay at present.
        num_drafted, num_accepted: since the start.
    """

    def __init__(self, costs: StepCosts, max_drafts: int) -> None:
        """Draft at most `max_drafts` tokens a sequence and step."""
        self.costs = costs
        self.max_drafts = max_drafts
        self.acceptance = _ACCEPTANCE
        self.num_drafted = self.num_accepted = 0
        self._loads: Sequence[Sequence[float]] = ()
        self._speeds: dict[tuple[int, int], float] = {}
        self._times: dict[tuple[int, int], deque[float]] = {}
        self._num_times = 0
        self.is_on = True
        self._steps, self._interval = 0, _PROBE_STEPS

    def set_loads(self, loads: Sequence[Sequence[float]]) -> None:
        """Use newer expert loads, [layers with experts][experts]."""
        self._loads = loads
        self._speeds.clear()

    def num_drafts(self, batch: int) -> int:
        """Drafts for each of `batch` generating sequences in the next step."""
        if not self.max_drafts:
            return 0
        best = max(range(self.max_drafts + 1), key=lambda count: self.gain(max(batch, 1), count))
        if self.is_on != (best > 0):
            self.is_on, self._interval, self._steps = best > 0, _PROBE_STEPS, 0
        if not batch:
            return 0
        self._steps += 1
        if self._steps < self._interval_of(batch):
            return best
        self._steps = 0
        self._interval = self._interval if self.is_on else min(2 * self._interval, _MOST_STEPS)
        return 0 if best else 1

    def _interval_of(self, batch: int) -> int:
        times = self._times.get((_bucket(batch), 0 if self.is_on else 1), ())
        return self._interval if len(times) >= _ENOUGH_TIMES else _FIRST_PROBES

    def gain(self, batch: int, count: int) -> float:
        """What `count` drafts bring, as a multiple of the tokens per second of plain steps."""
        tokens = sum(self.acceptance**i for i in range(count + 1))
        if (batch, count) not in self._speeds:
            self._speeds[batch, count] = self._speed(batch, count)
        return tokens * self._speeds[batch, count]

    def _speed(self, batch: int, count: int) -> float:
        """Steps with `count` drafts in the time of a plain one."""
        plain, drafted = (self._times.get((_bucket(batch), n), ()) for n in (0, count))
        if min(len(plain), len(drafted)) >= _ENOUGH_TIMES:
            return median(plain) / median(drafted)
        return gain(self.costs, self._loads, batch, count, 0.0)

    def observe_step(self, batch: int, count: int, seconds: float) -> None:
        """Note how long a step took that did nothing but generate."""
        key = _bucket(batch), count
        times = self._times.setdefault(key, deque(maxlen=_KEPT_TIMES))
        times.append(seconds / batch)
        self._num_times += 1
        if self._num_times % _LOOK_STEPS == 0:
            self._speeds.clear()

    def observe(self, drafted: int, accepted: int) -> None:
        """Note a sequence's drafts of a step, of which the first `accepted` were right."""
        self.num_drafted += drafted
        self.num_accepted += accepted
        for judged in range(min(accepted + 1, drafted)):
            hit = judged < accepted
            self.acceptance = _DECAY * self.acceptance + (1 - _DECAY) * hit


def _bucket(batch: int) -> int:
    """Batches up to the same power of two are timed together."""
    return batch.bit_length() if batch & (batch - 1) else batch.bit_length() - 1
