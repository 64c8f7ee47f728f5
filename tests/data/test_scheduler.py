"""The scheduler over thousands of seeded runs with deaths: order, slots, retries, no starvation."""

from __future__ import annotations

import random

import pytest

from whalefall.data.scheduler import Scheduler, broken_invariants


def random_plan(rng: random.Random) -> tuple[list[str], dict[str, list[str]], dict[str, int]]:
    count = rng.randint(1, 12)
    order = [f"t{i}" for i in range(count)]
    inputs = {k: rng.sample(order[:i], min(i, rng.randint(0, 3))) for i, k in enumerate(order)}
    return order, inputs, {k: rng.choice([1, 1, 2, 9]) for k in order}


@pytest.mark.parametrize("seed", range(10))
def test_every_task_runs_once_though_processes_die(seed: int) -> None:
    for trial in range(200):
        rng = random.Random(f"{seed}.{trial}")
        order, inputs, cpus = random_plan(rng)
        state = Scheduler(order, inputs, cpus, slots=rng.randint(1, 4), max_retries=5)
        finished: list[str] = []
        while not state.finished:
            for start in state.starts():
                assert start.attempt == state.deaths.get(start.key, 0)
            assert broken_invariants(state) == []
            key = rng.choice(sorted(state.running))
            if rng.random() < 0.2 and state.deaths.get(key, 0) < 5:
                state.died(key, "killed")
            else:
                state.succeeded(key)
                finished.append(key)
        assert sorted(finished) == sorted(order)


def test_the_sixth_death_is_final() -> None:
    state = Scheduler(["a"], {"a": []}, {"a": 1}, slots=1)
    for death in range(6):
        assert [s.attempt for s in state.starts()] == [death]
        state.died("a", "killed by signal 9")
    assert state.failed is not None and state.failed.reason.startswith("failed 6 times")
    assert state.starts() == []


def test_an_error_of_the_users_is_final_at_once() -> None:
    state = Scheduler(["a", "b"], {"a": [], "b": []}, {"a": 1, "b": 1}, slots=2)
    assert len(state.starts()) == 2
    state.raised("a", "ZeroDivisionError")
    assert state.finished and state.failed is not None and state.failed.key == "a"


def test_a_wide_task_is_not_overtaken() -> None:
    state = Scheduler(["a", "wide", "c"], {k: [] for k in ("a", "wide", "c")},
                      {"a": 1, "wide": 2, "c": 1}, slots=2)  # fmt: skip
    assert [s.key for s in state.starts()] == ["a"]
    state.succeeded("a")
    assert [s.key for s in state.starts()] == ["wide"]
