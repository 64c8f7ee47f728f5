"""Engine core: which tokens the next step computes.

Continuous batching without phases: running sequences come first, in order, each with what it is
missing; then waiting ones, their prompts cut to what is left of the token budget. Where blocks run
out, the last running sequence is preempted: its KV is swapped out and comes back unchanged, since
recomputing generated tokens as a prompt would not give the same bits. Source: vLLM V1's rules.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field, replace

from whalefall.engine.core.block_manager import BlockManager
from whalefall.engine.core.sequence import Sequence

__all__ = ["Batch", "Scheduled", "Scheduler"]


@dataclass(frozen=True)
class Scheduled:
    """Tokens [start, start + count) of a sequence; a prompt's chunk, or one generated token.

    Attributes:
        num_drafts: drafts that may be verified behind the known tokens; their blocks are there.
    """

    seq: Sequence
    start: int
    count: int
    in_prompt: bool
    num_drafts: int = 0

    @property
    def is_last(self) -> bool:
        """Whether the step computes the last known token, so that the next one is sampled."""
        return self.start + self.count == len(self.seq.tokens)


@dataclass
class Batch:
    """One step's work; swaps out come before swaps in, both before the computation.

    Attributes:
        swap_out: sequences and the blocks whose content must be put aside now.
        swap_in: sequences and the blocks that receive what was put aside.
        drafts: seq_id → the drafts that the step verifies; filled in by who drafts.
    """

    scheduled: list[Scheduled] = field(default_factory=list)
    swap_out: list[tuple[Sequence, list[int]]] = field(default_factory=list)
    swap_in: list[tuple[Sequence, list[int]]] = field(default_factory=list)
    drafts: dict[str, list[int]] = field(default_factory=dict)


class Scheduler:
    """Queues of sequences; `schedule`, compute, `commit`, and again."""

    def __init__(self, blocks: BlockManager, max_batch_tokens: int, max_sequences: int) -> None:
        """Schedule over `blocks`, at most so many tokens a step and sequences at once."""
        self.blocks = blocks
        self.max_batch_tokens = max_batch_tokens
        self.max_sequences = max_sequences
        self.running: list[Sequence] = []  # in order of (priority, arrival)
        self.waiting: list[Sequence] = []  # likewise; a preempted one is ahead by its arrival
        self.num_preemptions = 0

    def add(self, seq: Sequence) -> None:
        """Queue a new sequence."""
        insort(self.waiting, seq, key=lambda s: s.order)

    def remove(self, seq: Sequence) -> None:
        """Forget a finished or cancelled sequence and free its blocks."""
        (self.running if seq in self.running else self.waiting).remove(seq)
        self.blocks.free(seq)

    def schedule(self, num_drafts: int = 0) -> Batch:
        """Decide the next step's work; empty where nothing can run.

        Args:
            num_drafts: drafts wanted for each generating sequence. They take what budget and free
                blocks are left, and displace nobody.
        """
        batch = Batch()
        budget = self._schedule_running(batch, self.max_batch_tokens)
        if not batch.swap_out:
            budget = self._admit_waiting(batch, budget)
        if num_drafts:
            self._add_drafts(batch, budget, num_drafts)
        return batch

    def _add_drafts(self, batch: Batch, budget: int, num_drafts: int) -> None:
        for index, item in enumerate(batch.scheduled):
            if item.in_prompt or not item.is_last:
                continue
            known = len(item.seq.tokens)
            # the step yields a token more than it verifies
            count = min(num_drafts, budget, item.seq.max_tokens - known - 1)
            if count > 0 and self.blocks.grow(item.seq, known + count):
                batch.scheduled[index] = replace(item, num_drafts=count)
                budget -= count

    def _schedule_running(self, batch: Batch, budget: int) -> int:
        index = 0
        while index < len(self.running) and budget > 0:
            seq = self.running[index]
            count = self._count(seq, budget)
            while not self.blocks.grow(seq, seq.num_computed + count):
                if self._preempt_last(batch) is seq:
                    return budget
            batch.scheduled.append(Scheduled(seq, seq.num_computed, count, seq.in_prompt))
            budget -= count
            index += 1
        return budget

    def _count(self, seq: Sequence, budget: int) -> int:
        known = seq.num_prompt if seq.in_prompt else len(seq.tokens)
        return min(known - seq.num_computed, budget)

    def _preempt_last(self, batch: Batch) -> Sequence:
        seq = self.running.pop()
        batch.swap_out.append((seq, seq.blocks))
        self.blocks.free(seq)
        seq.swapped = True
        self.num_preemptions += 1
        self.add(seq)
        return seq

    def _admit_waiting(self, batch: Batch, budget: int) -> int:
        while self.waiting and budget > 0 and len(self.running) < self.max_sequences:
            seq = self.waiting[0]
            if not self._place(seq, budget):
                return budget
            self.waiting.pop(0)
            if seq.swapped:
                batch.swap_in.append((seq, list(seq.blocks)))
                seq.swapped = False
            count = self._count(seq, budget)
            self.blocks.grow(seq, seq.num_computed + count)
            insort(self.running, seq, key=lambda s: s.order)
            batch.scheduled.append(Scheduled(seq, seq.num_computed, count, seq.in_prompt))
            budget -= count
        return budget

    def _place(self, seq: Sequence, budget: int) -> bool:
        """Blocks for what `seq` has and for its next chunk; False, and none taken, if too few."""
        if not seq.swapped:
            self.blocks.match(seq)
            if self.blocks.grow(seq, seq.num_computed + self._count(seq, budget)):
                return True
            self.blocks.unmatch(seq)
            return False
        if self.blocks.blocks_short(seq, seq.num_computed + self._count(seq, budget)) > (
            self.blocks.num_free
        ):
            return False
        return self.blocks.restore(seq)

    def commit(self, batch: Batch) -> None:
        """Note that a batch was computed; drafts count only once accepted."""
        for item in batch.scheduled:
            item.seq.num_computed += item.count
            self.blocks.register(item.seq)

    def accept(self, seq: Sequence) -> None:
        """Note that the draft behind the computed tokens was right, and is the sequence's now."""
        seq.num_computed += 1
        self.blocks.register(seq)
