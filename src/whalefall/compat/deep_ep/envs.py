"""`deep_ep.utils.envs`: how the original's scripts start their ranks.

Source: DeepEP dd758ca `deep_ep/utils/envs.py`.
"""

from __future__ import annotations

import os
import random

import torch
import torch.distributed as dist

__all__ = ["dist_print", "get_global_seed", "get_local_seed", "init_dist", "init_seed"]

_seeds = {"global": 0, "local": 0}


def init_seed(global_seed: int) -> None:
    """Seed torch and `random` with `global_seed` plus this rank."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    _seeds.update({"global": global_seed, "local": global_seed + rank})
    torch.manual_seed(_seeds["local"])
    random.seed(_seeds["local"])


def get_local_seed() -> int:
    """What this rank was seeded with."""
    return _seeds["local"]


def get_global_seed() -> int:
    """What all ranks' seeds are counted from."""
    return _seeds["global"]


def dist_print(s: str = "", once_in_node: bool = False) -> None:
    """Print on every rank, or on each node's first one only; a barrier follows."""
    if not once_in_node or int(os.environ.get("LOCAL_RANK", "0")) == 0:
        print(s, flush=True)
    dist.barrier()


def init_dist(
    local_rank: int, num_local_ranks: int, seed: int = 0
) -> tuple[int, int, dist.ProcessGroup]:
    """Join the process group, over gloo, at MASTER_ADDR:MASTER_PORT (127.0.0.1:8361).

    Args:
        local_rank: this process on its node; RANK is the node's number, WORLD_SIZE how many.
        num_local_ranks: processes of a node.
        seed: for `init_seed`.
    Returns: rank, ranks, a group of them all. torch's default dtype is bfloat16 from here on.
    """
    nodes, node = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    address = os.environ.get("MASTER_ADDR", "127.0.0.1")
    os.environ["LOCAL_RANK"] = str(local_rank)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://{address}:{os.environ.get('MASTER_PORT', '8361')}",
        world_size=nodes * num_local_ranks,
        rank=node * num_local_ranks + local_rank,
    )
    torch.set_default_dtype(torch.bfloat16)
    init_seed(seed)
    return (
        dist.get_rank(),
        dist.get_world_size(),
        dist.new_group(list(range(dist.get_world_size()))),
    )
