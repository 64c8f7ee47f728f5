"""Kernels of a layer as work (operations, bytes) and the time a device needs for it.

A `Kernel` is a roofline: the longer of its arithmetic and its memory (or link) time, each at the
share of the peak that published kernels of its class reach. Nothing is fitted to a trace.
"""

from __future__ import annotations

from dataclasses import dataclass

from whalefall.model.config import ModelConfig
from whalefall.plan.hardware_files import Hardware

__all__ = ["Kernel", "attention_weights", "combine", "dispatch", "expected_nodes", "gemm", "routed"]

GIGA, TERA = 1e9, 1e12
SCALE_BYTES = 4
BLOCK = 128


@dataclass(frozen=True)
class Kernel:
    """One kernel's work on one device and its time.

    Attributes:
        name, kind: what it is, and its class ("gemm", "attention", "dispatch", …).
        flops, bytes: operations, and bytes read from memory or sent over the link.
        seconds: its time.
        bound: "compute", "memory", "rdma" or "nvlink": which limit makes it.
    """

    name: str
    kind: str
    flops: float
    bytes: float
    seconds: float
    bound: str


def roofline(
    name: str, kind: str, flops: float, num_bytes: float, flop_s: float, byte_s: float
) -> Kernel:
    """A kernel at the longer of its two times."""
    compute, memory = flops / flop_s, num_bytes / byte_s
    bound = "compute" if compute >= memory else "memory"
    return Kernel(name, kind, flops, num_bytes, max(compute, memory), bound)


def gemm(
    name: str, tokens: float, weights: float, hardware: Hardware, share: float = 1.0
) -> Kernel:
    """An FP8 product of `tokens` rows with `weights` numbers that are read once.

    Args:
        share: of the device's arithmetic that is free for it (SMs not communicating).
    """
    rate = hardware.fp8_tflops * TERA * hardware.efficiency.gemm * share
    read = hardware.read_gb_s * GIGA * hardware.efficiency.read
    return roofline(name, "gemm", 2 * tokens * weights, weights, rate, read)


def attention_weights(config: ModelConfig, absorbed: bool) -> dict[str, float]:
    """Weight counts of the projections around core attention, by name."""
    hidden, heads = config.hidden_size, config.num_heads
    queries = heads * config.qk_head_dim
    rank = config.kv_lora_rank
    per_head = heads * rank
    weights = {
        "kv_a": float(hidden * config.latent_dim),
        "o": float(heads * config.v_head_dim * hidden),
    }
    if config.q_lora_rank:
        weights["q_a"] = float(hidden * config.q_lora_rank)
        weights["q_b"] = float(config.q_lora_rank * queries)
    else:
        weights["q"] = float(hidden * queries)
    if absorbed:
        weights["absorb_q"] = float(per_head * config.qk_nope_head_dim)
        weights["absorb_v"] = float(per_head * config.v_head_dim)
    else:
        weights["kv_b"] = float(per_head * (config.qk_nope_head_dim + config.v_head_dim))
    return weights


def expert_weights(config: ModelConfig) -> float:
    """Numbers in one routed expert."""
    return 3.0 * config.hidden_size * config.moe_intermediate_size


def routed(
    config: ModelConfig,
    tokens: float,
    local_experts: float,
    hardware: Hardware,
    share: float = 1.0,
) -> Kernel:
    """The grouped products of a layer's routed experts on one device.

    Args:
        tokens: tokens whose selections land here on average (`num_experts_per_tok` each).
        local_experts: experts held here; each one that is hit is read once.
    """
    rows = tokens * config.num_experts_per_tok
    hit = local_experts * (1 - (1 - 1 / local_experts) ** rows) if local_experts >= 1 else 0.0
    rate = hardware.fp8_tflops * TERA * hardware.efficiency.gemm * share
    read = hardware.read_gb_s * GIGA * hardware.efficiency.read
    work = 2 * rows * expert_weights(config)
    return roofline(
        "routed experts", "grouped gemm", work, hit * expert_weights(config), rate, read
    )


