"""The model's losses and gradients against Transformers; balance; export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file

from tests.train import jobs
from whalefall.model.config import ModelConfig
from whalefall.train import Recipe, export_checkpoint, read_history, read_recipe
from whalefall.train.experts import MoE, moved_bias, select, sequence_loss
from whalefall.train.layers import Maker
from whalefall.train.products import Precision
from whalefall.train.stage import Build, Scales, Stage, cut, shifted_labels

ROWS, LENGTH = 3, 16


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return read_recipe(jobs.folder_with_recipe(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def stage(recipe: Recipe) -> Stage:
    """The whole model as one stage, with biases that change what is chosen."""
    build = Build(recipe.config, Precision("fp32"), LENGTH, Maker(1))
    made = Stage(build, cut(recipe.config, 1), 0, Scales())
    for number, (_, moe) in enumerate(made.moe_layers()):
        random = torch.Generator().manual_seed(number)
        moe.bias.copy_(torch.randn(len(moe.bias), generator=random) * 0.1)
    return made


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(0, 96, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))


def peer(stage: Stage, recipe: Recipe, folder: Path, layers: int) -> Any:
    """Transformers' model of the first `layers` layers, the MTP layer's included if so many."""
    folder.mkdir()
    tensors = {n.name: n.of(n.parameter.detach()).clone() for n in stage.published()}
    tensors |= {name: bias.clone() for name, bias in stage.biases()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = recipe.raw_config | {"num_hidden_layers": layers, "num_nextn_predict_layers": 0}
    (folder / "config.json").write_text(json.dumps(config))
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).train()


def run(stage: Stage, tokens: torch.Tensor, document: torch.Tensor, mtp: float) -> torch.Tensor:
    """Summed losses: main + mtp × MTP."""
    stage.zero_grad()
    stage.scales.main, stage.scales.mtp = 1.0, mtp
    stage.scales.sums = {"main": 0.0, "mtp": 0.0}
    learnt = torch.ones_like(tokens, dtype=torch.bool)
    return stage.criterion(*stage(tokens, document), tokens, learnt)


def test_main_loss_and_gradients_are_transformers(
    stage: Stage, recipe: Recipe, tokens: torch.Tensor, tmp_path: Path
) -> None:
    model = peer(stage, recipe, tmp_path / "peer", recipe.config.num_layers)
    loss = run(stage, tokens, torch.zeros(ROWS, LENGTH), 0.0)
    loss.backward()
    logits = model(tokens).logits[:, :-1]
    wanted = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    theirs = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    checked = 0
    for named in stage.published():
        if named.name in theirs:  # experts lie stacked there
            mine = named.of(named.parameter.grad)
            assert torch.allclose(mine, theirs[named.name], atol=2e-4, rtol=1e-3), named.name
            checked += 1
    assert checked > 30
    down = stage.layers[1].mlp.experts.down.grad
    assert torch.allclose(down, theirs["model.layers.1.mlp.experts.down_proj"], atol=2e-4)


def test_mtp_loss_is_one_decoder_layer_more(
    stage: Stage, recipe: Recipe, tokens: torch.Tensor, tmp_path: Path
) -> None:
    layers = recipe.config.num_layers
    main = peer(stage, recipe, tmp_path / "main", layers)
    deeper = peer(stage, recipe, tmp_path / "deeper", layers + 1).model
    published = {n.name: n.of(n.parameter.detach()) for n in stage.published()}
    name = f"model.layers.{layers}"

    def norm(x: torch.Tensor, which: str) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], published[f"{name}.{which}.weight"], 1e-6)

    with torch.no_grad():
        run(stage, tokens, torch.zeros(ROWS, LENGTH), 1.0)
        h = main(tokens, output_hidden_states=True).hidden_states[-1][:, :-2]
        ahead = published["model.embed_tokens.weight"][tokens[:, 1:-1]]
        joined = torch.cat((norm(ahead, "enorm"), norm(h, "hnorm")), -1)
        x = joined @ published[f"{name}.eh_proj.weight"].T
        count = x.shape[1]
        mask = torch.full((1, 1, count, count), -torch.inf).triu(1)
        angles = deeper.rotary_emb(x, torch.arange(count)[None])
        out = deeper.layers[layers](x, mask, position_embeddings=angles)
        logits = norm(out, "shared_head.norm") @ published["lm_head.weight"].T
    wanted = F.cross_entropy(logits.flatten(0, 1), tokens[:, 2:].flatten(), reduction="sum")
    assert stage.scales.sums["mtp"] == pytest.approx(float(wanted), rel=1e-5)


def test_documents_of_a_row_do_not_see_each_other(stage: Stage, tokens: torch.Tensor) -> None:
    document = torch.tensor([0.0] * 7 + [1.0] * 6 + [-1.0] * 3).expand(1, -1)
    with torch.no_grad():
        packed = float(run(stage, tokens[:1], document, 0.0))
        apart = sum(
            float(run(stage, tokens[:1, part], torch.zeros(1, n), 0.0))
            for part, n in ((slice(0, 7), 7), (slice(7, 13), 6))
        )
        # padding was learnt as a document of its own here: three tokens, two labels
        apart += float(run(stage, tokens[:1, 13:], torch.zeros(1, 3), 0.0))
    assert packed == pytest.approx(apart, rel=1e-4)


def test_labels_end_with_their_document_and_where_nothing_is_learnt() -> None:
    tokens = torch.arange(10, 18)[None]
    document = torch.tensor([[0, 0, 0, 0, 1, 1, 1, -1]])
    learnt = torch.tensor([[0, 1, 1, 0, 1, 1, 1, 0]])
    assert shifted_labels(tokens, document, learnt, 1).tolist() == [
        [11, 12, -1, -1, 15, 16, -1, -1]
    ]
    assert shifted_labels(tokens, document, learnt, 2).tolist() == [
        [12, -1, -1, -1, 16, -1, -1, -1]
    ]


def test_every_seed_and_name_has_weights_of_its_own() -> None:
    one, other = Maker(1), Maker(2)
    assert torch.equal(one.normal("a", 3, 4), Maker(1).normal("a", 3, 4))
    assert not torch.equal(one.normal("a", 3, 4), one.normal("b", 3, 4))
    assert not torch.equal(one.normal("a", 3, 4), other.normal("a", 3, 4))


def test_sequence_loss_is_the_papers_sum() -> None:
    random = torch.Generator().manual_seed(0)
    scores = torch.rand(2, 5, 4, generator=random)
    topk = scores.topk(2, -1).indices
    valid = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    wanted = 0.0
    for row, tokens in enumerate((5, 3)):
        for e in range(4):
            f = 4 / (2 * tokens) * sum(int(e in topk[row, t]) for t in range(tokens))
            p = sum(float(scores[row, t, e] / scores[row, t].sum()) for t in range(tokens)) / tokens
            wanted += f * p
    assert float(sequence_loss(scores, topk, valid)) == pytest.approx(wanted, rel=1e-5)
    even = torch.full((1, 4, 4), 0.5)
    spread = torch.tensor([[[0, 1], [2, 3], [0, 1], [2, 3]]])
    assert float(sequence_loss(even, spread, torch.ones(1, 4) > 0)) == pytest.approx(1.0)


def test_the_bias_moves_load_from_busy_experts_to_idle_ones(recipe: Recipe) -> None:
    config: ModelConfig = recipe.config
    random = torch.Generator().manual_seed(0)
    scores = (torch.randn(2000, 8, generator=random) + torch.arange(8) * 0.3).sigmoid()
    bias = torch.zeros(8)

    def load() -> torch.Tensor:
        return select(scores, bias, config)[0].flatten().bincount(minlength=8).float()

    before = load()
    for _ in range(300):
        bias = moved_bias(bias, load(), 0.002)
    after = load()
    assert before.max() / before.mean() > 1.8
    assert after.max() / after.mean() < 1.1
    # weights are those of the scores alone
    _, weight = select(scores, bias + 100, config)
    assert torch.allclose(weight.sum(-1), torch.tensor(config.routed_scaling_factor))


def test_no_speed_moves_no_bias() -> None:
    bias = torch.randn(4)
    assert torch.equal(moved_bias(bias, torch.tensor([1.0, 2, 3, 4]), 0.0), bias)


def test_padding_counts_for_no_balance(stage: Stage, tokens: torch.Tensor) -> None:
    moe: MoE = stage.layers[1].mlp
    moe.load.zero_()
    document = torch.zeros(ROWS, LENGTH)
    document[:, 10:] = -1
    run(stage, tokens, document, 0.0)
    assert float(moe.load.sum()) == ROWS * 10 * 2


def test_a_run_learns_and_its_export_is_read_by_the_engine(tmp_path: Path) -> None:
    path = jobs.folder_with_recipe(tmp_path)
    changes = {
        "run.steps": 40,
        "run.precision": "fp8",
        "checkpoint.every": 40,
        "optimizer.rate": 0.01,
    }
    jobs.on_ranks(jobs.run_to_end, path, changes, False)
    history = read_history(tmp_path / "run/history.jsonl")
    assert history[-1]["loss"] < history[0]["loss"] - 0.5
    assert "busiest expert" in (tmp_path / "run/curves.svg").read_text()
    size = export_checkpoint(str(tmp_path / "run"), tmp_path / "out")
    assert size == (tmp_path / "out/model.safetensors").stat().st_size
    from whalefall.model import Checkpoint, load_config, load_weights

    weights = load_weights(Checkpoint(tmp_path / "out"), load_config(tmp_path / "out"))
    assert len(weights.layers) == 4
