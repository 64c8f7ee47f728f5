"""Attention room: MLA decode and prefill over paged latent KV, sparse and dense.

In: numpy arrays or CPU torch tensors. Out: values and log-sum-exp, in the caller's library.
`reference.py` (float64, numpy) is the definition; `native/` agrees with it at every ISA level.
Source: FlashMLA; DeepSeek-V2 paper, 2.1.
"""

__all__: list[str] = []
