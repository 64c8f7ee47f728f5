"""Products against the machine's limits and torch, in one run: `whalefall bench gemm [--quick]`.

Weights rotate through enough memory to come from DRAM; reads and multiply-adds are measured beside
each row. Threads are pinned, one a core, so that the scheduler's moves are not measured. Against a
limit, both count by their best round: neighbours only ever take, and a disturbed limit flatters.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
from collections.abc import Callable, Iterable
from typing import Any

import ml_dtypes
import numpy as np
import torch

from benchmarks._calls import gemm_call_rows, per_call_us
from benchmarks._experts import choices, experts_of
from whalefall import gemm, jit
from whalefall.gemm.linear import expert_structs, weight_struct
from whalefall.gemm.native_calls import library
from whalefall.gemm.structs import KINDS, Input, LinearCall, Output
from whalefall.jit import machine
from whalefall.testing.benchmark import Row, by_level, interleave, save

E4M3 = ml_dtypes.float8_e4m3fn
RNG = np.random.default_rng(0)
AVX2 = jit.best_level() in ("any", "avx2")
DOT, TILE = machine.dot_is_fast(jit.best_level()), machine.tile_is_fast(jit.best_level())
# where bf16 is multiplied as such, activations are bf16; elsewhere fp32, which those kernels want
ACTIVATION = np.dtype(ml_dtypes.bfloat16 if DOT or TILE else np.float32)


def pin_threads() -> None:
    """The calling thread and the pool's workers, one a core."""
    before = set(os.listdir("/proc/self/task"))
    machine.fma_peak(1)
    workers = sorted(int(t) for t in set(os.listdir("/proc/self/task")) - before)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[0]})
    for worker, core in zip(workers, cores[1:], strict=False):
        os.sched_setaffinity(worker, {core})


