"""Attention against the machine's limits and torch: decode by heads, uneven lengths, memory, calls.

    whalefall bench attention [--quick]

Bandwidth and FMA peak are measured between the rounds of each row; there, both count by their best
round: neighbours only ever take, and a disturbed limit flatters. Pages are shuffled; the caches
of one round are larger than the last-level cache where a row is about memory. Both are measured
with workers awake, as they are within an engine's step.
"""

from __future__ import annotations

import argparse
import mmap
import resource
import time
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from benchmarks._calls import attention_call_rows
from whalefall import jit
from whalefall.attention import flash_mla_sparse_fwd, flash_mla_with_kvcache, get_mla_metadata
from whalefall.jit import machine
from whalefall.testing.benchmark import Row, by_level, interleave, save

D, D_V, PAGE = 576, 512, 64
BF16 = ml_dtypes.bfloat16


def huge(shape: tuple[int, ...]) -> Any:
    """A bf16 array in huge pages, of small numbers, as an engine would hold its cache."""
    count = int(np.prod(shape)) * 2
    area = mmap.mmap(
        -1, -(-count // (2 << 20)) * (2 << 20), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    )
    area.madvise(mmap.MADV_HUGEPAGE)
    bits = np.frombuffer(area, np.uint16)[: count // 2]
    bits[:] = (
        np.random.default_rng(0)
        .integers(0x3C00, 0x3E00, 1 << 16)
        .astype(np.uint16)
        .repeat(-(-len(bits) // (1 << 16)))[: len(bits)]
    )
    return bits.view(BF16).reshape(shape)


class Problem:
    """A decode step: q of one token a request, a shuffled cache, lengths."""

    def __init__(self, heads: int, lengths: list[int]) -> None:
        rng = np.random.default_rng(heads)
        self.heads, self.lengths = heads, np.array(lengths, np.int32)
        blocks = [-(-n // PAGE) for n in lengths]
        self.table = np.zeros((len(lengths), max(blocks)), np.int32)
        order = rng.permutation(sum(blocks)).astype(np.int32)
        for i, part in enumerate(np.split(order, np.cumsum(blocks)[:-1])):
            self.table[i, : len(part)] = part
        self.cache = huge((sum(blocks), PAGE, 1, D))
        self.q = rng.standard_normal((len(lengths), 1, heads, D)).astype(BF16)

    def __call__(self) -> Any:
        meta = get_mla_metadata()
        return flash_mla_with_kvcache(self.q, self.cache, self.table, self.lengths, D_V, *meta)

    @property
    def bytes(self) -> float:
        return float(self.lengths.sum()) * D * 2

    @property
    def flops(self) -> float:
        return 2.0 * self.heads * float(self.lengths.sum()) * (D + D_V)


def beside(call: Callable[[], object], limit: Callable[[], float], rounds: int) -> tuple[Any, Any]:
    """Seconds of `call` and the limit, measured in turns, workers awake; the best of each."""
    call()
    limit()
    seconds, limits = [], []
    for _ in range(rounds):
        limits.append(limit())
        machine.fma_peak(1)  # a worker that sleeps is up to a millisecond late
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    limits.append(limit())
    return min(seconds), max(limits)


def read() -> float:
    return machine.read_bandwidth(3) / 1e9  # the first wakes the workers


def peak() -> float:
    return machine.fma_peak(1) / 1e9


def memory_rows(rounds: int, scale: int) -> list[Row]:
    rows = []
    for heads in (1, 2):
        p = Problem(heads, [16384 // scale] * 8)
        seconds, limit = beside(p, read, rounds)
        ours = p.bytes / seconds / 1e9
        rows.append(
            Row(
                f"MLA decode, {heads} head{'s' * (heads > 1)}, 8 x {16384 // scale} keys, bf16",
                "read bandwidth", ">= 0.80x", ours, limit, "GB/s", ours / limit,
                ours / limit >= 0.8,
            )
        )  # fmt: skip
    return rows


def tile_peak() -> float:
    return machine.tile_peak(1) / 1e9


def compute_rows(rounds: int, scale: int) -> list[Row]:
    """16 and 128 heads against the FMA peak; with AMX's tiles, which outrun memory at 16 heads,
    against the read bandwidth and the tiles' peak as well."""
    rows = []
    level = jit.best_level()
    dot, tile = machine.dot_is_fast(level), machine.tile_is_fast(level)
    for heads, lengths, aim in (
        (16, [4096 // scale] * 16, 1.3 if dot else 0.65),
        (128, [4096 // scale] * 2, 1.65 if dot else 0.65),
    ):
        p = Problem(heads, lengths)
        limits: list[tuple[str, Callable[[], float], float | None, str]] = [
            ("FMA peak", peak, aim, "GFLOP/s")
        ]
        if tile:
            limits.append(("AMX peak", tile_peak, 0.25 if heads > 16 else None, "GFLOP/s"))
        if tile and heads == 16:
            limits.append(("read bandwidth", read, None, "GB/s"))
        for name, limit, least, unit in limits:
            seconds, most = beside(p, limit, rounds)
            ours = (p.bytes if unit == "GB/s" else p.flops) / seconds / 1e9
            rows.append(
                Row(
                    f"MLA decode, {heads} heads, {len(lengths)} x {lengths[0]} keys, bf16",
                    name, f">= {least:g}x" if least else "–", ours, most, unit, ours / most,
                    ours / most >= least if least else None,
                )
            )  # fmt: skip
    return rows


def torch_rows(rounds: int, scale: int) -> list[Row]:
    try:
        import torch
    except ImportError:
        return []
    heads, n = 128, 2048 // scale
    p = Problem(heads, [n])
    plain = torch.from_numpy(p.cache[p.table[0]].reshape(n, D).astype(np.float32))
    q = torch.from_numpy(p.q[0, 0].astype(np.float32))
    k = torch.randn(1, heads, n, 192, dtype=torch.bfloat16)
    v = torch.randn(1, heads, n, 128, dtype=torch.bfloat16)
    one = torch.randn(1, heads, 1, 192, dtype=torch.bfloat16)

    stored = torch.from_numpy(p.cache[p.table[0]].reshape(n, D).view(np.int16)).view(torch.bfloat16)

    def einsum(q: Any, rows: Any) -> Callable[[], Any]:
        def call() -> Any:
            s = torch.einsum("hd,nd->hn", q, rows) * D**-0.5
            return torch.einsum("hn,nd->hd", s.softmax(-1), rows[:, :D_V])

        return call

    def sdpa(k: Any, v: Any, one: Any) -> Callable[[], Any]:
        return lambda: torch.nn.functional.scaled_dot_product_attention(one, k, v)

    times = interleave(
        {
            "ours": p,
            "einsum bf16": einsum(q.bfloat16(), stored),
            "einsum cast": lambda: einsum(q, stored.float())(),
            "einsum fp32": einsum(q, plain),
            "sdpa bf16": sdpa(k, v, one),
            "sdpa fp32": sdpa(k.float(), v.float(), one.float()),
        },
        rounds,
        min_time_s=0.03,
        settle_s=0.015,
    )
    rows = []
    for name, what in (
        ("sdpa bf16", "torch SDPA on expanded heads, bf16"),
        ("sdpa fp32", "torch SDPA on expanded heads, fp32"),
        ("einsum bf16", "torch einsum on the bf16 latent"),
        ("einsum cast", "torch einsum on the bf16 latent, cast to fp32 first"),
        ("einsum fp32", "torch einsum on a latent kept in fp32 (twice the memory)"),
    ):
        ours, theirs = times["ours"].median_s * 1e3, times[name].median_s * 1e3
        rows.append(
            Row(
                f"MLA decode, 128 heads, {n} keys", what, ">= 2x", ours, theirs, "ms",
                theirs / ours, theirs >= 2 * ours,
            )
        )  # fmt: skip
    return rows


def shape_rows(rounds: int, scale: int) -> list[Row]:
    total = 65536 // scale
    uneven = [total // 2, total // 4] + [total // 64] * 16
    times = interleave(
        {"even": Problem(16, [sum(uneven) // 18] * 18), "uneven": Problem(16, uneven)}, rounds
    )
    even, odd = times["even"].median_s * 1e3, times["uneven"].median_s * 1e3
    longer = interleave({str(n): Problem(16, [n // scale]) for n in (16384, 65536)}, rounds)
    short_s, long_s = longer["16384"].median_s * 1e3, longer["65536"].median_s * 1e3
    return [
        Row(
            "very uneven lengths, 18 requests, 16 heads", "the same total evenly", "<= 1.15x time",
            odd, even, "ms", even / odd, odd <= 1.15 * even,
        ),
        Row(
            f"one request of {65536 // scale} keys, 16 heads", f"{16384 // scale} keys",
            "<= 4.4x time", long_s, short_s, "ms", short_s / long_s, long_s <= 4.4 * short_s,
        ),
    ]  # fmt: skip


def memory_row(scale: int) -> Row:
    """Peak growth of the process over a sparse prefill of 64 k tokens, beside its output."""
    tokens, heads, topk = 65536 // scale, 4, 64
    q = np.full((tokens, heads, D), 0.1, BF16)
    kv = np.full((tokens, 1, D), 0.1, BF16)
    index = np.random.default_rng(0).integers(0, tokens, (tokens, 1, topk)).astype(np.int32)
    flash_mla_sparse_fwd(q[:64], kv, index[:64], 0.1, D_V)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    out, top, lse = flash_mla_sparse_fwd(q, kv, index, 0.1, D_V)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    size = out.nbytes + top.nbytes + lse.nbytes
    return Row(
        f"peak memory growth, sparse prefill of {tokens} tokens, {heads} heads, top {topk}",
        "its output", "<= 2x", grown / 1e6, size / 1e6, "MB", size / max(1, grown),
        grown <= 2 * size,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smaller shapes, 3 rounds")
    quick = parser.parse_args().quick
    rounds, scale = (3, 8) if quick else (9, 1)
    rows = [memory_row(scale)]  # first: the peak so far is small
    rows += memory_rows(rounds, scale)
    rows += compute_rows(rounds, scale)
    rows += torch_rows(rounds, scale)
    rows += shape_rows(rounds, scale)
    rows += attention_call_rows()
    versions = {"numpy": np.__version__}
    try:
        import torch

        versions["torch"] = torch.__version__
    except ImportError:
        pass
    save(by_level("attention"), rows, versions)


if __name__ == "__main__":
    main()
