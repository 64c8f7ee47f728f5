"""`make traces`: the three traces that the original published, made by our own system.

train: two DualPipe stages on two expert ranks each, a forward and a backward overlapped (F&B);
prefill and decode: one step of a unit of two ranks in two micro-batches. Written to docs/traces/
(small), with what `whalefall trace summary` says of them. Starts processes of its own.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from whalefall import launch, trace

HERE = Path(__file__).parent
KINDS = ("train", "prefill", "decode")
HIDDEN, EXPERTS, TOP, ROWS, CHUNKS = 512, 8, 2, 128, 8
SHAPE = {
    "vocab_size": 2048,
    "hidden_size": 1024,
    "num_hidden_layers": 5,
    "first_k_dense_replace": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "q_lora_rank": 384,
    "kv_lora_rank": 256,
    "intermediate_size": 2816,
    "moe_intermediate_size": 704,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "max_position_embeddings": 2048,
}


def train_rank(rank: int, size: int, folder: str) -> None:
    """One of four: stage rank % 2 of a pipeline, expert rank rank // 2; records the second step."""
    import torch
    import torch.distributed as dist
    from torch import nn

    from whalefall.ep import Buffer
    from whalefall.pipeline import DualPipe, set_p2p_tensor_dtype, set_p2p_tensor_shapes
    from whalefall.pipeline.torch import BufferExchange, ExpertStage, Routed

    class Layer(ExpertStage):
        """A linear mixer for attention, a gate, and half of the experts."""

        def __init__(self, exchange: Any) -> None:
            super().__init__(exchange)
            self.mix = nn.Linear(HIDDEN, HIDDEN, bias=False)
            self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
            width = 2 * HIDDEN
            self.up = nn.Parameter(torch.randn(EXPERTS // 2, HIDDEN, width) / HIDDEN**0.5)
            self.down = nn.Parameter(torch.randn(EXPERTS // 2, width, HIDDEN) / width**0.5)

        def attention(self, x: torch.Tensor) -> Any:
            h = x + torch.tanh(self.mix(x))
            weight, expert = torch.softmax(self.gate(h), -1).topk(TOP, dim=-1)
            return h, h.bfloat16(), expert, weight

        def experts(self, routed: Routed) -> torch.Tensor:
            rows = routed.rows.float()
            out = torch.zeros_like(rows)
            for number in range(EXPERTS // 2):
                share = (routed.weight * (routed.expert == number)).sum(-1, keepdim=True)
                out = out + share * (torch.tanh(rows @ self.up[number]) @ self.down[number])
            return out.bfloat16()

    torch.set_num_threads(1)
    torch.manual_seed(rank)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size
    )
    pipelines = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    experts = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    buffers = [Buffer(experts[rank % 2], 1 << 24, 0, explicitly_destroy=True) for _ in range(2)]
    set_p2p_tensor_shapes([(ROWS, HIDDEN)])
    set_p2p_tensor_dtype(torch.float32)
    stages = [Layer(BufferExchange(buffer, EXPERTS)) for buffer in buffers]
    pipe = DualPipe((stages[0], stages[1]), process_group=pipelines[rank // 2])
    x = torch.randn(CHUNKS // 2 * ROWS, HIDDEN)
    for turn in range(2):
        dist.barrier()
        if turn:
            trace.start(f"train rank {rank}", rank=rank)
        loss = nn.functional.mse_loss
        with trace.span("step 1", "step"):
            pipe.step(x, num_chunks=CHUNKS, criterion=loss, labels=[x])
    trace.stop(f"{folder}/train-{rank}.json.gz")
    dist.barrier()
    for buffer in buffers:
        buffer.destroy()
    dist.destroy_process_group()


def serve_rank(rank: int, size: int, folder: str, model: str) -> None:
    """One of two ranks of a unit: a prefill step and a decode step, each recorded once warm."""
    from whalefall import ep, jit
    from whalefall.engine.core import Scheduled, Sequence
    from whalefall.engine.kv_cache import KVCache
    from whalefall.engine.step_arrays import step_batch
    from whalefall.model import Checkpoint, load_config, load_weights
    from whalefall.model.expert_parallel import ExpertParallelStep, even_placement

    jit.set_num_threads(1)
    config = load_config(model)
    weights = load_weights(Checkpoint(model), config)
    ranks = ep.Engine(ep.FileGroup(f"{folder}/ranks", rank, size), timeout_s=60)
    placement = even_placement(config, size, 2)
    step = ExpertParallelStep(weights, config, "w8a16", 512, ranks, placement, overlap=True)
    cache = KVCache(config.num_layers, 64, config.latent_dim, "bf16").array
    rng = np.random.default_rng(rank)
    sequences = [
        Sequence(
            f"{n}", rng.integers(4, 2000, 129).tolist(), 128, blocks=[3 * n, 3 * n + 1, 3 * n + 2]
        )
        for n in range(16)
    ]
    steps = {
        "prefill": [Scheduled(seq, 0, 128, True) for seq in sequences[:4]],
        "decode": [Scheduled(seq, 128, 1, False) for seq in sequences],
    }
    for kind, items in steps.items():
        last = np.cumsum([item.count for item in items]) - 1
        batch = step_batch(items, kind == "prefill", last)
        for turn in range(3):
            ranks.barrier()
            if turn == 2:
                trace.start(f"{kind} rank {rank}", rank=rank)
            step(batch, cache)
        trace.stop(f"{folder}/{kind}-{rank}.json.gz")
    ranks.close()


def tasks(function: str, size: int, **kwargs: Any) -> list[launch.Task]:
    """Ranks that run a function of this file."""
    return [
        launch.Task(
            f"{function} {rank}",
            f"_traces:{function}",
            kwargs={"rank": rank, "size": size, **kwargs},
            path=(str(HERE),),
        )
        for rank in range(size)
    ]


def main() -> None:
    """Make them."""
    from whalefall.model.synth import SHAPES, synth

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=HERE.parent / "docs" / "traces")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        model = synth(Path(folder) / "model", {**SHAPES["mid"], **SHAPE})
        launch.run(tasks("train_rank", 4, folder=folder), 300)
        launch.run(tasks("serve_rank", 2, folder=folder, model=str(model)), 300)
        for kind in KINDS:
            parts = sorted(Path(folder).glob(f"{kind}-*.json.gz"))
            output = arguments.output / f"{kind}.json.gz"
            events = trace.merge(parts, output)
            found = trace.summarize(output)
            print(
                f"| {kind} | {len(parts)} | {events:,} | {output.stat().st_size / 1e3:.0f} kB | "
                f"{found.span_us / 1e3:.1f} ms | {found.compute_us / 1e3:.1f} ms | "
                f"{found.communication_us / 1e3:.1f} ms | {found.overlap_ratio:.0%} |"
            )


if __name__ == "__main__":
    main()
