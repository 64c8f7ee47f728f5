"""KV on its way from a prefill rank to a decode rank: through shared memory, or over TCP.

In: pages of one prompt. Out: a `Transfer` that any rank of this host (or one that reaches the
port) can `fetch`. Memory is taken for what is under way and no longer.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from typing import Any

import msgspec
import numpy as np

from whalefall import comm
from whalefall.engine.kv_cache import KV_DTYPES
from whalefall.errors import LimitError, MissingError, WhalefallError
from whalefall.serve.units.messages import Transfer

__all__ = ["Outbox", "fetch"]

log = logging.getLogger("whalefall.serve")
LIMITS = comm.Limits(payload_bytes=1 << 40)
TIMEOUT_S = 30.0


class _Ask(msgspec.Struct):
    name: str


class _Found(msgspec.Struct):
    found: bool


class Outbox:
    """What a prefill rank keeps until it is fetched.

    Args:
        name: unique on this host; begins the regions' names.
        dtype: of the KV cache, as `KV_DTYPES` names it.
        token: the secret that fetchers over TCP must know.
        shared: use shared memory, and TCP only where that is full.
        host: address to listen on.
    """

    def __init__(
        self, name: str, dtype: str, token: bytes, shared: bool = True, host: str = "127.0.0.1"
    ) -> None:
        self._name, self._dtype, self._token, self._host = name, dtype, token, host
        self._shared = shared
        self._regions: dict[str, comm.Region] = {}
        self._arrays: dict[str, np.ndarray] = {}
        self._count = 0
        self._listener: socket.socket | None = None

    def put(self, key: str, pages: np.ndarray) -> Transfer:
        """Keep a prompt's pages [layers, blocks, 64, latent + rope]."""
        if self._shared:
            try:
                return self._share(key, pages)
            except LimitError as error:
                log.warning("%s; handing over through TCP", error)
        if self._listener is None:
            self._listener = comm.listen(self._host)
            threading.Thread(target=self._serve, name="hand-over", daemon=True).start()
        self._arrays[key] = np.ascontiguousarray(pages)
        port = self._listener.getsockname()[1]
        return Transfer(key, self._host, port, list(pages.shape), self._dtype)

    def _share(self, key: str, pages: np.ndarray) -> Transfer:
        self._count += 1
        region = comm.Region.create(f"{self._name}-{self._count}", max(1, pages.nbytes))
        raw: Any = np.frombuffer(region.view, np.uint8, pages.nbytes)
        raw.view(pages.dtype).reshape(pages.shape)[...] = pages
        del raw
        self._regions[key] = region
        return Transfer(str(region.name), "", 0, list(pages.shape), self._dtype)

    def release(self, key: str) -> None:
        """Give the memory back; unknown keys are ignored."""
        self._arrays.pop(key, None)
        region = self._regions.pop(key, None)
        if region is not None:
            region.close()

    def __len__(self) -> int:
        return len(self._regions) + len(self._arrays)

    def _serve(self) -> None:
        assert self._listener is not None
        while True:
            try:
                channel = comm.accept(self._listener, self._token, limits=LIMITS)
            except WhalefallError:
                continue  # a stranger
            except OSError:
                return
            threading.Thread(target=self._answer, args=(channel,), daemon=True).start()

    def _answer(self, channel: comm.Channel) -> None:
        with channel, contextlib.suppress(WhalefallError, OSError):
            channel.settimeout(TIMEOUT_S)
            ask, _ = channel.recv(_Ask)
            pages = self._arrays.get(ask.name)
            if pages is None:
                channel.send(_Found(False))
            else:
                channel.send(_Found(True), pages.view(np.uint8).reshape(-1))


def fetch(transfer: Transfer, token: bytes) -> np.ndarray:
    """The pages of a transfer, in memory of our own.

    Raises: MissingError if they are gone, or their rank is.
    """
    dtype = KV_DTYPES[transfer.dtype]
    pages = np.empty(transfer.shape, dtype)
    raw = pages.view(np.uint8).reshape(-1)
    if not transfer.port:
        with comm.Region.attach(transfer.name) as region:
            if region.nbytes < raw.nbytes:
                raise MissingError(f"hand-over: region {transfer.name} has {region.nbytes} bytes")
            raw[:] = np.frombuffer(region.view, np.uint8, raw.nbytes)
        return pages
    try:
        with comm.connect(transfer.host, transfer.port, token, limits=LIMITS) as channel:
            channel.settimeout(TIMEOUT_S)
            channel.send(_Ask(transfer.name))
            found, _ = channel.recv(_Found, lambda head, size: raw if head.found else bytearray())
    except OSError as error:
        raise MissingError(f"hand-over: {transfer.name}: {error}") from None
    if not found.found:
        raise MissingError(f"hand-over: nothing is kept for {transfer.name}")
    return pages
