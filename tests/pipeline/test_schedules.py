"""Schedules: sound, as long as theory says, and faults found."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whalefall import pipeline
from whalefall.errors import ConfigError
from whalefall.pipeline import Action, Schedule, Task, Times, check, make, simulate, theory

SHAPES = [
    ("1f1b", 4, 8), ("1f1b", 3, 2), ("zb1p", 4, 8), ("zb1p", 4, 3), ("interleaved", 2, 4),
    ("interleaved", 4, 8), ("dualpipe", 2, 4), ("dualpipe", 4, 10), ("dualpipe", 8, 20),
    ("dualpipev", 1, 2), ("dualpipev", 2, 5), ("dualpipev", 5, 11),
]  # fmt: skip


def words(schedule: Schedule, rank: int) -> str:
    """A rank's computations in the notation of the reference: phase by stage, z for split."""
    stages = schedule.stages_of(rank)  # of phase 0, then 1, on the first half of the ranks
    out = []
    for action in schedule.compute(rank):
        phase = stages.index(action.task.stage)
        text = {"F": "F", "B": "B", "I": "B", "W": "W", "FB": "FB"}[action.kind]
        if action.kind == "W":
            out.append("W")
        elif action.kind == "FB":
            out.append(f"FB{phase}{stages.index(action.second.stage)}")
        else:
            out.append(f"{text}{phase}" + ("z" if action.kind == "I" else ""))
    return " ".join(out)


def test_dualpipe_has_the_originals_measured_order() -> None:
    schedule = make("dualpipe", 4, 10)
    assert words(schedule, 0) == ("F0 F0 F0 F1 B1z W F1 FB01 FB10 FB01 FB10 B1 FB10 B1 B0z W B0z W")
    assert words(schedule, 1) == ("F0 F1 F0 F1 F0 B1 FB10 FB01 FB10 FB01 FB10 B1 B0 B1z B0z W W")
    assert words(make("dualpipev", 2, 5), 0) == words(schedule, 0)


@pytest.mark.parametrize(("name", "ranks", "chunks"), SHAPES)
def test_every_schedule_is_sound(name: str, ranks: int, chunks: int) -> None:
    schedule = make(name, ranks, chunks)
    limit = None
    if name != "interleaved":
        limit = theory(name, schedule.num_stages, 1, 2, 1, 3).activations
    assert check(schedule, limit) == []
    assert check(pipeline.forward_only(schedule)) == []


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.sampled_from(["1f1b", "zb1p", "dualpipe", "dualpipev", "interleaved"]),
    st.integers(1, 6),
    st.integers(0, 8),
    st.integers(0, 4),
)
def test_random_sizes_are_sound(name: str, ranks: int, extra: int, prefetch: int) -> None:
    ranks = ranks + ranks % 2 if name == "dualpipe" else ranks
    chunks = 2 * ranks + extra
    if name == "dualpipe":
        chunks += chunks % 2
    if name == "interleaved":
        chunks = ranks * (1 + extra)
    schedule = make(name, ranks, chunks, prefetch=prefetch)
    assert check(schedule) == []
    # uneven stages: still no deadlock, still all the work
    uneven = simulate(schedule, Times(f=lambda s: 1.0 + s, b=lambda s: 3.0 + s, w=1.0))
    assert not uneven.deadlock
    work = sum(4.0 + 2 * s for s in range(schedule.num_stages)) * chunks
    assert sum(uneven.busy) == pytest.approx(work)


def worst_idle(name: str, ranks: int, times: Times) -> float:
    return max(simulate(make(name, ranks, 6 * ranks), times).idle)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    st.sampled_from(["1f1b", "zb1p", "dualpipe", "dualpipev"]), st.sampled_from([2, 4, 8]),
    st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.booleans(),
)  # fmt: skip
def test_bubbles_equal_the_formulas(
    name: str, stages: int, f: int, i: int, w: int, overlapped: bool
) -> None:
    # where the table's formulas hold: weight parts no longer than what they fill in for, and, for
    # the dual schedules, forward and input-gradient passes of one length
    w = min(w, f, i)
    if name.startswith("dual"):
        i = f
        w = min(w, f)
    b = i + w
    fb = Fraction(9, 10) * (f + b) if overlapped else f + b
    ranks = stages // 2 if name == "dualpipev" else stages
    idle = worst_idle(name, ranks, Times(f, b, w, fb))
    if name == "1f1b":
        assert idle == (stages - 1) * (f + b)
    else:
        assert idle == pytest.approx(float(theory(name, stages, f, b, w, fb).bubble))


def test_communication_time_hides_under_compute_when_receives_are_early() -> None:
    times = Times(f=1, b=2, w=1, communication=0.2)
    free = simulate(make("1f1b", 4, 32), Times(f=1, b=2, w=1))
    slow = simulate(make("1f1b", 4, 32), times)
    # every chunk crosses three links and back; only the first and last crossings are seen
    assert slow.total - free.total < 32 * 6 * 0.2 / 2


