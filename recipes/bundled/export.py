"""Bundled checkpoint: the Hugging Face folder, FP8 128x128 blocks as DeepSeek publishes them.

In: `state.pt` of `train.py`, or a checkpoint of `whalefall train recipe.toml`. Out: config.json,
generation_config.json, model.safetensors, tokenizer.json, tokenizer_config.json.
Source: DeepSeek-V3's published files.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from model import MLP, Layer, Model, MoE, Shape
from train import Optimizer, load_state

BLOCK = 128
E4M3_MAX = 448.0
LIMIT_BYTES = 16_000_000


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """FP8 e4m3 of a matrix and its inverse scales, one a 128x128 block (the last may be ragged)."""
    rows, columns = weight.shape
    pad = torch.nn.functional.pad(weight, (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = pad.view(pad.shape[0] // BLOCK, BLOCK, pad.shape[1] // BLOCK, BLOCK)
    scale = blocks.abs().amax((1, 3)).clamp(min=1e-12) / E4M3_MAX
    scaled = (blocks / scale[:, None, :, None]).view(pad.shape)[:rows, :columns]
    return scaled.to(torch.float8_e4m3fn).contiguous(), scale


def dequantize(weight: Tensor, scale: Tensor) -> Tensor:
    """The fp32 matrix that `quantize`'s pair stands for."""
    rows, columns = weight.shape
    wide = scale.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    return weight.float() * wide


class Tensors:
    """Collects a checkpoint's tensors under their published names."""

    def __init__(self) -> None:
        self.all: dict[str, Tensor] = {}

    def fp8(self, name: str, weight: Tensor) -> None:
        quantized, scale = quantize(weight.detach())
        self.all[f"{name}.weight"] = quantized
        self.all[f"{name}.weight_scale_inv"] = scale

    def bf16(self, name: str, weight: Tensor) -> None:
        self.all[name] = weight.detach().to(torch.bfloat16).clone()

    def mlp(self, name: str, mlp: MLP) -> None:
        for part in ("gate_proj", "up_proj", "down_proj"):
            self.fp8(f"{name}.{part}", getattr(mlp, part))

    def moe(self, name: str, moe: MoE) -> None:
        self.bf16(f"{name}.gate.weight", moe.gate)
        self.all[f"{name}.gate.e_score_correction_bias"] = moe.bias.float().clone()
        width = moe.down.shape[2]
        for e in range(moe.down.shape[0]):
            self.fp8(f"{name}.experts.{e}.gate_proj", moe.gate_up[e, :width])
            self.fp8(f"{name}.experts.{e}.up_proj", moe.gate_up[e, width:])
            self.fp8(f"{name}.experts.{e}.down_proj", moe.down[e])
        self.mlp(f"{name}.shared_experts", moe.shared_experts)

    def layer(self, name: str, layer: Layer) -> None:
        self.bf16(f"{name}.input_layernorm.weight", layer.input_layernorm.weight)
        attention = layer.self_attn
        for part in ("q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"):
            self.fp8(f"{name}.self_attn.{part}", getattr(attention, part))
        self.bf16(f"{name}.self_attn.kv_a_layernorm.weight", attention.kv_a_layernorm.weight)
        self.bf16(f"{name}.post_attention_layernorm.weight", layer.post_attention_layernorm.weight)
        if isinstance(layer.mlp, MoE):
            self.moe(f"{name}.mlp", layer.mlp)
        else:
            self.mlp(f"{name}.mlp", layer.mlp)


def tensors(model: Model) -> dict[str, Tensor]:
    """All tensors of the checkpoint; the MTP layer keeps copies of embedding and head."""
    out = Tensors()
    out.bf16("model.embed_tokens.weight", model.embed_tokens)
    for i, layer in enumerate(model.layers):
        out.layer(f"model.layers.{i}", layer)
    out.bf16("model.norm.weight", model.norm.weight)
    out.bf16("lm_head.weight", model.lm_head)
    mtp, name = model.mtp, f"model.layers.{len(model.layers)}"
    out.bf16(f"{name}.embed_tokens.weight", model.embed_tokens)
    out.bf16(f"{name}.enorm.weight", mtp.enorm.weight)
    out.bf16(f"{name}.hnorm.weight", mtp.hnorm.weight)
    out.bf16(f"{name}.eh_proj.weight", mtp.eh_proj)
    out.layer(name, mtp.layer)
    out.bf16(f"{name}.shared_head.norm.weight", mtp.norm.weight)
    out.bf16(f"{name}.shared_head.head.weight", model.lm_head)
    return out.all


