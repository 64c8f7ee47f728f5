"""Train room: a checkpoint of a run as a Hugging Face folder, FP8 blocks as published.

In: a checkpoint of `checkpoint.py`. Out: config.json and model.safetensors; linear layers E4M3 in
128×128 blocks with `weight_scale_inv`, the rest BF16. Source: DeepSeek-V3's published files.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from whalefall.errors import ConfigError
from whalefall.model.config import parse_config
from whalefall.model.shapes import tensor_shapes
from whalefall.train.casts import TILE, cast_blocks
from whalefall.train.checkpoint import read_tensors

__all__ = ["export_checkpoint", "published_tensors"]


def published_tensors(path: str, average: bool = False) -> tuple[dict[str, Tensor], dict]:
    """A checkpoint's model tensors in fp32 under published names, and its `config.json`.

    Args:
        path: a checkpoint, or the folder of several, whose newest is taken.
        average: take the running average of the weights instead.
    Raises: ConfigError if the run kept no average; as `read_tensors`.
    """
    every, stamp = read_tensors(path)
    config = dict(stamp.config)
    parsed = parse_config(config)
    found: dict[str, Tensor] = {}
    mtp = f"model.layers.{parsed.num_layers}."
    shared = {
        f"{mtp}embed_tokens.weight": "model.embed_tokens.weight",
        f"{mtp}shared_head.head.weight": "lm_head.weight",
    }
    for name, shape, kind in tensor_shapes(parsed):
        source = shared.get(name, name)
        key = f"average.{source}" if average and kind != "bias" else source
        if key not in every:
            hint = "; optimizer.average was 0" if average else ""
            raise ConfigError(f"train: {path} has no tensor {key}{hint}")
        if tuple(every[key].shape) != shape:
            raise ConfigError(
                f"train: {path}: {key} has shape {list(every[key].shape)}, wanted {list(shape)}"
            )
        found[name] = every[key]
    return found, config


def export_checkpoint(
    path: str, folder: str | Path, average: bool = False, fp8: bool = True
) -> int:
    """Write a Hugging Face folder (without a tokenizer); gives the size of model.safetensors.

    Args:
        path, average: as `published_tensors`.
        fp8: quantise linear layers in 128×128 blocks; False: everything in BF16.
    """
    tensors, config = published_tensors(path, average)
    kinds = {name: kind for name, _, kind in tensor_shapes(parse_config(config))}
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if kinds[name] == "linear" and fp8:
            values, scale = cast_blocks(tensor[None])
            out[name], out[f"{name}_scale_inv"] = values[0], scale[0].contiguous()
        elif kinds[name] == "bias":
            out[name] = tensor.clone()
        else:
            out[name] = tensor.to(torch.bfloat16).clone()
    if fp8:
        config["quantization_config"] = {
            "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
            "weight_block_size": [TILE, TILE],
        }  # fmt: skip
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    target = folder / "model.safetensors"
    save_file(out, target.with_suffix(".new"), metadata={"format": "pt"})
    os.replace(target.with_suffix(".new"), target)
    return target.stat().st_size
