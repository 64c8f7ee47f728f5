"""Train room: which rank is what, and the groups that add gradients up.

In: pipeline, expert and data sizes. Out: this rank's place and its process groups.
Rank = (data · experts + expert) · pipeline + stage place: neighbours in a pipeline are neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from whalefall.train.recipe import Parallel

__all__ = ["Groups", "Place", "place_of"]


@dataclass(frozen=True)
class Place:
    """Where a rank is in each direction."""

    data: int
    expert: int
    pipeline: int

    def shard(self, parallel: Parallel) -> int:
        """Which rows of a step are this rank's."""
        return self.data * parallel.expert + self.expert


def place_of(rank: int, parallel: Parallel) -> Place:
    """A rank's place."""
    shard, stage = divmod(rank, parallel.pipeline)
    data, expert = divmod(shard, parallel.expert)
    return Place(data, expert, stage)


@dataclass(frozen=True)
class Groups:
    """This rank's process groups.

    Attributes:
        pipeline: the stages of its shard.
        expert: the ranks among which experts are spread, same stage.
        shards: all that hold the same dense weights.
        copies: all that hold the same experts.
        ends: the pipeline's first and last rank (elsewhere a group that is not this rank's).
    """

    place: Place
    pipeline: Any
    expert: Any
    shards: Any
    copies: Any
    ends: Any

    @classmethod
    def make(cls, parallel: Parallel) -> Groups:
        """Make all groups; collective over the default group."""
        places = [place_of(rank, parallel) for rank in range(parallel.ranks)]
        place = places[dist.get_rank()]
        keys: dict[str, Callable[[Place], object]] = {
            "pipeline": lambda p: (p.data, p.expert),
            "expert": lambda p: (p.data, p.pipeline),
            "shards": lambda p: p.pipeline,
            "copies": lambda p: (p.expert, p.pipeline),
        }
        found: dict[str, Any] = {}
        for name, key in keys.items():
            for value in dict.fromkeys(map(key, places)):
                ranks = [rank for rank, p in enumerate(places) if key(p) == value]
                group = dist.new_group(ranks)
                if key(place) == value:
                    found[name] = group
        found["ends"] = None
        ends = {0, parallel.pipeline - 1}
        for value in dict.fromkeys(map(keys["pipeline"], places)):
            same = [r for r, p in enumerate(places) if keys["pipeline"](p) == value]
            group = dist.new_group([r for r in same if places[r].pipeline in ends])
            if keys["pipeline"](place) == value:
                found["ends"] = group
        return cls(place, **found)
