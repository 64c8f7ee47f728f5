"""Full-size operands made of few rows, whose products are known whole in float64.

A and B take their rows in random order from a pool of at most 2,048 each: a kernel gets, reads and
multiplies full-size matrices, and the float64 product of the two pools holds every value that its
result may have. So all of a result is compared, whatever its size, and no level pays for a
reference of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import torch

from tests.gemm.operands import BF16, spread
from whalefall import gemm
from whalefall.dtypes import e2m1_to_float

STRIP = 128  # rows of B that stay together, as those of a block scale must
ADDED = 61  # distinct rows of C


class Key(NamedTuple):
    """A pool: `cast` is "token" or "block" (FP8, scales of 128), "fp4" (scales of 32) or "bf16"."""

    side: str
    rows: int
    k: int
    cast: str
    ue8m0: bool = False
    gran_k: int = 128


class Pool(NamedTuple):
    """Values before the cast [rows, k] in bfloat16, and codes and scales after it."""

    plain: Any
    values: Any
    scales: Any
    gran: tuple[int, int]


def key(side: str, rows: int, k: int, cast: str, ue8m0: bool = False, gran_k: int = 128) -> Key:
    """The pool for so many rows: all of them, or some 2^23 values in whole strips."""
    strips = min(-(-rows // STRIP), max(4, min(16, (1 << 23) // (STRIP * k))))
    return Key(side, strips * STRIP, k, cast, ue8m0, gran_k)


@functools.lru_cache(maxsize=4)
def pool(key: Key) -> Pool:
    """Normal values, cast."""
    rng = np.random.default_rng([ord(key.side[0]), key.rows, key.k])
    plain = rng.standard_normal((key.rows, key.k), np.float32).astype(BF16)
    if key.cast == "bf16":
        return Pool(plain, plain, None, (1, 1))
    if key.cast == "fp4":
        return Pool(plain, *gemm.per_token_cast_to_fp4(plain, key.ue8m0, 32), (1, 32))
    if key.cast == "block":
        return Pool(plain, *gemm.per_block_cast_to_fp8(plain, key.ue8m0), (STRIP, 128))
    pair = gemm.per_token_cast_to_fp8(plain, key.ue8m0, key.gran_k)
    return Pool(plain, *pair, (1, key.gran_k))


def exact(made: Pool) -> Any:
    """What a pool's codes stand for, float64."""
    if made.scales is None:
        return made.plain.astype(np.float64)
    if made.values.dtype == np.int8:
        packed = made.values.view(np.uint8)
        codes = np.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1)
        wide: Any = e2m1_to_float(codes).astype(np.float64)
    else:
        wide = made.values.astype(np.float32).astype(np.float64)
    wide *= spread(made.scales, *made.gran, wide.shape)
    return wide


class Products(NamedTuple):
    """A pool times another [rows of a, rows of b]: of the plain values, and of the codes."""

    plain: Any
    codes: Any
    size: float  # root mean square


@functools.lru_cache(maxsize=16)
def products(left: Key, right: Key, begin: int, end: int) -> Products:
    """Over columns begin to end of K; in float64, kept in fp32."""
    a, b = pool(left), pool(right)
    columns = slice(begin, end)
    plain = a.plain[:, columns].astype(np.float64) @ b.plain[:, columns].astype(np.float64).T
    codes = plain
    if a.scales is not None or b.scales is not None:
        codes = exact(a)[:, columns] @ exact(b)[:, columns].T
    size = float(np.sqrt(np.mean(codes**2)))
    kept = [torch.from_numpy(x.astype(np.float32)) for x in (plain, codes)]
    return Products(kept[0], kept[0] if codes is plain else kept[1], size)


