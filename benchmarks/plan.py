"""How well the planner's rooflines foretell: the published train trace, our own kernels, the day.

    whalefall bench plan

Three parts. DeepSeek's published train trace against the model's kernel classes on the H800 file.
This machine's kernels against the rooflines of hardware `this`, whose limits are measured between
the kernels in the same run, and whose shares of them `plan.this_machine` measures with probes of
other shapes before. The simulated day against the published 226.75 nodes: it checks the
control loop and predicts nothing. Nothing is fitted to any of these.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable

import ml_dtypes
import numpy as np

from benchmarks._experts import choices, experts_of
from benchmarks.attention import Problem, huge
from tests.model.published import V3
from whalefall import gemm
from whalefall.gemm.linear import expert_structs
from whalefall.jit import machine
from whalefall.model.config import ModelConfig, parse_config
from whalefall.plan import kernels, published
from whalefall.plan.capacity import parse_unit
from whalefall.plan.hardware_files import Hardware, load_hardware
from whalefall.plan.this_machine import shares
from whalefall.plan.train_step import train_chunk_seconds
from whalefall.serve.published_cluster import cluster_spec, default_curve, published_day
from whalefall.serve.simulate import simulate
from whalefall.testing.benchmark import Row, interleave, save

E4M3 = ml_dtypes.float8_e4m3fn
BF16 = ml_dtypes.bfloat16
QUARTER = "within 25 %"
# The shape "mid" of the serving benchmark.
MID = V3 | {
    "hidden_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 16, "q_lora_rank": 768,
    "intermediate_size": 10944, "moe_intermediate_size": 1408, "n_routed_experts": 64,
    "num_experts_per_tok": 6, "n_shared_experts": 2, "first_k_dense_replace": 1, "n_group": 1,
    "topk_group": 1, "vocab_size": 32768,
}  # fmt: skip


def trace_rows(config: ModelConfig) -> list[Row]:
    """The seven kernel classes of the published train trace."""
    modelled = train_chunk_seconds(config, load_hardware("h800"), tokens=4096, nodes=8, layers=4)
    rows = []
    for name, milliseconds in published.TRAIN_TRACE_MS.items():
        ours = modelled[name] * 1e3
        near = abs(ours / milliseconds - 1) <= 0.25
        what = f"V3 on H800, 4 MoE layers, 4,096 tokens: {name}"
        ratio = ours / milliseconds
        rows.append(
            Row(what, "published train trace", QUARTER, ours, milliseconds, "ms", ratio, near)
        )
    return rows


def expert_call(config: ModelConfig, tokens: int) -> Callable[[], object]:
    """One layer's routed experts, of distinct memory, under even random routing."""
    experts, hidden, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
    store = huge((experts * 3, hidden * width // 2)).view(E4M3).reshape(experts, 3, -1)
    weights = experts_of(store, hidden, width)
    structs = expert_structs(weights)
    rng = np.random.default_rng(tokens)
    x = (rng.standard_normal((tokens, hidden)) * 0.01).astype(BF16)
    topk = config.num_experts_per_tok
    idx = choices(rng, tokens, experts, topk)
    out = np.empty((tokens, topk, hidden), BF16)
    # `weights` is named so that what the structs point into lives as long as the call.
    return lambda keep=weights: gemm.fused_experts(x, structs, idx, out=out)


def dense_call(tokens: int, n: int, k: int) -> Callable[[], object]:
    """One FP8 linear layer; several weights in turn where one would stay in the cache."""
    copies = max(1, (256 << 20) // (n * k)) if tokens < 32 else 1
    store = huge((copies, n * k // 2)).view(E4M3).reshape(copies, n, k)
    scale = np.full((-(-n // 128), -(-k // 128)), 0.01, np.float32)
    x = np.random.default_rng(1).standard_normal((tokens, k)).astype(BF16)
    out = np.empty((tokens, n), BF16)
    turn = iter(range(1 << 62))
    return lambda: gemm.fp8_linear(x, store[next(turn) % copies], scale, out=out)


def measured(base: Hardware, reads: list[float], peaks: list[float]) -> Hardware:
    """`this`, its limits those measured between the kernels' rounds."""
    dot = machine.bf16_flops() / machine.limits()["fma_flops"]
    peak = float(np.median(peaks)) / 1e12 * dot
    read = float(np.median(reads)) / 1e9
    return dataclasses.replace(base, read_gb_s=read, fp8_tflops=peak, bf16_tflops=peak)


def own_rows(config: ModelConfig, rounds: int) -> list[Row]:
    """This machine's kernels beside their rooflines."""
    n, k = config.intermediate_size, config.hidden_size
    decode = Problem(config.num_heads, [4096] * 8)
    calls: dict[str, Callable[[], object]] = {
        "dense gemm, 1 row": dense_call(1, n, k),
        "dense gemm, 512 rows": dense_call(512, n, k),
        "routed experts, 1 token": expert_call(config, 1),
        "routed experts, 512 tokens": expert_call(config, 512),
        "MLA decode, 8 x 4,096 keys": decode,
    }
    shares(measure=True)
    reads: list[float] = []
    peaks: list[float] = []
    limits: dict[str, Callable[[], object]] = {
        "read": lambda: reads.append(machine.read_bandwidth(1)),
        "peak": lambda: peaks.append(machine.fma_peak(1)),
    }
    took = interleave(calls | limits, rounds)
    this = measured(load_hardware("this"), reads, peaks)
    local = float(config.num_experts)
    foretold = {
        "dense gemm, 1 row": kernels.gemm("", 1, n * k, this),
        "dense gemm, 512 rows": kernels.gemm("", 512, n * k, this),
        "routed experts, 1 token": kernels.routed(config, 1, local, this),
        "routed experts, 512 tokens": kernels.routed(config, 512, local, this),
        "MLA decode, 8 x 4,096 keys": kernels.decode_attention(config, 8, 4096, this, 2),
    }
    rows = []
    for name, kernel in foretold.items():
        ours, theirs = kernel.seconds * 1e3, took[name].median_s * 1e3
        near = abs(ours / theirs - 1) <= 0.25
        note = f"bound by {kernel.bound}"
        what = f"mid shape, this machine: {name}"
        rows.append(Row(what, "measured", QUARTER, ours, theirs, "ms", ours / theirs, near, note))
    return rows


def day_row(config: ModelConfig, weight: int) -> Row:
    """The simulated day's nodes."""
    units = parse_unit("4x8"), parse_unit("18x8")
    hit_rate = published.HIT_TOKENS / published.INPUT_TOKENS
    spec = cluster_spec(config, load_hardware("h800"), *units, hit_rate)
    nodes = simulate(spec, published_day(default_curve(), weight)).average_nodes
    theirs = published.AVERAGE_NODES
    near = abs(nodes / theirs - 1) <= 0.05
    return Row(
        "simulated day, nodes on average", "published day", "within 5 %", nodes, theirs, "nodes",
        nodes / theirs, near, "checks the control loop, predicts nothing",
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="whalefall bench plan", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, a coarser day")
    quick = parser.parse_args().quick
    v3, mid = parse_config(V3), parse_config(MID)
    rows = [*trace_rows(v3), *own_rows(mid, 3 if quick else 9), day_row(v3, 4000 if quick else 300)]
    save("plan", rows)


if __name__ == "__main__":
    main()
