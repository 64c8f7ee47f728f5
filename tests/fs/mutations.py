"""The breaks that the simulator must notice: each replaces a few words of a core's function.

`broken(mutation)` puts the changed functions in place and takes them out again. A text that is not
found exactly once is an error: the list must follow the code.
Source: the mutation list of the 3FS reference, section 8.
"""

from __future__ import annotations

import contextlib
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from whalefall.fs.core import chains, client, craq, manager, replica, resync
from whalefall.fs.simulation.store import SimStore, Unsynced


@dataclass(frozen=True)
class Mutation:
    """One break.

    Attributes:
        changes: (owner, function, old text, new text).
        seed: a schedule that shows it.
    """

    number: int
    name: str
    changes: tuple[tuple[Any, str, str, str], ...]
    seed: int
    profile: str = "mixed"


ADMIT = "    node.admit(message.target, message.chain_version)\n"
MUTATIONS = [
    Mutation(1, "no second look at chain and lease under the lock", (
        (craq, "_locked", ADMIT, ""),
        (craq, "_as_head", "chain, member = node.place(target)",
         "chain, member = node.seat(target)"),
        (craq, "_as_head", "if chain.members[0] != member or member.public is not Public.SERVING:",
         "if False:"),
        (craq, "_apply", "chain, _ = node.place(target)", "chain, _ = node.seat(target)"),
        (craq, "_forward", "chain, _ = node.place(target)", "chain, _ = node.seat(target)"),
    ), 584),
    Mutation(2, "acknowledge before the successor has", (
        (craq, "_forward", 'last = f"target {successor.target} on node', "return chain.version\n"
         '            last = f"target {successor.target} on node'),
    ), 0),
    Mutation(3, "commit before the content is down", (
        (craq, "_apply", "yield Store(target.target, message, data, version, chain.version)",
         "yield Unsynced(Store(target.target, message, data, version, chain.version))"),
        (craq, "_commit", "yield Commit(target.target, message.chunk, chain_version, message.tag)",
         "yield Unsynced(Commit(target.target, message.chunk, chain_version, message.tag))"),
    ), 3),
    Mutation(4, "no deduplication", (
        (replica.StorageNode, "recall", "if tag is None or", "if True or tag is None or"),
    ), 0),
    Mutation(5, "deduplication only at the head", (
        (craq, "_commit", "message.chunk, chain_version, message.tag)",
         "message.chunk, chain_version, message.tag if message.order is None else None)"),
    ), 16),
    Mutation(6, "a failure is remembered as final", (
        (craq, "update", "target.busy.discard(key)",
         "None if __import__('sys').exc_info()[0] else target.busy.discard(key)"),
    ), 0),
    Mutation(7, "forward with the old chain version for ever", (
        (craq, "_forward", "successor.target, chain.version, message.chunk",
         "successor.target, pending.chain_version, message.chunk"),
    ), 0),
    Mutation(8, "checksums and versions of two replicas are not compared", (
        (craq, "_apply", "if message.expected not in (-1, pending.checksum):", "if False:"),
        (craq, "_compare", "if theirs != ours:", "if False:"),
    ), 30),
    Mutation(9, "commit under one's own chain version, not the successor's", (
        (craq, "_forward", "return answer.chain_version", "return node.place(target)[0].version"),
    ), 15, "many"),
    Mutation(10, "a partial write goes raw to a target that is being filled", (
        (craq, "_forward", "if successor.public is Public.SYNCING and kind is not Kind.REMOVE:",
         "if False:"),
        (craq, "_forward", "expected=pending.checksum,", "expected=-1,"),
        (craq, "_compare", "if theirs != ours:", "if False:"),
    ), 30),
    Mutation(11, "recovery sends without the chunk's lock", (
        (resync, "_send_chunk", "yield Acquire(target.target, chunk)", "pass"),
        (resync, "_send_chunk", "target.locks.release(chunk)", "pass"),
        (resync, "_send_chunk", "if entry is not None and entry.pending is not None:", "if False:"),
    ), 26),
    Mutation(12, "recovery stamps the current chain version", (
        (resync, "_send_chunk", "committed.chain_version if committed else 0", "version"),
    ), 80),
    Mutation(13, "an uncommitted content at the target is not sent again", (
        (resync, "compare", "their_pending is not None or chunk in busy", "chunk in busy"),
    ), 111),
    Mutation(15, "two targets are filled at once", (
        (chains, "next_members", "if serving and not syncing else", "if serving else"),
    ), 3),
    Mutation(16, "all that are dead become the last that served", (
        (chains, "next_members", "        first = chosen[dead[0]]\n"
         "        chosen[dead[0]] = Member(first.target, first.node, Public.LASTSRV)\n",
         "        for place in dead:\n            first = chosen[place]\n"
         "            chosen[place] = Member(first.target, first.node, Public.LASTSRV)\n"),
    ), 26),
    Mutation(17, "what was pending on the last one is dropped", (
        (craq, "force_commit", "yield from settle(node, target, chunk)",
         "yield Abort(target.target, chunk)"),
    ), 130),
    Mutation(18, "an old report of being up to date is believed", (
        (manager.Manager, "_believe", "if report.local is not Local.OFFLINE and", "if False and"),
        (manager.Manager, "heartbeat", "if order <= self.sequence.get(node, (-1, -1)):",
         "if False:"),
    ), 16, "slow"),
    Mutation(19, "a target is up to date as soon as its node starts", (
        (replica.StorageNode, "__init__", "Target(number, store) for",
         "Target(number, store, local=Local.UPTODATE) for"),
    ), 65),
    Mutation(21, "no target stops itself", (
        (replica.StorageNode, "place", "if self.clock() >= target.lease_until_s:", "if False:"),
    ), 1, "cut"),
    Mutation(22, "an aborted content is dropped by halves: it stays on record", (
        (SimStore, "_abort", "self._pending.pop(chunk, None)",
         "self._pending.pop(chunk, None)\n    return"),
    ), 30),
    Mutation(24, "a target that is not up to date answers reads", (
        (craq, "readable", "if target.local is not Local.UPTODATE or "
         "member.public is not Public.SERVING:", "if False:"),
        (client.ClientCore, "_reader", "serving = chain.serving()",
         "serving = [m for m in chain.members if m.public in (0, 2)]"),
    ), 62, "many"),
    Mutation(28, "a new sequence number for every try", (
        (client.ClientCore, "_retry_update", "        tries += 1\n",
         "        tries += 1\n        tag = self._open_tag(number)\n"),
    ), 16),
]  # fmt: skip


