"""Model room: what a checkpoint's config.json says, in one spelling.

In: a Hugging Face `config.json` of a DeepSeek-architecture model (old or new field names). Out: a
`ModelConfig` with every number checked. Truth: the published configs; Transformers' meaning.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whalefall.arguments import whole
from whalefall.errors import ConfigError, MissingError, UnsupportedError
from whalefall.model.rope import Rope

__all__ = ["FORMS", "ModelConfig", "load_config"]

# model_type → what the form sets where the file is silent (Transformers' own defaults)
FORMS: dict[str, dict[str, Any]] = {
    "deepseek_v2": {
        "scoring_func": "softmax",
        "topk_method": "greedy",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "first_k_dense_replace": 0,
    },
    "deepseek_v3": {
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 3,
    },
    "kimi_k2": {
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.827,
        "first_k_dense_replace": 1,
    },
    "glm4_moe_lite": {
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.8,
        "first_k_dense_replace": 1,
        "rms_norm_eps": 1e-5,
    },
}
_LATER = {
    "deepseek_v32": "the sparse indexer of V3.2",
    "glm_moe_dsa": "the sparse indexer of GLM-5",
    "deepseek_v4": "V4's attention, which is no MLA",
    "kimi_k25": "INT4 experts and a vision tower",
    "kimi_linear": "linear attention",
}


@dataclass(frozen=True)
class ModelConfig:
    """The shape and rules of one DeepSeek-architecture model; names follow the published configs.

    Attributes:
        q_lora_rank: width of the compressed query, None where queries are projected directly.
        num_experts: routed experts a layer, 0 for a dense model.
        scoring: "sigmoid" (V3) or "softmax" (V2).
        topk_method: "greedy", "group_limited_greedy" or "noaux_tc".
        weight_block: rows and columns of an FP8 scale block, None where weights are not FP8.
        num_mtp_layers: multi-token prediction layers that the file carries beside the main ones.
        eos_token_ids: ids that end an answer (generation_config.json overrides config.json).
    """

    model_type: str
    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    intermediate_size: int
    moe_intermediate_size: int
    num_experts: int
    num_experts_per_tok: int
    num_shared_experts: int
    first_k_dense: int
    n_group: int
    topk_group: int
    scoring: str
    topk_method: str
    norm_topk_prob: bool
    routed_scaling_factor: float
    rms_norm_eps: float
    rope: Rope
    max_position_embeddings: int
    tie_word_embeddings: bool
    weight_block: tuple[int, int] | None
    num_mtp_layers: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    @property
    def qk_head_dim(self) -> int:
        """Width of one head's query and key, both parts."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Numbers the KV cache keeps a token and layer: latent and rope key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """What q·k is multiplied with, YaRN's correction included."""
        return float(self.qk_head_dim**-0.5 * self.rope.softmax_factor)

    @property
    def norm_eps_latent(self) -> float:
        """Epsilon of the q_a and kv_a norms: 1e-6 whatever the config says, as Transformers."""
        return 1e-6

    def is_moe(self, layer: int) -> bool:
        """Whether layer `layer` (MTP layers follow the main ones) has experts."""
        return self.num_experts > 0 and layer >= self.first_k_dense


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as problem:
        raise ConfigError(f"{path}: not JSON ({problem}); download the file again") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: got a {type(raw).__name__}, wanted a JSON object")
    return raw


def load_config(folder: str | Path) -> ModelConfig:
    """Read `config.json` (and `generation_config.json`) of a checkpoint folder.

    Raises: MissingError where the folder or file is not there, UnsupportedError for another
        architecture, ConfigError for numbers that make no sense.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise MissingError(f"model: no folder {folder}; wanted a Hugging Face checkpoint folder")
    path = folder / "config.json"
    if not path.is_file():
        raise MissingError(
            f"model: {folder} has no config.json; wanted a Hugging Face checkpoint folder"
        )
    raw = _read_json(path)
    generation = folder / "generation_config.json"
    if generation.is_file():
        eos = _read_json(generation).get("eos_token_id")
        if eos is not None:
            raw = {**raw, "eos_token_id": eos}
    return parse_config(raw, str(path))


def _number(raw: Mapping[str, Any], where: str, name: str, default: Any = ...) -> int:
    value = raw.get(name)
    if value is None:
        value = default
    if value is ...:
        raise ConfigError(f"{where}: no {name}; this is not a complete config")
    return whole(f"{where}: {name}", value, 0, 1 << 31)


def _ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (int(value),)


def _weight_block(raw: Mapping[str, Any], where: str) -> tuple[int, int] | None:
    quantization = raw.get("quantization_config")
    if not quantization:
        return None
    method = quantization.get("quant_method")
    block = quantization.get("weight_block_size")
    if method != "fp8" or not isinstance(block, list) or len(block) != 2:
        raise UnsupportedError(
            f"{where}: quantization {method!r} with blocks {block!r} is not supported, wanted"
            " 'fp8' with [128, 128]; use the publisher's FP8 or BF16 files"
        )
    if block != [128, 128]:
        raise UnsupportedError(f"{where}: FP8 blocks of {block}, wanted [128, 128]")
    return (128, 128)


