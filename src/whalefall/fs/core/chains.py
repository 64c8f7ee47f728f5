"""File-system room: chains of replicas and the table that moves them from state to state.

In: a chain as it is, and what each target's node last said about it. Out: the chain as it must be.
Truth: the state table of 3FS (public state by local state), checked cell by cell in the tests.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping

import msgspec

__all__ = ["Chain", "Local", "Member", "Public", "next_chain", "next_members", "read_tail"]


class Public(enum.IntEnum):
    """What the cluster lets a target do; the order is the order inside a chain."""

    SERVING = 0  # reads and writes
    LASTSRV = 1  # the last one that served: nobody serves until it is back
    SYNCING = 2  # writes, and is being filled
    WAITING = 3  # is back, and waits for its turn to sync
    OFFLINE = 4


class Local(enum.IntEnum):
    """What a target's own node says about it."""

    UPTODATE = 0
    ONLINE = 1
    OFFLINE = 2


class Member(msgspec.Struct, frozen=True, array_like=True):
    """One replica of a chain: target, its node, its public state."""

    target: int
    node: int
    public: Public


class Chain(msgspec.Struct, frozen=True, array_like=True):
    """Replicas in order, head first; every change raises the version."""

    chain: int
    version: int
    members: tuple[Member, ...]

    def member(self, target: int) -> Member | None:
        """The member with this target."""
        return next((m for m in self.members if m.target == target), None)

    def successor(self, target: int) -> Member | None:
        """Whom `target` forwards to: the next one, if it takes writes."""
        for here, after in zip(self.members, self.members[1:], strict=False):
            if here.target == target and after.public in (Public.SERVING, Public.SYNCING):
                return after
        return None

    def serving(self) -> list[Member]:
        """The members that answer reads, head first."""
        return [m for m in self.members if m.public is Public.SERVING]


def read_tail(chain: Chain) -> Member | None:
    """The last serving member: what it has committed is what the chain has committed."""
    serving = chain.serving()
    return serving[-1] if serving else None


def next_members(members: tuple[Member, ...], local: Mapping[int, Local]) -> tuple[Member, ...]:
    """One pass over a chain, old states in order.

    Args:
        members: the chain as it is.
        local: target → what its node says (missing: offline).
    Returns: the members with new states, in chain order.
    """
    serving = syncing = False
    dead: list[int] = []
    chosen: list[Member] = []
    for member in sorted(members, key=lambda m: m.public):
        state = local.get(member.target, Local.OFFLINE)
        if state is Local.OFFLINE:
            # Only one that served until now may become the last one; the head has seen every write.
            if member.public in (Public.SERVING, Public.LASTSRV):
                dead.append(len(chosen))
            new = Public.OFFLINE
        elif member.public is Public.SERVING:
            new = Public.SERVING
        elif member.public is Public.LASTSRV:
            new = Public.OFFLINE if serving else Public.SERVING
        elif member.public is Public.SYNCING and state is Local.UPTODATE:
            new = Public.SERVING
        elif state is Local.UPTODATE:
            new = Public.WAITING
        else:
            new = Public.SYNCING if serving and not syncing else Public.WAITING
        serving |= new is Public.SERVING
        syncing |= new is Public.SYNCING
        chosen.append(Member(member.target, member.node, new))
    if dead and not serving:
        first = chosen[dead[0]]
        chosen[dead[0]] = Member(first.target, first.node, Public.LASTSRV)
    return tuple(sorted(chosen, key=lambda m: m.public))


def next_chain(chain: Chain, local: Mapping[int, Local]) -> Chain:
    """The chain after one pass; the same object if nothing changed, else one version later."""
    members = next_members(chain.members, local)
    if members == chain.members:
        return chain
    return Chain(chain.chain, chain.version + 1, members)
