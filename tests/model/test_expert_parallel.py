"""Experts over ranks: the bits of one process, for any number of ranks, placement and schedule."""

from pathlib import Path

import numpy as np
import pytest

from tests.model import parallel_children as children
from tests.model.forms import FORMS
from whalefall import launch
from whalefall.errors import ShapeError
from whalefall.gemm.linear import packed_width
from whalefall.model.micro_batches import split
from whalefall.model.synth import synth

HERE = str(Path(__file__).parent)
SEQUENCES = 5


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {
        form: str(synth(folder / form, FORMS[form], fp8=form != "kimi-k2"))
        for form in ("v3", "kimi-k2", "v2-lite")
    }


def ranks(size: int, **kwargs: object) -> list[dict]:
    tasks = [
        launch.Task(
            f"rank {rank}",
            "parallel_children:run",
            kwargs={"rank": rank, "size": size, "sequences": SEQUENCES, **kwargs},
            path=(HERE,),
        )
        for rank in range(size)
    ]
    return launch.run(tasks, 120)


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("size", "form", "compute", "overlap", "redundant"),
    [
        (1, "v3", "w8a16", True, 0),
        (2, "v3", "w8a16", False, 3),
        (2, "v3", "w8a8", True, 2),
        (2, "kimi-k2", "fp32", True, 0),
        (4, "v3", "fp32", True, 4),
        (4, "v2-lite", "w8a8", False, 1),
        (4, "kimi-k2", "w8a16", True, 2),
        (2, "kimi-k2", "w8a8", False, 0),  # bf16 weights: rows travel as they are
        (8, "v3", "w8a16", True, 1),  # more ranks than sequences: three have no token at all
    ],
)
def test_ranks_give_the_bits_of_one_process(
    models, tmp_path, size, form, compute, overlap, redundant
) -> None:
    common = {"model": models[form], "compute": compute, "redundant": redundant}
    one = children.run(0, 0, "", overlap=False, sequences=SEQUENCES, **common)
    many = ranks(size, folder=str(tmp_path), overlap=overlap, **common)
    found = {q: rows for each in many for q, rows in each["logits"].items()}
    assert found == one["logits"]
    assert sum(np.array(each["load"]) for each in many).tolist() == one["load"]


def test_a_split_batch_holds_every_token_once() -> None:
    for in_prompt in (True, False):
        whole = children.batch([3, 1, 40, 7], [0, 5, 2, 9], in_prompt, [0, 1, 2, 3])
        first, second, order = split(whole)
        halves = (second, first) if in_prompt else (first, second)
        assert np.concatenate([h.tokens for h in halves]).tolist() == whole.tokens.tolist()
        assert np.concatenate([h.positions for h in halves]).tolist() == whole.positions.tolist()
        got = np.concatenate([first.tokens[first.logit_rows], second.tokens[second.logit_rows]])
        assert got[order].tolist() == whole.tokens[whole.logit_rows].tolist()


def test_a_split_prompt_is_even_and_its_earlier_part_comes_second() -> None:
    first, second, _ = split(children.batch([60, 4], [0, 0], True, [0, 1]))
    assert [len(first.tokens), len(second.tokens)] == [32, 32]
    assert first.positions[0] == 32 and second.positions[0] == 0


@pytest.mark.parametrize("lengths", [[], [1], [0, 1]])
def test_tiny_batches_split(lengths) -> None:
    seqs = list(range(len(lengths)))
    first, second, _ = split(children.batch(lengths, [0] * len(lengths), False, seqs))
    assert len(first.tokens) + len(second.tokens) == sum(lengths)


@pytest.mark.parametrize(
    ("form", "compute", "wanted"),
    [("v3", "w8a8", "uint8"), ("v3", "w8a16", "float32"), ("kimi-k2", "w8a8", "float32")],
)
def test_w8a8_rows_travel_as_fp8_with_scales(
    models, tmp_path, monkeypatch, form: str, compute: str, wanted: str
) -> None:
    from whalefall import ep

    sent = []
    real = ep.Engine.begin_dispatch_selections

    def seen(self, x, *rest):
        sent.append(x)
        return real(self, x, *rest)

    monkeypatch.setattr(ep.Engine, "begin_dispatch_selections", seen)
    children.run(0, 1, str(tmp_path), models[form], compute, False, 0, 2)
    assert {x.dtype.name for x in sent} == {wanted}
    if wanted == "uint8":
        assert {x.shape[1] for x in sent} == {packed_width(int(FORMS[form]["hidden_size"]))}


def test_a_placement_for_other_ranks_is_refused(models, tmp_path) -> None:
    from whalefall import ep
    from whalefall.model import Checkpoint, load_config, load_weights
    from whalefall.model.expert_parallel import ExpertParallelStep, even_placement

    config = load_config(models["v3"])
    weights = load_weights(Checkpoint(models["v3"]), config)
    with ep.Engine(ep.FileGroup(tmp_path, 0, 1)) as alone:
        with pytest.raises(ShapeError, match=r"over 2 ranks, wanted .* over 1"):
            ExpertParallelStep(weights, config, "fp32", 64, alone, even_placement(config, 2), False)
