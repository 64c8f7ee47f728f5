"""The simulated day: it conserves tokens, follows its load, repeats, and lands where it must."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest

from tests.plan.test_capacity import CONFIG, H800
from whalefall.errors import ConfigError
from whalefall.plan import published
from whalefall.plan.capacity import parse_unit
from whalefall.serve.published_cluster import (
    cluster_spec,
    default_curve,
    published_day,
    read_curve,
)
from whalefall.serve.simulate import simulate
from whalefall.serve.simulated_cluster import ClusterSpec, Day
from whalefall.serve.simulated_experts import Choices

SPEC = cluster_spec(CONFIG, H800, parse_unit("4x8"), parse_unit("18x8"), 342 / 608)
# One request in flight for 4,000: coarse in time, but the same control loop, in seconds.
COARSE = published_day(default_curve(), weight=4000)


def test_the_published_day_needs_its_published_nodes() -> None:
    outcome = simulate(SPEC, COARSE)
    assert outcome.average_nodes == pytest.approx(published.AVERAGE_NODES, rel=0.05)
    assert outcome.input_tokens == pytest.approx(published.INPUT_TOKENS, rel=0.02)
    assert outcome.output_tokens == pytest.approx(published.OUTPUT_TOKENS, rel=0.02)
    nodes = [n for _, n in outcome.curve]
    assert min(nodes) < 0.35 * max(nodes)


def test_twice_the_traffic_takes_twice_the_nodes() -> None:
    flat = Day((1.0, 1.0), 200e9, 0.5, 50e9, weight=4000)
    double = dataclasses.replace(flat, input_tokens=400e9, output_tokens=100e9)
    hours = 6 * 3600.0
    once = simulate(SPEC, flat, hours).average_nodes
    assert simulate(SPEC, double, hours).average_nodes == pytest.approx(2 * once, rel=0.12)


def test_a_seed_repeats_a_run() -> None:
    runs = [simulate(SPEC, COARSE, 3600.0, seed=7) for _ in range(2)]
    assert runs[0] == runs[1]
    assert simulate(SPEC, COARSE, 3600.0, seed=8) != runs[0]


def tight() -> ClusterSpec:
    """One decode unit with room for three groups of sequences, and no more to come."""
    return dataclasses.replace(SPEC, decode_max_requests=3 * 4000.0, decode_set_point=1e9)


def test_sequences_without_room_wait_and_still_finish() -> None:
    outcome = simulate(tight(), COARSE, 2 * 3600.0)
    free = simulate(SPEC, COARSE, 2 * 3600.0)
    assert outcome.waited > 0
    assert free.waited == 0
    assert 0 < outcome.output_tokens < free.output_tokens


def test_the_expert_balancer_keeps_up_with_loads_that_drift() -> None:
    outcome = simulate(SPEC, COARSE, 12 * 3600.0)
    for kind, ranks, best in (("prefill", 32, 1.35), ("decode", 144, 1.7)):
        figures = outcome.experts[kind]
        assert figures.looks > 100 and figures.placements > 10
        assert figures.moves <= figures.placements * 2 * 32  # two layers stand for all
        assert figures.balanced < best < figures.even, (kind, ranks, figures)


def test_topics_have_their_hours() -> None:
    assert SPEC.experts is not None
    choices, rng = Choices(SPEC.experts, 0), random.Random(0)
    assert choices.taste.sum(axis=-1) == pytest.approx(np.full((16, 2), 8.0))  # top-8
    noon = [choices.topic(12 * 3600.0, rng) for _ in range(2000)]
    assert noon.count(8) > 1.5 * noon.count(4) > 0
    assert noon.count(0) < 20


def test_a_model_without_experts_has_none_to_balance() -> None:
    bare = dataclasses.replace(SPEC, experts=None)
    outcome = simulate(bare, COARSE, 3600.0)
    assert outcome.experts == {}
    assert outcome.average_nodes == simulate(SPEC, COARSE, 3600.0).average_nodes


def test_a_traffic_file_is_read_and_checked(tmp_path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "curve.txt"
    path.write_text("1\n0.5\n")
    assert read_curve(path) == (1.0, 0.5)
    for text, words in (("1\nx\n", "'x' is no number"), ("1", "has 1 values"), ("1 -2", "is -2")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=words):
            read_curve(path)
    path.write_bytes(b"1 \xff\xfe")
    with pytest.raises(ConfigError, match="is no number"):
        read_curve(path)
    with pytest.raises(ConfigError, match="no traffic file"):
        read_curve(tmp_path / "none")