@pytest.mark.parametrize("name", ["1f1b", "zb1p", "dualpipe", "dualpipev"])
@pytest.mark.parametrize("stages", [2, 4, 8])
def test_live_activations_equal_the_formula(name: str, stages: int) -> None:
    ranks = stages // 2 if name == "dualpipev" else stages
    live = simulate(make(name, ranks, 6 * ranks)).live
    assert max(live) == theory(name, stages, 1, 2, 1, 3).activations


def broken(schedule: Schedule, rank: int, actions: list[Action]) -> list[str]:
    ranks = list(schedule.ranks)
    ranks[rank] = tuple(actions)
    return check(dataclasses.replace(schedule, ranks=tuple(ranks)))


@pytest.mark.parametrize(("name", "ranks", "chunks"), [("dualpipe", 4, 8), ("zb1p", 4, 8)])
class TestFaultsAreFound:
    def test_a_removed_receive(self, name: str, ranks: int, chunks: int) -> None:
        schedule = make(name, ranks, chunks)
        for phase in ("begin", "wait"):
            actions = list(schedule.ranks[1])
            at = next(n for n, a in enumerate(actions) if a.kind == "RECV_F" and a.phase == phase)
            del actions[at]
            assert broken(schedule, 1, actions)

    def test_a_removed_send(self, name: str, ranks: int, chunks: int) -> None:
        schedule = make(name, ranks, chunks)
        actions = [a for a in schedule.ranks[1] if not (a.kind == "SEND_B" and a.task.chunk == 2)]
        assert any("deadlock" in problem for problem in broken(schedule, 1, actions))

    def test_a_doubled_chunk(self, name: str, ranks: int, chunks: int) -> None:
        schedule = make(name, ranks, chunks)
        actions = list(schedule.ranks[0])
        at = next(n for n, a in enumerate(actions) if a.kind == "F")
        assert any("2 times" in p for p in broken(schedule, 0, [*actions, actions[at]]))

    def test_a_chunk_in_place_of_another(self, name: str, ranks: int, chunks: int) -> None:
        schedule = make(name, ranks, chunks)
        actions = list(schedule.ranks[0])
        at = next(n for n, a in enumerate(actions) if a.kind == "F")
        actions[at] = actions[at]._replace(task=Task(0, 1))
        assert any("forward 0 times" in p for p in broken(schedule, 0, actions))

    def test_a_swapped_order(self, name: str, ranks: int, chunks: int) -> None:
        schedule = make(name, ranks, chunks)
        actions = list(schedule.ranks[ranks - 1])
        at = [n for n, a in enumerate(actions) if a.kind in ("I", "W")]
        first = next(n for n in at if actions[n].kind == "I")
        second = next(
            n for n in at if actions[n].kind == "W" and actions[n].task == actions[first].task
        )
        actions[first], actions[second] = actions[second], actions[first]
        assert any("comes before I" in p for p in broken(schedule, ranks - 1, actions))

    def test_a_missing_weight_gradient(self, name: str, ranks: int, chunks: int) -> None:
        schedule = make(name, ranks, chunks)
        actions = list(schedule.ranks[0])
        del actions[max(n for n, a in enumerate(actions) if a.kind == "W")]
        assert any("W 0 times" in p for p in broken(schedule, 0, actions))

    def test_too_many_activations(self, name: str, ranks: int, chunks: int) -> None:
        assert any("activations" in p for p in check(make(name, ranks, chunks), 2))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("zigzag", 2, 4), "no schedule 'zigzag'"),
        (("dualpipe", 3, 8), "even number of ranks, not 3"),
        (("dualpipe", 2, 5), "even number of chunks, not 5"),
        (("dualpipe", 4, 6), "at least 8 chunks, not 6"),
        (("dualpipev", 4, 7), "at least 8 chunks, not 7"),
        (("interleaved", 4, 6), "multiple of 4 chunks"),
        (("1f1b", 0, 1), "0 ranks"),
    ],
)
def test_bad_sizes_are_one_clear_line(arguments: tuple, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make(*arguments)


def test_table_of_the_original() -> None:
    rows = {n: theory(n, 8, 1.0, 2.0, 1.0, 3.0) for n in ("1f1b", "zb1p", "dualpipe", "dualpipev")}
    assert [r.parameters for r in rows.values()] == [1, 1, 2, 2]
    assert [r.activations for r in rows.values()] == [8, 8, 9, 9]
    assert [r.devices for r in rows.values()] == [8, 8, 8, 4]
    with pytest.raises(ConfigError, match="no formula"):
        theory("interleaved", 8, 1, 2, 1, 3)


def test_public_names() -> None:
    assert sorted(pipeline.__all__) == [
        "Action", "DualPipe", "DualPipeV", "Pipeline", "Result", "Schedule", "Task", "Theory",
        "Times", "WeightGradStore", "Worker", "check", "decode_overlap", "execute",
        "forward_only", "make", "prefill_overlap", "set_p2p_tensor_dtype",
        "set_p2p_tensor_shapes", "simulate", "sync_mirrors", "theory",
    ]  # fmt: skip