# Shown by a directed test (test_manager.py): a random schedule seldom stops a manager just there.
LEASE_MUTATION = Mutation(20, "a manager writes without looking at its lease", (
        (manager.Manager, "write", "if lease is None or (lease.holder, lease.generation) != "
         "(self.name, self.generation):", "if False:"),
    ), 0)  # fmt: skip


# Shown by a directed test (test_resync.py): a random schedule seldom makes a chunk just then.
REMADE_MUTATION = Mutation(23, "recovery removes a chunk that was made again", (
        (resync, "resync", "todo = compare(",
         "resync_gone.clear(); resync_gone.update({**remote}.keys() - {*target.store.entries()})\n"
         "        todo = compare("),
        (resync, "_send_chunk", "committed = entry.committed if entry else None",
         "committed = entry.committed if entry and chunk not in resync_gone else None"),
    ), 0)  # fmt: skip


# Shown by a directed test (test_resync.py): of 5,000 schedules none delays a message just so.
DONE_MUTATION = Mutation(14, "the end of a recovery is believed for another chain version", (
        (resync, "sync_done", "target = _syncing(node, message.target, message.chain_version)",
         "target = node.targets[message.target]"),
        (resync, "sync_done", "if target.session != message.session:", "if False:"),
    ), 0)  # fmt: skip


def changed(function: Any, changes: list[tuple[str, str]]) -> Any:
    """A function compiled from its source with some texts replaced."""
    source = textwrap.dedent(inspect.getsource(function))
    for old, new in changes:
        found = source.count(old)
        assert found == 1, f"{function.__qualname__}: {found} times {old!r}"
        source = source.replace(old, new)
    # Same globals as the original, so that it sees what it saw; the definition goes elsewhere.
    scope: dict[str, Any] = {}
    function.__globals__.update(Unsynced=Unsynced, resync_gone=GONE)
    exec(compile(source, f"<mutant of {function.__name__}>", "exec"), function.__globals__, scope)
    return scope[function.__name__]


# Chunks that only the other side had when a recovery began (mutation 23).
GONE: set[bytes] = set()


@contextlib.contextmanager
def broken(mutation: Mutation) -> Iterator[None]:
    """Put a mutation in place."""
    grouped: dict[tuple[int, str], tuple[Any, str, list[tuple[str, str]]]] = {}
    for owner, name, old, new in mutation.changes:
        grouped.setdefault((id(owner), name), (owner, name, []))[2].append((old, new))
    before = [(owner, name, owner.__dict__[name]) for owner, name, _ in grouped.values()]
    try:
        for owner, name, changes in grouped.values():
            setattr(owner, name, changed(owner.__dict__[name], changes))
        yield
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)
