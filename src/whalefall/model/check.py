"""Model room: what a checkpoint needs and will do here, from its headers alone.

In: a checkpoint folder (a config.json is enough), this machine's memory and read bandwidth. Out: a
`Report`. Expected speed = bytes that a generated token reads ÷ measured read bandwidth: a bound
that attention over a long context and the sampler lower.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from whalefall.errors import MissingError, WhalefallError
from whalefall.model.checkpoint import Checkpoint
from whalefall.model.config import ModelConfig, load_config
from whalefall.model.shapes import tensor_shapes
from whalefall.model.tokenizer import has_tokenizer, load_tokenizer, small_tokenizer

__all__ = ["Report", "check", "kv_bytes", "mha_kv_bytes"]

_FP8_KINDS = ("linear",)


@dataclass(frozen=True)
class Report:
    """What `check` found.

    Attributes:
        problems: what keeps the checkpoint from being served; empty: it is supported.
        warnings: what may make its answers worse than they should be.
        parameters, active_parameters: of the main model; active: those a token uses.
        weight_bytes: size of the tensors; they stay in the page cache, shared by processes.
        token_bytes: weights that one generated token reads.
        kv_token_bytes, mha_token_bytes: KV cache of a token in BF16, latent and as plain MHA.
        memory_bytes: this machine's.
        tokens_per_s: the bound for one sequence here, None where nothing was measured.
    """

    model_type: str
    architecture: str
    problems: tuple[str, ...]
    has_weights: bool
    parameters: int
    active_parameters: int
    weight_bytes: int
    token_bytes: int
    kv_token_bytes: int
    mha_token_bytes: int
    context: int
    mtp_layers: int
    memory_bytes: int | None = None
    tokens_per_s: float | None = None
    warnings: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)


def kv_bytes(config: ModelConfig, itemsize: int = 2) -> int:
    """Bytes of latent KV a token, all layers."""
    return config.num_layers * config.latent_dim * itemsize


def mha_kv_bytes(config: ModelConfig, itemsize: int = 2) -> int:
    """Bytes of keys and values a token if every head kept its own."""
    width = config.num_heads * (config.qk_head_dim + config.v_head_dim)
    return config.num_layers * width * itemsize


def check(folder: str | Path, machine: Mapping[str, float] | None = None) -> Report:
    """Say whether a checkpoint can be served, and how it will do.

    Args:
        folder: the checkpoint, or a folder with only its config.json.
        machine: `memory_bytes` and `read_bytes_s`; None leaves both open.
    Raises: MissingError, UnsupportedError, ConfigError where not even the config can be used.
    """
    config = load_config(folder)
    try:
        checkpoint: Checkpoint | None = Checkpoint(folder)
    except MissingError as missing:
        if any(Path(folder).glob("*.safetensors*")):
            raise missing
        checkpoint = None
    problems = _problems(config, checkpoint) if checkpoint else ()
    warnings: tuple[str, ...] = ()
    if has_tokenizer(folder):
        try:
            small = small_tokenizer(load_tokenizer(folder, config.vocab_size), config.vocab_size)
            warnings = (small,) if small else ()
        except WhalefallError as error:
            problems += (str(error),)
    sizes = _sizes(config, checkpoint)
    machine = machine or {}
    bandwidth = machine.get("read_bytes_s")
    return Report(
        model_type=config.model_type,
        architecture=config.architecture,
        problems=problems,
        has_weights=checkpoint is not None,
        parameters=sizes["parameters"],
        active_parameters=sizes["active"],
        weight_bytes=checkpoint.nbytes if checkpoint else sizes["bytes"],
        token_bytes=sizes["token_bytes"],
        kv_token_bytes=kv_bytes(config),
        mha_token_bytes=mha_kv_bytes(config),
        context=config.max_position_embeddings,
        mtp_layers=config.num_mtp_layers,
        memory_bytes=int(machine["memory_bytes"]) if "memory_bytes" in machine else None,
        tokens_per_s=bandwidth / sizes["token_bytes"] if bandwidth else None,
        warnings=warnings,
    )


def _problems(config: ModelConfig, checkpoint: Checkpoint) -> tuple[str, ...]:
    missing, wrong = [], []
    first_mtp = f"model.layers.{config.num_layers}."
    for name, shape, kind in tensor_shapes(config):
        if name.startswith(first_mtp) and f"{first_mtp}eh_proj.weight" not in checkpoint:
            continue  # a file without its MTP layer serves
        if name.startswith(first_mtp) and kind in ("table", "kept"):
            continue  # stored copies, which may be left out
        found = checkpoint.tensors.get(name)
        if found is None:
            missing.append(name)
        elif found.shape != shape:
            wrong.append(f"{name} is {list(found.shape)}, wanted {list(shape)}")
        elif found.dtype == "F8_E4M3" and f"{name}_scale_inv" not in checkpoint:
            missing.append(f"{name}_scale_inv")
    problems = [*wrong[:3]]
    if missing:
        problems.append(f"{len(missing)} tensors are missing, the first {missing[0]}")
    return tuple(problems)


def _sizes(config: ModelConfig, checkpoint: Checkpoint | None) -> dict[str, int]:
    """Parameters and bytes, in all and of one token, of the main model."""
    sizes = {"parameters": 0, "active": 0, "bytes": 0, "token_bytes": 0}
    last = f"model.layers.{config.num_layers}."
    for name, shape, kind in tensor_shapes(config):
        if name.startswith(last):
            continue
        count = shape[0] * (shape[1] if len(shape) > 1 else 1)
        size = count * (1 if config.weight_block and kind in _FP8_KINDS else 2)
        if checkpoint is not None and name in checkpoint:
            size = checkpoint.tensors[name].end - checkpoint.tensors[name].start
        share = 1.0
        if ".mlp.experts." in name:
            share = config.num_experts_per_tok / config.num_experts
        elif kind == "table":
            share = 1.0 if config.tie_word_embeddings else 1 / config.vocab_size
        sizes["parameters"] += count
        sizes["bytes"] += size
        sizes["active"] += round(count * share)
        sizes["token_bytes"] += round(size * share)
    return sizes
