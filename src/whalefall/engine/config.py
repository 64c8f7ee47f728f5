"""Engine room: how an engine computes, and how much it may hold."""

from __future__ import annotations

from dataclasses import dataclass

from whalefall.arguments import whole
from whalefall.engine.kv_cache import KV_DTYPES
from whalefall.errors import ConfigError
from whalefall.model.step import COMPUTE

__all__ = ["EngineConfig"]

_MAX_DRAFTS = 16


@dataclass(frozen=True)
class EngineConfig:
    """How an engine computes, and how much it may hold.

    Attributes:
        compute: "w8a16" (activations kept), "w8a8" (as published) or "fp32" (exact path).
        kv: type of the KV cache, "bf16", "fp32" or "fp8" (656 bytes a token and layer, for 512
            latent and 64 rope columns); None: fp32 for compute="fp32", else bf16.
        max_batch_tokens: tokens of one step.
        max_sequences: answers that run at once.
        kv_cache_bytes: memory of the KV cache; None: 1 GiB, or what max_model_len needs.
        num_blocks: the same in blocks of 64 tokens; wins over kv_cache_bytes.
        max_model_len: longest prompt and answer together; None: the model's, as far as it fits.
        strict_prefix: keep blocks of answers out of the prefix cache.
        speculative: draft tokens with the checkpoint's MTP layer where that saves time; answers
            stay the same, bit for bit. None: where the checkpoint has one, and is too large for
            the processor's caches (a small one is not bound by what it reads).
        draft_tokens: drafts a sequence and step, at most.
        prefix_cache: a folder or URL where blocks of prompts are kept, shared and found again after
            a restart; "": memory only.
        prefix_cache_bytes: the least recently used leave beyond it; 0: no limit.
    """

    compute: str = "w8a16"
    kv: str | None = None
    max_batch_tokens: int = 1024
    max_sequences: int = 128
    kv_cache_bytes: int | None = None
    num_blocks: int | None = None
    max_model_len: int | None = None
    strict_prefix: bool = False
    speculative: bool | None = None
    draft_tokens: int = 1
    prefix_cache: str = ""
    prefix_cache_bytes: int = 0

    def __post_init__(self) -> None:
        """Check the values. Raises: ConfigError."""
        if self.compute not in COMPUTE:
            raise ConfigError(f"compute is {self.compute!r}, wanted one of {', '.join(COMPUTE)}")
        if self.kv is not None and self.kv not in KV_DTYPES:
            raise ConfigError(f"kv is {self.kv!r}, wanted one of {', '.join(KV_DTYPES)}")
        whole("draft_tokens", self.draft_tokens, 1, _MAX_DRAFTS)
        limits = ("max_batch_tokens", "max_sequences", "kv_cache_bytes", "num_blocks")
        for name in (*limits, "max_model_len"):
            value = getattr(self, name)
            if value is not None:
                whole(name, value, 1, (1 << 48) - 1)

    @property
    def kv_dtype(self) -> str:
        """Type of the KV cache."""
        return self.kv or ("fp32" if self.compute == "fp32" else "bf16")
