"""One run, however its ranks are laid out: same losses, same gradients."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from tests.pipeline import ranks
from tests.train import jobs

LAYOUTS = {
    "data": jobs.layout(data=2),
    "1f1b": jobs.layout(pipeline=2, chunks=4),
    "zb1p": jobs.layout(pipeline=2, schedule="zb1p", chunks=4),
    "dualpipe": jobs.layout(pipeline=2, schedule="dualpipe", chunks=4),
    "dualpipev": jobs.layout(pipeline=2, schedule="dualpipev", chunks=4),
    "expert": jobs.layout(expert=2),
}
FOUR = {
    "dualpipe x data": jobs.layout(pipeline=2, data=2, schedule="dualpipe", chunks=4),
    "zb1p x expert": jobs.layout(pipeline=2, expert=2, schedule="zb1p", chunks=2),
    "expert x data": jobs.layout(expert=2, data=2),
}
# fp32 sums in another order: 1e-5 of a tensor's largest gradient, 1e-5 of a loss
TOLERANCE = 1e-5
# between expert ranks tokens and sums travel in bf16 (2^-8), which turns some near-ties of the
# gate: of all gradients together
EXPERT_TOLERANCE = 0.05


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jobs.folder_with_recipe(tmp_path_factory.mktemp("layouts"))


@pytest.fixture(scope="module")
def single(recipe: Path) -> dict[str, np.ndarray]:
    return jobs.on_ranks(jobs.gradients, recipe, {})[0]


@pytest.fixture(scope="module")
def on_two(recipe: Path) -> list:
    return ranks.run(jobs.all_gradients, 2, str(recipe), LAYOUTS)


@pytest.fixture(scope="module")
def on_four(recipe: Path) -> list:
    return ranks.run(jobs.all_gradients, 4, str(recipe), FOUR)


def largest(found: list[dict[str, np.ndarray]], single: dict[str, np.ndarray]) -> float:
    """Largest difference, over all ranks and tensors, of a tensor's largest gradient."""
    assert set().union(*found) == set(single)
    return max(
        float(np.abs(grad - single[name]).max() / np.abs(single[name]).max())
        for part in found
        for name, grad in part.items()
    )


def together(found: list[dict[str, np.ndarray]], single: dict[str, np.ndarray]) -> float:
    """Norm of all differences over the norm of all gradients."""
    joined = {name: grad for part in found for name, grad in part.items()}
    assert set(joined) == set(single)
    apart = sum(float(np.square(joined[name] - single[name]).sum()) for name in single)
    return (apart / sum(float(np.square(grad).sum()) for grad in single.values())) ** 0.5


@pytest.mark.ranks
@pytest.mark.parametrize("name", [n for n in LAYOUTS if n != "expert"])
def test_gradients_are_those_of_a_single_process(on_two, single, name: str) -> None:
    assert largest([part[name] for part in on_two], single) < TOLERANCE


@pytest.mark.ranks
def test_gradients_are_those_of_a_single_process_on_four_ranks(on_four, single) -> None:
    assert largest([part["dualpipe x data"] for part in on_four], single) < TOLERANCE


@pytest.mark.ranks
@pytest.mark.parametrize("name", ["expert", "zb1p x expert", "expert x data"])
def test_expert_ranks_give_the_same_but_for_bf16(on_two, on_four, single, name: str) -> None:
    found = [part[name] for part in (on_two if name in LAYOUTS else on_four)]
    assert together(found, single) < EXPERT_TOLERANCE
    routed = [{n for n in part if ".experts." in n} for part in found]
    assert not set.intersection(*routed)  # each rank holds its own
    assert set.union(*routed) == {n for n in single if ".experts." in n}


@pytest.mark.ranks
def test_losses_are_those_of_a_single_process(recipe: Path) -> None:
    wanted = jobs.on_ranks(jobs.reports, recipe, {}, 4)[0]
    chosen = {name: LAYOUTS[name] for name in ("1f1b", "dualpipe", "data")}
    for part in ranks.run(jobs.all_reports, 2, str(recipe), chosen, 4):
        for found in part.values():
            for key in ("loss", "mtp", "norm", "sequence", "balance"):
                values = [line[key] for line in found]
                assert values == pytest.approx([w[key] for w in wanted], rel=TOLERANCE), key
    assert wanted[-1]["loss"] < wanted[0]["loss"]


@pytest.mark.ranks
def test_one_lost_weight_gradient_flush_is_seen(recipe: Path, single) -> None:
    found = jobs.on_ranks(jobs.gradients, recipe, LAYOUTS["zb1p"], 1)
    assert largest(found, single) > 1000 * TOLERANCE
    assert together(found, single) > EXPERT_TOLERANCE
