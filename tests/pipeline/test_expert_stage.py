"""Expert dispatch and combine inside a stage: gradients right, communication hidden."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
from tests.pipeline import expert_jobs, ranks

pytestmark = pytest.mark.ranks


def test_communication_hides_under_the_other_chunks_compute() -> None:
    (found,) = ranks.run(expert_jobs.alone, 1)
    error, overlap = found
    assert error < 1e-5  # fp32 sums in another order
    assert overlap >= 0.8


def test_experts_over_two_ranks_get_the_gradients_of_both_ranks_tokens() -> None:
    found = ranks.run(expert_jobs.two_ranks, 2)
    assert max(found) < 0.02  # tokens and gradients travel in bf16, 8 bits of mantissa
