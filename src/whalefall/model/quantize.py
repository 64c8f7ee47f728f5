"""Model room: FP8 checkpoints out of BF16 ones, in the published 128 × 128 block format.

In: a folder with BF16 weights. Out: a folder whose linear layers are E4M3 with `weight_scale_inv`;
embeddings, head, norms, gates and eh_proj stay as they are. Source: DeepSeek-V3's published files.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np

from whalefall.errors import ConfigError
from whalefall.model.checkpoint import Checkpoint, ShardWriter
from whalefall.model.config import load_config

__all__ = ["quantize", "quantize_blocks"]

_E4M3_MAX = 448.0
_KEPT = ("embed_tokens", "lm_head", "eh_proj", "shared_head", "mlp.gate.")


def quantize_blocks(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """E4M3 values [N, K] and fp32 scales [⌈N/128⌉, ⌈K/128⌉] of a matrix; scale = amax / 448."""
    rows, columns = weight.shape
    value = weight.astype(np.float32)
    out = np.empty((rows, columns), ml_dtypes.float8_e4m3fn)
    scales = np.empty((-(-rows // 128), -(-columns // 128)), np.float32)
    starts = np.arange(0, columns, 128)
    for block, row in enumerate(range(0, rows, 128)):
        part = value[row : row + 128]
        amax = np.maximum.reduceat(np.abs(part).max(axis=0), starts)
        scale = np.where(amax > 0, amax / np.float32(_E4M3_MAX), np.float32(1)).astype(np.float32)
        scales[block] = scale
        wide = np.repeat(scale, 128)[:columns]
        out[row : row + 128] = np.clip(part / wide, -_E4M3_MAX, _E4M3_MAX)
    return out, scales


def _is_quantized(name: str, shape: tuple[int, ...]) -> bool:
    return name.endswith(".weight") and len(shape) == 2 and not any(part in name for part in _KEPT)


def quantize(
    source: str | Path, target: str | Path, progress: Callable[[int, int], None] | None = None
) -> Path:
    """Write an FP8 copy of a BF16 (or fp32) checkpoint.

    Args:
        source: the checkpoint folder.
        target: a new folder; written shard by shard, the index last, so that a run that was
            interrupted leaves no folder that loads.
        progress: called with (tensors done, tensors in all).
    Returns: the target.
    Raises: ConfigError where the source is FP8 already or the target is not empty.
    """
    source, target = Path(source), Path(target)
    if load_config(source).weight_block is not None:
        raise ConfigError(f"quantize: {source} is FP8 already")
    if target.exists() and any(target.iterdir()):
        raise ConfigError(f"quantize: {target} is not empty; name a new folder")
    checkpoint = Checkpoint(source)
    target.mkdir(parents=True, exist_ok=True)
    writer = ShardWriter(target)
    for done, name in enumerate(checkpoint.tensors):
        array = checkpoint.array(name)
        if _is_quantized(name, array.shape):
            values, scales = quantize_blocks(array)
            writer.add(name, values)
            writer.add(f"{name}_scale_inv", scales)
        else:
            writer.add(name, array)
        if progress:
            progress(done + 1, len(checkpoint.tensors))
    _copy_small_files(source, target)
    writer.close()
    return target


def _copy_small_files(source: Path, target: Path) -> None:
    for path in source.iterdir():
        if path.is_file() and not path.name.endswith((".safetensors", ".index.json")):
            shutil.copyfile(path, target / path.name)
    raw = json.loads((source / "config.json").read_text(encoding="utf-8"))
    raw["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    (target / "config.json").write_text(json.dumps(raw, indent=1), encoding="utf-8")
