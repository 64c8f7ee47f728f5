"""Day 1, FlashMLA: decode two requests of different lengths over one paged latent cache."""

import numpy as np

from whalefall.attention import append_latent, flash_mla_with_kvcache, get_mla_metadata

rng = np.random.default_rng(0)
page, heads, lengths = 64, 16, np.array([100, 7], np.int32)
cache = np.zeros((4, page, 1, 576), np.float32)
table = np.array([[3, 0], [2, -1]], np.int32)  # pages of each request; -1 is never read

rows = []
for request, length in enumerate(lengths):
    latent = rng.standard_normal((length, 512)).astype(np.float32)
    rope = rng.standard_normal((length, 64)).astype(np.float32)
    tokens = np.arange(length)
    slots = (table[request, tokens // page] * page + tokens % page).astype(np.int32)
    append_latent(latent, rope, cache, slots)
    rows.append(np.concatenate([latent, rope], axis=1))

q = rng.standard_normal((2, 1, heads, 576)).astype(np.float32)
metadata, num_splits = get_mla_metadata()
out, lse = flash_mla_with_kvcache(q, cache, table, lengths, 512, metadata, num_splits, causal=True)
print("out", out.shape, "lse", lse.shape)

# The definition, for the second request: softmax over its 7 rows, values = their first 512 columns.
scores = q[1, 0] @ rows[1].T * 576**-0.5
weights = np.exp(scores - scores.max(axis=1, keepdims=True))
weights /= weights.sum(axis=1, keepdims=True)
print("agrees with the definition:", np.allclose(out[1, 0], weights @ rows[1][:, :512], atol=1e-5))

# A request alone gives the same bits as in the batch.
alone, _ = flash_mla_with_kvcache(q[1:], cache, table[1:], lengths[1:], 512, metadata, num_splits)
print("same bits alone:", bool((alone[0] == out[1]).all()))
