"""The rule that says how many tokens to draft."""

from __future__ import annotations

import pytest

from whalefall.engine.core import DraftPolicy, StepCosts
from whalefall.engine.core.drafting import distinct_experts, gain

# DeepSeek-V3 in GB: 58 layers of 256 experts, 8 of them a token; 3 dense layers and the attention
V3 = StepCosts(step=17.0, expert=0.044, draft=1.3, top_k=8, draft_experts=True)
V3_LOADS = [[1.0] * 256] * 58
DENSE = StepCosts(step=10.0, draft=0.5)


def test_distinct_experts_of_equal_and_of_uneven_loads() -> None:
    assert distinct_experts([5, 5, 5, 5], 1, 1) == 1
    assert distinct_experts([5, 5, 5, 5], 2, 1) == 2
    assert distinct_experts([1, 1], 1, 2) == pytest.approx(1.5)  # the other one with chance 1/2
    assert distinct_experts([1, 0, 0, 0], 1, 9) == 1  # always the same
    assert distinct_experts([0, 0], 1, 2) == pytest.approx(1.5)  # nothing known: as if equal
    assert distinct_experts([1] * 256, 8, 10_000) == pytest.approx(256)
    assert distinct_experts([], 8, 3) == 0


def test_a_dense_model_always_gains_as_long_as_drafts_are_accepted() -> None:
    for batch in (1, 8, 64):
        assert gain(DENSE, (), batch, 1, 0.8) == pytest.approx(1.8 * 10 / 10.5)
    assert gain(DENSE, (), 1, 1, 0.04) < 1 < gain(DENSE, (), 1, 1, 0.06)
    assert gain(DENSE, (), 1, 0, 0.8) == 1


def test_experts_that_only_drafts_need_make_drafts_dear() -> None:
    """One token reads 8 experts a layer, a draft nearly 8 more: 0.7 of it must be accepted."""
    assert gain(V3, V3_LOADS, 1, 1, 0.5) < 1 < gain(V3, V3_LOADS, 1, 1, 0.8)
    few = gain(V3, V3_LOADS, 8, 1, 0.7)
    many = gain(V3, V3_LOADS, 256, 1, 0.7)  # all experts are read anyway
    assert few < 1.1 < 1.5 < many
    skewed = [[float(e < 16) for e in range(256)]] * 58
    assert gain(V3, skewed, 8, 1, 0.7) > few


def test_work_that_grows_with_the_rows_makes_drafts_useless_in_large_batches() -> None:
    costs = StepCosts(step=10.0, row=1.0)
    assert gain(costs, (), 1, 1, 0.8) > 1.5
    assert gain(costs, (), 64, 1, 0.8) < 1


def test_acceptance_is_that_of_drafts_that_were_judged() -> None:
    policy = DraftPolicy(DENSE, 4)
    for _ in range(400):
        policy.observe(4, 1)  # one right, one wrong, two never judged
    assert policy.acceptance == pytest.approx(0.5, abs=0.02)
    assert (policy.num_drafted, policy.num_accepted) == (1600, 400)


def test_more_drafts_while_they_are_accepted_and_none_when_not() -> None:
    policy = DraftPolicy(DENSE, 3)
    for _ in range(400):
        policy.observe(3, 3)
    assert policy.num_drafts(1) == 3
    for _ in range(400):
        policy.observe(3, 0)
    assert policy.num_drafts(1) == 0
    assert not policy.is_on
    assert DraftPolicy(DENSE, 0).num_drafts(1) == 0
    assert DraftPolicy(DENSE, 3).num_drafts(0) == 0


def test_drafts_are_tried_again_ever_more_rarely() -> None:
    policy = DraftPolicy(DENSE, 1)
    for drafts in (0, 1):
        for _ in range(3):
            policy.observe_step(1, drafts, 1.0 + 0.1 * drafts)
    for _ in range(400):
        policy.observe(1, 0)
    tried = [step for step in range(2000) if policy.num_drafts(1)]
    assert len(tried) == 5
    assert tried == sorted(tried)
    assert tried[1] - tried[0] == 128
    for _ in range(200):
        policy.observe(1, 1)
    assert sum(policy.num_drafts(1) for _ in range(640)) == 630  # one in 64 goes without


def test_measured_times_overrule_the_estimate_for_their_batch() -> None:
    policy = DraftPolicy(DENSE, 1)
    assert policy.gain(5, 1) > 1
    for _ in range(8):
        policy.observe_step(5, 0, 5.0)
        policy.observe_step(7, 1, 14.0)
    assert policy.gain(5, 1) == pytest.approx(0.9)
    assert policy.gain(8, 1) == pytest.approx(0.9)
    assert min(policy.gain(4, 1), policy.gain(9, 1)) > 1
    for _ in range(16):
        policy.observe_step(8, 1, 9.6)  # the machine was busy before
    assert policy.gain(5, 1) == pytest.approx(1.5)


def test_newer_loads_count() -> None:
    policy = DraftPolicy(V3, 1)
    policy.set_loads(V3_LOADS)
    before = policy.gain(8, 1)
    policy.set_loads([[float(e < 16) for e in range(256)]] * 58)
    assert policy.gain(8, 1) > before
