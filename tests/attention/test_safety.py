"""No out-of-bounds access for any argument values: a sanitizer build under random calls.

The driver runs in a child process with AddressSanitizer preloaded and its own compile cache, on
arrays that end where their allocation ends. Refusals are fine, reports are not.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

DRIVER = """
import sys
import numpy as np, ml_dtypes
from whalefall import attention, jit
from whalefall.attention import native_calls
from whalefall.errors import WhalefallError

flags = ("-fsanitize=address,undefined", "-fno-sanitize=alignment",
         "-fno-sanitize-recover=undefined", "-O1", "-g")
plain = jit.build
jit.build = lambda source, defines=None, level=None: plain(source, defines, flags, level)
rng = np.random.default_rng(int(sys.argv[1]))
BF16 = ml_dtypes.bfloat16
EXTREME = np.array([-2**31, -1, 0, 1, 2**31 - 1])

def integers(low, high, shape):
    values = rng.integers(low, high, shape)
    spoil = rng.random(shape) < 0.05
    values[spoil] = rng.choice(EXTREME, int(spoil.sum()))
    return values.astype(np.int32)

def decode():
    b, s_q, h_kv = rng.integers(1, 4), rng.integers(1, 4), rng.integers(1, 3)
    h_q = h_kv * rng.integers(1, 6)
    d, page, blocks = rng.integers(1, 80), rng.integers(1, 70), rng.integers(1, 9)
    fp8 = rng.random() < 0.2
    dtype = rng.choice([BF16, np.float16, np.float32])
    if fp8:
        d, h_q, h_kv, dtype = 576, rng.integers(1, 6), 1, BF16
        cache = rng.integers(0, 256, (blocks, page, 1, 656)).astype(np.uint8)
    else:
        cache = rng.standard_normal((blocks, page, h_kv, d)).astype(dtype)
    q = rng.standard_normal((b, s_q, h_q, d)).astype(dtype)
    table = integers(0, blocks, (b, rng.integers(0, 6)))
    lengths = integers(0, table.shape[1] * page + 2, (b,))
    return attention.flash_mla_with_kvcache(
        q, cache, table, lengths, int(rng.integers(0, d + 2)), None,
        causal=bool(rng.integers(2)), is_fp8_kvcache=bool(fp8))

def sparse():
    s_q, h, d = rng.integers(0, 5), rng.integers(1, 7), rng.integers(1, 80)
    s_kv, topk = rng.integers(0, 200), rng.integers(0, 150)
    dtype = rng.choice([BF16, np.float16, np.float32])
    q, kv = (rng.standard_normal(s).astype(dtype) for s in ((s_q, h, d), (s_kv, 1, d)))
    return attention.flash_mla_sparse_fwd(
        q, kv, integers(0, max(1, s_kv), (s_q, 1, topk)), 0.3, int(rng.integers(1, d + 1)),
        rng.standard_normal(h).astype(np.float32), integers(0, topk + 1, (s_q,)))

def varlen():
    h_kv, group, d, d_v = rng.integers(1, 3), rng.integers(1, 3), *rng.integers(1, 70, 2)
    cu = [np.cumsum(np.append(0, rng.integers(0, 90, 3))).astype(np.int32) for _ in range(2)]
    if rng.random() < 0.2:
        cu[0] = integers(0, 90, (4,))
    dtype = rng.choice([BF16, np.float32])
    q = rng.standard_normal((abs(int(cu[0][-1])) % 300, h_kv * group, d)).astype(dtype)
    k, v = (rng.standard_normal((int(cu[1][-1]), h_kv, w)).astype(dtype) for w in (d, d_v))
    return attention.flash_attn_varlen_func(q, k, v, *cu, 90, 90, causal=bool(rng.integers(2)))

def append():
    t, blocks, page = rng.integers(0, 9), rng.integers(1, 4), rng.integers(1, 20)
    fp8 = rng.random() < 0.5
    a, r = (512, 64) if fp8 else rng.integers(1, 40, 2)
    width, dtype = (656, np.uint8) if fp8 else (a + r, rng.choice([BF16, np.float16, np.float32]))
    latent, rope = (rng.standard_normal((t, w)).astype(np.float32) for w in (a, r))
    cache = np.zeros((blocks, page, 1, width), dtype)
    return attention.append_latent(latent, rope, cache, integers(0, blocks * page, (t,)), bool(fp8))

done = refused = 0
for i in range(int(sys.argv[2])):
    try:
        rng.choice([decode, sparse, varlen, append])()
        done += 1
    except WhalefallError:
        refused += 1
print("done", done, "refused", refused)
assert done > refused / 4
"""


def library(name: str) -> str:
    command = ["g++", f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_random_calls_give_the_sanitizers_nothing_to_report(seed: int, tmp_path: Path) -> None:
    asan = library("libasan.so")
    if not Path(asan).is_absolute():
        pytest.skip("this compiler has no AddressSanitizer runtime")
    variables = {
        "LD_PRELOAD": f"{asan} {library('libstdc++.so')}",
        "ASAN_OPTIONS": "detect_leaks=0",
        "WHALEFALL_CXX": "g++",
        "PYTHONPATH": str(ROOT / "src"),
    }
    ran = subprocess.run(
        [sys.executable, "-c", DRIVER, str(seed), "400"],
        capture_output=True, text=True, check=False, env={**os.environ, **variables},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-4000:]
    assert ran.stdout.startswith("done")
