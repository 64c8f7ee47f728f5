"""Without a C++ compiler: what `doctor`, `make` and README say happens, happens."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ANSWER = """
from whalefall.engine import LLM, SamplingParams
from whalefall.serve.commands import bundled_path
llm = LLM(bundled_path(), num_blocks=64)
print(len(llm.generate(["The whale"], SamplingParams(max_tokens=3))[0].outputs[0].token_ids))
"""
EVERYTHING = """
import ml_dtypes
import numpy as np
from whalefall import attention, compat, gemm, jit
from whalefall.engine import LLM, SamplingParams
from whalefall.ep.routing import route
from whalefall.serve.commands import bundled_path
compat.install()
import deep_gemm, flash_mla
x, q = np.ones((2, 128), np.float32), np.ones((3, 2, 16), np.float32)
ends, d = np.array([0, 3], np.int32), np.ones((2, 2), np.float32)
packed = gemm.per_token_cast_to_fp8(x, True)
deep_gemm.set_num_sms(1)
deep_gemm.fp8_gemm_nt(packed, packed, d, c=d, recipe=(1, 1, 128))
print(d[0, 0], gemm.linear(x, x)[0, 0], deep_gemm.get_num_sms())
out, lse = flash_mla.flash_attn_varlen_func(q, q, q, ends, ends, 3, 3)
print(out[0, 0, 0], attention.merge_partials(out[None], lse[None])[0][0, 0, 0])
half, page = (np.ones(s, ml_dtypes.bfloat16) for s in ((1, 1, 2, 16), (1, 64, 1, 16)))
metadata = flash_mla.get_mla_metadata()
out, _ = flash_mla.flash_mla_with_kvcache(half, page, ends[None, :1], ends[1:], 8, *metadata)
print(out[0, 0, 0, 0])
print(route(np.eye(4, dtype=np.float32), None, 1)[0][:, 0])
llm = LLM(bundled_path(), num_blocks=64)
print(len(llm.generate(["The whale"], SamplingParams(max_tokens=3))[0].outputs[0].token_ids))
"""


def run(*args: str, **settings: str) -> subprocess.CompletedProcess[str]:
    settings = {**os.environ, "WHALEFALL_CXX": "/bin/false", **settings}
    command = [sys.executable, *args]
    return subprocess.run(
        command, capture_output=True, text=True, env=settings, check=False, cwd=ROOT
    )


def test_doctor_make_and_readme_say_the_same() -> None:
    words = ("models, gemm and attention", "answer by the numpy reference, slowly", "ziglang")
    doctor = run("-m", "whalefall", "doctor").stdout
    make = next(line for line in (ROOT / "Makefile").read_text().splitlines() if "ziglang" in line)
    readme = " ".join((ROOT / "README.md").read_text().split())
    readme = readme[readme.index("Kernels are compiled at first use") :][:600]
    for text in (doctor, make, readme):
        text = text.replace("the ", "").replace("will ", "").replace("`", "")
        assert not [word for word in words if word.replace("the ", "") not in text], text


def test_a_model_answers_with_one_warning() -> None:
    done = run("-c", ANSWER)
    assert done.stdout == "3\n", done.stderr
    assert done.stderr.count("running the numpy reference, slowly") == 1


def test_all_rooms_answer_with_one_warning_in_all(tmp_path: Path) -> None:
    done = run("-W", "always", "-c", EVERYTHING, WHALEFALL_CACHE=str(tmp_path))
    assert done.stdout == "129.0 128.0 1\n1.0 1.0\n1\n[0 1 2 3]\n3\n", done.stderr
    warned = [line for line in done.stderr.splitlines() if "no C++ compiler" in line]
    assert len(warned) == 1
    assert "pip install ziglang" in warned[0]
    assert "running the numpy reference, slowly" in warned[0]


@pytest.mark.parametrize("command", [("jit", "warm"), ("bench", "gemm"), ("bench", "attention")])
def test_what_numpy_cannot_stand_in_for_is_refused(command: tuple[str, ...]) -> None:
    done = run("-m", "whalefall", *command)
    assert done.returncode == 2
    assert done.stderr.startswith("NoCompilerError: no C++ compiler")
    assert done.stderr.count("\n") == 1 and not done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("room", ["gemm", "attention"])
def test_the_tests_of_kernels_hold_for_numpy(room: str) -> None:
    done = run("-m", "pytest", "-q", "-p", "tests.without_compiler", f"tests/{room}")
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