def _form(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    kind = raw.get("model_type")
    if kind in FORMS:
        return FORMS[kind]
    missing = f"; whalefall lacks {_LATER[kind]}" if kind in _LATER else ""
    raise UnsupportedError(
        f"{where}: model_type {kind!r} (architectures {raw.get('architectures')!r}), wanted one of"
        f" {', '.join(FORMS)}{missing}"
    )


def _first_k_dense(raw: Mapping[str, Any], where: str, layers: int) -> int:
    kinds = raw.get("mlp_layer_types")
    if kinds is None:
        if raw.get("moe_layer_freq", 1) != 1:
            raise UnsupportedError(f"{where}: moe_layer_freq {raw['moe_layer_freq']}, wanted 1")
        return min(_number(raw, where, "first_k_dense_replace"), layers)
    dense = sum(kind == "dense" for kind in kinds)
    if list(kinds) != ["dense"] * dense + ["sparse"] * (layers - dense):
        raise UnsupportedError(f"{where}: mlp_layer_types {kinds}, wanted dense ones first")
    return dense


def parse_config(raw: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """Make a `ModelConfig` of the fields of a config.json; `where` opens the error messages."""
    form = _form(raw, where)
    raw = {**form, **{name: value for name, value in raw.items() if value is not None}}
    layers = _number(raw, where, "num_hidden_layers")
    experts = _number(raw, where, "n_routed_experts", raw.get("num_local_experts", 0))
    q_lora = _number(raw, where, "q_lora_rank", 0)
    no_experts = ... if experts else 0
    _refuse_unsupported(raw, where)
    config = ModelConfig(
        model_type=raw["model_type"],
        architecture=(raw.get("architectures") or ["?"])[0],
        vocab_size=_number(raw, where, "vocab_size"),
        hidden_size=_number(raw, where, "hidden_size"),
        num_layers=layers,
        num_heads=_number(raw, where, "num_attention_heads"),
        q_lora_rank=q_lora or None,
        kv_lora_rank=_number(raw, where, "kv_lora_rank", 512),
        qk_nope_head_dim=_number(raw, where, "qk_nope_head_dim", 128),
        qk_rope_head_dim=_number(raw, where, "qk_rope_head_dim", 64),
        v_head_dim=_number(raw, where, "v_head_dim", 128),
        intermediate_size=_number(raw, where, "intermediate_size"),
        moe_intermediate_size=_number(raw, where, "moe_intermediate_size", no_experts),
        num_experts=experts,
        num_experts_per_tok=_number(raw, where, "num_experts_per_tok", no_experts),
        num_shared_experts=_number(raw, where, "n_shared_experts", 0),
        first_k_dense=_first_k_dense(raw, where, layers),
        n_group=_number(raw, where, "n_group", 1),
        topk_group=_number(raw, where, "topk_group", 1),
        scoring=str(raw["scoring_func"]),
        topk_method=str(raw["topk_method"]),
        # V2's gate never normalises, whatever the file says (Transformers does the same)
        norm_topk_prob=bool(raw["norm_topk_prob"]) and raw["model_type"] != "deepseek_v2",
        routed_scaling_factor=float(raw["routed_scaling_factor"]),
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        rope=Rope.from_config(raw, where),
        max_position_embeddings=_number(raw, where, "max_position_embeddings", 4096),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        weight_block=_weight_block(raw, where),
        num_mtp_layers=_number(raw, where, "num_nextn_predict_layers", 0),
        bos_token_id=raw.get("bos_token_id"),
        eos_token_ids=_ids(raw.get("eos_token_id")),
    )
    _check(config, where)
    return config


def _refuse_unsupported(raw: Mapping[str, Any], where: str) -> None:
    wanted = {"hidden_act": "silu", "attention_bias": False, "rope_interleave": True}
    for name, value in wanted.items():
        if raw.get(name, value) != value:
            raise UnsupportedError(f"{where}: {name} is {raw[name]!r}, wanted {value!r}")


def _check(config: ModelConfig, where: str) -> None:
    for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "kv_lora_rank"):
        if getattr(config, name) < 1:
            raise ConfigError(f"{where}: {name} is {getattr(config, name)}, wanted 1 or more")
    if config.qk_rope_head_dim % 2:
        raise ConfigError(f"{where}: qk_rope_head_dim is {config.qk_rope_head_dim}, wanted even")
    if config.scoring not in ("sigmoid", "softmax"):
        raise UnsupportedError(
            f"{where}: scoring_func is {config.scoring!r}, wanted sigmoid or softmax"
        )
    if config.num_experts:
        _check_experts(config, where)


def _check_experts(config: ModelConfig, where: str) -> None:
    if not 0 < config.num_experts_per_tok <= config.num_experts:
        raise ConfigError(
            f"{where}: num_experts_per_tok is {config.num_experts_per_tok},"
            f" wanted 1 to {config.num_experts}"
        )
    if config.n_group < 1 or config.num_experts % config.n_group:
        raise ConfigError(
            f"{where}: n_group is {config.n_group}, wanted a divisor of {config.num_experts}"
        )
    if not 0 < config.topk_group <= config.n_group:
        raise ConfigError(
            f"{where}: topk_group is {config.topk_group}, wanted 1 to {config.n_group}"
        )
