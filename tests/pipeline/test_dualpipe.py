"""Every schedule's gradients against one process, over gloo processes."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
from tests.pipeline import jobs, ranks

pytestmark = pytest.mark.ranks
# rounding of sums in another order: a few ulp of values around 1
FP64, FP32 = 1e-12, 1e-5


@pytest.mark.parametrize(
    ("name", "size", "chunks"),
    [
        ("dualpipe", 2, 4),
        ("dualpipe", 4, 10),
        ("dualpipe", 8, 16),
        ("dualpipev", 1, 3),
        ("dualpipev", 2, 5),
        ("dualpipev", 4, 8),
        ("1f1b", 4, 6),
        ("1f1b", 3, 2),
        ("zb1p", 4, 6),
        ("interleaved", 2, 4),
    ],
)
def test_gradients_losses_and_outputs_equal_one_process(name: str, size: int, chunks: int) -> None:
    found = ranks.run(jobs.largest_error, size, name, chunks, "float64")
    assert max(one["grad"] for one in found) <= FP64
    for counted, simulated in (one["live"] for one in found):
        assert counted == simulated
    ends = [one for one in found if one["loss"] is not None]
    assert len(ends) == (2 if name == "dualpipe" else 1)
    assert max(one["loss"] for one in ends) <= FP64
    assert max(one["output"] for one in ends) <= FP64


def test_gradients_equal_in_fp32() -> None:
    found = ranks.run(jobs.largest_error, 4, "dualpipe", 8, "float32")
    assert max(one["grad"] for one in found) <= FP32


@pytest.mark.parametrize("name", ["dualpipe", "dualpipev"])
def test_the_overlap_hook_is_used_and_right(name: str) -> None:
    found = ranks.run(jobs.largest_error, 2, name, 8, "float64", True)
    assert max(one["grad"] for one in found) <= FP64
    assert min(one["calls"] for one in found) >= 4


def test_a_rank_mapping_reorders_the_ranks() -> None:
    found = ranks.run(jobs.largest_error, 4, "dualpipe", 8, "float64", False, [2, 0, 3, 1])
    assert max(one["grad"] for one in found) <= FP64


def test_a_process_group_is_honoured() -> None:
    found = [one for one in ranks.run(jobs.in_subgroup, 3) if one is not None]
    assert [one["rank"] for one in found] == [1, 0]
    assert max(one["grad"] for one in found) <= FP64


@pytest.mark.parametrize("name", ["dualpipe", "dualpipev"])
def test_inference_gives_outputs_and_no_gradients(name: str) -> None:
    found = [one for one in ranks.run(jobs.inference, 2, name, 4) if one is not None]
    assert len(found) == (2 if name == "dualpipe" else 1)
    assert max(found) <= FP64


def test_bad_input_is_one_clear_line() -> None:
    (said,) = ranks.run(jobs.refuses, 1)
    assert said == [
        "ConfigError: DualPipe needs an even number of ranks, not 1",
        "ConfigError: pipeline: dualpipev on 1 ranks needs at least 2 chunks, not 1",
        "ShapeError: pipeline: inputs have 6 rows in dimension 0; rank 0 cuts them into 4 equal "
        "chunks",
        "ConfigError: pipeline: rank 0 ends chunks and needs a criterion; or torch.no_grad()",
        "ConfigError: pipeline: rank_mapping is [3]; wanted each of 0 … 0 once",
        "ConfigError: WeightGradStore.pop: the queue is empty; flush() comes first",
        "ConfigError: pipeline: 1f1b puts 1 stages on a rank, got 2 modules",
    ]


def test_a_stage_with_another_shape_says_so() -> None:
    said = ranks.run(jobs.wrong_shape, 2)
    assert any("ShapeError: pipeline: stage 0 sends shapes [(3, 2, 8)]" in one for one in said)


def test_a_killed_rank_is_named_by_its_neighbours() -> None:
    said = ranks.run(jobs.survivor, 3)
    assert said[1] is None
    assert "RankFailure of 1: pipeline: rank 1 failed or left" in said[0]
    assert "RankFailure of 1: pipeline: rank 1 failed or left" in said[2]
