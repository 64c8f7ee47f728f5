"""How the server ends: open answers finish, those that cannot are told so, the exit code is 0.

uvicorn alone cancels what is still open after its time limit, so that a client takes the text so
far for the whole answer; and it repeats the signal that ended it, so that the process dies of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from types import FrameType

import uvicorn

from whalefall.serve.worker import EngineWorker

__all__ = ["GRACE_S", "DrainingServer"]

GRACE_S = 2.0  # for a client to take the error that ends its answer


class DrainingServer(uvicorn.Server):
    """uvicorn's server with a drain.

    The first SIGTERM or SIGINT stops listening and lets open answers finish for `drain_s`; then, or
    at the second signal, each of them ends with an error, and a little later its connection.

    Args:
        config: without a time limit of its own.
        worker: whose requests are ended.
        drain_s: seconds.
    """

    def __init__(self, config: uvicorn.Config, worker: EngineWorker, drain_s: float) -> None:
        super().__init__(config)
        self._worker, self._drain_s = worker, drain_s
        self._hurry = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal came. It is not noted for repetition, as it is when uvicorn handles it."""
        if self.should_exit and self._loop is not None:
            self._loop.call_soon_threadsafe(self._hurry.set)
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to serve."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop listening, and return once nothing is open any more."""
        cut = asyncio.create_task(self._cut())
        await super().shutdown(sockets)
        cut.cancel()

    async def _cut(self) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._hurry.wait(), self._drain_s)
        self._worker.end_open()
        await asyncio.sleep(GRACE_S)
        for connection in list(self.server_state.connections):
            if connection.transport is not None:  # of a client that reads nothing
                connection.transport.abort()
