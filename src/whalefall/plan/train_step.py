"""One forward-and-backward pair of chunks in training, by class of kernel, on a device."""

from __future__ import annotations

from whalefall.model.config import ModelConfig
from whalefall.plan import kernels as k
from whalefall.plan.hardware_files import Hardware

__all__ = ["train_chunk_seconds"]

# Backward of core attention: five products where forward has two.
ATTENTION_BACKWARD = 2.5


def train_chunk_seconds(
    config: ModelConfig, hardware: Hardware, tokens: int, nodes: int, layers: int
) -> dict[str, float]:
    """Seconds by kernel class of one forward and one backward chunk that overlap (DualPipe).

    Args:
        tokens: tokens of one sequence, which is one GPU's chunk; attention is causal over it.
        nodes: nodes of the expert-parallel group.
        layers: MoE layers in the chunk.
    Returns: class → seconds: "dense gemm" and "grouped gemm" (forward and input gradients), "wgrad"
        (both), "attention forward", "attention backward", "dispatch", "combine".
    """
    share = hardware.efficiency.compute_sms
    gemm = hardware.fp8_tflops * k.TERA * hardware.efficiency.gemm * share
    wgrad = hardware.fp8_tflops * k.TERA * hardware.efficiency.gemm_wgrad * share
    bf16 = hardware.bf16_tflops * k.TERA * share
    expert = k.expert_weights(config)
    dense = sum(k.attention_weights(config, absorbed=False).values())
    dense += config.num_shared_experts * expert
    grouped = config.num_experts_per_tok * expert
    width = config.qk_head_dim + config.v_head_dim
    attention = 2.0 * tokens * (tokens / 2) * config.num_heads * width
    backward = ATTENTION_BACKWARD * attention
    forward_dispatch = k.dispatch(config, tokens, nodes, hardware).seconds
    # Backward of combine is a dispatch of BF16 gradients; backward of dispatch is a combine.
    backward_dispatch = k.dispatch(config, tokens, nodes, hardware, fp8=False).seconds
    seconds = {
        "dense gemm": 2 * 2 * tokens * dense / gemm,
        "grouped gemm": 2 * 2 * tokens * grouped / gemm,
        "wgrad": 2 * tokens * (dense + grouped) / wgrad,
        "attention forward": attention / (bf16 * hardware.efficiency.attention_forward),
        "attention backward": backward / (bf16 * hardware.efficiency.attention_backward),
        "dispatch": forward_dispatch + backward_dispatch,
        "combine": 2 * k.combine(config, tokens, nodes, hardware).seconds,
    }
    return {name: layers * value for name, value in seconds.items()}
