"""Ep room: which ranks share a host, and who receives for whom from other hosts. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from whalefall.errors import ConfigError

__all__ = ["MAX_LOCAL_RANKS", "MAX_RANKS", "Topology"]

MAX_RANKS = 256
MAX_LOCAL_RANKS = 64


@dataclass(frozen=True)
class Topology:
    """The hosts of a group.

    Attributes:
        hosts: the ranks of each host, ascending; hosts in the order of their first ranks.
        processes: which process each rank is, so that groups can be told apart.
    """

    hosts: tuple[tuple[int, ...], ...]
    processes: tuple[str, ...] = ()

    @classmethod
    def from_names(cls, names: Sequence[str], processes: Sequence[str] = ()) -> Topology:
        """From each rank's host name, and process.

        Raises: ConfigError for groups that are too large, or where a host's ranks are no
            neighbours (expert ranges of a host must be contiguous).
        """
        if len(names) > MAX_RANKS:
            raise ConfigError(f"ep: {len(names)} ranks, wanted at most {MAX_RANKS}")
        order = list(dict.fromkeys(names))
        hosts = tuple(tuple(r for r, n in enumerate(names) if n == name) for name in order)
        for name, ranks in zip(order, hosts, strict=True):
            if len(ranks) > MAX_LOCAL_RANKS:
                raise ConfigError(
                    f"ep: host {name} has {len(ranks)} ranks, wanted at most {MAX_LOCAL_RANKS}"
                )
            if ranks != tuple(range(ranks[0], ranks[0] + len(ranks))):
                raise ConfigError(f"ep: ranks {ranks} of host {name} are no neighbours; renumber")
        return cls(hosts, tuple(processes))

    @property
    def num_ranks(self) -> int:
        """Ranks of all hosts."""
        return sum(len(ranks) for ranks in self.hosts)

    def host_of(self, rank: int) -> int:
        """The host of a rank."""
        return next(h for h, ranks in enumerate(self.hosts) if rank in ranks)

    def proxy(self, rank: int, host: int) -> int:
        """The rank that stands for `rank` on `host`: itself at home, else the one of its place."""
        ranks = self.hosts[host]
        if rank in ranks:
            return rank
        return ranks[self.hosts[self.host_of(rank)].index(rank) % len(ranks)]

    def served(self, rank: int) -> list[int]:
        """The ranks of other hosts whose proxy `rank` is."""
        host = self.host_of(rank)
        return [
            r
            for r in range(self.num_ranks)
            if self.host_of(r) != host and self.proxy(r, host) == rank
        ]
