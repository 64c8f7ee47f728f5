"""File-system room: a simulated client, a process around the client's core."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from whalefall.comm import crc32c
from whalefall.fs.core import effects
from whalefall.fs.core.client import ClientCore, Piece, RefreshRouting
from whalefall.fs.core.messages import Failed, ReadDone, Routing
from whalefall.fs.core.replica import Limits
from whalefall.fs.simulation.process import SimProcess

if TYPE_CHECKING:
    from whalefall.fs.simulation.world import World

__all__ = ["SimClient"]


class SimClient(SimProcess):
    """A client that runs one operation after another."""

    def __init__(self, world: World, name: str, retry_s: float) -> None:
        super().__init__(world, name)
        limits = Limits(world.lease_s, world.lease_s / 2, 0.0, 0.05, retry_s)
        self.core = ClientCore(
            name, limits, self.sim.clock, lambda n: self.sim.random.randrange(n), crc32c
        )
        self.managers = list(world.manager_names)

    def perform(self, effect: Any, resume: Callable[[Any], None]) -> None:
        if not isinstance(effect, RefreshRouting):
            super().perform(effect, resume)
            return
        call = effects.Call(0, self.core.routing.version, b"", 0.1)

        asked = self.managers[0]

        def got(result: Any) -> None:
            if isinstance(result, Exception) or isinstance(result[0], Failed):
                if self.managers[0] == asked:  # else another procedure has moved on already
                    self.managers.append(self.managers.pop(0))
                resume(None)
            else:
                resume(result[0] if isinstance(result[0], Routing) else None)

        self.call(asked, call, got)

    def read(self, chain: int, chunk: bytes, done: Callable[[Any], None]) -> None:
        """Read a chunk whole; `done` gets its bytes or the exception."""
        piece = Piece(chain, chunk, 0, 64, None)
        content: list[bytes] = [b""]

        def call_with_data(to: str, call: effects.Call, resume: Callable[[Any], None]) -> None:
            def got(result: Any) -> None:
                if not isinstance(result, Exception) and isinstance(result[0], ReadDone):
                    content[0] = result[1][0]
                resume(result)

            SimProcess.call(self, to, call, got)

        self.call = call_with_data  # type: ignore[method-assign]
        procedure = self.core.read([piece])
        self.start(procedure, lambda r: done(r if isinstance(r, Exception) else content[0]))
