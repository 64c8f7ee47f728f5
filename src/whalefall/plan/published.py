"""What was published about one day (24 h from 2025-02-27 12:00 local) of the V3/R1 system.

Nothing here is computed: these are citations. Source: DeepSeek, "One More Thing: DeepSeek-V3/R1
Inference System Overview" (open-infra-index, day 6).
"""

from __future__ import annotations

__all__ = [
    "AVERAGE_NODES",
    "COST_USD",
    "DECODE_TOKENS_S_NODE",
    "GPUS_PER_NODE",
    "GPU_HOUR_USD",
    "HIT_TOKENS",
    "INPUT_TOKENS",
    "MARGIN",
    "MEAN_KV_LENGTH",
    "NODE_STEPS",
    "OUTPUT_TOKENS",
    "PEAK_NODES",
    "PREFILL_TOKENS_S_NODE",
    "R1_PRICES",
    "REVENUE_CNY",
    "REVENUE_USD",
    "TRAIN_TRACE_MS",
    "V3_PRICES",
]

PEAK_NODES = 278
AVERAGE_NODES = 226.75
GPUS_PER_NODE = 8
GPU_HOUR_USD = 2.0
COST_USD = 87_072.0

INPUT_TOKENS = 608e9
HIT_TOKENS = 342e9
OUTPUT_TOKENS = 168e9
MEAN_KV_LENGTH = 4_989
PREFILL_TOKENS_S_NODE = 73_700.0
DECODE_TOKENS_S_NODE = 14_800.0

# Dollars per million tokens: input found in the cache, input not found, output.
R1_PRICES = (0.14, 0.55, 2.19)
V3_PRICES = (0.07, 0.27, 1.10)
# From token counts that are not public in full precision; ours differ (see docs/plan.md).
REVENUE_USD = 562_027.0
REVENUE_CNY = 4_090_000.0
MARGIN = 5.45

# Nodes in use from an hour of the local day on; the chart starts at noon.
NODE_STEPS = (
    (12.0, 278),
    (24.0, 218),
    (25.25, 188),
    (26.0, 158),
    (26.75, 128),
    (27.0, 98),
    (27.5, 68),
    (30.5, 98),
    (31.0, 128),
    (31.5, 188),
    (32.0, 218),
    (32.5, 278),
)
DAY_START_HOUR = 12.0
# The off-peak discount's window (16:30-00:30 UTC) in the chart's local hours.
NIGHT_WINDOW = (24.5, 32.5)

# Milliseconds by class in DeepSeek's published train trace (profile-data, train.json: four MoE
# layers forward and backward, 4,096 tokens, EP64), summed over its kernels by their names:
# fp8_ptp128c; m_grouped_fp8_ptp128c; fp8_dptp128c_acc; FlashAttention forward; its backward with
# pre- and postprocessing; internode dispatch (both forms); internode combine.
TRAIN_TRACE_MS = {
    "dense gemm": 18.84,
    "grouped gemm": 22.93,
    "wgrad": 32.76,
    "attention forward": 4.95,
    "attention backward": 17.02,
    "dispatch": 31.00,
    "combine": 49.45,
}
