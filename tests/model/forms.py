"""Small random checkpoints, one for each supported form, with odd sizes."""

from __future__ import annotations

from typing import Any

from whalefall.model.synth import SHAPES

_TINY = SHAPES["tiny"]
_YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
_V2 = {
    "model_type": "deepseek_v2",
    "architectures": ["DeepseekV2ForCausalLM"],
    "scoring_func": "softmax",
    "norm_topk_prob": False,
}

FORMS: dict[str, dict[str, Any]] = {
    "v2": {
        **_TINY,
        **_V2,
        "topk_method": "group_limited_greedy",
        "routed_scaling_factor": 16.0,
        "rope_scaling": {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    },
    "v2-lite": {
        **_TINY,
        **_V2,
        "q_lora_rank": None,
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
        "n_shared_experts": 2,
        "rope_scaling": {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    },
    "v3": {**_TINY, "rope_scaling": _YARN, "num_nextn_predict_layers": 1},
    "moonlight": {
        **_TINY,
        "q_lora_rank": None,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 2,
        "rope_theta": 50000.0,
        "rms_norm_eps": 1e-5,
        "routed_scaling_factor": 2.446,
    },
    "kimi-k2": {
        **_TINY,
        "model_type": "kimi_k2",
        "n_group": 1,
        "topk_group": 1,
        "n_routed_experts": 12,
        "rope_theta": 50000.0,
        "routed_scaling_factor": 2.827,
        "rope_scaling": {**_YARN, "factor": 32, "beta_fast": 1, "beta_slow": 1},
    },
    "glm-4.7-flash": {
        **_TINY,
        "model_type": "glm4_moe_lite",
        "architectures": ["Glm4MoeLiteForCausalLM"],
        "n_group": 1,
        "topk_group": 1,
        "qk_nope_head_dim": 36,
        "v_head_dim": 52,
        "rms_norm_eps": 1e-5,
        "routed_scaling_factor": 1.8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
}
