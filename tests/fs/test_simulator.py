"""The protocol under seeded faults: no schedule may break an invariant; each break must be seen."""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter

import pytest

from tests.fs.mutations import LEASE_MUTATION, MUTATIONS, REMADE_MUTATION, Mutation, broken
from whalefall.fs.simulation import PROFILES, Outcome, run_schedule
from whalefall.fs.simulation.history import Operation, linearizable
from whalefall.sim import Faults, Network, Simulation

SCHEDULES = {"mixed": 250, "managers": 50, "slow": 50, "cut": 50, "churn": 50, "many": 50}
SCHEDULES["together"] = 100
LONG = {"mixed": 5000, "managers": 1000, "slow": 1000, "cut": 1000, "churn": 1000, "many": 1000}
LONG["together"] = 2000
LONG_FROM = 100_000


def _run(job: tuple[str, int]) -> Outcome:
    profile, seed = job
    return run_schedule(seed, False, profile)


def run_all(jobs: list[tuple[str, int]]) -> None:
    """Run schedules on all cores; print what ran, fail with the seeds that broke something."""
    # Fork: a worker need not import everything again. No threads run here yet.
    with multiprocessing.get_context("fork").Pool(min(4, os.cpu_count() or 1)) as pool:
        outcomes = pool.map(_run, jobs, chunksize=5)
    faults: Counter[str] = Counter()
    for outcome in outcomes:
        faults.update(outcome.faults)
    print(
        f"{len(outcomes)} schedules, {sum(faults.values())} faults {dict(faults)}, "
        f"{sum(o.operations for o in outcomes)} operations, "
        f"{sum(o.steps for o in outcomes)} steps, {sum(o.messages for o in outcomes)} messages"
    )
    bad = [(j, o.violation) for j, o in zip(jobs, outcomes, strict=True) if o.violation]
    assert not bad, f"{len(bad)} schedules, the first: {bad[:3]}"
    assert not sum(o.conflicts for o in outcomes), "a replica was asked for an impossible version"
    assert sum(faults.values()) > len(jobs)


@pytest.mark.timeout(900)  # where the machine is busy with other things
def test_500_schedules_keep_every_invariant() -> None:
    jobs = [(profile, seed) for profile, count in SCHEDULES.items() for seed in range(count)]
    assert len(jobs) >= 500
    run_all(jobs)


@pytest.mark.parametrize(
    ("profile", "seed"),
    [
        ("mixed", 104_980),  # a replica that was being filled kept other bytes than it was sent
        ("churn", 34),  # a follower without the chunk did not pass a removal on: a retry ran twice
    ],
)
def test_a_schedule_that_broke_once_holds(profile: str, seed: int) -> None:
    assert not run_schedule(seed, False, profile).violation


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_10000_schedules_keep_every_invariant() -> None:
    jobs = [(p, LONG_FROM + seed) for p, count in LONG.items() for seed in range(count)]
    run_all(jobs)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=[str(m.number) for m in MUTATIONS])
def test_mutation_is_caught(mutation: Mutation) -> None:
    with broken(mutation):
        outcome = run_schedule(mutation.seed, False, mutation.profile)
    assert outcome.violation, f"{mutation.number} ({mutation.name}) went unnoticed"
    assert not run_schedule(mutation.seed, False, mutation.profile).violation


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("mutation", MUTATIONS, ids=[str(m.number) for m in MUTATIONS])
def test_mutation_is_found_by_a_search(mutation: Mutation) -> None:
    for seed in range(5000, 7000):
        with broken(mutation):
            violation = run_schedule(seed, False, mutation.profile).violation
        if violation:
            print(f"mutation {mutation.number}: seed {seed}: {violation[:100]}")
            return
    pytest.fail(f"mutation {mutation.number}: 2000 schedules saw nothing")


def test_every_mutation_of_the_list_is_there() -> None:
    from tests.fs.test_meta import META_MUTATIONS

    numbers = [m.number for m in MUTATIONS] + [m.number for m, _ in META_MUTATIONS]
    numbers += [LEASE_MUTATION.number, REMADE_MUTATION.number]
    assert sorted(numbers) == list(range(1, 29))


def test_a_seed_gives_the_same_run() -> None:
    one, two = (run_schedule(7, True) for _ in range(2))
    assert one == two and len(one.transcript) > 50
    assert run_schedule(8, True).transcript != one.transcript
    assert set(PROFILES) == set(SCHEDULES) == set(LONG)


# ---- the checker itself


def op(kind: str, called: float, returned: float, data: bytes = b"", offset: int = 0) -> Operation:
    return Operation("c", kind, b"x", called, offset, data, returned)


def test_the_checker_accepts_what_some_order_explains() -> None:
    forever = float("inf")
    assert linearizable([op("write", 0, 5, b"a"), op("read", 1, 2, b""), op("read", 3, 4, b"a")])
    assert linearizable([op("write", 0, forever, b"a"), op("read", 9, 10, b"a")])
    assert linearizable([op("write", 0, forever, b"a"), op("read", 9, 10, b"")])
    assert linearizable([op("write", 0, 1, b"a"), op("remove", 2, 3), op("read", 4, 5, b"")])
    assert linearizable([op("write", 0, 1, b"b", 1), op("read", 2, 3, b"\0b")])


def test_the_checker_refuses_stale_lost_and_repeated_writes() -> None:
    a, b = op("write", 0, 1, b"a"), op("write", 2, 3, b"b")
    assert not linearizable([a, op("read", 2, 3, b"")])
    assert not linearizable([a, b, op("read", 4, 5, b"a")])
    assert not linearizable([a, op("write", 0.5, 9, b"b"), op("read", 2, 3, b"b"),
                             op("read", 4, 5, b"a")])  # fmt: skip
    assert not linearizable([a, op("read", 2, 3, b"c")])


def test_the_network_loses_doubles_and_cuts() -> None:
    sim = Simulation(1)
    network = Network(sim, Faults(loss=0.3, duplicate=0.3, slow=0.2))
    got: list[int] = []
    for number in range(1000):
        network.send("a", "b", lambda n=number: got.append(n))  # type: ignore[misc]
    sim.run(10)
    assert len(set(got)) == 1000 - network.lost and len(got) == len(set(got)) + network.doubled
    assert got != sorted(got) and 200 < network.lost < 400
    network.isolate("b", ["a"], into=True, out=False)
    before = len(got)
    network.send("a", "b", lambda: got.append(-1))
    network.send("b", "a", lambda: got.append(-2))
    sim.run(20)
    assert -1 not in got[before:]
