"""What the operator sets, checked once at start."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from whalefall.arguments import finite, whole
from whalefall.errors import ConfigError

__all__ = ["Settings"]


@dataclass(frozen=True)
class Settings:
    """The server's limits and identity.

    Attributes:
        model_name: the name that /v1/models shows and requests may use.
        host: the address to listen on; anything but loopback needs `api_key`.
        api_key: the bearer token every /v1 request must carry; None: none.
        max_queue: requests that may wait for the engine; one more gets a 429.
        max_request_bytes: the largest request body.
        keep_alive_s: seconds of silence after which a stream sends a comment.
        node_hour: what this machine costs an hour, in dollars, for the ledger.
        drain_s: seconds that open answers get to finish once the server is told to end.
    """

    model_name: str
    host: str = "127.0.0.1"
    api_key: str | None = None
    max_queue: int = 256
    max_request_bytes: int = 8 << 20
    keep_alive_s: float = 10.0
    node_hour: float = 0.10
    drain_s: float = 30.0

    def __post_init__(self) -> None:
        if not self.api_key and not is_loopback(self.host):
            raise ConfigError(
                f"serve: --host {self.host} is reachable from elsewhere and needs --api-key KEY"
            )
        whole("serve: --max-queue", self.max_queue, 1)
        whole("serve: --max-request-bytes", self.max_request_bytes, 1024)
        finite("serve: --node-hour", self.node_hour, 0)
        finite("serve: --drain-seconds", self.drain_s, 0)


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