def prefill_attention(
    config: ModelConfig, tokens: float, context: float, hardware: Hardware, share: float = 1.0
) -> Kernel:
    """Core attention of prompt tokens over expanded heads; `context`: mean keys a token sees."""
    width = config.qk_head_dim + config.v_head_dim
    flops = 2 * tokens * context * config.num_heads * width
    rate = hardware.bf16_tflops * TERA * hardware.efficiency.attention_forward * share
    read = hardware.read_gb_s * GIGA * hardware.efficiency.read
    moved = 2 * tokens * config.num_heads * (2 * width)
    return roofline("core attention", "attention", flops, moved, rate, read)


def decode_attention(
    config: ModelConfig, tokens: float, context: float, hardware: Hardware, kv_bytes: int
) -> Kernel:
    """Absorbed MLA of one query a sequence; the latent cache is read once for all heads."""
    width = config.latent_dim + config.kv_lora_rank
    flops = 2 * tokens * context * config.num_heads * width
    rate = hardware.bf16_tflops * TERA * hardware.efficiency.mla_compute
    read = hardware.read_gb_s * GIGA * hardware.efficiency.mla_read
    moved = tokens * context * config.latent_dim * kv_bytes
    return roofline("core attention", "attention", flops, moved, rate, read)


def expected_nodes(config: ModelConfig, nodes: int) -> float:
    """Nodes that a token's experts lie on, expected under even routing, own node included.

    Group-limited routing lets a token into at most `topk_group` groups, and so on as many nodes.
    """
    spread = nodes * (1 - (1 - 1 / nodes) ** config.num_experts_per_tok)
    limit = config.topk_group if config.n_group > 1 else nodes
    return min(spread, float(limit), float(nodes))


def link(name: str, kind: str, rdma: float, nvlink: float, hardware: Hardware) -> Kernel:
    """A transfer at the slower of its two links."""
    rdma_s = rdma / (hardware.rdma_gb_s * GIGA * hardware.efficiency.rdma)
    nvlink_s = nvlink / (hardware.nvlink_gb_s * GIGA * hardware.efficiency.nvlink)
    bound = "rdma" if rdma_s >= nvlink_s else "nvlink"
    return Kernel(
        name, kind, 0.0, rdma if bound == "rdma" else nvlink, max(rdma_s, nvlink_s), bound
    )


def row_bytes(config: ModelConfig, fp8: bool) -> float:
    """Bytes of a token's hidden state on the wire."""
    hidden = config.hidden_size
    return hidden + hidden / BLOCK * SCALE_BYTES if fp8 else 2.0 * hidden


def dispatch(
    config: ModelConfig,
    tokens: float,
    nodes: int,
    hardware: Hardware,
    fp8: bool = True,
    per_expert: bool = False,
) -> Kernel:
    """Tokens on their way to the experts: once a node, or once an expert (low latency)."""
    return _exchange("dispatch", config, tokens, nodes, hardware, fp8, per_expert)


def combine(
    config: ModelConfig, tokens: float, nodes: int, hardware: Hardware, per_expert: bool = False
) -> Kernel:
    """The experts' BF16 results on their way back, by the same routes."""
    return _exchange("combine", config, tokens, nodes, hardware, False, per_expert)


def _exchange(
    kind: str,
    config: ModelConfig,
    tokens: float,
    nodes: int,
    hardware: Hardware,
    fp8: bool,
    per_expert: bool,
) -> Kernel:
    # DeepEP's published bandwidths, which the hardware files hold, count the rows for the sender's
    # own node too (its tests: num_rdma_token_sent); so they are counted here.
    row = tokens * row_bytes(config, fp8)
    picks = float(config.num_experts_per_tok)
    sent = picks if per_expert else expected_nodes(config, nodes)
    return link(kind, kind, row * sent if nodes > 1 else 0.0, row * picks, hardware)
