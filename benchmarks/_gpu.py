"""Times every Triton kernel beside the card's own limits and the published figures: `make gpu`.

Needs numpy, ml_dtypes, pytest, torch and Triton; runs from the source tree. A time is the median of
CUDA events around single calls, L2 overwritten before each. Past the deadline
(WHALEFALL_GPU_SECONDS, 300) what is left is named, not timed. Published figures are an H800's;
shapes are the originals'. Run dry, in Triton's interpreter, by tests/gemm/test_triton.py; not run
on a GPU.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

SECONDS = 300.0
DENSE = [(2112, 7168), (24576, 1536), (7168, 16384), (4096, 7168), (7168, 2048)]  # N, K


@dataclass(frozen=True)
class Timing:
    """One row: what is called, its arithmetic and its bytes, and what others published for it."""

    name: str
    call: Callable[[], Any]
    flops: float
    moved: float
    published: str


def missing() -> str | None:
    """What this machine lacks for the kernels, in one line."""
    for module in ("torch", "triton", "ml_dtypes", "pytest"):
        try:
            __import__(module)
        except ImportError:
            return f"no {module}: python3 cannot import it; use the python3 that has it"
    import torch

    if not torch.cuda.is_available():
        return "no CUDA device: torch sees none; run it where nvidia-smi lists one"
    return None


def milliseconds(call: Callable[[], Any]) -> float:
    """The median of 20 calls by CUDA events, after 3 that count nothing; L2 is cold."""
    import torch

    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    times = []
    for i in range(23):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        if i >= 3:
            times.append(begin.elapsed_time(end))
    return statistics.median(times)


def limits(device: str, size: int) -> Iterator[Timing]:
    """The card's copy bandwidth, and its BF16 rate by cuBLAS."""
    import torch

    x = torch.empty(size << 17, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    yield Timing("copy", lambda: y.copy_(x), 0, 2 * x.numel(), "3,350 GB/s (memory, H800)")
    a = torch.randn(size, size, device=device).bfloat16()
    name = f"torch bf16 {size}^3"
    yield Timing(name, lambda: a @ a, 2 * size**3, 6 * size**2, "990 TFLOPS (peak, H800)")


def weights(device: str, *shape: int) -> Any:
    """Random FP8 matrices with a scale for each 128 x 128."""
    import torch

    lead, n, k = shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128)
    values = torch.randn(shape, device=device).to(torch.float8_e4m3fn)
    return values, torch.rand(*lead, n, k, device=device) + 0.5


