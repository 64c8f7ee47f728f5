"""Record room: one global order of a data set, drawn from a seed and never stored.

In: the number of samples, a seed, an epoch. Out: the sample at any position, batches of any rank,
and a state that another number of ranks goes on from exactly.
The order is a permutation by a Feistel network over the next power of four, walked until it falls
inside (cycle walking), so position i costs the same whatever n is.
Source: Black and Rogaway, "Ciphers with arbitrary finite domains" (2002), for cycle walking.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from whalefall.errors import ConfigError

__all__ = ["GlobalShuffle", "RankBatches", "permute"]

_ROUNDS = 6


def _mix(value: np.ndarray, key: np.uint64) -> np.ndarray:
    """A 64-bit hash of each value under a key (splitmix64's finisher)."""
    value = (value ^ key) * np.uint64(0xBF58476D1CE4E5B9)
    value ^= value >> np.uint64(27)
    value *= np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def permute(positions: np.ndarray, count: int, seed: int, epoch: int = 0) -> np.ndarray:
    """The samples at these positions of the order that (seed, epoch) draws of `count` samples.

    Args:
        positions: [k] int64, 0 … count - 1.
        count: number of samples.
        seed: any integer.
        epoch: each has an order of its own.
    Returns: [k] int64; over all positions, every sample once.
    Raises: ConfigError for a position outside.
    """
    values = np.asarray(positions).astype(np.int64)
    if values.size and not (values.min() >= 0 and values.max() < count):
        raise ConfigError(
            f"record: position {values.min()} … {values.max()}, wanted 0 … {count - 1}"
        )
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    keys = np.random.SeedSequence([seed % 2**64, epoch]).generate_state(_ROUNDS, np.uint64)
    values = _feistel(values.astype(np.uint64), half, keys)
    outside = np.flatnonzero(values >= count)
    while len(outside):
        values[outside] = _feistel(values[outside], half, keys)
        outside = outside[values[outside] >= count]
    return values.astype(np.int64)


def _feistel(values: np.ndarray, half: int, keys: np.ndarray) -> np.ndarray:
    """A permutation of 0 … 4**half - 1."""
    mask, bits = np.uint64(2**half - 1), np.uint64(half)
    left, right = values >> bits, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right, key) & mask)
    return (left << bits) | right


@dataclass
class GlobalShuffle:
    """The shuffled order of `count` samples for one epoch, and how far training has come in it.

    Attributes:
        count: number of samples.
        seed: the order's seed.
        epoch: the epoch; `next_epoch` moves on.
        consumed: how many positions all ranks together have used.
    """

    count: int
    seed: int = 0
    epoch: int = 0
    consumed: int = 0

    def __post_init__(self) -> None:
        if self.count < 0 or not 0 <= self.consumed <= self.count:
            raise ConfigError(
                f"record: shuffle of {self.count} samples of which {self.consumed} are consumed"
            )

    def at(self, positions: np.ndarray) -> np.ndarray:
        """The samples at these positions."""
        return permute(positions, self.count, self.seed, self.epoch)

    def batches(
        self, batch_size: int, rank: int = 0, num_ranks: int = 1, drop_last: bool = False
    ) -> RankBatches:
        """The batches that `rank` of `num_ranks` still has to read in this epoch."""
        return RankBatches(self, batch_size, rank, num_ranks, drop_last)

    def advance(self, steps: int, batch_size: int, num_ranks: int = 1) -> None:
        """Note that all ranks have finished `steps` more batches."""
        self.consumed = min(self.count, self.consumed + steps * batch_size * num_ranks)

    def next_epoch(self) -> None:
        """Begin the next epoch's order."""
        self.epoch, self.consumed = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        """What `from_state` needs, with the same number of ranks or another."""
        return {
            "count": self.count,
            "seed": self.seed,
            "epoch": self.epoch,
            "consumed": self.consumed,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any], count: int) -> GlobalShuffle:
        """Go on from a state.

        Raises: ConfigError if the data set has another number of samples now.
        """
        if state["count"] != count:
            raise ConfigError(
                f"record: the state is of {state['count']} samples, the data set has {count}; "
                "an order of other samples cannot be gone on with"
            )
        return cls(**state)


@dataclass(frozen=True)
class RankBatches:
    """One rank's batches: a step takes batch_size * num_ranks positions, each rank its own run.

    Iterating does not change the shuffle; it can serve as torch's `batch_sampler`.
    """

    shuffle: GlobalShuffle
    batch_size: int
    rank: int
    num_ranks: int
    drop_last: bool

    def __post_init__(self) -> None:
        if self.batch_size < 1 or not 0 <= self.rank < self.num_ranks:
            raise ConfigError(
                f"record: batches of {self.batch_size} for rank {self.rank} of {self.num_ranks}, "
                "wanted batch_size >= 1 and 0 <= rank < num_ranks"
            )

    def __len__(self) -> int:
        """How many batches are left; the same on every rank, but the last step may be ragged."""
        left = self.shuffle.count - self.shuffle.consumed
        step = self.batch_size * self.num_ranks
        return left // step if self.drop_last else -(-left // step)

    def __iter__(self) -> Iterator[list[int]]:
        shuffle = self.shuffle
        start, epoch = shuffle.consumed, shuffle.epoch
        for step in range(len(self)):
            first = start + step * self.batch_size * self.num_ranks
            span = np.arange(first, min(first + self.batch_size * self.num_ranks, shuffle.count))
            # the ragged last step is shared out evenly, so no rank waits long for another
            mine = np.array_split(span, self.num_ranks)[self.rank]
            yield permute(mine, shuffle.count, shuffle.seed, epoch).tolist()
