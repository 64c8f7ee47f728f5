"""Breaks of the kernels, each of which must turn a test red: the tests' own test.

Each break is made in a copy of the tree, and the tests that should notice run there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from whalefall import jit
from whalefall.jit import machine

ROOT = Path(__file__).parents[2]
GEMM, ATTENTION = "src/whalefall/gemm/native", "src/whalefall/attention/native"
SIMD = "src/whalefall/jit/include/whalefall/simd.h"
EVERY_CODE = "tests/gemm/test_linear.py::test_every_code_counts_as_its_value_in_every_place"


class Break(NamedTuple):
    """One change of a source, and the tests that notice."""

    file: str
    old: str
    new: str
    tests: str
    tiles: bool = False  # of what is compiled where AMX's tiles are fast


BREAKS = {
    "take the scale of the block of K before": Break(
        f"{GEMM}/panel.h",
        "first[(block >> shift) * stride]",
        "first[((block >> shift) - (block >> shift > 0)) * stride]",
        "tests/gemm/test_dense.py::test_fp8_layouts_and_recipes",
    ),
    "drop the last block of K": Break(
        f"{GEMM}/gemm.h",
        "int64_t cols() const { return num_cols; }",
        "int64_t cols() const { return (num_cols - 1) / 128 * 128; }",
        "tests/gemm/test_dense.py::test_fp8_layouts_and_recipes",
    ),
    "round ties of W8A8 away from zero": Break(
        f"{GEMM}/linear.h",
        "u = (u + 0x7ffff + ((u >> 20) & 1)) & 0xfff00000u;",
        "u = (u + 0x80000) & 0xfff00000u;",
        "tests/gemm/test_quantised.py::test_quantised_activations_are_the_cast_ones",
    ),
    "forget the scales of x": Break(
        f"{GEMM}/few.h",
        "float factor = x.scaled() ? x.scale[m][b] : 1.0f;",
        "float factor = 1.0f;",
        "tests/gemm/test_quantised.py::test_quantised_activations_are_the_cast_ones",
    ),
    "drop a mantissa bit of every fourth code": Break(
        SIMD,
        "out[3] = fp8_bits_to_float(even << 16);",
        "out[3] = fp8_bits_to_float(even << 16 & ~(1 << 20));",
        EVERY_CODE,
    ),
    "put codes into the panel in the order in which they are decoded": Break(
        f"{GEMM}/many_fma.h",
        "store(out + (3 - j) * kTileColumns",
        "store(out + j * kTileColumns",
        EVERY_CODE,
    ),
    "spread one number of x over its neighbour's place": Break(
        f"{GEMM}/many_fma.h", "v, v, 3, 3, 3, 3", "v, v, 2, 2, 2, 2", EVERY_CODE
    ),
    "look for NaN in half of the codes": Break(
        SIMD,
        "void see32(const uint8_t* p) { see16(p), see16(p + 16); }",
        "void see32(const uint8_t* p) { see16(p); }",
        "tests/gemm/test_linear.py::test_a_nan_weight_reaches_its_column_and_no_other",
    ),
    "take the first group's scales for the second one's rows": Break(
        f"{GEMM}/many_tile.h",
        "{0, kGroup}, {kGroup, 0}}",
        "{0, kGroup}, {0, 0}}",
        "tests/gemm/test_tiles.py::test_bits_depend_on_neither_m_nor_form_nor_threads_nor_the_call",
        tiles=True,
    ),
    "overwrite scales that are still wanted": Break(
        f"{GEMM}/many_tile.h",
        "k / kPanelDepth % 2 * kScales",
        "0 * k",
        "tests/gemm/test_tiles.py::test_a_product_of_many_waves_and_panels_is_exact",
        tiles=True,
    ),
    "give all rows of a tile the first block row's scale": Break(
        f"{GEMM}/few_tile.h",
        "turn_ * width - j * kLanes",
        "kGroup * width - j * kLanes",
        "tests/gemm/test_tiles.py::test_a_part_of_a_weight_keeps_its_place_in_the_scales",
        tiles=True,
    ),
    "leave x in order where W is dealt": Break(
        f"{GEMM}/tile_rows.h",
        "if (deal) deal_halves(first",
        "if (false) deal_halves(first",
        "tests/gemm/test_tiles.py::test_a_product_of_many_waves_and_panels_is_exact",
        tiles=True,
    ),
    "read indices behind a list": Break(
        f"{ATTENTION}/mla_sparse.h",
        "std::clamp<int64_t>(lengths[token / tokens_per_length], 0, topk)",
        "lengths[token / tokens_per_length]",
        "tests/attention/test_sparse.py::test_a_length_beyond_the_list_ends_with_it",
    ),
    "shift decode's causal mask by one": Break(
        f"{ATTENTION}/mla_decode.h",
        "args.causal ? args.per_request - 1 - t : 0",
        "args.causal ? args.per_request - t : 0",
        "tests/attention/test_decode.py::test_a_sample_of_the_original_grid",
    ),
    "shift prefill's causal mask by one": Break(
        f"{ATTENTION}/mha.h",
        "token + 1 - args_.q_starts[sequence + 1] + all",
        "token - args_.q_starts[sequence + 1] + all",
        "tests/attention/test_serving.py::test_varlen_attention_agrees_with_float64",
    ),
    "swap the scales of two tiles of an FP8 row": Break(
        f"{ATTENTION}/fp8_rows.h",
        "std::memcpy(&scale, row + kFp8Columns + tile * 4, 4);",
        "std::memcpy(&scale, row + kFp8Columns + (tile ^ 1) * 4, 4);",
        "tests/attention/test_decode.py::test_dense_over_the_fp8_cache",
    ),
    "see one key less of a page": Break(
        f"{ATTENTION}/mla.h",
        "args_.keys[t],\n",
        "args_.keys[t] - (args_.keys[t] > 1),\n",
        "tests/attention/test_decode.py::test_a_sample_of_the_original_grid",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BREAKS)
def test_a_break_turns_a_test_red(name: str, tmp_path: Path) -> None:
    made = BREAKS[name]
    if made.tiles and not machine.tile_is_fast(jit.levels()[-1]):
        pytest.skip("needs fast AMX tiles")
    for folder in ("src", "tests/gemm", "tests/attention"):
        ignore = shutil.ignore_patterns("bundled", "__pycache__")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    source = tmp_path / made.file
    assert made.old in source.read_text(), "the source has changed: bring the break up to date"
    source.write_text(source.read_text().replace(made.old, made.new))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", made.tests]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "src")}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stdout[-2000:]  # 1: tests failed; 2 to 5: they did not run
    assert "AssertionError" in done.stdout or "assert " in done.stdout
