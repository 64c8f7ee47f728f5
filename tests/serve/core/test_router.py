"""The router: every answer ends once, whatever dies, and no rank gets more than it holds."""

import random

from hypothesis import given
from hypothesis import strategies as st

from whalefall.serve.core import Effect, Place, Router


def router(prefill: int = 1, decode: int = 1, ranks: int = 2, **kwargs: int) -> Router:
    made = Router(**kwargs)
    for number in range(prefill):
        made.unit_up(f"prefill-{number}", "prefill", ranks, 1000, 4)
    for number in range(decode):
        made.unit_up(f"decode-{number}", "decode", ranks, 1000, 4)
    return made


def test_an_answer_goes_from_prefill_to_decode_and_its_pages_are_released() -> None:
    r = router()
    assert r.add("a", 100, 50, (0, 0)) == [Effect("prefill", "a", Place("prefill-0", 0))]
    there, here = Place("prefill-0", 0), Place("decode-0", 0)
    assert r.prefilled("a") == [Effect("decode", "a", here, there)]
    assert r.admitted("a") == [Effect("release", "a", there)]
    assert r.finished("a") == [] and not r.answers
    assert r.is_empty("prefill-0") and r.is_empty("decode-0")


def test_prompts_and_answers_spread_over_ranks() -> None:
    r = router(prefill=2, decode=2)
    places = {r.add(f"{i}", 100, 50, (0, i))[0].place for i in range(4)}
    assert len(places) == 4
    assert len({r.prefilled(f"{i}")[0].place for i in range(4)}) == 4


def test_a_prefix_that_a_rank_knows_draws_the_next_prompt() -> None:
    r = router()
    hashes = [bytes([i]) for i in range(3)]
    r.add("a", 200, 8, (0, 0), hashes)
    r.add("b", 30, 8, (0, 1))
    r.prefilled("a")
    r.prefilled("b")
    assert r.add("c", 200, 8, (0, 2), hashes)[0].place == Place("prefill-0", 0)
    assert r.answers["c"].cached == 192


def test_a_dead_decode_unit_sends_its_answers_back_to_prefill() -> None:
    r = router(decode=2, ranks=1)
    r.add("a", 100, 50, (0, 0))
    r.prefilled("a")
    r.admitted("a")
    there = Place("prefill-0", 0)
    assert r.unit_down("decode-0") == [Effect("prefill", "a", there, attempt=1)]
    assert r.prefilled("a")[0].place == Place("decode-1", 0)


def test_pages_not_fetched_yet_go_to_another_decode_unit() -> None:
    r = router(decode=2, ranks=1)
    r.add("a", 100, 50, (0, 0))
    r.prefilled("a")
    source = Place("prefill-0", 0)
    assert r.unit_down("decode-0") == [Effect("decode", "a", Place("decode-1", 0), source)]


def test_pages_lost_before_they_were_fetched_are_computed_anew_and_the_old_attempt_cancelled():
    r = router(prefill=2, ranks=1)
    r.add("a", 100, 50, (0, 0))
    r.prefilled("a")
    assert r.unit_down("prefill-0") == [
        Effect("cancel", "a", Place("decode-0", 0), attempt=0),
        Effect("prefill", "a", Place("prefill-1", 0), attempt=1),
    ]


def test_a_dead_prefill_unit_does_not_disturb_answers_under_way() -> None:
    r = router(ranks=1)
    r.add("a", 100, 50, (0, 0))
    r.prefilled("a")
    r.admitted("a")
    assert r.unit_down("prefill-0") == []
    assert r.finished("a") == []


def test_an_answer_under_which_units_keep_dying_fails() -> None:
    r = router(ranks=1, max_restarts=1)
    r.add("a", 100, 50, (0, 0))
    r.unit_down("prefill-0")
    r.unit_up("prefill-1", "prefill", 1, 1000, 4)
    assert r.unit_down("prefill-1") == [Effect("fail", "a")]
    assert not r.answers


def test_siblings_wait_for_the_prompt_they_share() -> None:
    r = router()
    r.add("0/a", 100, 50, (0, 0))
    assert r.add("1/a", 100, 50, (0, 1), after="0/a") == []
    assert [e.kind for e in r.prefilled("0/a")] == ["decode", "prefill"]


def test_a_drained_unit_gets_nothing_new_and_becomes_empty() -> None:
    r = router(decode=2, ranks=1)
    r.add("a", 100, 50, (0, 0))
    r.prefilled("a")
    r.admitted("a")
    r.drain("decode-0")
    r.add("b", 100, 50, (0, 1))
    assert r.prefilled("b")[0].place == Place("decode-1", 0)
    assert not r.is_empty("decode-0")
    r.finished("a")
    assert r.is_empty("decode-0")


class World:
    """Ranks that do what they are told, sometimes, and die."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.router = Router(ahead=2, max_restarts=1000)
        self.todo: list[Effect] = []
        self.kept: set[tuple[str, Place]] = set()  # pages in memory
        self.ended: list[str] = []
        self.units: list[str] = []
        for kind in ("prefill", "prefill", "decode", "decode"):
            self.start(kind)

    def start(self, kind: str) -> None:
        name = f"{kind}-{len(self.units)}"
        self.units.append(name)
        self.todo += self.router.unit_up(name, kind, self.rng.randint(1, 3), 400, 3)

    def step(self) -> None:
        assert self.router.broken_invariants() == []
        if self.rng.random() < 0.03 and self.router.units:
            self.kill(self.rng.choice(sorted(self.router.units)))
        elif self.todo:
            self.act(self.todo.pop(self.rng.randrange(len(self.todo))))

    def kill(self, name: str) -> None:
        self.todo = [e for e in self.todo if e.place is None or e.place.unit != name]
        self.kept = {(key, place) for key, place in self.kept if place.unit != name}
        self.todo += self.router.unit_down(name)
        self.start(name.split("-")[0])

    def act(self, effect: Effect) -> None:
        r, key, place = self.router, effect.key, effect.place
        answer = r.answers.get(key)
        if effect.kind in ("release", "cancel"):
            self.kept.discard((key, place))
        elif answer is None:
            return
        elif effect.kind == "prefill" and (answer.state, answer.source) == ("prefill", place):
            self.kept.add((key, place))
            self.todo += r.prefilled(key)
        elif effect.kind == "decode" and (answer.state, answer.target) == ("handover", place):
            if (key, effect.source) not in self.kept:
                self.todo += r.lost(key)
                return
            self.todo += r.admitted(key)
            self.todo.append(Effect("fail", key, place))  # here: generate to the end
        elif effect.kind == "fail" and (answer.state, answer.target) == ("decode", place):
            self.ended.append(key)
            self.todo += r.finished(key)


@given(st.integers(0, 2**32))
def test_every_answer_ends_once_and_nothing_stays_behind(seed: int) -> None:
    world = World(seed)
    cancelled = []
    for number in range(30):
        key, prompt = f"{number}", world.rng.randint(1, 200)
        world.todo += world.router.add(key, prompt, world.rng.randint(1, 100), (0, number))
        for _ in range(world.rng.randint(0, 6)):
            world.step()
        if world.rng.random() < 0.1 and key in world.router.answers:
            world.todo += world.router.cancel(key)
            cancelled.append(key)
    for _ in range(4000):
        if not (world.router.answers or world.todo):
            break
        world.step()
    assert sorted(world.ended + cancelled) == sorted(f"{n}" for n in range(30))
    assert not world.kept
    assert all(world.router.is_empty(name) for name in world.router.units)
