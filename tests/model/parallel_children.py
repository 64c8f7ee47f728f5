"""What the ranks of the expert-parallel tests run; JSON in, JSON out."""

from typing import Any

import numpy as np

from whalefall import ep, eplb, jit
from whalefall.engine.kv_cache import KVCache
from whalefall.model import Checkpoint, load_config, load_weights
from whalefall.model.expert_parallel import ExpertParallelStep, even_placement
from whalefall.model.native_step import NativeStep
from whalefall.model.step import StepBatch

BLOCKS = 3  # of 64 tokens, for each sequence


def batch(lengths: list[int], start: list[int], in_prompt: bool, seqs: list[int]) -> StepBatch:
    """Tokens [start, start + length) of sequences `seqs`; a token's id is made of its place."""
    spans = [range(s, s + n) for s, n in zip(start, lengths, strict=True)]
    ends = np.cumsum([0, *lengths])
    return StepBatch(
        tokens=np.array(
            [(7 + 31 * q + 13 * p) % 260 for q, r in zip(seqs, spans, strict=True) for p in r],
            np.int32,
        ),
        positions=np.array([p for span in spans for p in span], np.int32),
        starts=ends.astype(np.int32),
        block_tables=np.array(
            [[q * BLOCKS + b for b in range(BLOCKS)] for q in seqs], np.int32
        ).reshape(len(seqs), BLOCKS),
        logit_rows=np.array([e - 1 for e in ends[1:] if e], np.int32),
        in_prompt=in_prompt,
    )


def steps(seqs: list[int]) -> list[StepBatch]:
    """A prompt in two chunks, then three generated tokens, for each of the sequences."""
    first = [5 + 17 * q % 60 for q in seqs]
    second = [3 + 5 * q % 11 for q in seqs]
    all_ = [batch(first, [0] * len(seqs), True, seqs), batch(second, first, True, seqs)]
    known = [a + b for a, b in zip(first, second, strict=True)]
    return [
        *all_,
        *(batch([1] * len(seqs), [k + i for k in known], False, seqs) for i in range(3)),
    ]


def skewed(config: Any, ranks: int, redundant: int) -> eplb.Placement:
    """A placement for loads of which a few experts take most, with unequal shares."""
    rng = np.random.default_rng(3)
    layers = config.num_layers - config.first_k_dense
    slots = -(-(config.num_experts + redundant) // ranks) * ranks
    weight = rng.lognormal(0, 1.5, (layers, config.num_experts))
    return eplb.rebalance(weight, slots, 1, 1, ranks, split="best")


def run(
    rank: int, size: int, folder: str, model: str, compute: str, overlap: bool, redundant: int,
    sequences: int,
) -> dict[str, Any]:  # fmt: skip
    """Logits and hidden states of this rank's sequences (those of number ≡ rank), in hex."""
    jit.set_num_threads(1)
    config = load_config(model)
    weights = load_weights(Checkpoint(model), config)
    kv = KVCache(config.num_layers, sequences * BLOCKS, config.latent_dim, "fp32").array
    seqs = [q for q in range(sequences) if not size or q % size == rank]
    found: dict[str, list[str]] = {str(q): [] for q in seqs}
    step: Any
    if not size:  # all in one process
        step = NativeStep(weights, config, compute, 256)
        load = step.expert_load
    else:
        ranks = ep.Engine(ep.FileGroup(folder, rank, size), chunk_bytes=1 << 16)
        step = ExpertParallelStep(
            weights, config, compute, 256, ranks, even_placement(config, size), overlap
        )
        load = step.expert_load
    for number, each in enumerate(steps(seqs)):
        if number == 3 and size:
            step.place(skewed(config, size, redundant))
        hidden = np.empty((len(each.tokens), config.hidden_size), np.float32)
        logits = step(each, kv, hidden)
        for q, row, state in zip(seqs, logits, hidden[each.logit_rows], strict=True):
            found[str(q)].append((row.tobytes() + state.tobytes()).hex())
    ratio = step.clock.ratio if size else 0.0
    return {"logits": found, "load": load.tolist(), "overlap": ratio}
