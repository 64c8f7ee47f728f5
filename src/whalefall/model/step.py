"""Model room: one forward step over the tokens of several sequences, all of one phase.

In: a `StepBatch` and the KV cache's pages. Out: logits of the rows asked for; new latents lie in
the pages. `NumpyStep` is plain and slow, `NativeStep` one C++ call; both use the absorbed form of
MLA for generated tokens and for prompts, so a token's KV never depends on chunks or neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from whalefall import jit
from whalefall.model.config import ModelConfig
from whalefall.model.weights import Weights

__all__ = ["COMPUTE", "Step", "StepBatch", "make_step"]

COMPUTE = ("w8a16", "w8a8", "fp32")


@dataclass(frozen=True)
class StepBatch:
    """Tokens of one phase, sequence after sequence.

    Attributes:
        tokens: [T] int32.
        positions: [T] int32, of each token in its sequence.
        starts: [S + 1] int32, tokens [starts[s], starts[s + 1]) belong to sequence s.
        block_tables: [S, blocks] int32, the pages of each sequence, padded with 0.
        logit_rows: [R] int32, the tokens whose logits are wanted.
        in_prompt: the phase: prompt or generated.
    """

    tokens: np.ndarray
    positions: np.ndarray
    starts: np.ndarray
    block_tables: np.ndarray
    logit_rows: np.ndarray
    in_prompt: bool


class Step(Protocol):
    """What computes a batch.

    Attributes:
        expert_load: [layers, experts] int64, selections so far.
        hidden_size: width of the hidden states.
    """

    expert_load: np.ndarray
    hidden_size: int

    def __call__(
        self, batch: StepBatch, kv: np.ndarray, hidden: np.ndarray | None = None
    ) -> np.ndarray:
        """Compute `batch`, writing latents into kv [layers, blocks, 64, latent + rope].

        Args:
            hidden: where the final norm's output of every token goes, [T, hidden] fp32.
        Returns: logits [R, vocab] fp32.
        """

    def mtp(self, batch: StepBatch, kv: np.ndarray, hidden: np.ndarray) -> np.ndarray:
        """One call of the checkpoint's first MTP layer, whose latents lie after the layers' in kv.

        Args:
            batch: row i: token i + 1 of a sequence, at position i; kv has one more layer.
            hidden: [T, hidden] fp32, the main model's at position i; receives the MTP layer's own,
                after its norm, from which it may be applied again.
        Returns: logits [R, vocab] fp32: row i's say what token i + 2 is.
        Source: DeepSeek-V3 report, 2.2.
        """


def make_step(weights: Weights, config: ModelConfig, compute: str, max_positions: int) -> Step:
    """The native step, or where no compiler is found the numpy one."""
    from whalefall.model.native_step import NativeStep
    from whalefall.model.numpy_step import NumpyStep

    try:
        return NativeStep(weights, config, compute, max_positions)
    except jit.NoCompilerError as missing:
        jit.numpy_instead(missing)
        return NumpyStep(weights, config, max_positions)
