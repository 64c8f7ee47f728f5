"""Ep room: `Buffer`, the original's first API, on a process group of CPU ranks.

In: bf16 (or FP8 with scales) tokens, top-k ids. Out: what the original's calls return, but ordered
(source rank, then token) in every form. `set_num_sms` sets communication threads.
Source: DeepEP `Buffer`; deviations in docs/differences.md.

# T tokens, R ranks, E experts, El experts of this rank, K top-k, H hidden, N rows received
"""

from __future__ import annotations

import math
import os
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from whalefall.arguments import flag, whole
from whalefall.ep import config as sizes
from whalefall.ep.arguments import ADDRESSES
from whalefall.ep.config import Config
from whalefall.ep.engine import CHUNK_BYTES, SLOTS, Engine
from whalefall.ep.events import EventHandle, EventOverlap
from whalefall.ep.torch.group import MpiGroup, TorchGroup
from whalefall.ep.torch.internode import Internode
from whalefall.ep.torch.low_latency import LowLatency
from whalefall.errors import ConfigError, DtypeError, LimitError

__all__ = ["Buffer"]


class Buffer(Internode, LowLatency):
    """The communication of one rank; making it is collective.

    Args:
        group: a `torch.distributed` process group; or None with `comm`.
        num_nvl_bytes: shared memory for the traffic within a host, a multiple of 128; address
            space, of which only what is used becomes memory.
        num_rdma_bytes: the same for the low-latency form (`get_low_latency_rdma_size_hint`).
        low_latency_mode: whether the low-latency form is wanted.
        num_qps_per_rank: accepted; there are no queue pairs here.
        allow_nvlink_for_low_latency_mode: accepted; within a host memory is always shared.
        allow_mnnvl: accepted.
        explicitly_destroy: `destroy` will be called; else the end of the object does it.
        enable_shrink: in the low-latency form failed ranks are masked instead of raising; not one
            through which ranks of another host send, unless it was the last of its host.
        comm: an mpi4py communicator.
    Raises: ConfigError for arguments that make no sense or differ between ranks; RankFailure.
    """

    num_sms: ClassVar[int] = 20

    def __init__(
        self,
        group: Any,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        explicitly_destroy: bool = False,
        enable_shrink: bool = False,
        comm: Any = None,
    ) -> None:
        if group is None and comm is None:
            raise ConfigError("Buffer: got neither group nor comm; one of the two is needed")
        for name, value in (("num_nvl_bytes", num_nvl_bytes), ("num_rdma_bytes", num_rdma_bytes)):
            if whole(f"Buffer: {name}", value, 0, ADDRESSES) % 128:
                raise ConfigError(f"Buffer: {name} is {value}, wanted a multiple of 128")
        if group is not None and not isinstance(group, dist.ProcessGroup):
            raise ConfigError(
                f"Buffer: group is a {type(group).__name__}, wanted a ProcessGroup of torch"
            )
        low_latency_mode = flag("Buffer: low_latency_mode", low_latency_mode)
        enable_shrink = flag("Buffer: enable_shrink", enable_shrink)
        if low_latency_mode and not num_rdma_bytes:
            raise ConfigError(
                "Buffer: low_latency_mode needs num_rdma_bytes; get_low_latency_rdma_size_hint "
                "gives it"
            )
        self.group = group
        meeting = MpiGroup(comm) if group is None else TorchGroup(group)
        self.rank, self.group_size = meeting.rank, meeting.size
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes
        self.low_latency_mode = low_latency_mode
        self.explicitly_destroy, self.enable_shrink = explicitly_destroy, enable_shrink
        self.nvshmem_qp_depth = int(os.environ.get("NVSHMEM_QP_DEPTH", "1024"))
        chunk = min(CHUNK_BYTES, num_nvl_bytes // SLOTS // 4096 * 4096) if num_nvl_bytes else 0
        self.runtime = Engine(
            meeting, chunk_bytes=chunk or CHUNK_BYTES,
            slot_bytes=-(-num_nvl_bytes // SLOTS // 4096) * 4096,
            low_latency_bytes=num_rdma_bytes if low_latency_mode else 0, shrink=enable_shrink,
        )  # fmt: skip

    # ---- the object itself

    def destroy(self) -> None:
        """Leave the group and free the memory.

        Raises: ConfigError unless made with `explicitly_destroy=True`.
        """
        if not self.explicitly_destroy:
            raise ConfigError("Buffer.destroy: made without explicitly_destroy=True; just drop it")
        self.runtime.close()

    def get_local_buffer_tensor(
        self,
        dtype: torch.dtype,
        size: torch.Size | None = None,
        offset: int = 0,
        use_rdma_buffer: bool = False,
    ) -> torch.Tensor:
        """This rank's shared memory as a tensor; its contents change with every call.

        Other ranks may read from it until they have returned from their last call too: synchronise
        the group before writing.

        Args:
            dtype: of the elements.
            size: shape; None: all of it, 1-D.
            offset: in bytes.
            use_rdma_buffer: the low-latency form's memory.
        """
        use_rdma_buffer = flag("get_local_buffer_tensor: use_rdma_buffer", use_rdma_buffer)
        if not isinstance(dtype, torch.dtype):
            raise DtypeError(
                f"get_local_buffer_tensor: dtype is a {type(dtype).__name__}, wanted a torch.dtype"
            )
        whole("get_local_buffer_tensor: offset", offset, 0, ADDRESSES)
        if size is not None and not isinstance(size, tuple | list):
            raise ConfigError(
                f"get_local_buffer_tensor: size is a {type(size).__name__}, wanted a torch.Size"
            )
        for n in size or ():
            whole("get_local_buffer_tensor: size", n, 0, ADDRESSES)
        exchange = self.runtime.low_latency if use_rdma_buffer else self.runtime.normal
        nbytes = self.num_rdma_bytes if use_rdma_buffer else self.num_nvl_bytes
        if exchange is None or not 0 <= offset <= nbytes:
            raise LimitError(f"Buffer: offset {offset} of a buffer of {nbytes} bytes")
        item = torch.empty(0, dtype=dtype).element_size()
        count = (nbytes - offset) // item if size is None else math.prod(size)
        if offset + count * item > nbytes:
            raise LimitError(
                f"Buffer: {count * item} bytes at {offset} of a buffer of {nbytes} bytes"
            )
        if count == 0:
            return torch.empty(size or (0,), dtype=dtype)
        memory = exchange.fabric.own_memory(offset, count * item)
        flat = torch.frombuffer(memory, dtype=dtype)
        return flat if size is None else flat.view(size)

    @staticmethod
    def is_sm90_compiled() -> bool:
        """False: no GPU code is in here."""
        return False

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        """Set the communication threads of dispatch and combine, for all buffers.

        Raises: ConfigError for an odd number.
        """
        if whole("set_num_sms: new_num_sms", new_num_sms, 0, 1 << 16) % 2:
            raise ConfigError(f"set_num_sms: got {new_num_sms}, wanted an even number")
        Buffer.num_sms = Buffer._threads = new_num_sms

    @staticmethod
    def capture() -> EventOverlap:
        """An event of here and now."""
        return EventOverlap(EventHandle())

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        """The original's values; for a number of ranks it does not know, the next larger one's."""
        return sizes.dispatch_config(num_ranks, Buffer.num_sms)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        """The original's values; for a number of ranks it does not know, the next larger one's."""
        return sizes.combine_config(num_ranks, Buffer.num_sms)

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        """Bytes for `num_rdma_bytes`; `num_ranks` does not matter."""
        return sizes.low_latency_size_hint(num_max_dispatch_tokens_per_rank, hidden, num_experts)

    def get_comm_stream(self) -> torch.cpu.Stream:
        """torch's stand-in for a stream; the communication thread needs none."""
        return torch.cpu.Stream()
