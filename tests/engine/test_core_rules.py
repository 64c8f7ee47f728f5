"""Rules of the block manager and the scheduler, one by one; transcripts show them together."""

from __future__ import annotations

from whalefall.engine.core import BlockManager, Scheduler, Sequence
from whalefall.engine.core.block_manager import block_hash
from whalefall.engine.core.sequence import BLOCK_SIZE


def sequence(name: str, tokens: list[int], priority: int = 0, arrival: int = 0) -> Sequence:
    return Sequence(name, list(tokens), len(tokens), priority=priority, arrival=arrival)


def computed(blocks: BlockManager, seq: Sequence) -> Sequence:
    """The sequence with all its tokens computed and its full blocks findable."""
    assert blocks.grow(seq, len(seq.tokens))
    seq.num_computed = len(seq.tokens)
    blocks.register(seq)
    return seq


def test_a_block_is_known_by_all_that_comes_before_it() -> None:
    first, other, second = [1] * BLOCK_SIZE, [2] * BLOCK_SIZE, [3] * BLOCK_SIZE
    assert block_hash(block_hash(b"", first), second) != block_hash(block_hash(b"", other), second)
    blocks = BlockManager(8)
    computed(blocks, sequence("a", [*first, *second, 9]))
    computed(blocks, sequence("b", [*other, 9]))
    found = sequence("c", [*other, *second, 9])
    blocks.match(found)
    assert found.num_cached == BLOCK_SIZE  # a's second block belongs to another beginning


def test_blocks_that_come_back_from_the_swap_area_are_found_again() -> None:
    tokens = list(range(2 * BLOCK_SIZE + 1))
    blocks = BlockManager(3)
    seq = computed(blocks, sequence("a", tokens))
    blocks.free(seq)
    other = sequence("b", [7] * (3 * BLOCK_SIZE))
    assert blocks.grow(other, 3 * BLOCK_SIZE)  # takes every block; nothing of a is left
    blocks.free(other)
    assert not blocks.knows(seq.hashes[0])
    assert blocks.restore(seq)
    assert all(blocks.knows(own) for own in seq.hashes)
    blocks.free(seq)
    like = sequence("c", tokens)
    blocks.match(like)
    assert like.num_cached == 2 * BLOCK_SIZE


def test_a_sequence_that_could_not_be_admitted_leaves_the_counts_alone() -> None:
    tokens = list(range(BLOCK_SIZE + 1))
    blocks = BlockManager(3)
    computed(blocks, sequence("a", tokens))
    scheduler = Scheduler(blocks, 1024, 4)
    counts = blocks.query_tokens, blocks.hit_tokens
    scheduler.add(sequence("b", [*tokens, *range(1000, 1000 + 3 * BLOCK_SIZE)]))
    assert not scheduler.schedule().scheduled
    assert (blocks.query_tokens, blocks.hit_tokens) == counts


def test_who_comes_later_with_a_lower_number_runs_earlier_and_is_preempted_later() -> None:
    scheduler = Scheduler(BlockManager(2), 1024, 4)
    low = sequence("low", [1] * BLOCK_SIZE, priority=5, arrival=0)
    scheduler.add(low)
    scheduler.commit(scheduler.schedule())
    high = sequence("high", [2] * BLOCK_SIZE, priority=0, arrival=1)
    scheduler.add(high)
    scheduler.commit(scheduler.schedule())
    assert [seq.seq_id for seq in scheduler.running] == ["high", "low"]
    for seq in (low, high):
        seq.tokens.append(7)  # each needs a second block, and there is none
    batch = scheduler.schedule()
    assert [item.seq.seq_id for item in batch.scheduled] == ["high"]
    assert [seq.seq_id for seq, _ in batch.swap_out] == ["low"]