def huge(size: int) -> Any:
    """Bytes on huge pages: E4M3 codes as a checkpoint's, of normally distributed weights.

    One in some ten thousand is subnormal, of uniform codes one in 18: SSE2's multiplications wait
    for those (docs/benchmarks/gemm.notes.md), FMA does not.
    """
    # private: shared memory is on huge pages only where the machine's owner says so
    area = mmap.mmap(-1, -(-size // (1 << 21)) << 21, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area.madvise(mmap.MADV_HUGEPAGE)
    memory = np.frombuffer(area, np.uint8)[:size]
    weights = RNG.standard_normal((1024, 1024)).astype(np.float32)
    memory[:] = np.resize(gemm.per_block_cast_to_fp8(weights, False)[0].view(np.uint8), size)
    return memory


def limits_rows(memory: Any, quick: bool) -> list[Row]:
    """FP8 weights times 1 to 8 rows, as shares of what memory and FMA allow."""
    rows = []
    reader = machine._library()
    peak = max(peak_of_level() for _ in range(40))
    shapes = [(2048, 7168), (7168, 2048), (1408, 2048)]
    for n, k in shapes[:1] if quick else shapes:
        weights = [
            memory[i : i + n * k].reshape(n, k).view(E4M3)
            for i in range(0, memory.size - n * k + 1, n * k)
        ]
        scale = np.full((-(-n // 128), -(-k // 128)), 0.01, np.float32)
        for m in (1, 2, 4, 8):
            x, y = RNG.standard_normal((m, k)).astype(ACTIVATION), np.empty((m, n), np.float32)
            calls = [linear_call(w, scale, x, y) for w in weights]

            def ours(calls: Any = calls) -> None:
                run = library().wf_linear
                for call in calls:
                    run(ctypes.addressof(call))

            def read() -> None:
                reader.wf_read(memory.ctypes.data, memory.size)

            took = interleave({"ours": ours, "read": read}, rounds=7)
            speed = len(weights) * n * k / took["ours"].best_s / 1e9
            bandwidth = memory.size / took["read"].best_s / 1e9
            ceiling = min(bandwidth, 28.0) if AVX2 else bandwidth
            if m > 2:
                ceiling = min(bandwidth, peak / (2 * m) / 1e9)
            target = {1: 0.80, 2: 0.65}.get(m, 0.45) if AVX2 else {1: 0.85, 2: 0.85}.get(m, 0.6)
            against = "read bandwidth" if m <= 2 else "min(read, peak of the level / 2M)"
            rows.append(
                row(f"FP8 {n}x{k} x {m} rows, from DRAM", against, target, speed, ceiling, "GB/s")
            )
    return rows


def peak_of_level() -> float:
    """FLOP/s of what the kernels multiply with: tiles, dots (twice the FMAs) or FMAs."""
    return machine.tile_peak(1) if TILE else machine.fma_peak(1) * (2 if DOT else 1)


def row(what: str, against: str, target: float, ours: float, theirs: float, unit: str) -> Row:
    ratio = ours / theirs
    return Row(what, against, f">= {target:g}x", ours, theirs, unit, ratio, ratio >= target)


def linear_call(w: Any, scale: Any, x: Any, y: Any, form: int = 0) -> LinearCall:
    m, k = x.shape
    return LinearCall(
        weight_struct(w, scale, "bench"),
        Input(x.ctypes.data, k, KINDS[str(x.dtype)], 0),
        Output(y.ctypes.data, y.shape[1], None, None, 0, 0),
        m,
        form,
        0,
    )


def torch_rows(memory: Any) -> list[Row]:
    """The same products against torch's linear layers of the same shape."""
    n, k, rows = 2048, 7168, []
    weights = [
        memory[i : i + n * k].reshape(n, k).view(E4M3)
        for i in range(0, memory.size - n * k + 1, n * k)
    ][:6]
    scale = np.full((16, 56), 0.01, np.float32)
    dense = {
        "fp32": [torch.randn(n, k) for _ in range(3)],
        "bf16": [torch.randn(n, k, dtype=torch.bfloat16) for _ in range(3)],
    }
    for m in (1, 4, 8):
        x32, y = RNG.standard_normal((m, k)).astype(np.float32), np.empty((m, n), np.float32)
        calls = [linear_call(w, scale, x32.astype(ACTIVATION), y) for w in weights]
        inputs = {"fp32": torch.from_numpy(x32), "bf16": torch.from_numpy(x32).bfloat16()}

        def ours(calls: Any = calls) -> None:
            for call in calls:
                library().wf_linear(ctypes.addressof(call))

        contenders: dict[str, Callable[[], object]] = {"ours": ours}
        for name, tensors in dense.items():
            contenders[name] = lambda t=tensors, i=inputs[name]: [
                torch.nn.functional.linear(i, w) for w in t
            ]
        took = interleave(contenders, rounds=7, settle_s=0.015)
        mine = len(weights) * n * k * 2 * m / took["ours"].median_s / 1e9
        for name, target in (("fp32", 3.0), ("bf16", 1.6)):
            theirs = 3 * n * k * 2 * m / took[name].median_s / 1e9
            what = f"FP8 {n}x{k} x {m} rows"
            rows.append(row(what, f"torch {name} linear", target, mine, theirs, "GFLOP/s"))
    return rows


def gemm_rows(quick: bool) -> list[Row]:
    """`fp8_gemm_nt` and the many form against the peak measured beside them.

    That of FMAs, or of AMX's tiles; then against torch's bf16 products as well, which are made by
    tiles too, of weights that were made bf16 before.
    """
    rows = []
    shapes = [(512, 7168, 2048), (512, 2048, 7168), (1024, 2048, 2048), (4096, 576, 2048)]
    for m, n, k in shapes[:1] if quick else shapes:
        x = RNG.standard_normal((m, k)).astype(np.float32)
        a = gemm.per_token_cast_to_fp8(x, False)
        b = gemm.per_block_cast_to_fp8(RNG.standard_normal((n, k)).astype(np.float32), False)
        d, y = np.empty((m, n), ml_dtypes.bfloat16), np.empty((m, n), np.float32)
        contenders: dict[str, Callable[[], object]] = {
            "gemm": lambda a=a, b=b, d=d: gemm.fp8_gemm_nt(a, b, d),
            "linear": lambda x=x.astype(ACTIVATION), b=b, y=y: gemm.fp8_linear(
                x, *b, "many", out=y
            ),
        }
        peaks: list[float] = []
        measure = machine.tile_peak if TILE else machine.fma_peak
        contenders["peak"] = lambda p=peaks, f=measure: p.extend(f(1) for _ in range(3))
        if TILE:
            left, right = torch.from_numpy(x).bfloat16(), _dequantised(*b)
            contenders["torch"] = lambda x=left, w=right: torch.nn.functional.linear(x, w)
        # torch's threads spin for some milliseconds after it; ours must not share cores with them
        took = interleave(contenders, rounds=15 if TILE else 9, settle_s=0.015 if TILE else 0)
        peak = max(peaks) / 1e9
        against, target = ("AMX peak", 0.35) if TILE else ("fp32 FMA peak", 1.6 if DOT else 0.75)
        for name, words in (("gemm", "fp8_gemm_nt"), ("linear", "fp8_linear many")):
            speed = 2 * m * n * k / took[name].best_s / 1e9
            what = f"{words} M {m}, N {n}, K {k}"
            rows.append(row(what, against, target, speed, peak, "GFLOP/s"))
            if TILE:
                speed = 2 * m * n * k / took[name].median_s / 1e9
                theirs = 2 * m * n * k / took["torch"].median_s / 1e9
                rows.append(
                    row(what, "torch bf16 of dequantised weights", 1.0, speed, theirs, "GFLOP/s")
                )
    return rows


def grouped_rows() -> list[Row]:
    """64 experts, 512 tokens, top-6: gate-up-SiLU-down against Python loops of torch matmuls.

    Two loops hold their weights as they multiply them, in two and four times our bytes. The third
    has our bytes, a checkpoint's, and makes bf16 of each expert before it multiplies.
    """
    hidden, width, experts, tokens, topk = 2048, 1408, 64, 512, 6
    store = huge(experts * 3 * hidden * width).reshape(experts, 3, -1).view(E4M3)
    weights = experts_of(store, hidden, width)
    structs = expert_structs(weights)
    x32 = (RNG.standard_normal((tokens, hidden)) * 0.01).astype(np.float32)
    x = x32.astype(ACTIVATION)
    idx = choices(RNG, tokens, experts, topk)
    out = np.empty((tokens, topk, hidden), ml_dtypes.bfloat16)
    shapes = ((width, hidden), (width, hidden), (hidden, width))
    halves = [[torch.randn(a, b).bfloat16() * 0.02 for a, b in shapes] for _ in range(experts)]
    wide = [[w.float() for w in expert] for expert in halves]
    stored = [[_torch_pair(*pair) for pair in zip(e[:3], e[3:], strict=True)] for e in weights]
    tx, tidx = torch.from_numpy(x32), torch.from_numpy(idx.astype(np.int64))

    def loop(tx: torch.Tensor, held: Iterable[list[torch.Tensor]]) -> None:
        result = torch.zeros_like(tx)
        for e, (w1, w3, w2) in enumerate(held):
            rows, _ = torch.where(tidx == e)
            h = torch.nn.functional.silu(tx[rows] @ w1.T) * (tx[rows] @ w3.T)
            result.index_add_(0, rows, h @ w2.T)

    peaks: list[float] = []
    contenders: dict[str, Callable[[], object]] = {
        "ours": lambda: gemm.fused_experts(x, structs, idx, "many", out=out),
        "bf16": lambda: loop(tx.bfloat16(), halves),
        "fp32": lambda: loop(tx, wide),
        "FP8": lambda: loop(tx.bfloat16(), ([_bf16(*pair) for pair in e] for e in stored)),
        "peak": lambda: peaks.extend(machine.fma_peak(1) for _ in range(3)),
    }
    took = interleave(contenders, rounds=5)
    flops = 6 * tokens * topk * hidden * width / 1e9
    what = "64 experts, 512 tokens, top-6 (gate, up, SiLU, down)"
    mine = flops / took["ours"].median_s
    rows = [
        row(what, f"torch {words} of weights (ours 0.55)", 5.0, mine, flops / took[name].median_s,
            "GFLOP/s")
        for name, words in (
            ("bf16", "bf16 loop, 1.1 GB"), ("fp32", "fp32 loop, 2.2 GB"),
            ("FP8", "loop that makes bf16 of FP8, 0.55 GB"),
        )
    ]  # fmt: skip
    if TILE:  # the bound is memory: half a gigabyte of weights
        return rows
    best = flops / took["ours"].best_s
    target = 1.4 if DOT else 0.75
    return [*rows, row(what, "fp32 FMA peak", target, best, max(peaks) / 1e9, "GFLOP/s")]


def _torch_pair(codes: np.ndarray, scales: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """E4M3 codes and their scales, the same memory, as torch has them."""
    return (torch.from_numpy(codes.view(np.uint8)).view(torch.float8_e4m3fn),
            torch.from_numpy(scales))  # fmt: skip


def _dequantised(codes: np.ndarray, scales: np.ndarray) -> torch.Tensor:
    """The weight of codes and scales [ceil(N / 128), ceil(K / 128)] as bf16."""
    n, k = codes.shape
    wide = np.repeat(np.repeat(scales, 128, 0)[:n], 128, 1)[:, :k]
    return torch.from_numpy(codes.astype(np.float32) * wide).bfloat16()


def _bf16(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The weight [N, K] of codes and scales [N / 128, K / 128]."""
    blocks = codes.to(torch.bfloat16).view(len(scales), 128, -1, 128)
    return blocks.mul_(scales[:, None, :, None].bfloat16()).view(codes.shape)


def overhead_rows() -> list[Row]:
    """What a call costs beside its work, through the public functions and by struct."""
    w, s = np.zeros((1, 1), E4M3), np.ones((1, 1), np.float32)
    x, y = np.ones((1, 1), np.float32), np.empty((1, 1), np.float32)
    call = linear_call(w, s, x, y)
    address, run = ctypes.addressof(call), library().wf_linear
    struct = per_call_us(lambda: run(address), tuple)
    return [
        *gemm_call_rows(),
        Row("call by struct pointer, 1x1x1", "5 us", "<= 5 us", struct, 5.0, "us", 5 / struct,
            struct <= 5),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one shape of each kind")
    parser.add_argument("--only", default="", help="limits, torch, gemm, grouped, overhead")
    options = parser.parse_args()
    torch.set_num_threads(jit.get_num_threads())
    torch.randn(512, 512) @ torch.randn(512, 512)  # torch's threads start, free to move
    everywhere = os.sched_getaffinity(0)
    pin_threads()
    memory = huge((120 if options.quick else 240) << 20)
    parts: dict[str, Callable[[], list[Row]]] = {
        "limits": lambda: limits_rows(memory, options.quick),
        "torch": lambda: torch_rows(memory),
        "gemm": lambda: gemm_rows(options.quick),
        "grouped": grouped_rows,
        "overhead": overhead_rows,
    }
    chosen = [name for name in parts if options.only in ("", name)]
    rows = [line for name in chosen for line in parts[name]()]
    if options.only:
        for line in rows:
            print(f"{line.what}: {line.ours:.3g} {line.unit}, {line.against}: {line.ratio:.2f}")
        return
    os.sched_setaffinity(0, everywhere)
    save(by_level("gemm"), rows, {"torch": torch.__version__, "numpy": np.__version__})


if __name__ == "__main__":
    main()
