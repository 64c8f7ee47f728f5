"""The protocol under seeded faults: no schedule may break an invariant; each break must be seen."""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter
from random import Random

import pytest

from tests.fs.mutations import (
    DONE_MUTATION,
    LEASE_MUTATION,
    MUTATIONS,
    REMADE_MUTATION,
    Mutation,
    broken,
)
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
        ("mixed", 102_594),  # a copy of a packet ran that a full disk had refused
        ("mixed", 104_524),  # a full disk said no where an earlier try was pending already
        ("mixed", 102_434),  # recovery passed on what had not matched the predecessor's
        ("slow", 1285),  # a removal of nothing was known at the tail, and not to the new head
        ("slow", 100_252),  # an operation was remembered that those who served on had lost
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
    for seed in range(5000, 17000):
        with broken(mutation):
            violation = run_schedule(seed, False, mutation.profile).violation
        if violation:
            print(f"mutation {mutation.number}: seed {seed}: {violation[:100]}")
            return
    pytest.fail(f"mutation {mutation.number}: 12000 schedules saw nothing")


def test_every_mutation_of_the_list_is_there() -> None:
    from tests.fs.test_meta import META_MUTATIONS

    numbers = [m.number for m in MUTATIONS] + [m.number for m, _ in META_MUTATIONS]
    numbers += [m.number for m in (DONE_MUTATION, LEASE_MUTATION, REMADE_MUTATION)]
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


def by_trying(ops: list[Operation], state: bytes = b"") -> bool:
    """The definition itself: every order of every choice of the operations not known to be done."""
    if all(o.returned_s == float("inf") for o in ops):
        return True
    end = min(o.returned_s for o in ops)
    return any(
        after is not None and by_trying([o for o in ops if o is not one], after)
        for one in ops
        if one.called_s <= end
        for after in [one.apply(state)]
    )


def test_the_checker_says_what_trying_every_order_says() -> None:
    random, found = Random(4), Counter[bool]()
    for _ in range(3000):
        history = []
        for _ in range(random.randint(1, 7)):
            called = random.randint(0, 12)
            returned = called + random.choice([1, 2, 3, 8]) if random.random() < 0.7 else 1e999
            kind = random.choice(["write", "write", "remove", "read", "read", "read"])
            data = bytes(random.choices(b"\0ab", k=random.randint(0 if kind == "read" else 1, 2)))
            history.append(op(kind, called, returned, data, random.randint(0, 1)))
        known = [o for o in history if o.kind != "read" or o.returned_s < 1e999]
        truth = by_trying(known)
        found[truth] += 1
        assert linearizable(history) == truth, [str(o) for o in history]
    assert min(found[True], found[False]) > 300


def test_the_checker_keeps_both_ways_to_the_same_content() -> None:
    whole, half = op("write", 4, 1e999, b"ab"), op("write", 5, 1e999, b"a")
    reads = [op("read", 6, 7, b"ab"), op("write", 8, 9, b"yy"), op("read", 10, 11, b"ab")]
    for unknown in ([whole, half], [half, whole]):
        assert linearizable([op("write", 0, 1, b"xb"), *unknown, *reads])
    assert not linearizable([op("write", 0, 1, b"xb"), whole, *reads])


@pytest.mark.parametrize("lie", [False, True])
def test_the_checker_ends_where_many_outcomes_are_unknown(lie: bool) -> None:
    history = [op("write", n, float("inf"), b"%c" % (65 + n), n % 2) for n in range(24)]
    history += [op("read", 30 + n, 30.5 + n, b"") for n in range(40)]
    history += [op("write", 80, 81, b"xy"), op("read", 82, 83, b"xz" if lie else b"xy")]
    assert linearizable(history) != lie


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