def load_model(work: Path, average: bool) -> Model:
    """The trained model; `average` takes the running average of its weights."""
    model = Model(Shape())
    optimizer = Optimizer(model)
    load_state(work / "state.pt", model, optimizer)
    if average:
        for flat, mean in zip(optimizer.flat, optimizer.average, strict=True):
            flat.data.copy_(mean)
    return model


def load_checkpoint(path: str, average: bool) -> Model:
    """The model of a checkpoint of whalefall's trainer, whose tensors have published names."""
    from whalefall.train.export import published_tensors

    found, _ = published_tensors(path, average)
    model = Model(Shape())

    def put(parameter: Tensor, name: str) -> None:
        parameter.detach().copy_(found[name])

    def put_mlp(mlp: MLP, name: str) -> None:
        for part in ("gate_proj", "up_proj", "down_proj"):
            put(getattr(mlp, part), f"{name}.{part}.weight")

    def put_moe(moe: MoE, name: str) -> None:
        put(moe.gate, f"{name}.gate.weight")
        put(moe.bias, f"{name}.gate.e_score_correction_bias")
        width = moe.down.shape[2]
        for e in range(moe.down.shape[0]):
            put(moe.gate_up[e, :width], f"{name}.experts.{e}.gate_proj.weight")
            put(moe.gate_up[e, width:], f"{name}.experts.{e}.up_proj.weight")
            put(moe.down[e], f"{name}.experts.{e}.down_proj.weight")
        put_mlp(moe.shared_experts, f"{name}.shared_experts")

    def put_layer(layer: Layer, name: str) -> None:
        for norm in ("input_layernorm", "post_attention_layernorm"):
            put(getattr(layer, norm).weight, f"{name}.{norm}.weight")
        for part in ("q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"):
            put(getattr(layer.self_attn, part), f"{name}.self_attn.{part}.weight")
        put(layer.self_attn.kv_a_layernorm.weight, f"{name}.self_attn.kv_a_layernorm.weight")
        if isinstance(layer.mlp, MoE):
            put_moe(layer.mlp, f"{name}.mlp")
        else:
            put_mlp(layer.mlp, f"{name}.mlp")

    put(model.embed_tokens, "model.embed_tokens.weight")
    put(model.norm.weight, "model.norm.weight")
    put(model.lm_head, "lm_head.weight")
    for i, layer in enumerate(model.layers):
        put_layer(layer, f"model.layers.{i}")
    name = f"model.layers.{len(model.layers)}"
    for norm, theirs in (("enorm", "enorm"), ("hnorm", "hnorm"), ("norm", "shared_head.norm")):
        put(getattr(model.mtp, norm).weight, f"{name}.{theirs}.weight")
    put(model.mtp.eh_proj, f"{name}.eh_proj.weight")
    put_layer(model.mtp.layer, name)
    return model


def export(model: Model, work: Path, folder: Path) -> int:
    """Write the folder; gives the size of model.safetensors in bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model.shape.config()
    config["quantization_config"] = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [BLOCK, BLOCK],
    }
    generation = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "do_sample": False}
    for name, value in {"config.json": config, "generation_config.json": generation}.items():
        (folder / name).write_text(json.dumps(value, indent=2) + "\n")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(work / name, folder / name)
    path = folder / "model.safetensors"
    save_file(tensors(model), path.with_suffix(".new"), metadata={"format": "pt"})
    path.with_suffix(".new").chmod(0o644)
    os.replace(path.with_suffix(".new"), path)
    return path.stat().st_size


def main() -> None:
    """Export the trained state."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/bundled"))
    parser.add_argument("--out", type=Path, default=Path("src/whalefall/model/bundled"))
    parser.add_argument("--average", action="store_true", help="the running average of the weights")
    parser.add_argument("--checkpoint", help="of whalefall train: its run folder, or one step")
    args = parser.parse_args()
    if args.checkpoint:
        model = load_checkpoint(args.checkpoint, args.average)
    else:
        model = load_model(args.work, args.average)
    size = export(model, args.work, args.out)
    print(f"{args.out}: model.safetensors has {size:,} bytes")
    if size > LIMIT_BYTES:
        raise SystemExit(f"model.safetensors has {size:,} bytes, wanted at most {LIMIT_BYTES:,}")


if __name__ == "__main__":
    main()
