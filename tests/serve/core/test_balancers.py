"""The balancers and the autoscaler: what they choose, and what they keep even."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whalefall.errors import ConfigError
from whalefall.serve.core import (
    DecodeLoad,
    PrefillLoad,
    ScaleRule,
    ScaleState,
    attention_work,
    choose_decode,
    choose_prefill,
    scale,
)


def test_a_prompt_goes_to_the_least_loaded_unit_and_ties_to_the_first() -> None:
    assert choose_prefill([PrefillLoad(), PrefillLoad()], 10) == 0
    assert choose_prefill([PrefillLoad(100, 100), PrefillLoad(10, 10)], 10) == 1


def test_few_tokens_of_a_long_prompt_count_by_their_attention() -> None:
    long = PrefillLoad().plus(100_000, 99_000)  # 1,000 tokens, a hundred million pairs
    short = PrefillLoad().plus(1_500, 0)
    assert long.tokens < short.tokens
    assert choose_prefill([long, short], 500) == 1


def test_a_cached_prefix_draws_its_prompt() -> None:
    loads = [PrefillLoad(100, 5_000), PrefillLoad(120, 6_000)]
    assert choose_prefill(loads, 2_000) == 0
    assert choose_prefill(loads, 2_000, cached=[0, 1_900]) == 1


def test_attention_work_of_parts_adds_up() -> None:
    assert attention_work(3) == 1 + 2 + 3
    assert attention_work(10, 4) + attention_work(4) == attention_work(10)


@given(st.integers(0, 2**32))
def test_prefill_stays_even_in_both_quantities(seed: int) -> None:
    rng = random.Random(seed)
    loads = [PrefillLoad() for _ in range(4)]
    prompts = [int(rng.lognormvariate(6, 1)) for _ in range(400)]
    for prompt in prompts:
        index = choose_prefill(loads, prompt)
        loads[index] = loads[index].plus(prompt, 0)
    tokens = [load.tokens for load in loads]
    attention = [load.attention for load in loads]
    # No placement can undercut the largest prompt, so it may stand above an even share.
    largest = max(prompts)
    assert max(tokens) < 1.3 * sum(tokens) / 4 + largest
    assert max(attention) < 1.3 * sum(attention) / 4 + attention_work(largest)


def test_decode_balances_the_fuller_of_kv_and_requests() -> None:
    many_short = DecodeLoad(kv_used=100, kv_total=1000, requests=9, max_requests=10)
    few_long = DecodeLoad(kv_used=700, kv_total=1000, requests=2, max_requests=10)
    assert choose_decode([many_short, few_long], 50) == 1
    fuller = DecodeLoad(kv_used=900, kv_total=1000, requests=2, max_requests=10)
    half = DecodeLoad(kv_used=100, kv_total=1000, requests=5, max_requests=10)
    assert choose_decode([fuller, half], 50) == 1


def test_decode_never_overfills() -> None:
    full = DecodeLoad(kv_used=0, kv_total=1000, requests=10, max_requests=10)
    tight = DecodeLoad(kv_used=960, kv_total=1000, requests=1, max_requests=10)
    assert choose_decode([full, tight], 50) is None
    assert choose_decode([full, tight], 40) == 1
    assert choose_decode([], 1) is None


RULE = ScaleRule(set_point=10.0, min_units=1, max_units=8, calm_s=60.0)


def test_scaling_up_is_immediate_and_down_waits() -> None:
    state = scale(ScaleState(2), 47.0, 0.0, RULE)
    assert state.units == 5
    state = scale(state, 10.0, 100.0, RULE)
    assert state.units == 5
    assert scale(state, 10.0, 159.0, RULE).units == 5
    assert scale(state, 10.0, 160.0, RULE).units == 1


def test_a_busy_moment_restarts_the_calm() -> None:
    state = scale(ScaleState(5), 10.0, 0.0, RULE)
    state = scale(state, 50.0, 30.0, RULE)
    state = scale(state, 10.0, 70.0, RULE)
    assert scale(state, 10.0, 120.0, RULE).units == 5
    assert scale(state, 10.0, 130.0, RULE).units == 1


def test_scale_keeps_its_limits_and_does_not_flap() -> None:
    assert scale(ScaleState(2), 1e9, 0.0, RULE).units == 8
    assert scale(ScaleState(2), 0.0, 0.0, ScaleRule(10.0, 2, 8, 0.0)).units == 2
    for load in (15.1, 24.9):
        assert scale(ScaleState(2), load, 0.0, RULE).units == 2


def test_a_smoothed_load_ignores_a_spike_and_follows_a_step() -> None:
    rule = ScaleRule(set_point=10.0, smooth_s=600.0, calm_s=0.0)
    state = scale(ScaleState(2), 20.0, 0.0, rule)
    assert scale(state, 80.0, 60.0, rule).units == 3
    assert scale(state, 80.0, 6000.0, rule).units == 8


def test_absurd_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="wanted a set point above 0"):
        ScaleRule(set_point=0.0)
    with pytest.raises(ConfigError, match="got no units"):
        choose_prefill([], 5)
