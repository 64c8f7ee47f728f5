"""What a call costs beside its work: the smallest call of each function, with new arrays each time.

Sixty-four sets of arrays are walked through, so that no call sees those of the one before; each
figure is the best of a hundred rounds, work of the kernel included.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from whalefall import attention, gemm
from whalefall.dtypes import restore
from whalefall.testing.benchmark import Row

SETS, ROUNDS, TARGET_US = 64, 100, 5.0
BF16, E4M3 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
Sets = Callable[[], tuple[Any, ...]]


def ones(dtype: Any, *shape: int) -> Any:
    return np.ones(shape, dtype)


def whole(value: int, *shape: int) -> Any:
    return np.full(shape, value, np.int32)


def fp8(*shape: int) -> tuple[Any, Any]:
    """Values and one scale a row (a matrix), or one a group."""
    count = (shape[0], 1) if len(shape) == 2 else (shape[0], 1, 1)
    return ones(E4M3, *shape), ones(np.float32, *count)


def per_call_us(call: Callable[..., object], make: Sets) -> float:
    """Microseconds of a call, by the best round over sets of arguments."""
    sets = itertools.cycle([make() for _ in range(SETS)])
    best = 1e9
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        for _ in range(3 * SETS):
            call(*next(sets))
        best = min(best, (time.perf_counter() - start) / (3 * SETS))
    return best * 1e6


def row(what: str, call: Callable[..., object], make: Sets) -> Row:
    ours = per_call_us(call, make)
    return Row(f"a call of {what}, new arrays", "5 µs", "<= 5 µs", ours, TARGET_US, "µs",
               TARGET_US / ours, ours <= TARGET_US)  # fmt: skip


def of_torch(make: Sets) -> Sets:
    """The same in tensors."""
    torch = sys.modules["torch"]

    def tensor(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(tensor(one) for one in value)
        return restore(value, torch.empty(0))

    return lambda: tensor(make())


def gemm_call_rows() -> list[Row]:
    """The smallest products: 1 × 1 × 128, one group."""
    dense = lambda: (fp8(1, 128), fp8(1, 128), ones(BF16, 1, 1))  # noqa: E731
    halves = lambda: (ones(BF16, 1, 128), ones(BF16, 1, 128), ones(BF16, 1, 1))  # noqa: E731
    linear = lambda: (ones(BF16, 1, 128), *fp8(1, 128))  # noqa: E731
    grouped = lambda: (fp8(1, 128), fp8(1, 1, 128), ones(BF16, 1, 1), whole(0, 1))  # noqa: E731
    masked = lambda: (fp8(1, 1, 128), fp8(1, 1, 128), ones(BF16, 1, 1, 1), whole(1, 1), 1)  # noqa: E731
    return [
        row("fp8_linear", gemm.fp8_linear, linear),
        row("fp8_gemm_nt", gemm.fp8_gemm_nt, dense),
        row("bf16_gemm_nt", gemm.bf16_gemm_nt, halves),
        row("m_grouped_fp8_gemm_nt_contiguous", gemm.m_grouped_fp8_gemm_nt_contiguous, grouped),
        row("m_grouped_fp8_gemm_nt_masked", gemm.m_grouped_fp8_gemm_nt_masked, masked),
        row("fp8_linear, torch", gemm.fp8_linear, of_torch(linear)),
        row("fp8_gemm_nt, torch", gemm.fp8_gemm_nt, of_torch(dense)),
    ]


def attention_call_rows() -> list[Row]:
    """One query, one head, one key."""
    metadata, _ = attention.get_mla_metadata()

    def dense() -> tuple[Any, ...]:
        return ones(BF16, 1, 1, 1, 576), ones(BF16, 1, 64, 1, 576), whole(0, 1, 1), whole(1, 1)

    def decode(*arrays: Any, **more: Any) -> Any:
        return attention.flash_mla_with_kvcache(*arrays[:4], 512, metadata, None, **more)

    def sparse(*arrays: Any) -> Any:
        return decode(*arrays[:4], indices=arrays[4])

    def bytes_cache() -> tuple[Any, ...]:
        q, _, *rest = dense()
        return q, np.zeros((1, 64, 1, 656), np.uint8), *rest

    def prefill() -> tuple[Any, ...]:
        return ones(BF16, 1, 1, 576), ones(BF16, 64, 1, 576), whole(0, 1, 1, 1), 0.1

    def heads() -> tuple[Any, ...]:
        starts = np.array([0, 1], np.int32)
        k = ones(BF16, 1, 1, 192), ones(BF16, 1, 1, 192), ones(BF16, 1, 1, 128)
        return *k, starts, starts.copy(), 1, 1

    name = "flash_mla_with_kvcache"
    rows = [
        row(name, decode, dense),
        row(f"{name} with indices", sparse, lambda: (*dense(), whole(0, 1, 1, 1))),
        row(f"{name}, FP8 rows", lambda *a: decode(*a, is_fp8_kvcache=True), bytes_cache),
        row("flash_mla_sparse_fwd", attention.flash_mla_sparse_fwd, prefill),
        row("flash_attn_varlen_func", attention.flash_attn_varlen_func, heads),
    ]
    if "torch" in sys.modules:
        rows.append(row(f"{name}, torch", decode, of_torch(dense)))
    return rows
