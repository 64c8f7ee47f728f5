"""Pipeline room: expert dispatch and combine, begun and waited for, forward and backward.

In: tokens with their experts. Out: rows at the experts, and back. A combine's backward is a
dispatch of gradients, a dispatch's backward a combine. `BufferExchange` does it over `ep.Buffer`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch

from whalefall.ep import Buffer

__all__ = ["BufferExchange", "Exchange", "Routed"]


class Routed(NamedTuple):
    """Rows that arrived: [N, H], local expert ids [N, K] (−1: not here), gate weights [N, K]."""

    rows: torch.Tensor
    expert: torch.Tensor
    weight: torch.Tensor
    handle: Any


class Exchange(Protocol):
    """Each call begins; the returned call waits and gives the result.

    An exchange records in the trace, under "communication", when its data moves.
    """

    def dispatch(
        self, tokens: torch.Tensor, expert: torch.Tensor, weight: torch.Tensor
    ) -> Callable[[], Routed]:
        """Tokens [T, H], global expert ids [T, K], gate weights [T, K] to the experts' ranks."""

    def combine(self, rows: torch.Tensor, handle: Any) -> Callable[[], torch.Tensor]:
        """Rows [N, H] back to their tokens [T, H], added up."""

    def combine_backward(self, grad: torch.Tensor, handle: Any) -> Callable[[], torch.Tensor]:
        """Gradients of tokens [T, H] to the rows [N, H] that were added up."""

    def dispatch_backward(
        self, grad: torch.Tensor, weight_grad: torch.Tensor, handle: Any
    ) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
        """Gradients of rows and gate weights back to their tokens, added up."""


class BufferExchange:
    """An exchange over this rank's `ep.Buffer`; its communication threads work meanwhile.

    Args:
        buffer: of the expert-parallel group.
        num_experts: of all ranks together.
    """

    def __init__(self, buffer: Buffer, num_experts: int) -> None:
        self.buffer = buffer
        self.num_experts = num_experts

    def dispatch(
        self, tokens: torch.Tensor, expert: torch.Tensor, weight: torch.Tensor
    ) -> Callable[[], Routed]:
        """As `Exchange`; tokens in bf16."""
        ranks, hosts, experts, is_in, _ = self.buffer.get_dispatch_layout(expert, self.num_experts)
        rows, ids, weights, _, handle, event = self.buffer.dispatch(
            tokens, None, ranks, hosts, is_in, experts, expert, weight, async_finish=True
        )

        def wait() -> Routed:
            event.current_stream_wait()
            return Routed(rows, ids, weights, handle)

        return wait

    def combine(self, rows: torch.Tensor, handle: Any) -> Callable[[], torch.Tensor]:
        """As `Exchange`."""
        tokens, _, event = self.buffer.combine(rows, handle, async_finish=True)
        return _after(event, tokens)

    def combine_backward(self, grad: torch.Tensor, handle: Any) -> Callable[[], torch.Tensor]:
        """As `Exchange`."""
        rows, *_, event = self.buffer.dispatch(grad, handle, async_finish=True)
        return _after(event, rows)

    def dispatch_backward(
        self, grad: torch.Tensor, weight_grad: torch.Tensor, handle: Any
    ) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
        """As `Exchange`."""
        tokens, weights, event = self.buffer.combine(
            grad, handle, topk_weights=weight_grad, async_finish=True
        )
        return _after(event, (tokens, weights))


def _after(event: Any, value: Any) -> Callable[[], Any]:
    """A wait for `event` that gives `value`."""

    def wait() -> Any:
        event.current_stream_wait()
        return value

    return wait
