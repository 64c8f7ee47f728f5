"""Engine core: one sequence, its tokens and its blocks.

A sequence has no phase: it has computed fewer tokens than it knows, or is waiting for one.
"""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["BLOCK_SIZE", "Sequence"]

BLOCK_SIZE = 64  # tokens of a KV block, as FlashMLA's pages


@dataclass(eq=False)
class Sequence:
    """One answer in the making.

    Attributes:
        seq_id: unique among the sequences of an engine.
        tokens: prompt, then generated tokens.
        num_prompt: length of the prompt; tokens before it are computed in the prompt form.
        salt: keeps the prefix cache of one user apart from another's.
        priority: lower runs earlier.
        arrival: order of arrival, unique.
        max_tokens: length at which the answer ends at the latest; nothing is drafted beyond.
        num_computed: tokens whose KV lies in `blocks` (or in the swap area).
        num_cached: prompt tokens that came from the prefix cache.
        blocks: block ids, block i holding tokens [64 i, 64 i + 64).
        hashes: chained hashes of the full blocks that were computed so far.
        swapped: whether the KV lies in the swap area.
    """

    seq_id: str
    tokens: list[int]
    num_prompt: int
    salt: str = ""
    priority: int = 0
    arrival: int = 0
    max_tokens: int = 1 << 62
    num_computed: int = 0
    num_cached: int = 0
    blocks: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    swapped: bool = False

    @property
    def num_missing(self) -> int:
        """Known tokens that are not computed yet."""
        return len(self.tokens) - self.num_computed

    @property
    def in_prompt(self) -> bool:
        """Whether the next token to compute belongs to the prompt."""
        return self.num_computed < self.num_prompt

    @property
    def order(self) -> tuple[int, int]:
        """Sequences run in this order; the greatest is preempted first."""
        return (self.priority, self.arrival)
