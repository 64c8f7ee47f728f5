"""Configs as published, `model check`, and the commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.model.published import GLM, K2, V2_LITE, V3
from whalefall.errors import ConfigError, UnsupportedError
from whalefall.model import Checkpoint, load_config, load_weights
from whalefall.model.check import check
from whalefall.model.commands import app
from whalefall.model.config import parse_config
from whalefall.model.quantize import quantize, quantize_blocks
from whalefall.model.synth import synth, write_tokenizer


def folder_of(tmp_path: Path, fields: dict[str, Any]) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(fields))
    return tmp_path


@pytest.mark.parametrize(
    ("fields", "total", "active"),
    # the published counts, in billions; K2's card says 1,000 and 32
    [(V3, 671.0, 37.5), (V2_LITE, 15.7, 2.4), (K2, 1026, 32.5), (GLM, 29.9, 3.6)],
    ids=["v3", "v2-lite", "k2", "glm-4.7-flash"],
)
def test_parameters_of_published_configs(
    fields: dict[str, Any], total: float, active: float, tmp_path: Path
) -> None:
    report = check(folder_of(tmp_path, fields))
    assert report.problems == ()
    assert report.parameters / 1e9 == pytest.approx(total, rel=0.003)
    assert report.active_parameters / 1e9 == pytest.approx(active, rel=0.06)


def test_v3_latent_kv_is_71_times_smaller_than_mha(tmp_path: Path) -> None:
    report = check(folder_of(tmp_path, V3))
    assert (report.kv_token_bytes, report.mha_token_bytes) == (70_272, 4_997_120)


@pytest.mark.parametrize(("fields", "low", "high"), [(V3, 10, 23), (K2, 19, 20)], ids=["v3", "k2"])
def test_yarn_ranges(fields: dict[str, Any], low: int, high: int) -> None:
    assert parse_config(fields).rope.correction_range() == (low, high)


def test_yarn_softmax_scale_of_v3() -> None:
    assert parse_config(V3).softmax_scale == pytest.approx(0.135234, abs=1e-6)


def test_generation_config_overrides_eos(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {**V3, "eos_token_id": 1})
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    assert load_config(folder).eos_token_ids == (7, 8)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"hidden_size": -1}, ConfigError, "hidden_size is -1, wanted a whole number"),
        ({"n_group": 7}, ConfigError, "n_group is 7, wanted a divisor of 256"),
        ({"topk_group": 9}, ConfigError, "topk_group is 9, wanted 1 to 8"),
        ({"hidden_act": "gelu"}, UnsupportedError, "hidden_act is 'gelu', wanted 'silu'"),
        ({"scoring_func": "sqrt"}, UnsupportedError, "scoring_func is 'sqrt'"),
        ({"rope_scaling": {"type": "linear"}}, UnsupportedError, "rope type 'linear'"),
        ({"quantization_config": {"quant_method": "awq"}}, UnsupportedError, "quantization 'awq'"),
        ({"vocab_size": None}, ConfigError, "no vocab_size"),
    ],
)
def test_bad_configs_get_one_line(
    change: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        parse_config({**V3, **change})


def test_blocks_are_scaled_by_their_largest_value() -> None:
    weight = np.random.default_rng(0).standard_normal((200, 300)).astype(np.float32)
    weight[130:, 260:] = 0
    values, scale = quantize_blocks(weight)
    assert scale.shape == (2, 3)
    assert scale[0, 1] == np.abs(weight[:128, 128:256]).max() / np.float32(448)
    wide = np.repeat(np.repeat(scale, 128, 0)[:200], 128, 1)[:, :300]
    # half a step of three mantissa bits, or of the smallest subnormal
    bound = np.maximum(np.abs(weight) / 16, wide * 2**-10) * (1 + 1e-6)
    assert (np.abs(values.astype(np.float32) * wide - weight) <= bound).all()


def test_quantize_writes_what_synth_would_have(tmp_path: Path) -> None:
    source = synth(tmp_path / "bf16", "tiny", fp8=False, seed=3)
    target = quantize(source, tmp_path / "fp8")
    config = load_config(target)
    assert config.weight_block == (128, 128)
    plain = load_weights(Checkpoint(source), load_config(source)).layers[1].attention.kv_b
    small = load_weights(Checkpoint(target), config).layers[1].attention.kv_b
    values, scale = quantize_blocks(plain.weight)
    assert (small.weight == values).all()
    assert small.scale is not None
    assert (small.scale == scale).all()
    with pytest.raises(ConfigError, match="is FP8 already"):
        quantize(target, tmp_path / "again")
    with pytest.raises(ConfigError, match="is not empty"):
        quantize(source, target)


def test_commands(tmp_path: Path) -> None:
    run, folder = CliRunner(), str(tmp_path / "m")
    assert run.invoke(app, ["synth", folder]).exit_code == 0
    found = json.loads(run.invoke(app, ["check", folder, "--json"]).output)
    assert found["problems"] == []
    assert found["tokens_per_s"] > 0
    assert "supported" in run.invoke(app, ["check", folder]).output
    assert json.loads(run.invoke(app, ["info", folder, "--json"]).output)["kv_lora_rank"] == 64
    config = tmp_path / "m" / "config.json"
    config.write_text(
        config.read_text().replace('"num_hidden_layers": 3', '"num_hidden_layers": 4')
    )
    broken = run.invoke(app, ["check", folder])
    assert broken.exit_code == 2
    assert "tensors are missing, the first model.layers.3" in broken.output


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        ("tokenizer.json", "{", "not a tokenizer.json"),
        ("tokenizer_config.json", "[]", "holds list, wanted an object"),
        ("tokenizer_config.json", '{"chat_template": 5}', "chat_template is int"),
        ("tokenizer_config.json", "{", "not JSON"),
        ("chat_template.jinja", "{% if %}", "line 1"),
    ],
)
def test_a_broken_tokenizer_or_template_is_a_problem(
    file: str, text: str, says: str, tmp_path: Path
) -> None:
    synth(tmp_path / "m", "tiny")
    (tmp_path / "m" / file).write_text(text)
    done = CliRunner().invoke(app, ["check", str(tmp_path / "m")])
    assert done.exit_code == 2
    (line,) = [x for x in done.output.splitlines() if "problem:" in x]
    assert says in line


def test_a_small_tokenizer_is_a_warning(tmp_path: Path) -> None:
    synth(tmp_path / "m", "tiny")
    size = load_config(tmp_path / "m").vocab_size
    write_tokenizer(tmp_path / "m", size)  # 260 ids
    done = CliRunner().invoke(app, ["check", str(tmp_path / "m")])
    assert done.exit_code == 0
    assert ("warning: the tokenizer has 260 ids" in done.output) == (size * 0.9 > 260)
    assert size * 0.9 > 260
