"""Train room: token rows from `.ffr` files; a step's batch is a function of the step alone.

In: files whose samples are rows. Out: batches, the same after a restart and on any layout of ranks.
A row is int32 [L] tokens of one document, all learnt, or int32 [3, L]: tokens; the number of each
token's document, −1 for padding; 1 where the token is to be learnt.

# R rows, L length
"""

from __future__ import annotations

import glob
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from whalefall.errors import ConfigError, CorruptError, MissingError, ShapeError
from whalefall.record import FileReader, FileWriter
from whalefall.record.shuffle import permute
from whalefall.train.recipe import Recipe

__all__ = ["Batch", "Rows", "write_rows", "write_stream"]


class Batch(NamedTuple):
    """Rows of a step: tokens int64, document numbers fp32 (−1: padding), learnt bool: [R, L]."""

    tokens: Tensor
    document: Tensor
    learnt: Tensor

    def part(self, rows: slice) -> Batch:
        """Some of the rows."""
        return Batch(self.tokens[rows], self.document[rows], self.learnt[rows])


def write_rows(path: str | Path, rows: Sequence[np.ndarray]) -> None:
    """Write rows as a `.ffr` file.

    Args:
        rows: each int32 [L] or [3, L], as the module says.
    Raises: ShapeError, ConfigError.
    """
    with FileWriter(str(path), len(rows)) as writer:
        for row in rows:
            if row.ndim not in (1, 2) or (row.ndim == 2 and len(row) != 3):
                raise ShapeError(f"train: a row has shape {list(row.shape)}, wanted [L] or [3, L]")
            writer.write_one(np.ascontiguousarray(row, np.int32))


def write_stream(path: str | Path, ids: Iterable[int] | np.ndarray, length: int) -> int:
    """Cut a stream of token ids into rows of `length`, drop the rest; gives the number of rows."""
    stream = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), np.int32)
    rows = stream[: len(stream) // length * length].reshape(-1, length)
    write_rows(path, list(rows))
    return len(rows)


class _Source:
    """The rows of one source, in an order that (seed, epoch) draws."""

    def __init__(self, files: str, rows: int, length: int, seed: int) -> None:
        names = sorted(glob.glob(files)) if "://" not in files else [files]
        if not names:
            raise MissingError(f"train: no files {files}; the recipe's data.source names them")
        self.reader = FileReader(names)
        self.files, self.rows, self.length, self.seed = files, rows, length, seed
        if len(self.reader) == 0:
            raise ConfigError(f"train: {files} hold no rows")

    def read(self, first: int, count: int) -> list[np.ndarray]:
        """Rows at global positions first … first + count − 1, epoch after epoch; [3, L] each."""
        total = len(self.reader)
        samples = [
            int(permute(np.array([place % total]), total, self.seed, place // total)[0])
            for place in range(first, first + count)
        ]
        return [
            self._row(data, sample)
            for data, sample in zip(self.reader.read(samples), samples, strict=True)
        ]

    def _row(self, data: np.ndarray, sample: int) -> np.ndarray:
        if data.nbytes not in (4 * self.length, 12 * self.length):
            raise CorruptError(
                f"train: {self.files}: row {sample} has {data.nbytes} bytes, wanted "
                f"{4 * self.length} or {12 * self.length} for data.length {self.length}"
            )
        values = data.view(np.int32).reshape(-1, self.length)
        if len(values) == 3:
            return values
        return np.stack([values[0], np.zeros_like(values[0]), np.ones_like(values[0])])


class Rows:
    """The recipe's data.

    Raises: MissingError for files that are not there; `batch` raises CorruptError for rows that
        are no rows.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.vocab = recipe.config.vocab_size
        self.sources = [
            _Source(recipe.path(source.files), source.rows, recipe.data.length,
                    recipe.run.seed * 1009 + number)
            for number, source in enumerate(recipe.data.source)
        ]  # fmt: skip

    def batch(self, step: int, shard: int = 0) -> Batch:
        """The rows of one shard in a step; row j of a step is chunk j mod (shards x chunks)'s."""
        parallel = self.recipe.parallel
        rows = [row for s in self.sources for row in s.read(step * s.rows, s.rows)]
        share = parallel.shards * parallel.chunks
        chunks = range(shard * parallel.chunks, (shard + 1) * parallel.chunks)
        mine = torch.from_numpy(np.stack([row for c in chunks for row in rows[c::share]]))
        tokens = mine[:, 0].long()
        if bool((tokens < 0).any()) or int(tokens.max()) >= self.vocab:
            raise CorruptError(
                f"train: step {step}: tokens {int(tokens.min())} … {int(tokens.max())}, the model "
                f"knows 0 … {self.vocab - 1}; were the rows made with another tokenizer?"
            )
        return Batch(tokens, mine[:, 1].float(), mine[:, 2].bool())
