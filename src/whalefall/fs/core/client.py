"""File-system room: a client's side of the protocol — whom to ask, when to try again.

In: updates and batches of reads. Out: their results, or an error that says which target, what was
tried, for how long. An update keeps its tag over all tries; a channel carries one at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from whalefall.fs.core.chains import Chain, Member, read_tail
from whalefall.fs.core.effects import Call, Calls, Procedure, Refused, Sleep, Unreachable
from whalefall.fs.core.messages import (
    Code,
    Failed,
    Kind,
    Query,
    QueryDone,
    Read,
    ReadDone,
    Routing,
    Tag,
    Update,
    UpdateDone,
)
from whalefall.fs.core.replica import Limits

__all__ = ["ClientCore", "Piece", "RefreshRouting"]

FINAL = {Code.NO_SPACE, Code.INVALID, Code.PROTOCOL, Code.STALE_REQUEST}
# A call asks for no more than this: while one is on its way the server reads for the next.
CALL_BYTES = 2 << 20
RENEW = {Code.ROUTING_MISMATCH, Code.TARGET_OFFLINE}


@dataclass(frozen=True)
class RefreshRouting:
    """Ask the manager for newer routing (an effect of clients only). Result: Routing or None."""


@dataclass
class Piece:
    """One read: a range of one chunk, and its result.

    Attributes:
        into: where the bytes go (writable, of `length` bytes).
        got: bytes read; fewer at the end of a chunk, 0 where there is no chunk.
    """

    chain: int
    chunk: bytes
    offset: int
    length: int
    into: Any = None
    got: int = 0
    version: int = 0
    at_tail: bool = False
    last: str = ""


@dataclass
class Group:
    """Pieces that one call asks a target for."""

    member: Member
    chain: Chain
    pieces: list[Piece] = field(default_factory=list)
    bytes: int = 0


@dataclass
class ClientCore:
    """The state of one client.

    Args:
        client: unique to this process.
        choose: picks one of n (reads spread over replicas).
        clock: seconds, monotonic.
        checksum: CRC-32C of data.
    """

    client: str
    limits: Limits
    clock: Callable[[], float]
    choose: Callable[[int], int]
    checksum: Callable[[Any], int]
    routing: Routing = field(default_factory=Routing)
    # Chain → channels that are free, the last used first: a new operation fences an old packet.
    free: dict[int, list[int]] = field(default_factory=dict)
    made: dict[int, int] = field(default_factory=dict)
    counter: int = 0
    avoid: dict[int, float] = field(default_factory=dict)

    def apply_routing(self, routing: Routing) -> None:
        """Take newer routing."""
        if routing.version > self.routing.version:
            self.routing = routing

    def _open_tag(self, chain: int) -> Tag:
        stack = self.free.setdefault(chain, [])
        if stack:
            channel = stack.pop()
        else:
            channel = self.made[chain] = self.made.get(chain, 0) + 1
        self.counter += 1
        return Tag(self.client, channel, self.counter, self.counter)

    def _chain(self, number: int) -> Chain:
        chain = self.routing.chains.get(number)
        if chain is None:
            raise Refused(Code.ROUTING_MISMATCH, f"no chain {number} is known")
        return chain

    # ---- updates

    def update(
        self, chain: int, chunk: bytes, kind: Kind, offset: int, length: int, size: int, data: Any
    ) -> Procedure[UpdateDone]:
        """Run one update exactly once.

        Raises: Refused; TIMED_OUT means that it may or may not have happened.
        """
        tag = self._open_tag(chain)
        try:
            return (
                yield from self._retry_update(chain, tag, chunk, kind, offset, length, size, data)
            )
        finally:
            self.free[chain].append(tag.channel)

    def _retry_update(
        self, number: int, tag: Tag, chunk: bytes, kind: Kind, offset: int, length: int,
        size: int, data: Any,
    ) -> Procedure[UpdateDone]:  # fmt: skip
        began_s, tries, last = self.clock(), 0, "nothing was tried"
        checksum = self.checksum(data) if kind is Kind.WRITE else -1
        while True:
            tries += 1
            code = Code.TIMED_OUT
            try:
                chain = self._chain(number)
                head = self._head(chain)
                packet = Update(
                    head.target, chain.version, chunk, kind, offset, length, size, tag,
                    checksum=checksum,
                )  # fmt: skip
                answer, _ = yield Call(head.node, packet, data, self.limits.call_s * 2)
                if isinstance(answer, UpdateDone):
                    return answer
                code, last = answer.code, f"target {head.target}: {answer.reason}"
            except Unreachable as error:
                last = f"target {head.target} on node {head.node}: no answer ({error})"
            except Refused as refusal:
                code, last = refusal.code, refusal.reason
            if code in FINAL:
                raise Refused(code, last)
            yield from self._again(began_s, tries, last, code)

    def _head(self, chain: Chain) -> Member:
        serving = chain.serving()
        if not serving:
            states = ", ".join(f"{m.target} {m.public.name}" for m in chain.members)
            raise Refused(Code.ROUTING_MISMATCH, f"chain {chain.chain}: nobody serves ({states})")
        return serving[0]

    def _again(self, began_s: float, tries: int, last: str, code: Code) -> Procedure[None]:
        spent_s = self.clock() - began_s
        if spent_s >= self.limits.retry_s:
            raise Refused(
                Code.TIMED_OUT, f"gave up after {tries} tries in {spent_s:.1f} s; last: {last}"
            )
        if code not in (Code.CHANNEL_BUSY, Code.NOT_COMMITTED):
            routing = yield RefreshRouting()  # type: ignore[misc]
            if routing is not None:
                self.apply_routing(routing)
        if tries > 1 or code not in RENEW:
            yield Sleep(min(self.limits.pause_s * min(tries, 8), 0.5))

    # ---- reads

    def read(self, pieces: list[Piece], relaxed: bool = False) -> Procedure[None]:
        """Read all pieces, each into its buffer; tries again for those that could not be read.

        Raises: Refused, naming the first piece that could not be read in time.
        """
        began_s, tries, todo = self.clock(), 0, pieces
        while True:
            tries += 1
            groups, left, code = self._group(todo)
            calls = [self._call(g.member, g.chain, g.pieces, relaxed) for g in groups]
            answers = (yield Calls(tuple(calls))) if calls else []
            for group, answer in zip(groups, answers, strict=True):
                failed, why = self._take(group.member, group.pieces, answer)
                left += failed
                code = why if failed else code
            if not left:
                return
            todo = left
            asks = all(piece.last == "ask" for piece in todo)
            if not (asks and tries == 1):
                yield from self._again(began_s, tries, todo[0].last, code)

    def _group(self, todo: list[Piece]) -> tuple[list[Group], list[Piece], Code]:
        groups: dict[int, list[Group]] = {}
        picked: dict[tuple[int, bool], tuple[Member, Chain]] = {}
        left: list[Piece] = []
        for piece in todo:
            key = (piece.chain, piece.at_tail)
            if key not in picked:
                try:
                    chain = self._chain(piece.chain)
                    picked[key] = (self._reader(chain, piece.at_tail), chain)
                except Refused as refusal:
                    piece.last = refusal.reason
                    left.append(piece)
                    continue
            member, chain = picked[key]
            of_target = groups.setdefault(member.target * 2 + piece.at_tail, [])
            if not of_target or of_target[-1].bytes + piece.length > CALL_BYTES:
                of_target.append(Group(member, chain))
            of_target[-1].pieces.append(piece)
            of_target[-1].bytes += piece.length
        # One of each target in turn, so that all of them work from the beginning.
        turns = itertools.zip_longest(*groups.values())
        return [g for turn in turns for g in turn if g], left, Code.ROUTING_MISMATCH

    def _reader(self, chain: Chain, at_tail: bool) -> Member:
        tail = read_tail(chain)
        if tail is None:
            self._head(chain)  # says why
            raise AssertionError
        if at_tail:
            return tail
        now = self.clock()
        serving = chain.serving()
        good = [m for m in serving if self.avoid.get(m.target, 0.0) <= now] or serving
        return good[self.choose(len(good))]

    def _call(self, member: Member, chain: Chain, group: list[Piece], relaxed: bool) -> Call:
        ios = [(p.chunk, p.offset, p.length) for p in group]
        message = Read(member.target, chain.version, ios, group[0].at_tail, relaxed)
        return Call(member.node, message, b"", self.limits.call_s, into=[p.into for p in group])

    def _take(self, member: Member, group: list[Piece], answer: Any) -> tuple[list[Piece], Code]:
        """Results of one call; returns the pieces to try again, and why."""
        if isinstance(answer, Exception):
            self.avoid[member.target] = self.clock() + self.limits.lease_s / 2
            reason = f"target {member.target} on node {member.node}: no answer ({answer})"
            answer = (Failed(Code.TIMED_OUT, reason), b"")
        reply, _ = answer
        if not isinstance(reply, ReadDone):
            for piece in group:
                piece.last = f"target {member.target}: {reply.reason}"
                piece.at_tail = False
            return group, reply.code
        again, why = [], Code.OK
        for piece, (code, got, version) in zip(group, reply.results, strict=True):
            if code == Code.OK or code == Code.NOT_FOUND:
                piece.got, piece.version = got, version
                continue
            why = Code(code)
            piece.at_tail = code in (Code.ASK_TAIL, Code.NOT_COMMITTED)
            piece.last = "ask" if code == Code.ASK_TAIL else f"target {member.target}: {why.name}"
            if code == Code.CORRUPT:
                self.avoid[member.target] = self.clock() + self.limits.lease_s / 2
            again.append(piece)
        return again, why

    def query(self, number: int, prefix: bytes) -> Procedure[QueryDone]:
        """The last chunk under a prefix, as the tail has it."""
        began_s, tries, last, code = self.clock(), 0, "nothing was tried", Code.TIMED_OUT
        while True:
            tries += 1
            try:
                chain = self._chain(number)
                member = self._reader(chain, True)
                answer, _ = yield Call(
                    member.node,
                    Query(member.target, chain.version, prefix),
                    b"",
                    self.limits.call_s,
                )
                if isinstance(answer, QueryDone):
                    return answer
                code, last = answer.code, answer.reason
            except Unreachable as error:
                last = f"node {member.node}: no answer ({error})"
            except Refused as refusal:
                code, last = refusal.code, refusal.reason
            yield from self._again(began_s, tries, last, code)
