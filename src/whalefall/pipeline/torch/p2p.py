"""Pipeline room: tensors between ranks, over a torch.distributed group.

In: tensors of the agreed shapes. Out: sends and receives that are begun and waited for separately.
Every message carries a tag of its own, so order does not matter and nothing can be mixed up.
Source: DualPipe `set_p2p_tensor_shapes`, `set_p2p_tensor_dtype`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from whalefall import trace
from whalefall.errors import ConfigError, DtypeError, RankFailure, ShapeError
from whalefall.pipeline.actions import Action

__all__ = ["Link", "set_p2p_tensor_dtype", "set_p2p_tensor_shapes", "settings"]

Works = Callable[[], list[dist.Work | None]]
# gloo copies into the socket in the thread that sends (12 ms for 16 MiB, measured): where that
# outweighs waking another thread, it is not the computing one that does it
THREAD_BYTES = 1 << 20

_shapes: list[tuple[int, ...]] | None = None
_dtype: torch.dtype | None = None


def set_p2p_tensor_shapes(shapes: Sequence[Sequence[int]]) -> None:
    """The shapes of a micro-batch's tensors between stages, the same for every stage."""
    global _shapes
    _shapes = [tuple(shape) for shape in shapes]


def set_p2p_tensor_dtype(dtype: torch.dtype) -> None:
    """Their dtype."""
    global _dtype
    _dtype = dtype


def settings() -> tuple[list[tuple[int, ...]], torch.dtype]:
    """Shapes and dtype; ConfigError if the caller did not set them."""
    if _shapes is None or _dtype is None:
        raise ConfigError(
            "pipeline: call set_p2p_tensor_shapes() and set_p2p_tensor_dtype() before step()"
        )
    return _shapes, _dtype


class Link:
    """This rank's connections to the others of a pipeline.

    Args:
        group: the process group; None: the default one.
        rank_mapping: pipeline rank of each group rank; None: the same.
    """

    def __init__(
        self, group: dist.ProcessGroup | None = None, rank_mapping: Sequence[int] | None = None
    ) -> None:
        self.group = group if group is not None else dist.distributed_c10d._get_default_group()
        self.size = self.group.size()
        mapping = list(range(self.size)) if rank_mapping is None else list(rank_mapping)
        if sorted(mapping) != list(range(self.size)):
            raise ConfigError(
                f"pipeline: rank_mapping is {mapping}; wanted each of 0 … {self.size - 1} once"
            )
        self.rank = mapping[self.group.rank()]
        self.group_rank = [mapping.index(pipeline) for pipeline in range(self.size)]
        self._sender: ThreadPoolExecutor | None = None
        self.tagged = dist.get_backend(self.group) == "gloo"  # NCCL ignores tags: order decides

    def _global(self, rank: int) -> int:
        return dist.get_global_rank(self.group, self.group_rank[rank])

    def _tag(self, action: Action, place: int, num_tensors: int) -> int:
        way = 0 if action.kind.endswith("F") else 1
        number = (action.task.chunk * 4096 + action.task.stage) * 2 + way
        return number * num_tensors + place if self.tagged else 0

    def send(self, action: Action, tensors: Sequence[torch.Tensor]) -> Callable[[], Any]:
        """Begin to send tensors of the agreed shapes; the returned call waits.

        While a trace is recorded, the call gives when the message travelled: (start, end) in
        `time.perf_counter_ns`.
        """
        shapes, dtype = settings()
        what = f"pipeline: stage {action.task.stage - (1 if action.kind[-1] == 'F' else -1)}"
        found = [tuple(tensor.shape) for tensor in tensors]
        if found != shapes:
            raise ShapeError(f"{what} sends shapes {found}; set_p2p_tensor_shapes says {shapes}")
        for tensor in tensors:
            if tensor.dtype != dtype:
                raise DtypeError(f"{what} sends {tensor.dtype}; set_p2p_tensor_dtype says {dtype}")
        kept = [tensor.detach().contiguous() for tensor in tensors]
        start = time.perf_counter_ns()
        with self._naming(action):
            works = self._begin(kept, action)
        watch = _Watch(works) if trace.is_recording() else None

        def wait() -> tuple[int, int] | None:
            moved = None
            with self._naming(action):
                if watch is None:
                    _finish(works)
                else:
                    moved = start, watch.end_ns()
            kept.clear()  # alive until here: gloo reads them
            return moved

        return wait

    def _begin(self, tensors: Sequence[torch.Tensor], action: Action) -> Works:
        """Begin to send; the returned call gives what to wait for."""
        peer, count = self._global(action.peer), len(tensors)

        def begin() -> list[dist.Work | None]:
            return [
                dist.isend(tensor, peer, self.group, self._tag(action, n, count))
                for n, tensor in enumerate(tensors)
            ]

        if not self.tagged or sum(t.nbytes for t in tensors) < THREAD_BYTES:
            begun = begin()
            return lambda: begun
        if self._sender is None:
            self._sender = ThreadPoolExecutor(1, "pipeline send")
        return self._sender.submit(begin).result

    def receive(self, action: Action, grad: bool) -> tuple[list[torch.Tensor], Callable[[], None]]:
        """Begin to receive; the tensors are valid after the returned call."""
        shapes, dtype = settings()
        tensors = [torch.empty(shape, dtype=dtype) for shape in shapes]
        works = []
        with self._naming(action):
            for n, tensor in enumerate(tensors):
                tag = self._tag(action, n, len(shapes))
                works.append(dist.irecv(tensor, self._global(action.peer), self.group, tag))

        def wait() -> None:
            with self._naming(action):
                _finish(lambda: works)
            for tensor in tensors:
                tensor.requires_grad_(grad)

        return tensors, wait

    @contextmanager
    def _naming(self, action: Action) -> Iterator[None]:
        """A backend's error becomes one that names the other rank."""
        try:
            yield
        except RuntimeError as error:
            first = str(error).splitlines()[0]
            raise RankFailure(
                f"pipeline: rank {action.peer} failed or left during {action}, seen by rank "
                f"{self.rank}: {first}",
                rank=action.peer,
            ) from error


def _finish(works: Works) -> None:
    for work in works():
        if work is not None:
            work.wait()


class _Watch:
    """Sees when messages have left: a backend tells a thread that waits, and each one once."""

    def __init__(self, works: Works) -> None:
        self._works = works
        self._end_ns = 0
        self._error: RuntimeError | None = None
        self._thread = threading.Thread(target=self._run, name="pipeline send", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            _finish(self._works)
        except RuntimeError as error:
            self._error = error
        self._end_ns = time.perf_counter_ns()

    def end_ns(self) -> int:
        """When the last one had left; raises what the backend raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._end_ns
