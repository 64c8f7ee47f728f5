"""Shares of this machine's measured peaks that our kernels reach, for `--hardware this`.

The shares come from one probe a class, of shapes that no published model has, each beside the peak
in the same moments. They are kept like the peaks (`whalefall doctor --measure` renews both).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import ml_dtypes
import numpy as np

from whalefall.attention import (
    flash_attn_varlen_func,
    flash_mla_with_kvcache,
    get_mla_metadata,
)
from whalefall.errors import WhalefallError
from whalefall.gemm import fp8_linear
from whalefall.jit import isa, machine, pool

__all__ = ["shares"]

E4M3, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16
ROUNDS = 7
FRESH_BYTES = 256 << 20  # weights and caches of a memory probe: more than any cache holds
# Not measured: the forward kernel's arithmetic takes 2.5 times as much, backwards.
BACKWARD_OF_FORWARD = 0.75
Probe = tuple[Callable[[], object], float]  # a call, and its operations or bytes


def shares(measure: bool = False) -> dict[str, float]:
    """Shares (0 to 1) of the peaks that the classes of kernels reach, as `Efficiency` names them.

    Takes about three seconds where they were not measured before, or with `measure`.
    """
    level, threads = isa.best_level(), pool.get_num_threads()
    key = f"{machine.cpu_model()}|{threads}|{level}|shares"
    return machine.kept(key, _measured, anew=measure)


def _measured() -> dict[str, float]:
    dots = machine.bf16_flops() / machine.limits()["fma_flops"]
    compute = _against(
        {
            "gemm": _product(rows=256, n=3072, k=1536),
            "attention_forward": _varlen(tokens=768),
            "mla_compute": _decode(heads=32, keys=1024, requests=4),
        },
        lambda: machine.fma_peak(1) * dots,
    )
    memory = _against(
        {
            "read": _product(rows=1, n=3072, k=1536),
            "mla_read": _decode(heads=1, keys=8192, requests=FRESH_BYTES // (8192 * 1152)),
        },
        lambda: machine.read_bandwidth(1),
    )
    found = {**compute, **memory}
    found["gemm_wgrad"] = found["gemm"]  # the same kernel over transposed operands
    found["attention_backward"] = BACKWARD_OF_FORWARD * found["attention_forward"]
    return found


def _against(probes: dict[str, Probe], peak: Callable[[], float]) -> dict[str, float]:
    """Each probe's rate over the peak, both by their medians, taken in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in probes}
    limits = []
    for number in range(ROUNDS + 1):
        limits.append(peak())
        for name, (call, _) in probes.items():
            start = time.perf_counter()
            call()
            if number:  # the first compiles
                seconds[name].append(time.perf_counter() - start)
    limit = statistics.median(limits)
    rates = {name: work / statistics.median(seconds[name]) for name, (_, work) in probes.items()}
    for name, rate in rates.items():
        if not rate > 0:
            raise WhalefallError(f"plan: the probe {name} took no time; measure again")
    return {name: min(1.0, rate / limit) for name, rate in rates.items()}


def _product(rows: int, n: int, k: int) -> Probe:
    """An FP8 linear; one row reads a different weight each time, as many as memory holds fresh."""
    copies = FRESH_BYTES // (n * k) if rows == 1 else 1
    weights = np.full((copies, n, k), 0x30, np.uint8).view(E4M3)
    scale = np.full((-(-n // 128), -(-k // 128)), 0.01, np.float32)
    x, out = np.ones((rows, k), BF16), np.empty((rows, n), BF16)

    def call() -> None:
        for weight in weights:
            fp8_linear(x, weight, scale, out=out)

    return call, float(copies * n * k * (1 if rows == 1 else 2 * rows))


def _decode(heads: int, keys: int, requests: int) -> Probe:
    """One token a request over its own pages of the latent cache."""
    pages = keys // 64
    cache = np.full((requests * pages, 64, 1, 576), 0.01, BF16)
    table = np.arange(requests * pages, dtype=np.int32).reshape(requests, pages)
    q = np.ones((requests, 1, heads, 576), BF16)
    lengths = np.full(requests, keys, np.int32)
    read, flops = cache.nbytes, 2.0 * requests * keys * heads * (576 + 512)
    return (
        lambda: flash_mla_with_kvcache(q, cache, table, lengths, 512, *get_mla_metadata()),
        float(read) if heads == 1 else flops,
    )


def _varlen(tokens: int) -> Probe:
    """A prompt in the expanded form, 8 heads of 192 and 128 columns."""
    q = np.ones((tokens, 8, 192), BF16)
    v = np.ones((tokens, 8, 128), BF16)
    ends = np.array([0, tokens], np.int32)
    flops = 2.0 * tokens * (tokens + 1) / 2 * 8 * (192 + 128)
    return lambda: flash_attn_varlen_func(q, q, v, ends, ends, tokens, tokens, causal=True), flops
