"""`import flash_mla` after install(): the original's names, and its usual calling sequence."""

from __future__ import annotations

import subprocess
import sys
import textwrap

SCRIPT = """
    import whalefall.compat
    whalefall.compat.install()
    import numpy as np
    import flash_mla
    from flash_mla import flash_mla_with_kvcache, get_mla_metadata
    from flash_mla.flash_mla_interface import FlashMLASchedMeta
    q = np.ones((1, 1, 2, 576), np.float32)
    cache = np.ones((1, 64, 1, 576), np.float32)
    lengths = np.array([5], np.int32)
    meta, splits = get_mla_metadata(lengths, 2, 1)
    assert isinstance(meta, FlashMLASchedMeta) and splits is None
    out, lse = flash_mla_with_kvcache(
        q, cache, np.zeros((1, 1), np.int32), lengths, 512, meta, splits, causal=True)
    assert (out == 1).all() and abs(float(lse[0, 0, 0]) - (24 + np.log(5))) < 1e-5
    print(flash_mla.__version__, sorted(n for n in flash_mla.__all__ if n.startswith("flash")))
"""


def test_the_originals_calling_sequence_runs() -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1.0.0 ['flash_attn_varlen_func'")
