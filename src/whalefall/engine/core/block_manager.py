"""Engine core: pages of the KV cache, and the prefix cache over them.

A block in use has references. A freed block keeps its hash and content until it is handed out
again, least recently used first; the tail of a chain goes before its head, since a head is of use
to more prompts. h_i = H(h_{i-1}, tokens of block i), the salt hashed into the first.
Source: vLLM's automatic prefix caching.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence as Items

from whalefall.engine.core.sequence import BLOCK_SIZE, Sequence

__all__ = ["BlockManager", "block_hash"]


def block_hash(previous: bytes, tokens: Items[int], salt: str = "") -> bytes:
    """Hash of a full block given its predecessor's (b"" for the first, which takes the salt)."""
    digest = hashlib.blake2b(previous, digest_size=16)
    if not previous:
        digest.update(salt.encode() + b"\0")
    digest.update(array("q", tokens).tobytes())
    return digest.digest()


class BlockManager:
    """Hands out blocks, counts references, finds cached prefixes."""

    def __init__(self, num_blocks: int, strict_prefix: bool = False) -> None:
        """Manage blocks 0 … `num_blocks` − 1; `strict_prefix`: cache only blocks of prompts."""
        self.num_blocks = num_blocks
        self.strict_prefix = strict_prefix
        self._references = [0] * num_blocks
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self.query_tokens = 0
        self.hit_tokens = 0

    @property
    def num_free(self) -> int:
        """Blocks that could be handed out, cached ones included."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks that some sequence refers to."""
        return self.num_blocks - len(self._free)

    def blocks_short(self, seq: Sequence, num_tokens: int) -> int:
        """How many more blocks `seq` needs to hold `num_tokens` tokens."""
        return max(0, -(-num_tokens // BLOCK_SIZE) - len(seq.blocks))

    def grow(self, seq: Sequence, num_tokens: int) -> bool:
        """Give `seq` blocks for `num_tokens` tokens; False (and no change) if there are too few."""
        short = self.blocks_short(seq, num_tokens)
        if short > len(self._free):
            return False
        seq.blocks.extend(self._take() for _ in range(short))
        return True

    def _take(self) -> int:
        block, _ = self._free.popitem(last=False)
        self._forget(block)
        self._references[block] = 1
        return block

    def _forget(self, block: int) -> None:
        known = self._hash_of.pop(block, None)
        if known is not None:
            del self._block_of[known]

    def match(self, seq: Sequence) -> None:
        """Give a new sequence the cached blocks of its prompt's beginning.

        At least one token is left to compute, since its logits are needed.
        """
        self.query_tokens += seq.num_prompt
        previous = b""
        for start in range(0, seq.num_prompt - BLOCK_SIZE, BLOCK_SIZE):
            previous = block_hash(previous, seq.tokens[start : start + BLOCK_SIZE], seq.salt)
            block = self._block_of.get(previous)
            if block is None:
                break
            if self._references[block] == 0:
                del self._free[block]
            self._references[block] += 1
            seq.blocks.append(block)
            seq.hashes.append(previous)
        seq.num_computed = seq.num_cached = len(seq.blocks) * BLOCK_SIZE
        self.hit_tokens += seq.num_cached

    def unmatch(self, seq: Sequence) -> None:
        """Undo `match` for a sequence that could not be admitted after all."""
        self.query_tokens -= seq.num_prompt
        self.hit_tokens -= seq.num_cached
        self.free(seq)
        seq.hashes.clear()
        seq.num_computed = seq.num_cached = 0

    def register(self, seq: Sequence) -> None:
        """Make the full, computed blocks of `seq` findable for later prompts."""
        last = seq.num_prompt if self.strict_prefix else len(seq.tokens)
        full = min(seq.num_computed, last) // BLOCK_SIZE
        for index in range(len(seq.hashes), full):
            previous = seq.hashes[-1] if seq.hashes else b""
            start = index * BLOCK_SIZE
            own = block_hash(previous, seq.tokens[start : start + BLOCK_SIZE], seq.salt)
            seq.hashes.append(own)
            self._remember(seq.blocks[index], own)

    def _remember(self, block: int, own: bytes) -> None:
        if own not in self._block_of:  # an equal block that came first stays the known one
            self._block_of[own] = block
            self._hash_of[block] = own

    def knows(self, own: bytes) -> bool:
        """Whether a block of this hash can be found."""
        return own in self._block_of

    def adopt(self, hashes: Items[bytes]) -> list[tuple[bytes, int]]:
        """Make room for blocks that come from elsewhere, to be found by `match` like others.

        Args:
            hashes: a chain from its first block on; blocks that are known stay as they are.
        Returns: hash and block of those that the caller must fill now, as far as blocks are free.
        """
        for own in reversed(hashes):  # what is there must not give way to its own tail
            block = self._block_of.get(own)
            if block is not None and block in self._free:
                self._free.move_to_end(block)
        known = sum(self._block_of.get(own) in self._free for own in hashes)
        fresh = [own for own in hashes if own not in self._block_of][: len(self._free) - known]
        adopted = []
        for own in reversed(fresh):
            block = self._take()
            self._references[block] = 0
            self._free[block] = None
            self._remember(block, own)
            adopted.append((own, block))
        return adopted

    def restore(self, seq: Sequence) -> bool:
        """Blocks for a sequence whose KV comes back from the swap area; False if too few."""
        if not self.grow(seq, seq.num_computed):
            return False
        for block, own in zip(seq.blocks, seq.hashes, strict=False):
            self._remember(block, own)
        return True

    def free(self, seq: Sequence) -> None:
        """Take the blocks of `seq` back, the tail of the chain first in line for reuse."""
        for block in reversed(seq.blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None
                if block not in self._hash_of:  # nothing to find in it: reuse it first
                    self._free.move_to_end(block, last=False)
        seq.blocks = []

    def broken_invariants(self, sequences: Items[Sequence]) -> list[str]:
        """What is wrong with the books, given all sequences that hold blocks; tests ask."""
        counts = [0] * self.num_blocks
        for seq in sequences:
            for block in seq.blocks:
                counts[block] += 1
        broken = []
        if counts != self._references:
            broken.append(f"references {self._references}, held {counts}")
        if set(self._free) != {b for b, n in enumerate(self._references) if n == 0}:
            broken.append(f"free {list(self._free)} beside references {self._references}")
        if {h: b for b, h in self._hash_of.items()} != self._block_of:
            broken.append("hash tables disagree")
        return broken
