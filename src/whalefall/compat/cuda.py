"""CUDA names of torch mapped to the CPU, for the originals' scripts on a machine without a GPU.

`emulate()` replaces the factories and moves that name a "cuda" device, and the handful of
`torch.cuda` calls such scripts make: synchronize, events (timed by the clock), device properties.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["emulate"]

_FACTORIES = (
    *("empty", "zeros", "ones", "full", "rand", "randn", "randint", "randperm", "arange"),
    *("tensor", "as_tensor", "eye", "linspace", "empty_strided", "scalar_tensor"),
    *("empty_like", "zeros_like", "ones_like", "rand_like", "randn_like", "full_like"),
)


class _Event:
    """A CUDA event by the wall clock."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.at_s = 0.0

    def record(self, *_: Any) -> None:
        self.at_s = time.perf_counter()

    def synchronize(self) -> None:
        """Nothing is ever pending."""

    def wait(self, *_: Any) -> None:
        """Nothing is ever pending."""

    def elapsed_time(self, end: _Event) -> float:
        return (end.at_s - self.at_s) * 1e3


def _is_cuda(device: Any) -> bool:
    return isinstance(device, int) or str(device).startswith("cuda")


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs and kwargs["device"] is not None and _is_cuda(kwargs["device"]):
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)

    return call


def _moved(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        args = tuple("cpu" if isinstance(a, str) and _is_cuda(a) else a for a in args)
        args = tuple(
            torch.device("cpu") if isinstance(a, torch.device) and _is_cuda(a) else a for a in args
        )
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs["device"] = "cpu"
        return function(self, *args, **kwargs)

    return call


def _on_gloo(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` makes a process group over gloo where it was told NCCL."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        args = tuple("gloo" if a == "nccl" else a for a in args)
        if kwargs.get("backend") == "nccl":
            kwargs["backend"] = "gloo"
        kwargs.pop("device_id", None)
        return function(*args, **kwargs)

    return call


def _gathered(function: Callable[..., Any]) -> Callable[..., Any]:
    """An all-gather that takes a stacked output, [ranks, *shape], as NCCL does; gloo wants rows."""

    @functools.wraps(function)
    def call(output: torch.Tensor, given: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        stacked = output.dim() == given.dim() + 1 and given.dim() > 0
        return function(output.flatten(0, 1) if stacked else output, given, *args, **kwargs)

    return call


def emulate() -> None:
    """Map CUDA to the CPU and NCCL to gloo in this process, for good; call it before the script's
    own imports.
    """
    dist.init_process_group = _on_gloo(dist.init_process_group)
    dist.new_group = _on_gloo(dist.new_group)
    dist.all_gather_into_tensor = _gathered(dist.all_gather_into_tensor)
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    torch.Tensor.to = _moved(torch.Tensor.to)  # type: ignore[method-assign,assignment]
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign,assignment]
    torch.Tensor.new_empty = _on_cpu(torch.Tensor.new_empty)  # type: ignore[method-assign]
    torch.set_default_device = lambda device: None  # type: ignore[assignment]
    cuda: Any = torch.cuda
    cuda.is_available = lambda: True
    cuda.device_count = lambda: 1
    cuda.current_device = lambda: 0
    cuda.set_device = lambda *_: None
    cuda.synchronize = lambda *_: None
    cuda.empty_cache = lambda: None
    cuda.get_device_capability = lambda *_: (9, 0)
    cuda.get_device_name = lambda *_: "whalefall on a CPU"
    cuda.get_device_properties = lambda *_: SimpleNamespace(
        name="whalefall on a CPU", major=9, minor=0, multi_processor_count=1, L2_cache_size=1 << 20
    )
    cuda.Event = _Event
