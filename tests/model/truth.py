"""Truth for the model's tests: Transformers' own models in fp32 on dequantised weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
import transformers

from whalefall.model.checkpoint import Checkpoint, write_safetensors
from whalefall.model.weights import Linear

torch.set_num_threads(1)


def dequantized_copy(source: Path, target: Path) -> Path:
    """The checkpoint with every weight as fp32, and a config without quantisation."""
    target.mkdir(parents=True)
    checkpoint = Checkpoint(source)
    tensors = {}
    for name in checkpoint.tensors:
        if name.endswith("_scale_inv"):
            continue
        array = checkpoint.array(name)
        if array.dtype == ml_dtypes.float8_e4m3fn:
            array = Linear(array, checkpoint.array(f"{name}_scale_inv")).dequantize()
        tensors[name] = np.ascontiguousarray(array.astype(np.float32))
    write_safetensors(target / "model.safetensors", tensors)
    config = json.loads((source / "config.json").read_text())
    config.pop("quantization_config", None)
    if config["model_type"] == "kimi_k2":  # K2 is V3's form under another name
        config["model_type"] = "deepseek_v3"
    (target / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, target / name)
    return target


def load_transformers(source: Path, scratch: Path) -> Any:
    """Transformers' model of a checkpoint, fp32, eager attention."""
    folder = dequantized_copy(source, scratch)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    model.generation_config.eos_token_id = None
    return model.eval()


def logits(model: Any, tokens: list[int]) -> np.ndarray:
    """Logits [tokens, vocab] of one sequence."""
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].numpy()


def greedy(model: Any, tokens: list[int], count: int) -> list[int]:
    """`count` greedy tokens after `tokens`."""
    with torch.no_grad():
        out = model.generate(
            torch.tensor([tokens]), max_new_tokens=count, do_sample=False, eos_token_id=None
        )
    return out[0, len(tokens) :].tolist()
