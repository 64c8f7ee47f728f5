"""The router: which rank of which unit computes which answer. A state machine without IO.

An answer waits, is prefilled on a rank that `choose_prefill` names, is handed over to a rank that
`choose_decode` names, and is generated there. Where a unit dies its answers go back as far as they
must: a prompt is computed again, tokens that the client has are kept. Methods take what happened
and return what to do (`Effect`s).
Source: the published V3/R1 system: prefill balancer, decode balancer, units of data-parallel ranks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from whalefall.serve.core.decode import DecodeLoad, choose_decode
from whalefall.serve.core.prefill import PrefillLoad, choose_prefill

__all__ = ["Answer", "Effect", "Kind", "Place", "Router"]

Kind = Literal["prefill", "decode"]
BLOCK = 64  # tokens of a prefix block
KNOWN_BLOCKS = 1 << 16  # that are remembered of a prefill rank


class Place(NamedTuple):
    """A rank of a unit."""

    unit: str
    rank: int


class Effect(NamedTuple):
    """Something to do.

    Attributes:
        kind: "prefill" an answer's prompt at `place`; "decode" it at `place`, its KV lying at
            `source`; "release" the KV that `place` keeps for it; "cancel" it at `place`; "fail" it,
            since too many units died under it.
        key: the answer.
        attempt: how often it had begun anew; what ranks say of earlier attempts is stale.
    """

    kind: Literal["prefill", "decode", "release", "cancel", "fail"]
    key: str
    place: Place | None = None
    source: Place | None = None
    attempt: int = 0


@dataclass
class Answer:
    """One answer under way.

    Attributes:
        key: its name.
        prompt: tokens of its prompt.
        reserve: tokens it may add, as far as room is kept for them.
        order: (priority, arrival); lower goes first.
        hashes: chained hashes of the prompt's full blocks.
        after: an answer with the same prompt whose prefill it waits for.
        state: "waiting" for a prefill rank, in "prefill", its KV "ready" to be fetched, in
            "handover", in "decode".
        source: the prefill rank that computes it, or keeps its KV.
        target: the decode rank.
        restarts: units that died under it.
    """

    key: str
    prompt: int
    reserve: int
    order: tuple[int, int]
    hashes: tuple[bytes, ...] = ()
    after: str | None = None
    state: Literal["waiting", "prefill", "ready", "handover", "decode"] = "waiting"
    source: Place | None = None
    target: Place | None = None
    cached: int = 0
    restarts: int = 0


@dataclass
class _Rank:
    prefill: PrefillLoad = field(default_factory=PrefillLoad)
    answers: int = 0
    kv: int = 0
    known: OrderedDict[bytes, None] = field(default_factory=OrderedDict)


@dataclass
class _Unit:
    kind: Kind
    ranks: list[_Rank]
    kv_tokens: int
    max_requests: int
    draining: bool = False


class Router:
    """Books over units and answers.

    Args:
        ahead: answers a prefill rank may have under way or keep KV of.
        max_restarts: units that may die under an answer before it fails.
    """

    def __init__(self, ahead: int = 4, max_restarts: int = 5) -> None:
        self.ahead, self.max_restarts = ahead, max_restarts
        self.answers: dict[str, Answer] = {}
        self.units: dict[str, _Unit] = {}

    # ---- units

    def unit_up(
        self, name: str, kind: Kind, ranks: int, kv_tokens: int, max_requests: int
    ) -> list[Effect]:
        """A unit is ready; `kv_tokens` and `max_requests` are those of one rank."""
        self.units[name] = _Unit(kind, [_Rank() for _ in range(ranks)], kv_tokens, max_requests)
        return self._assign()

    def drain(self, name: str) -> None:
        """Give a unit nothing new."""
        self.units[name].draining = True

    def is_empty(self, name: str) -> bool:
        """Whether a unit computes and keeps nothing."""
        return all(not rank.answers for rank in self.units[name].ranks)

    def unit_down(self, name: str) -> list[Effect]:
        """A unit is gone, with all it held."""
        self.units.pop(name, None)
        effects: list[Effect] = []
        for answer in list(self.answers.values()):
            lost_source = answer.source is not None and answer.source.unit == name
            lost_target = answer.target is not None and answer.target.unit == name
            if not (lost_source or lost_target):
                continue
            if lost_target and answer.state == "handover" and not lost_source:
                answer.state, answer.target = "ready", None
                continue
            if answer.state == "decode" and not lost_target:
                answer.source = None  # its KV was fetched already
                continue
            effects += self._restart(answer)
        return effects + self._assign()

    def _restart(self, answer: Answer) -> list[Effect]:
        effects = self._leave(answer)
        answer.state, answer.restarts = "waiting", answer.restarts + 1
        if answer.restarts > self.max_restarts:
            del self.answers[answer.key]
            effects.append(Effect("fail", answer.key))
        return effects

    def _leave(self, answer: Answer) -> list[Effect]:
        """Take an answer off the books of its ranks that live; they are told to forget it."""
        effects = []
        if answer.source is not None and (rank := self._rank(answer.source)):
            kind: Literal["cancel", "release"] = "release"
            if answer.state == "prefill":
                kind = "cancel"
                self._unload(answer, rank)
            rank.answers -= 1
            effects.append(Effect(kind, answer.key, answer.source, None, answer.restarts))
        if answer.target is not None and (rank := self._rank(answer.target)):
            rank.answers -= 1
            rank.kv -= answer.prompt + answer.reserve
            effects.append(Effect("cancel", answer.key, answer.target, None, answer.restarts))
        answer.source = answer.target = None
        return effects

    def _rank(self, place: Place) -> _Rank | None:
        unit = self.units.get(place.unit)
        return unit.ranks[place.rank] if unit else None

    # ---- answers

    def add(
        self,
        key: str,
        prompt: int,
        reserve: int,
        order: tuple[int, int],
        hashes: Sequence[bytes] = (),
        after: str | None = None,
    ) -> list[Effect]:
        """A new answer; see `Answer`."""
        self.answers[key] = Answer(key, prompt, reserve, order, tuple(hashes), after)
        return self._assign()

    def prefilled(self, key: str) -> list[Effect]:
        """A prompt was computed; its KV lies at its source."""
        answer = self.answers.get(key)
        if answer is None or answer.state != "prefill" or answer.source is None:
            return []
        if rank := self._rank(answer.source):
            self._unload(answer, rank)
            self._remember(answer, rank)
        answer.state = "ready"
        return self._assign()

    def admitted(self, key: str) -> list[Effect]:
        """A decode rank has fetched an answer's KV."""
        answer = self.answers.get(key)
        if answer is None or answer.state != "handover":
            return []
        answer.state = "decode"
        source, answer.source = answer.source, None
        effects = []
        if source is not None and (rank := self._rank(source)):
            rank.answers -= 1
            effects.append(Effect("release", key, source, None, answer.restarts))
        return effects + self._assign()

    def lost(self, key: str) -> list[Effect]:
        """A decode rank did not find an answer's KV."""
        answer = self.answers.get(key)
        if answer is None or answer.state != "handover":
            return []
        return self._restart(answer) + self._assign()

    def finished(self, key: str) -> list[Effect]:
        """An answer ended at the rank that computed it."""
        answer = self.answers.pop(key, None)
        if answer is None:
            return []
        # the rank that ended it has nothing left of it
        effects = [effect for effect in self._leave(answer) if effect.kind == "release"]
        return effects + self._assign()

    def cancel(self, key: str) -> list[Effect]:
        """Nobody wants an answer any more."""
        answer = self.answers.pop(key, None)
        return [] if answer is None else self._leave(answer) + self._assign()

    # ---- choosing

    def _places(self, kind: Kind) -> list[tuple[Place, _Unit, _Rank]]:
        return [
            (Place(name, number), unit, rank)
            for name, unit in self.units.items()
            if unit.kind == kind and not unit.draining
            for number, rank in enumerate(unit.ranks)
        ]

    def _assign(self) -> list[Effect]:
        effects: list[Effect] = []
        ready = [a for a in self.answers.values() if a.state == "ready"]
        for answer in sorted(ready, key=lambda a: a.order):
            if not self._start_decode(answer, effects):
                break
        waiting = [a for a in self.answers.values() if a.state == "waiting"]
        for answer in sorted(waiting, key=lambda a: a.order):
            elder = self.answers.get(answer.after) if answer.after else None
            if elder is not None and elder.state in ("waiting", "prefill"):
                continue
            if not self._start_prefill(answer, effects):
                break
        return effects

    def _start_prefill(self, answer: Answer, effects: list[Effect]) -> bool:
        able = [p for p in self._places("prefill") if p[2].answers < self.ahead]
        if not able:
            return False
        cached = [self._hit(answer, rank) for _, _, rank in able]
        index = choose_prefill([rank.prefill for _, _, rank in able], answer.prompt, cached)
        place, _, rank = able[index]
        answer.state, answer.source, answer.cached = "prefill", place, cached[index]
        rank.prefill = rank.prefill.plus(answer.prompt, answer.cached)
        rank.answers += 1
        effects.append(Effect("prefill", answer.key, place, None, answer.restarts))
        return True

    def _start_decode(self, answer: Answer, effects: list[Effect]) -> bool:
        places = self._places("decode")
        loads = [
            DecodeLoad(rank.kv, unit.kv_tokens, rank.answers, unit.max_requests)
            for _, unit, rank in places
        ]
        index = choose_decode(loads, answer.prompt + answer.reserve)
        if index is None:
            return False
        place, _, rank = places[index]
        answer.state, answer.target = "handover", place
        rank.answers += 1
        rank.kv += answer.prompt + answer.reserve
        effects.append(Effect("decode", answer.key, place, answer.source, answer.restarts))
        return True

    def _unload(self, answer: Answer, rank: _Rank) -> None:
        done = PrefillLoad().plus(answer.prompt, answer.cached)
        rank.prefill = PrefillLoad(
            max(0.0, rank.prefill.tokens - done.tokens),
            max(0.0, rank.prefill.attention - done.attention),
        )

    def _hit(self, answer: Answer, rank: _Rank) -> int:
        count = 0
        for own in answer.hashes:
            if own not in rank.known:
                break
            count += 1
        return min(count * BLOCK, answer.prompt - 1)

    def _remember(self, answer: Answer, rank: _Rank) -> None:
        for own in answer.hashes:
            rank.known[own] = None
            rank.known.move_to_end(own)
        while len(rank.known) > KNOWN_BLOCKS:
            rank.known.popitem(last=False)

    def broken_invariants(self) -> list[str]:
        """What is wrong with the books; tests ask after each step."""
        broken = []
        for name, unit in self.units.items():
            for number, rank in enumerate(unit.ranks):
                place = Place(name, number)
                here = [a for a in self.answers.values() if place in (a.source, a.target)]
                kv = sum(a.prompt + a.reserve for a in here if a.target == place)
                if (len(here), kv) != (rank.answers, rank.kv):
                    broken.append(f"{place}: {rank.answers} answers, {rank.kv} kv; has {here}")
                if unit.kind == "decode" and (
                    rank.kv > unit.kv_tokens or rank.answers > unit.max_requests
                ):
                    broken.append(f"{place} is overfull")
                if rank.answers > self.ahead and unit.kind == "prefill":
                    broken.append(f"{place} is too far ahead")
        return broken