class Operand(NamedTuple):
    """A matrix [rows, end - begin]: rows of a pool, columns `begin` to `end` of it."""

    key: Key
    index: Any
    begin: int
    end: int

    @property
    def pair(self) -> tuple[Any, Any]:
        """Values and scales (None for bf16)."""
        made = pool(self.key)
        packs = 2 if made.values.dtype == np.int8 else 1
        values = made.values[:, self.begin // packs : self.end // packs][self.index]
        if made.scales is None:
            return values, None
        blocks = slice(self.begin // made.gran[1], -(-self.end // made.gran[1]))
        return values, made.scales[self.index[:: made.gran[0]] // made.gran[0], blocks]

    @property
    def given(self) -> Any:
        """As a function takes it."""
        values, scales = self.pair
        return values if scales is None else (values, scales)


def shuffled(rng: np.random.Generator, of: int, count: int) -> Any:
    """`count` of the numbers below `of`, none again before all were there."""
    return np.concatenate([rng.permutation(of) for _ in range(-(-count // of) or 1)])[:count]


def left(rng: np.random.Generator, key: Key, rows: int, begin: int = 0, end: int = 0) -> Operand:
    """Any rows of the pool."""
    return Operand(key, shuffled(rng, key.rows, rows), begin, end or key.k)


def right(rng: np.random.Generator, key: Key, rows: int, begin: int = 0, end: int = 0) -> Operand:
    """Whole strips of the pool, the last one cut."""
    strips = shuffled(rng, key.rows // STRIP, -(-rows // STRIP))
    index = (strips[:, None] * STRIP + np.arange(STRIP)).reshape(-1)[:rows]
    return Operand(key, index, begin, end or key.k)


class Added:
    """A matrix to add to, [m, n]; its row r is made anew where it is asked for."""

    def __init__(self, n: int, dtype: Any, seed: int = 1) -> None:
        rng = np.random.default_rng(seed)
        self.rows = (rng.standard_normal((ADDED, n), np.float32) * 32).astype(dtype)

    def fill(self, d: Any) -> Any:
        """Written to all of d."""
        for at in range(0, len(d), ADDED):
            d[at : at + ADDED] = self.rows[: len(d) - at]
        return d

    def part(self, begin: int, end: int) -> Any:
        return as_float(self.rows[np.arange(begin, end) % ADDED])


def as_float(x: Any) -> torch.Tensor:
    """A numpy array in bf16 or fp32 as fp32 in torch, whose casts run on both cores."""
    x = np.ascontiguousarray(x)
    if x.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16).float()
    return torch.from_numpy(x)


def turned(x: Any) -> Any:
    """The last two axes exchanged, contiguous."""
    wide = {1: np.int8, 2: np.int16, 4: np.int32}[x.dtype.itemsize]
    flipped = torch.from_numpy(x.view(wide)).transpose(-1, -2).contiguous().numpy()
    return flipped.view(x.dtype)


def check(d: Any, a: Operand, b: Operand, limit: float, c: Added | None = None) -> None:
    """All of `d` is within the original's limit of the product of the values before the casts,
    rounded as `d` is; and each of its values is the product of the codes, but for its rounding."""
    known = products(a.key, b.key, a.begin, a.end)
    # half a unit of bf16's last place; fp32 sums of 32,768 terms are off by 3e-5 of their size
    relative, absolute = (2**-8 if d.dtype == BF16 else 1e-6), 1e-4 * known.size
    squares = both = 0.0
    for begin, end, want, plain in blocks(known, a, b, d.shape[1]):
        got = as_float(d[begin:end])
        if c is not None:
            more = c.part(begin, end)
            want, plain = want + more, plain + more
        if d.dtype == BF16:
            plain = plain.bfloat16().float()
        apart = (got - want).abs_()
        allowed = want.abs().mul_(relative).add_(absolute)
        far = ~(apart <= allowed)  # NaN is far
        if far.any():
            at = far.nonzero()[0].tolist()
            raise AssertionError(
                f"{int(far.sum())} of {far.numel()} values are off, the first at "
                f"{[begin + at[0], at[1]]}: {got[tuple(at)]}, wanted {want[tuple(at)]}"
            )
        # calc_diff is 1 - 2 sum(xy) / sum(x² + y²), which is this without its cancellation
        squares += float((got - plain).square_().sum())
        both += float(got.square().sum() + plain.square().sum())
    assert squares <= limit * both, f"diff {squares / both:.2g}, wanted below {limit:g}"


def blocks(
    known: Products, a: Operand, b: Operand, n: int
) -> Iterator[tuple[int, int, torch.Tensor, torch.Tensor]]:
    """Rows begin to end, and what the codes' and the plain product are there."""
    strips = torch.from_numpy(b.index[::STRIP] // STRIP)
    index = torch.from_numpy(a.index)
    step = max(1, (1 << 19) // n)  # a block stays in the cache

    def taken(table: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        narrow = table[rows].reshape(len(rows), -1, STRIP)
        return narrow[:, strips].reshape(len(rows), -1)[:, :n]

    for begin in range(0, len(index), step):
        rows = index[begin : begin + step]
        codes = taken(known.codes, rows)
        plain = codes if known.plain is known.codes else taken(known.plain, rows)
        yield begin, begin + len(rows), codes, plain
