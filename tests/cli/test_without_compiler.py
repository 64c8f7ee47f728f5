"""Without a C++ compiler: what `doctor`, `make` and README say happens, happens."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ANSWER = """
from whalefall.engine import LLM, SamplingParams
from whalefall.serve.commands import bundled_path
llm = LLM(bundled_path(), num_blocks=64)
print(len(llm.generate(["The whale"], SamplingParams(max_tokens=3))[0].outputs[0].token_ids))
"""
CALLS = """
import numpy as np
from whalefall import attention, gemm
from whalefall.errors import MissingError
x, q = np.ones((2, 128), np.float32), np.ones((3, 2, 16), np.float32)
ends = np.array([0, 3], np.int32)
packed = gemm.per_token_cast_to_fp8(x, True)
for call in (
    lambda: gemm.linear(x, x),
    lambda: gemm.fp8_gemm_nt(packed, packed, np.ones((2, 2), np.float32), recipe=(1, 1, 128)),
    lambda: attention.flash_attn_varlen_func(q, q, q, ends, ends, 3, 3),
):
    try:
        call()
    except MissingError as error:
        print(error)
"""


def run(*args: str) -> subprocess.CompletedProcess[str]:
    settings = os.environ | {"WHALEFALL_CXX": "/bin/false"}
    command = [sys.executable, *args]
    return subprocess.run(command, capture_output=True, text=True, env=settings, check=False)


def test_doctor_make_and_readme_say_the_same() -> None:
    words = ("models", "answer by the numpy reference, slowly", "MissingError", "ziglang")
    doctor = run("-m", "whalefall", "doctor").stdout
    make = next(line for line in (ROOT / "Makefile").read_text().splitlines() if "ziglang" in line)
    readme = " ".join((ROOT / "README.md").read_text().split())
    readme = readme[readme.index("Kernels are compiled at first use") :][:600]
    for text in (doctor, make, readme):
        text = text.replace("the ", "")
        assert not [word for word in words if word.replace("the ", "") not in text], text


def test_a_model_answers_with_one_warning() -> None:
    done = run("-c", ANSWER)
    assert done.stdout == "3\n", done.stderr
    assert done.stderr.count("running the numpy reference, slowly") == 1


def test_products_and_attention_say_how_to_get_a_compiler() -> None:
    lines = run("-c", CALLS).stdout.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("no C++ compiler") for line in lines)
    assert all("pip install ziglang" in line for line in lines)
