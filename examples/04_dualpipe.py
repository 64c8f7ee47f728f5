"""Day 4, DualPipe: train 2 stages on 2 ranks, chunks from both ends, as in one process."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from whalefall.pipeline import DualPipe, set_p2p_tensor_dtype, set_p2p_tensor_shapes, sync_mirrors

CHUNKS, ROWS, WIDTH = 8, 4, 16


def stage(number: int) -> nn.Module:
    torch.manual_seed(number)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()).double()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(9)
    return torch.randn(CHUNKS * ROWS, WIDTH).double(), torch.randn(CHUNKS * ROWS, WIDTH).double()


def train(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    set_p2p_tensor_shapes([(ROWS, WIDTH)])
    set_p2p_tensor_dtype(torch.float64)
    pipe = DualPipe((stage(rank), stage(1 - rank)))  # stage r and its mirror
    x, y = batch()
    half = len(x) // 2
    # each end feeds half of the chunks; its labels belong to the other end's chunks
    mine, others = (slice(half), slice(half, None))[:: 1 if rank == 0 else -1]
    loss, _ = pipe.step(
        x[mine], num_chunks=CHUNKS, criterion=nn.functional.mse_loss, labels=[y[others]]
    )
    sync_mirrors(pipe)
    if rank == 0:
        model = nn.Sequential(stage(0), stage(1))
        for a, b in zip(x.chunk(CHUNKS), y.chunk(CHUNKS), strict=True):
            nn.functional.mse_loss(model(a), b).backward()
        pairs = zip(pipe.module[0].parameters(), model[0].parameters(), strict=True)
        error = max(float((p.grad - q.grad).abs().max()) for p, q in pairs)
        print(f"losses: {len(loss)}; gradients equal one process's: {error < 1e-12}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(train, (port,), nprocs=2)
