"""Breaks of the kernels, each of which must turn a test red at every ISA level.

Each break is made in a copy of the tree, where the test that should notice runs at one level.
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
NATIVE = "src/whalefall/attention/native"
SAMPLE = "test_decode.py::test_a_sample_of_the_original_grid"
PAGED = "test_serving.py::test_paged_mla_agrees_with_float64"
GROWING = "test_serving.py::test_maxima_that_grow_along_the_keys"
VARLEN = "test_serving.py::test_varlen_attention_agrees_with_float64"
SPARSE = "test_sparse.py::test_sparse_prefill"
BF16 = "test_bf16_queries.py::test_any_rows_keys_and_pages_agree_with_float64"


class Break(NamedTuple):
    """One change of a source; the test that notices, and its case behind the level."""

    file: str
    old: str
    new: str
    test: str
    case: str


BREAKS = {
    "shift decode's causal mask by one": Break(
        "mla_decode.h", "args.per_request - 1 - t : 0", "args.per_request - t : 0",
        SAMPLE, "2-2-140-3-1-True-True",
    ),
    "shift prefill's causal mask by one": Break(
        "mha.h", "token + 1 - args_.q_starts", "token - args_.q_starts",
        VARLEN, "40-24-float32-True",
    ),
    "swap the scales of two tiles of an FP8 row": Break(
        "fp8_rows.h", "row + kFp8Columns + tile * 4, 4", "row + kFp8Columns + (tile ^ 1) * 4, 4",
        "test_decode.py::test_dense_over_the_fp8_cache", "uint8",
    ),
    "drop the last block of keys": Break(
        "plan.h", "return ceil_div(block.keys, kKeys);",
        "return block.keys > kKeys ? block.keys / kKeys : 1;", SAMPLE, "1-2-300-128-8-True-True",
    ),
    "drop the last key": Break(
        "mla.h", "args_.keys[t],\n", "args_.keys[t] - (args_.keys[t] > 1),\n",
        SAMPLE, "1-1-20-1-1-False-False",
    ),
    "see one key behind the last, many heads": Break(
        "attend.h", "if (t >= group.seen[r]) s[t * R + r] = -kInf",
        "if (t > group.seen[r]) s[t * R + r] = 0",
        PAGED, "16-576-512-bfloat16",
    ),
    "see keys behind the last, one head": Break(
        "in_order.h", "i < whole * R; ++i) s[i] = -kInf", "i < whole * R; ++i) s[i] = 0",
        PAGED, "1-576-512-bfloat16",
    ),
    "read the entry behind the last of a table": Break(
        "mla_decode.h", "i < ceil_div(length, cache.page)", "i <= ceil_div(length, cache.page)",
        SAMPLE, "1-1-140-126-3-False-False",
    ),
    "take indices out of range for the nearest key": Break(
        "mla_sparse.h", "if (index[i] >= 0 && index[i] < rows)\n"
        "        use(cache.row(index[i] / cache.page, index[i] % cache.page, 0));",
        "if (const int64_t at = std::clamp<int64_t>(index[i], 0, rows - 1); at >= 0)\n"
        "        use(cache.row(at / cache.page, at % cache.page, 0));",
        SPARSE, "3-1840-256-16-512-False",
    ),
    "read NaN keys behind topk_length": Break(
        "mla_sparse.h", "if (!lengths) return topk;", "return topk;",
        SPARSE, "3-1840-256-16-512-False",
    ),
    "turn the attention sink round": Break(
        "block.h", "std::exp(double(to.sink[rows[r].head]) - lse)",
        "std::exp(lse - double(to.sink[rows[r].head]))",
        SPARSE, "5-128-128-64-576-True",
    ),
    "merge runs without their maxima": Break(
        "block.h", "b = power_of_two(other.point - origin);", "b = set1(1.0f);",
        PAGED, "16-576-512-bfloat16",
    ),
    "keep old values when the maximum grows, many heads": Break(
        "attend.h", "if (group.rescaled) rescale<R>(o, end - step, group.factor);", "",
        GROWING, "16-False",
    ),
    "keep old values when the maximum grows, one head": Break(
        "in_order.h", "if (!all_one(factor)) rescale<R>(o, v_steps, factor);", "",
        GROWING, "1-False",
    ),
    "give each token its neighbour's table": Break(
        "mla.h", "table_(args.tables[block.token])",
        "table_(args.tables[block.token ? block.token - 1 : 0])",
        SAMPLE, "64-1-20-2-1-True-False",
    ),
}  # fmt: skip

# At `avx2`: several groups of four heads.
ALONE = "test_serving.py::test_four_heads_have_the_same_bits_alone_and_among_others"
THREES_BREAKS = {
    "give the third key the scores of the second": Break(
        "scores.h", "last[i] = sum[(T - 1) * R + i % R];", "last[i] = sum[(T - 2) * R + i % R];",
        PAGED, "16-576-512-bfloat16",
    ),
    "forget the last two keys": Break(
        "scores.h", "for (; t < tokens; t += 2)", "for (; t + 2 < tokens; t += 2)",
        PAGED, "16-576-512-bfloat16",
    ),
    "take the odd elements for the even ones": Break(
        "rows.h", "vpblendw $0xaa", "vpblendw $0x55", PAGED, "16-576-512-bfloat16",
    ),
    "weigh the third vector by the step's own first": Break(
        "weigh.h", "Row::second(v + kStep, first) : Row::first(v + kStep)};",
        "Row::second(v + kStep, first) : Row::first(v)};", ALONE, "96-80-bfloat16",
    ),
    "drop the vectors behind the last three": Break(
        "weigh.h", "weigh<Row, R, R>(value, step, end_step, p, begin, end, share, o);", "",
        ALONE, "96-80-bfloat16",
    ),
}  # fmt: skip

# Where AMX's tiles are fast.
TILE_BREAKS = {
    "see a key behind the last, tiles": Break(
        "tile_soften.h", "select(count > t,", "select(count >= t,", BF16, "3-160-128-64",
    ),
    "pair weights and values in different orders": Break(
        "tile_values.h", "put(row(t + 2 * p), row(t + 2 * p + 1), strip + pair_place(p)",
        "put(row(t + 2 * p), row(t + 2 * p + 1), strip + p", BF16, "40-96-96-64",
    ),
    "copy one row for all 16 that are not evenly spaced": Break(
        "tile_scores.h", "memcpy(row, panel.k[first + i],", "memcpy(row, panel.k[first],",
        BF16, "16-576-512-61",
    ),
    "keep old weights when the maximum grows, tiles": Break(
        "tile_soften.h", "rescale_weights(first, p, moved);", "", GROWING, "16-True",
    ),
    "keep old values when the maximum grows, tiles": Break(
        "tile_attend.h",
        "if (groups[g].rescaled) rescale<kTileRows>(groups[g].o, steps, groups[g].factor);", "",
        GROWING, "16-True",
    ),
    "take the maximum for that of any scale": Break(
        "tile_attend.h", "if (!(scale > 0)) {", "if (false) {",
        "test_bf16_queries.py::test_scales_that_are_not_positive", "-0.05",
    ),
    "weigh what a row does not see with 0, were it NaN": Break(
        "tile_attend.h", "if (least == n || all_finite(panel, least, n, v_steps))", "if (true)",
        "test_bf16_queries.py::test_a_value_that_is_no_number_reaches_only_rows_that_see_it",
        "16-nan",
    ),
    "scale FP8 rows by twice a power of two": Break(
        "fp8_rows.h", "short(exponent * 128)", "short(exponent * 128 + 128)",
        "test_serving.py::test_fp8_rows_attend_as_their_bf16_expansion", "16-True",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", TILE_BREAKS)
def test_a_break_of_the_tiles_turns_a_test_red(name: str, tmp_path: Path) -> None:
    if not machine.tile_is_fast(jit.levels()[-1]):
        pytest.skip("no tiles here, or slow ones")
    turns_red(TILE_BREAKS[name], "amx", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", THREES_BREAKS)
def test_a_break_of_the_threes_turns_a_test_red(name: str, tmp_path: Path) -> None:
    if "avx2" not in jit.levels():
        pytest.skip("no avx2 here")
    turns_red(THREES_BREAKS[name], "avx2", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("forced", jit.levels())
@pytest.mark.parametrize("name", BREAKS)
def test_a_break_turns_a_test_red(name: str, forced: str, tmp_path: Path) -> None:
    turns_red(BREAKS[name], forced, tmp_path)


def turns_red(made: Break, forced: str, tmp_path: Path) -> None:
    for folder in ("src", "tests/attention"):
        ignore = shutil.ignore_patterns("bundled", "__pycache__")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    source = tmp_path / NATIVE / made.file
    text = source.read_text()
    assert made.old in text, "the source has changed: bring the break up to date"
    test = f"tests/attention/{made.test}[{forced}-{made.case}]"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "src")}

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )

    source.write_text(text.replace(made.old, made.new))
    done = run()
    assert done.returncode == 1, done.stdout[-2000:]  # 1: it failed; 2 to 5: it did not run
    assert "AssertionError" in done.stdout or "assert " in done.stdout or "Error" in done.stdout
    source.write_text(text)
    assert run().returncode == 0, "red without the break too"
