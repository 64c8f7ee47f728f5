"""The simulator's units are chosen by the server's balancers: each of their terms shows there."""

from __future__ import annotations

import pytest

from whalefall.serve.core.prefill import PrefillLoad
from whalefall.serve.simulate import Cluster
from whalefall.serve.simulated_cluster import ClusterSpec, Day, DecodeUnit, PrefillUnit

PROMPT = 4096.0


def cluster(hit_rate: float = 0.0) -> Cluster:
    """Decode units of 1,000 KV tokens and 10 requests; requests of one, prompts of about 4,096."""
    spec = ClusterSpec(1, 1, 1e6, lambda batch: 0.05, 10, 1000.0, 1e6, 1e6)
    return Cluster(spec, Day((1.0,), 1e9, hit_rate, 1e8, prompt=PROMPT, weight=1), 0)


def decode(held: list[tuple[float, int]]) -> Cluster:
    """Units that hold so many KV tokens in so many requests."""
    made = cluster()
    made.decode[:] = [DecodeUnit(0.0) for _ in held]
    for unit, (kv, requests) in zip(made.decode, held, strict=True):
        unit.kv = kv
        unit.finish = [(1e9, kv / requests, 0.0, 1.0)] * requests
    return made


@pytest.mark.parametrize(
    ("held", "chosen"),
    [
        ([(500, 1), (60, 6)], 0),  # the other is fuller of requests, if not of KV
        ([(500, 1), (60, 3)], 1),  # the first is fuller of KV, if not of requests
        ([(300, 3), (200, 2), (400, 4)], 1),
        ([(960, 1), (500, 9)], 1),  # no room for 50 tokens in the first
    ],
)
def test_a_sequence_goes_to_the_unit_whose_fuller_resource_is_least_full(held, chosen) -> None:
    made = decode(held)
    assert made.place(0.0, 40.0, 10.0, 0.0)
    grown = [len(unit.finish) - before for unit, (_, before) in zip(made.decode, held, strict=True)]
    assert grown == [int(index == chosen) for index in range(len(held))]


@pytest.mark.parametrize("held", [[(960, 1), (980, 2)], [(10, 10), (960, 1)]])
def test_a_sequence_that_fits_nowhere_waits(held) -> None:
    assert not decode(held).place(0.0, 40.0, 10.0, 0.0)


@pytest.mark.parametrize(
    ("hit_rate", "loads", "chosen"),
    [
        (0.0, [(0, 0), (1000, 1e6)], 0),
        (0.0, [(10_000, 0), (0, 1e9)], 0),  # its tokens are less of a burden than those pairs
        (0.0, [(10_000, 0), (0, 1e6)], 1),
        (0.9, [(3000, 0), (0, 8e6)], 0),  # hits are no tokens to compute
        (0.9, [(3000, 0), (0, 4e6)], 1),  # nor pairs to score
    ],
)
def test_a_prompt_goes_to_the_unit_whose_worse_load_is_least(hit_rate, loads, chosen) -> None:
    made = cluster(hit_rate)
    made.rng.gammavariate = lambda shape, scale: shape * scale  # type: ignore[method-assign]
    made.prefill[:] = [PrefillUnit(0.0, PrefillLoad(*load)) for load in loads]
    made.on_arrive(0.0)
    grown = [
        unit.load.tokens - before for unit, (before, _) in zip(made.prefill, loads, strict=True)
    ]
    assert grown == [
        pytest.approx(PROMPT * (1 - hit_rate)) if index == chosen else 0
        for index in range(len(loads))
    ]
