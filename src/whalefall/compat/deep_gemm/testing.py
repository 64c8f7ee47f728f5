"""`deep_gemm.testing`: closeness, timing and filters that the original's scripts use.

Source: DeepGEMM 2.6.1 `deep_gemm/testing/{numeric,bench,utils}.py`.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from typing import Any, Self

import torch

from whalefall.gemm.reference import calc_diff as _calc_diff

__all__ = [
    "assert_bitwise_equal",
    "bench",
    "bench_kineto",
    "calc_diff",
    "count_bytes",
    "empty_suppress",
    "get_arch_major",
    "ignore_env",
    "suppress_stdout_stderr",
    "test_filter",
]


def calc_diff(x: torch.Tensor, y: torch.Tensor) -> Any:
    """1 - 2 Σxy / Σ(x² + y²) in float64 as a tensor; 0.0 where both are zero."""
    if not (x.any() or y.any()):
        return 0.0
    return torch.tensor(_calc_diff(x, y), dtype=torch.float64)


def bench(
    fn: Callable[[], object],
    num_warmups: int = 5,
    num_tests: int = 10,
    high_precision: bool = False,
) -> float:
    """Mean seconds of a call, by the wall clock."""
    for _ in range(num_warmups):
        fn()
    start = time.perf_counter()
    for _ in range(num_tests):
        fn()
    return (time.perf_counter() - start) / num_tests


def bench_kineto(
    fn: Callable[[], object],
    kernel_names: str | tuple[str, ...],
    num_tests: int = 30,
    suppress_kineto_output: bool = False,
    trace_path: str | None = None,
    flush_l2: bool = True,
    with_multiple_kernels: bool = False,
    barrier: Callable[[], object] | None = None,
) -> float | tuple[float, ...]:
    """Mean seconds of a call (a CPU has no kernels to tell apart: each name gets the whole)."""
    took = bench(fn, 1, max(1, num_tests // 10))
    return took if isinstance(kernel_names, str) else tuple(took for _ in kernel_names)


def count_bytes(*tensors: Any) -> int:
    """Bytes of all tensors, nested in tuples and lists or None."""
    total = 0
    for tensor in tensors:
        if isinstance(tensor, (tuple, list)):
            total += count_bytes(*tensor)
        elif tensor is not None:
            total += tensor.numel() * tensor.element_size()
    return total


def assert_bitwise_equal(x: torch.Tensor, y: torch.Tensor, label: str = "") -> None:
    """AssertionError where any bit of x and y differs."""
    same = x.shape == y.shape and x.dtype == y.dtype
    if not same or not torch.equal(
        x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8)
    ):
        raise AssertionError(f"{label}: bits differ")


def get_arch_major() -> int:
    """9: behaviour follows the original's SM90 path where its paths differ."""
    return 9


def test_filter(condition: Callable[[], bool]) -> Callable[..., Any]:
    """Skip the decorated function where `condition()` is false."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if condition():
                return function(*args, **kwargs)
            print(f"{function.__name__}: filtered out")
            return None

        return call

    return decorate


def ignore_env(name: str, condition: Callable[[], bool]) -> Callable[..., Any]:
    """Run the decorated function without an environment variable where `condition()` holds."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            saved = os.environ.pop(name, None) if condition() else None
            try:
                return function(*args, **kwargs)
            finally:
                if saved is not None:
                    os.environ[name] = saved

        return call

    return decorate


class empty_suppress:
    """A block in which everything is printed."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class suppress_stdout_stderr(empty_suppress):
    """The same: nothing a CPU kernel prints needs suppressing."""
