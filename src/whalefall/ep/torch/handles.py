"""Ep room: the handles of `Buffer`: tuples as the original's, made when somebody looks inside.

Our engine needs none of their tensors, so a caller that only passes a handle on pays nothing. What
describes the original's channels is given for one channel (docs/differences.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import numpy as np
import torch

from whalefall.ep.events import EventHandle
from whalefall.ep.halves import Half
from whalefall.ep.handle import Handle
from whalefall.errors import ConfigError

__all__ = ["DispatchHandle", "LowLatencyHandle"]


class DispatchHandle(tuple[Any, ...]):
    """Of `Buffer.dispatch`: 6 tensors within a host, 10 between hosts.

    Attributes:
        native: the engine's handle; waits for an asynchronous dispatch whose counts are unknown.
    """

    _native: Callable[[], Handle]

    @classmethod
    def of(cls, native: Callable[[], Handle], num_hosts: int) -> DispatchHandle:
        """A handle whose engine handle `native()` gives."""
        made = cls((None,) * (6 if num_hosts == 1 else 10))
        made._native = native
        return made

    @property
    def native(self) -> Handle:
        """The engine's handle."""
        return self._native()

    @cached_property
    def _tensors(self) -> tuple[Any, ...]:
        handle = self.native
        prefix = np.cumsum(handle.rows, 0).astype(np.int32)  # [i][r]: rows to r from ranks 0 … i
        rank = handle.rank
        in_rank = torch.from_numpy(handle.in_rank.copy())  # whatever the caller does with it
        head = np.where(handle.in_rank, np.cumsum(handle.in_rank, 0) - 1, -1).astype(np.int32)
        source = torch.from_numpy(handle.token[: handle.num_rows].copy())
        if len(self) == 6:
            sent = handle.rows[rank].astype(np.int32)[:, None]
            received = handle.order_start[:-1].astype(np.int32)[:, None]
            return (
                torch.from_numpy(prefix), torch.from_numpy(sent), torch.from_numpy(received),
                source, in_rank, torch.from_numpy(head),
            )  # fmt: skip
        hosts = handle.topology.hosts
        touched = np.stack([handle.in_rank[:, list(h)].any(1) for h in hosts], 1)  # [T, H]
        from_host = np.array([handle.rows[list(h), rank].sum() for h in hosts], np.int32)
        host_head = np.where(touched, np.cumsum(touched, 0) - 1, -1).astype(np.int32)
        meta = np.zeros((handle.num_rows, 8), np.uint8)
        ranks = np.repeat(np.arange(len(handle.tokens)), np.diff(handle.order_start))
        meta[:, :4] = ranks.astype(np.int32)[:, None].view(np.uint8)
        arrays = (
            touched.sum(0).astype(np.int32)[:, None], handle.rows[rank].astype(np.int32)[:, None],
            from_host[:, None], np.cumsum(from_host).astype(np.int32),
            handle.order_start[:-1].astype(np.int32)[:, None],
            handle.order_start[1:].astype(np.int32), meta, host_head, head,
        )  # fmt: skip
        return (in_rank, *(torch.from_numpy(a) for a in arrays))

    def __getitem__(self, at: Any) -> Any:
        return self._tensors[at]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._tensors)


class LowLatencyHandle(tuple[Any, ...]):
    """Of `low_latency_dispatch`: (src_info, layout_range, max tokens, hidden, experts).

    Attributes:
        native: the engine's handle; waits for an asynchronous dispatch.
    """

    _native: Handle
    _event: EventHandle | None
    _half: Half

    @classmethod
    def of(
        cls, fields: tuple[Any, ...], native: Handle, event: EventHandle | None, half: Half
    ) -> LowLatencyHandle:
        """A handle whose counts are there after the event, where there is one, or the half."""
        made = cls(fields)
        made._native, made._event, made._half = native, event, half
        return made

    @property
    def native(self) -> Handle:
        """The engine's handle.

        Raises: ConfigError while the dispatch's hook has not been called; what the dispatch raised.
        """
        if self._event is not None:
            self._event.current_stream_wait()
        elif self._half.is_left:
            raise ConfigError(
                "low latency: handle is of a dispatch whose hook was not called; call it first"
            )
        self._half.end()  # only repeats its failure
        return self._native
