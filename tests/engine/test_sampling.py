"""The native sampler against its definition in numpy, and the definition against arithmetic."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whalefall.engine import SamplingParams
from whalefall.engine.sampling import SampleRow, sample, sample_row, uniform
from whalefall.errors import ConfigError


def logits(seed: int, vocab: int = 300) -> np.ndarray:
    return (3 * np.random.default_rng(seed).standard_normal(vocab)).astype(np.float32)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_p=st.sampled_from([1.0, 0.9, 0.4, 1e-6]),
    top_k=st.sampled_from([-1, 0, 1, 7, 1000]),
    min_p=st.sampled_from([0.0, 0.05, 0.9]),
    repetition=st.sampled_from([1.0, 1.3, 0.5]),
    frequency=st.sampled_from([0.0, 0.7, -1.0]),
    presence=st.sampled_from([0.0, 0.5]),
    draw=st.floats(0, 1, exclude_max=True),
    ties=st.booleans(),
)
def test_native_sampling_equals_its_definition(
    seed: int, draw: float, ties: bool, repetition: float, frequency: float, presence: float,
    **filters: Any,
) -> None:  # fmt: skip
    params = SamplingParams(
        **filters,
        repetition_penalty=repetition,
        frequency_penalty=frequency,
        presence_penalty=presence,
        logit_bias={5: 2.5, 7: -100},
        logprobs=3,
    )
    x = np.round(logits(seed)) if ties else logits(seed)
    row = SampleRow(x, params, Counter({3: 0, 5: 2, 11: 1}), banned=(0, 1), uniform=draw)
    ours, theirs = sample([row])[0], sample_row(row)
    assert ours[0] == theirs[0]
    assert ours[1] is not None
    assert theirs[1] is not None
    assert ours[1].rank == theirs[1].rank
    assert [token for token, _ in ours[1].top] == [token for token, _ in theirs[1].top]
    assert ours[1].logprob == pytest.approx(theirs[1].logprob, abs=1e-6)


def test_draws_follow_the_softmax() -> None:
    x = np.log(np.array([0.5, 0.25, 0.125, 0.125], np.float32))
    rows = [
        SampleRow(x, SamplingParams(), Counter(), uniform=uniform(1, 0, i)) for i in range(20_000)
    ]
    share = np.bincount([token for token, _ in sample(rows)], minlength=4) / len(rows)
    # the standard deviation of a share of 20,000 draws is at most 0.0036
    np.testing.assert_allclose(share, [0.5, 0.25, 0.125, 0.125], atol=0.012)


def test_top_p_keeps_the_fewest_tokens_that_reach_it() -> None:
    x = np.log(np.array([0.1, 0.5, 0.3, 0.1], np.float32))
    params = SamplingParams(top_p=0.7)
    found = {sample([SampleRow(x, params, Counter(), uniform=u / 50)])[0][0] for u in range(50)}
    assert found == {1, 2}


def test_the_lowest_id_wins_among_equals() -> None:
    x = np.zeros(40, np.float32)
    x[[9, 30]] = 1
    assert sample([SampleRow(x, SamplingParams(temperature=0), Counter())])[0][0] == 9


def test_penalties_by_hand() -> None:
    x = np.array([2.0, -2.0, 1.9, 1.0], np.float32)
    params = SamplingParams(temperature=0, repetition_penalty=2.0)
    assert sample([SampleRow(x, params, Counter({0: 0}))])[0][0] == 2  # 2 / 2 < 1.9
    params = SamplingParams(temperature=0, frequency_penalty=0.04, presence_penalty=0.04)
    assert sample([SampleRow(x, params, Counter({0: 1}))])[0][0] == 0  # 2 - 0.08 > 1.9
    assert sample([SampleRow(x, params, Counter({0: 2}))])[0][0] == 2  # 2 - 0.12 < 1.9


def test_logprobs_are_the_models_own_whatever_the_temperature() -> None:
    x = logits(1)
    wanted = x - np.log(np.exp(x.astype(np.float64)).sum())
    for temperature in (0.0, 5.0):
        params = SamplingParams(temperature=temperature, logit_bias={4: 50}, logprobs=20)
        token, report = sample([SampleRow(x, params, Counter(), uniform=0.5)])[0]
        assert token == 4
        assert report is not None
        assert report.logprob == pytest.approx(wanted[4], abs=1e-5)
        assert report.rank == 1 + (x > x[4]).sum()
        assert [t for t, _ in report.top] == np.argsort(-x, kind="stable")[:20].tolist()


def test_draws_differ_by_seed_answer_and_position_only() -> None:
    seen = {uniform(s, i, p) for s in range(10) for i in range(10) for p in range(10)}
    assert len(seen) == 1000
    assert uniform(3, 1, 4) == uniform(3, 1, 4)
    assert min(seen) >= 0 and max(seen) < 1


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("temperature", -0.1, "temperature is -0.1, wanted 0 to 100"),
        ("temperature", float("nan"), "temperature is nan"),
        ("top_p", 0.0, "top_p is 0.0, wanted above 0 to 1"),
        ("top_k", -2, "top_k is -2"),
        ("n", 0, "n is 0, wanted a whole number from 1 to 128"),
        ("max_tokens", 0, "max_tokens is 0"),
        ("logprobs", 21, "logprobs is 21, wanted a whole number from 0 to 20"),
        ("frequency_penalty", 2.5, "frequency_penalty is 2.5"),
        ("stop", [""], "wanted strings that are not empty"),
        ("logit_bias", {3: 101}, r"logit_bias\[3\] is 101"),
        ("min_tokens", 17, "min_tokens is 17, wanted at most max_tokens = 16"),
    ],
)
def test_absurd_parameters_are_refused(name: str, value: object, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        SamplingParams(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("draw", [sample, lambda rows: [sample_row(row) for row in rows]])
def test_presence_and_frequency_are_of_the_answer_not_of_the_prompt(draw: Any) -> None:
    x = np.array([0.0, 1.0, 0.9], np.float32)
    params = SamplingParams(temperature=0, presence_penalty=0.5, frequency_penalty=0.5)
    assert draw([SampleRow(x, params, Counter({1: 0}))])[0][0] == 1  # the prompt has it
    assert draw([SampleRow(x, params, Counter({1: 1}))])[0][0] == 2
