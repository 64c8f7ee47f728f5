"""`deep_ep.utils.testing`: timing, by the wall clock.

Source: DeepEP dd758ca `deep_ep/utils/testing.py`.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

from whalefall.compat.deep_gemm.testing import suppress_stdout_stderr

__all__ = ["bench", "bench_kineto", "flush_l2_cache", "suppress_stdout_stderr"]


def flush_l2_cache(enabled: bool = True) -> None:
    """Nothing: a CPU's caches are the program's."""


def bench(
    fn: Callable[[], object],
    num_warmups: int = 50,
    num_tests: int = 50,
    post_fn: Callable[[], object] | None = None,
    flush_l2: bool = True,
) -> tuple[float, float, float]:
    """Mean, shortest and longest seconds of a call, the first one left out."""
    for _ in range(num_warmups):
        fn()
    seconds = []
    for _ in range(max(2, num_tests)):
        began = time.perf_counter()
        fn()
        seconds.append(time.perf_counter() - began)
        if post_fn is not None:
            post_fn()
    return statistics.mean(seconds[1:]), min(seconds[1:]), max(seconds[1:])


def bench_kineto(
    fn: Callable[[], object],
    kernel_names: str | tuple[str, ...],
    num_tests: int = 30,
    suppress_kineto_output: bool = False,
    trace_path: str | None = None,
    flush_l2: bool = True,
    barrier_comm_profiling: bool = False,
    num_kernels_per_period: int = 1,
    barrier: Callable[[], object] | None = None,
) -> Any:
    """Mean seconds of a call (a CPU has no kernels to tell apart: each name gets the whole, each of
    its `num_kernels_per_period` kernels an equal part). As in the original, nothing runs and a
    second is said where EP_USE_NVIDIA_TOOLS is set to 1."""
    skipped = os.environ.get("EP_USE_NVIDIA_TOOLS", "0") == "1"
    took = 1.0 if skipped else bench(fn, 1, num_tests)[0]
    each: Any = took
    if num_kernels_per_period > 1:
        each = [took / num_kernels_per_period] * num_kernels_per_period
    return each if isinstance(kernel_names, str) else [each] * len(kernel_names)
