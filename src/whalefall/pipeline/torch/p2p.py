"""Pipeline room: tensors between ranks, over a torch.distributed group.

In: tensors of the agreed shapes. Out: sends and receives that are begun and waited for separately.
Every message carries a tag of its own, so order does not matter and nothing can be mixed up.
Source: DualPipe `set_p2p_tensor_shapes`, `set_p2p_tensor_dtype`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist

from whalefall.errors import ConfigError, DtypeError, RankFailure, ShapeError
from whalefall.pipeline.actions import Action

__all__ = ["Link", "set_p2p_tensor_dtype", "set_p2p_tensor_shapes", "settings"]

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
        self.tagged = dist.get_backend(self.group) == "gloo"  # NCCL ignores tags: order decides

    def _global(self, rank: int) -> int:
        return dist.get_global_rank(self.group, self.group_rank[rank])

    def _tag(self, action: Action, place: int, num_tensors: int) -> int:
        way = 0 if action.kind.endswith("F") else 1
        number = (action.task.chunk * 4096 + action.task.stage) * 2 + way
        return number * num_tensors + place if self.tagged else 0

    def send(self, action: Action, tensors: Sequence[torch.Tensor]) -> Callable[[], None]:
        """Begin to send tensors of the agreed shapes; the returned call waits."""
        shapes, dtype = settings()
        what = f"pipeline: stage {action.task.stage - (1 if action.kind[-1] == 'F' else -1)}"
        found = [tuple(tensor.shape) for tensor in tensors]
        if found != shapes:
            raise ShapeError(f"{what} sends shapes {found}; set_p2p_tensor_shapes says {shapes}")
        for tensor in tensors:
            if tensor.dtype != dtype:
                raise DtypeError(f"{what} sends {tensor.dtype}; set_p2p_tensor_dtype says {dtype}")
        kept = [tensor.detach().contiguous() for tensor in tensors]
        works = []
        with self._naming(action):
            for n, tensor in enumerate(kept):
                tag = self._tag(action, n, len(shapes))
                works.append(dist.isend(tensor, self._global(action.peer), self.group, tag))

        def wait() -> None:
            self._finish(works, action)
            kept.clear()  # alive until here: gloo reads them

        return wait

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
            self._finish(works, action)
            for tensor in tensors:
                tensor.requires_grad_(grad)

        return tensors, wait

    def _finish(self, works: Sequence[dist.Work | None], action: Action) -> None:
        with self._naming(action):
            for work in works:
                if work is not None:
                    work.wait()

    @contextmanager
    def _naming(self, action: Action) -> Iterator[None]:
        """A backend's error becomes one that names the other rank."""
        try:
            yield
        except RuntimeError as error:
            first = str(error).splitlines()[0]
            raise RankFailure(
                f"pipeline: rank {action.peer} failed or left during {action}, seen by rank "
                f"{self.rank}: {first}"
            ) from error
