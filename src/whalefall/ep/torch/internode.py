"""Ep room: the original's calls between hosts by name; `dispatch` and `combine` go there anyway."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from whalefall.ep.config import Config
from whalefall.ep.events import EventOverlap
from whalefall.ep.torch.given import Scaled
from whalefall.ep.torch.normal import Normal
from whalefall.errors import ConfigError

__all__ = ["Internode"]


class Internode(Normal):
    """The normal half of `Buffer`, with `internode_*`."""

    def internode_dispatch(
        self,
        x: Tensor | Scaled,
        handle: tuple[Any, ...] | None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        expert_alignment: int = 1,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Any, ...]:
        """`dispatch`, which goes between hosts by itself; `config` must be given.

        Raises: ConfigError without a config.
        """
        _given(config, "internode_dispatch", "get_dispatch_config")
        return self.dispatch(
            x, handle, num_tokens_per_rank, num_tokens_per_rdma_rank, is_token_in_rank,
            num_tokens_per_expert, topk_idx, topk_weights, expert_alignment, 0, config,
            previous_event, async_finish, allocate_on_comm_stream,
        )  # fmt: skip

    def internode_combine(
        self,
        x: Tensor,
        handle: tuple[Any, ...],
        topk_weights: Tensor | None = None,
        bias: Tensor | tuple[Tensor, Tensor] | None = None,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        """`combine`, which goes between hosts by itself; `config` must be given.

        Raises: ConfigError without a config.
        """
        _given(config, "internode_combine", "get_combine_config")
        return self.combine(
            x, handle, topk_weights, bias, config, previous_event, async_finish,
            allocate_on_comm_stream,
        )  # fmt: skip


def _given(config: Config | None, where: str, how: str) -> None:
    if config is None:
        raise ConfigError(f"Buffer.{where}: config is None; {how} gives it")
