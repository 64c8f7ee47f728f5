"""Gemm room: FP8 and BF16 matrix products for CPUs, call-compatible with DeepGEMM.

In: numpy arrays or CPU torch tensors with block scales. Out: products written where the caller
says. Linear layers and fused experts over a checkpoint's own weights are the serving side.
Source: DeepGEMM; DeepSeek-V3 technical report 3.3.
"""

from whalefall.gemm.linear import ExpertWeights, fp8_linear, fused_experts, linear

__all__ = ["ExpertWeights", "fp8_linear", "fused_experts", "linear"]
