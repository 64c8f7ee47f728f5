"""Model room: rotary positions with YaRN, as numbers and as a cos/sin table.

In: rope fields of a config (old `rope_scaling` or new `rope_parameters`). Out: `inv_freq`, a table
[positions, pairs, 2] of cos and sin, the factor on the softmax scale.
Truth: Transformers' `_compute_yarn_parameters`; DeepSeek-V3's `precompute_freqs_cis`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from whalefall.errors import ConfigError, UnsupportedError

__all__ = ["Rope"]


def _mscale(factor: float, weight: float = 1.0) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of one model; pairs are (2i, 2i + 1) and stay in place.

    Attributes:
        dim: rotated dimensions of a head.
        factor: YaRN's context extension, 1.0 without YaRN.
        original_max_position: context before the extension.
    """

    dim: int
    theta: float = 10000.0
    factor: float = 1.0
    original_max_position: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None
    yarn: bool = False

    @classmethod
    def from_config(cls, raw: Mapping[str, Any], where: str) -> Rope:
        """Read `rope_parameters`, else `rope_theta` and `rope_scaling`, of a config.json."""
        dim = int(raw.get("qk_rope_head_dim") or 64)
        fields: dict[str, Any] = dict(raw.get("rope_scaling") or {})
        fields.update(raw.get("rope_parameters") or {})
        theta = float(fields.get("rope_theta", raw.get("rope_theta", 10000.0)))
        kind = fields.get("rope_type", fields.get("type", "default"))
        if kind == "default":
            return cls(dim=dim, theta=theta)
        if kind != "yarn":
            raise UnsupportedError(f"{where}: rope type {kind!r}, wanted 'default' or 'yarn'")
        try:
            original = int(fields["original_max_position_embeddings"])
            factor = float(fields.get("factor") or raw["max_position_embeddings"] / original)
        except KeyError as missing:
            raise ConfigError(f"{where}: YaRN without {missing}") from None
        return cls(
            dim=dim,
            theta=theta,
            factor=factor,
            original_max_position=original,
            beta_fast=float(fields.get("beta_fast") or 32),
            beta_slow=float(fields.get("beta_slow") or 1),
            mscale=float(fields.get("mscale") or 0),
            mscale_all_dim=float(fields.get("mscale_all_dim") or 0),
            attention_factor=fields.get("attention_factor"),
            yarn=True,
        )

    @property
    def softmax_factor(self) -> float:
        """m(mscale_all_dim)²: what YaRN multiplies the softmax scale with."""
        if not self.yarn or not self.mscale_all_dim:
            return 1.0
        return _mscale(self.factor, self.mscale_all_dim) ** 2

    @property
    def table_factor(self) -> float:
        """What cos and sin are multiplied with; 1 in all published files."""
        if not self.yarn:
            return 1.0
        if self.attention_factor is not None:
            return float(self.attention_factor)
        if self.mscale and self.mscale_all_dim:
            return _mscale(self.factor, self.mscale) / _mscale(self.factor, self.mscale_all_dim)
        return _mscale(self.factor)

    def correction_range(self) -> tuple[int, int]:
        """First and last index of YaRN's ramp; the upper clamp is dim − 1, not dim / 2 − 1."""

        def index(rotations: float) -> float:
            wavelength = self.original_max_position / (rotations * 2 * math.pi)
            return self.dim * math.log(wavelength) / (2 * math.log(self.theta))

        low = max(math.floor(index(self.beta_fast)), 0)
        return low, min(math.ceil(index(self.beta_slow)), self.dim - 1)

    def inv_freq(self) -> np.ndarray:
        """Angle a position, [dim / 2] float32."""
        exponent = np.arange(0, self.dim, 2, dtype=np.float32) / np.float32(self.dim)
        plain = (np.float32(1) / np.float32(self.theta) ** exponent).astype(np.float32)
        if not self.yarn:
            return plain
        low, high = self.correction_range()
        width = np.float32(high - low if high != low else 0.001)
        index = np.arange(self.dim // 2, dtype=np.float32)
        ramp = np.clip((index - np.float32(low)) / width, 0, 1).astype(np.float32)
        return (plain / np.float32(self.factor) * ramp + plain * (1 - ramp)).astype(np.float32)

    def table(self, positions: int) -> np.ndarray:
        """cos and sin of every position: [positions, dim / 2, 2] float32."""
        position = np.arange(positions, dtype=np.float32)
        angle = position[:, None] * self.inv_freq()[None, :]
        table = np.stack([np.cos(angle), np.sin(angle)], axis=-1)
        return (table * np.float32(self.table_factor)).astype(np.float32)