def products(device: str, part: int) -> Iterator[Timing]:
    """FP8 products: dense, grouped contiguous, masked; and the cast. `part` divides all sizes."""
    import torch

    from whalefall.gemm import triton as kernels

    def rows(m: int, k: int) -> Any:
        return kernels.per_token_cast_to_fp8(torch.randn(m, k, device=device), False)

    bf16 = torch.bfloat16
    for n, k in [(n // part, k // part) for n, k in DENSE]:
        m = 4096 // part
        a, b, d = rows(m, k), weights(device, n, k), torch.empty(m, n, dtype=bf16, device=device)
        yield Timing(
            f"fp8_gemm_nt {m} x {n} x {k}",
            lambda a=a, b=b, d=d: kernels.fp8_gemm_nt(a, b, d),
            *(2 * m * n * k, m * k + n * k + 2 * m * n, "1,350-1,550 TFLOPS"),
        )
    groups, each, n, k = max(2, 8 // part), max(128, 4096 // part), 4096 // part, 7168 // part
    m = groups * each
    a, b = rows(m, k), weights(device, groups, n, k)
    flops, moved = 2 * m * n * k, m * k + groups * n * k + 2 * m * n
    index = torch.arange(groups, dtype=torch.int32, device=device).repeat_interleave(each)
    d = torch.empty(m, n, dtype=bf16, device=device)
    yield Timing(
        f"m_grouped contiguous {groups} x {each} x {n} x {k}",
        lambda: kernels.m_grouped_fp8_gemm_nt_contiguous(a, b, d, index),
        *(flops, moved, "1,350-1,550 TFLOPS (dense)"),
    )
    tall = tuple(x.view(groups, each, -1) for x in a)
    counts = torch.full((groups,), each, dtype=torch.int32, device=device)
    yield Timing(
        f"m_grouped masked {groups} x {each} x {n} x {k}",
        lambda: kernels.m_grouped_fp8_gemm_nt_masked(
            tall, b, d.view(groups, each, n), counts, each
        ),
        *(flops, moved, "1,350-1,550 TFLOPS (dense)"),
    )
    x = torch.randn(16384 // part, 7168 // part, device=device).to(bf16)
    for ue8m0 in (False, True):
        yield Timing(
            f"per_token_cast_to_fp8 {list(x.shape)}{' UE8M0' if ue8m0 else ''}",
            lambda ue8m0=ue8m0: kernels.per_token_cast_to_fp8(x, ue8m0),
            *(0, x.numel() * (2 + 1 + 4 / 128), "none"),
        )


def cache_of(device: str, dtype: Any, blocks: int, fp8: bool) -> Any:
    """A cache of random rows; FP8: random codes (none is NaN), scales below 1, random rope."""
    import torch

    if not fp8:
        return (torch.randn(blocks, 64, 1, 576, device=device) / 10).to(dtype)
    cache = torch.randint(0, 127, (blocks, 64, 1, 656), device=device, dtype=torch.uint8)
    cache[..., :512] |= torch.randint_like(cache[..., :512], 0, 2) << 7
    cache[..., 512:528] = torch.rand(blocks, 64, 1, 4, device=device).view(torch.uint8)
    rope = (torch.randn(blocks, 64, 1, 64, device=device) / 10).bfloat16()
    cache[..., 528:] = rope.view(torch.uint8)
    return cache


def decodes(device: str, dtype: Any, part: int) -> Iterator[Timing]:
    """MLA decode: BF16 with 1 head (memory) and 128 (arithmetic), FP8, and sparse over both."""
    import torch

    from whalefall.attention.triton import decode

    batch, topk = max(2, 128 // part), max(16, 2048 // part)
    for heads, tokens, keys, fp8, sparse in (
        (1, 1, 8192, False, False),
        (128, 1, 4096, False, False),
        (128, 2, 4096, False, False),
        (128, 1, 4096, True, False),
        (128, 2, 8192, False, True),
        (128, 2, 8192, True, True),
    ):
        heads, keys = max(1, heads // part), max(64, keys // part)
        blocks = batch * keys // 64
        q = (torch.randn(batch, tokens, heads, 576, device=device) / 10).to(dtype)
        cache = cache_of(device, dtype, blocks, fp8)
        where = torch.randperm(blocks, device=device).int().view(batch, -1)
        if sparse:
            shape = (batch, tokens, topk)
            where = torch.randint(0, blocks * 64, shape, device=device, dtype=torch.int32)
        seen = topk if sparse else keys
        lengths = torch.full((batch,), seen, device=device, dtype=torch.int32)
        row = 656 if fp8 else 1152
        read = batch * seen * row * (tokens if sparse else 1)
        published = "410 TFLOPS" if sparse else "660 TFLOPS, 3,000 GB/s"
        yield Timing(
            f"MLA decode {'sparse ' if sparse else ''}{'fp8' if fp8 else 'bf16'}, {heads} heads, "
            f"{batch} x {tokens} tokens, {seen} keys",
            lambda q=q, cache=cache, where=where, lengths=lengths, fp8=fp8, sparse=sparse: decode(
                q, cache, where, lengths, 576**-0.5, False, fp8, sparse
            ),
            2 * heads * tokens * batch * seen * (576 + 512),
            read + q.numel() * 2 + q.numel() // 576 * 512 * 2,
            published + ("" if fp8 == sparse else f" (of {'bf16' if fp8 else 'fp8'})"),
        )


def every(device: str, dtype: Any, part: int) -> Iterator[Timing]:
    """All timings; `part` divides their sizes."""
    yield from limits(device, 8192 // part)
    yield from products(device, part)
    yield from decodes(device, dtype, part)


def report(
    timings: Iterator[Timing], clock: Callable[[Callable[[], Any]], float], deadline: float
) -> int:
    """Prints a row for each timing; returns how many the deadline left out."""
    left = 0
    print(f"{'what':62}{'ms':>9}{'TFLOPS':>9}{'GB/s':>8}  published (H800)")
    for timing in timings:
        if time.monotonic() > deadline:
            left += 1
            print(f"{timing.name:62}{'not timed: past the deadline':>28}")
            continue
        ms = clock(timing.call)
        rate = f"{timing.flops / ms / 1e9:.0f}" if timing.flops else "-"
        print(
            f"{timing.name:62}{ms:9.3f}{rate:>9}{timing.moved / ms / 1e6:8.0f}  {timing.published}",
            flush=True,
        )
    return left


def main() -> int:
    lacks = missing()
    if lacks:
        print(f"benchmarks/_gpu.py: {lacks}")
        return 2
    if sys.argv[1:] == ["--check"]:
        return 0
    import torch
    import triton

    deadline = time.monotonic() + float(os.environ.get("WHALEFALL_GPU_SECONDS", SECONDS))
    versions = f"torch {torch.__version__}, Triton {triton.__version__}"
    print(f"{torch.cuda.get_device_name()}, {versions}; medians of CUDA events, L2 cold")
    left = report(every("cuda", torch.bfloat16, 1), milliseconds, deadline)
    if left:
        print(f"{left} timings left out: WHALEFALL_GPU_SECONDS={SECONDS:.0f} gives more time")
    return 0


if __name__ == "__main__":
    sys.exit(main())
