"""Every refusal says where, what it got, what it wanted and, behind a semicolon, what to do."""

from __future__ import annotations

import ast
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.gemm.operands import BF16, E4M3
from whalefall import arguments, dtypes, gemm
from whalefall.errors import ConfigError, WhalefallError

SHARED = [Path(dtypes.__file__).parent / name for name in ("arrays.py", "formats.py", "written.py")]
FILES = [*sorted(Path(gemm.__file__).parent.glob("*.py")), *SHARED, Path(arguments.__file__)]


def texts(path: Path) -> list[tuple[int, str]]:
    """Line and constant text of the message of every `raise SomethingError(...)`."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            parts = [n.value for n in ast.walk(node.exc) if isinstance(n, ast.Constant)]
            found.append((node.lineno, " ".join(part for part in parts if isinstance(part, str))))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_message_has_a_remedy(path: Path) -> None:
    # two that other rooms' messages are made of
    if path.name == "arguments.py":
        wanted = [text for _, text in texts(path) if "finite" not in text and text.strip("{} ,")]
        wanted = [text for text in wanted if "pass" in text]
        assert len(wanted) == 3
        return
    for line, text in texts(path):
        _, _, remedy = text.partition("; ")
        assert remedy.strip(), (path.name, line, text)


def one(shape: Any, dtype: Any = np.float32) -> Any:
    return np.ones(shape, dtype)


CODES = one((4, 256)).astype(E4M3)
A, B, D = (CODES, one((4, 2))), (CODES, one((1, 2))), np.zeros((4, 4), np.float32)
SHORT = (CODES[:, :128], one((1, 1)))
MANY = (CODES[None], one((1, 1, 2)))
MASKED = (CODES[None], one((1, 4, 2)))
ROWS, COUNTS = np.zeros(4, np.int32), np.array([4], np.int32)
KA, KD = (one((128, 4), E4M3), one((1, 4))), np.zeros((1, 4, 4), np.float32)
HALF = one((4, 8), BF16)
rows, masked = gemm.m_grouped_fp8_gemm_nt_contiguous, gemm.m_grouped_fp8_gemm_nt_masked
by_k = gemm.k_grouped_fp8_gemm_tn_contiguous
TRAINED = torch.ones(4, 8, dtype=torch.bfloat16, requires_grad=True)

# call, what the message holds: argument, got, wanted, remedy
REFUSALS: list[tuple[Any, str]] = [
    (partial(gemm.fp8_gemm_nt, A, B, D[:, :3]), "d has shape [4, 3], wanted [4, 4]; make it"),
    (partial(gemm.fp8_gemm_nt, A, B, D[:, ::-1]), "d has strides [4, -1], wanted 1 along"),
    (partial(gemm.fp8_gemm_nt, A, B, D.astype("f8")), "d is float64, wanted float32 or bfloat16;"),
    (partial(gemm.fp8_gemm_nt, A, B, D.astype(">f4")), "d: dtype >f4, wanted real numbers in this"),
    (partial(gemm.fp8_gemm_nt, A, B, D, D.astype(BF16)), "c is bfloat16, wanted d's float32; co"),
    (partial(gemm.fp8_gemm_nt, A, SHORT, D), "b has K=128, wanted K=256 as a has; give"),
    (partial(gemm.fp8_gemm_nt, A, B, D, recipe=(True, 128, 128)), "scales of a for (True, 128)"),
    (partial(gemm.fp8_gemm_nt, A, B, D, recipe=(1, 64, 128)), "scales of b for (64, 128)"),
    (partial(gemm.fp8_gemm_nt, A, B, D, compiled_dims="x"), "compiled_dims='x', wanted letters"),
    (partial(gemm.bf16_gemm_nt, HALF, HALF.astype("f4"), D), "b is float32, wanted bfloat16; con"),
    (
        partial(gemm.bf16_gemm_nt, torch.ones(4, 8).bfloat16(), TRAINED, D),
        "nt: b needs a gradient;",
    ),
    (partial(gemm.bf16_gemm_nt, HALF[0], HALF, D), "a has shape [8], wanted 2 axes; reshape it"),
    (
        partial(rows, A, MANY, D, ROWS.astype("i8")),
        "grouped_layout is int64, wanted int32; convert",
    ),
    (partial(rows, A, MANY, D, ROWS + 1), "grouped_layout holds 1, wanted -1 to 0; -1 is no"),
    (
        partial(rows, A, MANY, D, COUNTS + 1, use_psum_layout=True),
        "grouped_layout: group 0 ends at row 5, wanted at most a's 4; with",
    ),
    (partial(masked, MASKED, MANY, KD, COUNTS + 1, 4), "masked_m holds 5, wanted 0 to M=4; clamp"),
    (partial(masked, MASKED, MANY, KD, ROWS, 4), "masked_m has shape [4], wanted [G=1]; reshape"),
    (partial(by_k, KA, KA, KD, np.array([64, 64]), None), "wanted a list of the groups' sizes"),
    (partial(by_k, KA, KA, KD, [64], None), "ks_cpu sums to 64, wanted the operands' K=128; name"),
    (
        partial(by_k, KA, KA, KD, None, COUNTS + 200, use_psum_layout=True),
        "grouped_layout: groups end at 204, wanted at most K=128; with",
    ),
    (partial(by_k, KA, (KA[0], TRAINED), KD, [128], None), "scale of b needs a gradient; call it"),
    (partial(gemm.linear, TRAINED, HALF), "linear: x needs a gradient; call it under"),
    (partial(gemm.set_pdl, "x"), "set_pdl: new_enable_pdl is 'x', wanted True or False; pass"),
    (
        partial(gemm.set_ignore_compile_dims, object()),  # type: ignore[arg-type]
        "set_ignore_compile_dims: new_value is a object, wanted True or False; pass",
    ),
    (
        partial(gemm.get_theoretical_mk_alignment_for_contiguous_layout, "x"),  # type: ignore[arg-type]
        "expected_m is 'x', wanted a whole number >= 0; pass",
    ),
]


@pytest.mark.parametrize(("call", "words"), REFUSALS, ids=[words for _, words in REFUSALS])
def test_a_refusal_says_what_to_do(call: Any, words: str) -> None:
    with pytest.raises(WhalefallError) as refusal:
        call()
    text = str(refusal.value)
    assert words in text
    assert text.partition("; ")[2] and "\n" not in text


@pytest.mark.parametrize("call", [gemm.set_pdl, gemm.set_ignore_compile_dims])
def test_flags_of_settings_are_kept(call: Any) -> None:
    call(np.bool_(True))
    assert gemm.get_pdl() is (call is gemm.set_pdl)
    call(False)
    assert gemm.get_pdl() is False
    with pytest.raises(ConfigError):
        call([True])
