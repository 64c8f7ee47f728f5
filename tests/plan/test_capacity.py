"""The capacity model: kernel classes against the published trace, limits and monotony."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import pytest

from tests.model.published import V3
from whalefall.errors import ConfigError, MissingError
from whalefall.model.config import parse_config
from whalefall.plan import capacity, kernels
from whalefall.plan.hardware_files import load_hardware, names, parse
from whalefall.plan.ledger import Prices
from whalefall.plan.published import TRAIN_TRACE_MS
from whalefall.plan.train_step import train_chunk_seconds
from whalefall.plan.training import TrainingRun

CONFIG = parse_config(V3)
H800 = load_hardware("h800")


def test_kernel_classes_are_within_a_quarter_of_the_published_trace() -> None:
    seconds = train_chunk_seconds(CONFIG, H800, tokens=4096, nodes=8, layers=4)
    assert seconds.keys() == TRAIN_TRACE_MS.keys()
    off = {name: seconds[name] * 1e3 / ms - 1 for name, ms in TRAIN_TRACE_MS.items()}
    assert max(map(abs, off.values())) <= 0.25, off


def test_v3_has_its_published_active_weights() -> None:
    attention = sum(kernels.attention_weights(CONFIG, absorbed=False).values())
    experts = 9 * kernels.expert_weights(CONFIG)
    dense = 3 * 7168 * 18432
    active = 61 * attention + 58 * experts + 3 * dense + 129280 * 7168
    assert active / 1e9 == pytest.approx(37, abs=0.6)


def test_a_unit_holds_its_published_experts() -> None:
    prefill, decode = capacity.parse_unit("4x8"), capacity.parse_unit("18x8")
    assert (prefill.ranks, decode.ranks) == (32, 144)
    assert capacity.local_experts(CONFIG, prefill) == 9
    assert capacity.local_experts(CONFIG, decode) == 2


def test_published_averages_are_below_the_peaks() -> None:
    prefill = capacity.prefill_capacity(CONFIG, H800, capacity.parse_unit("4x8"), 4096, 2304)
    decode = capacity.decode_capacity(CONFIG, H800, capacity.parse_unit("18x8"), 4989)
    assert 73_700 < prefill.tokens_s_node / (1 - 0.5625) < 10 * 73_700
    assert 14_800 < decode.tokens_s_node < 10 * 14_800


def test_faster_hardware_and_looser_limits_never_lower_the_peak() -> None:
    unit = capacity.parse_unit("18x8")
    base = capacity.decode_capacity(CONFIG, H800, unit, 4989)
    for field in ("memory_gb", "read_gb_s", "bf16_tflops", "fp8_tflops", "rdma_gb_s"):
        better = dataclasses.replace(H800, **{field: 2 * getattr(H800, field)})
        assert capacity.decode_capacity(CONFIG, better, unit, 4989).tokens_s_node >= (
            base.tokens_s_node * (1 - 1e-9)
        ), field
    longer = capacity.decode_capacity(CONFIG, H800, unit, 10_000)
    assert longer.tokens_s_node < base.tokens_s_node
    hurried = capacity.decode_capacity(CONFIG, H800, unit, 4989, tpot_s=0.02)
    assert hurried.step_s <= 0.02
    assert hurried.batch < base.batch


def test_a_token_crosses_to_at_most_its_groups_nodes() -> None:
    assert kernels.expected_nodes(CONFIG, 1) == pytest.approx(1)
    assert kernels.expected_nodes(CONFIG, 8) == 4
    free = parse_config(V3 | {"n_group": 1, "topk_group": 1})
    assert kernels.expected_nodes(free, 8) == pytest.approx(8 * (1 - (7 / 8) ** 8))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="do not fit in 80 GB; use more nodes"):
        capacity.decode_capacity(CONFIG, H800, capacity.parse_unit("1x8"), 4989)
    with pytest.raises(ConfigError, match="wanted NODESxGPUS"):
        capacity.parse_unit("4by8")
    with pytest.raises(MissingError, match="wanted one of h200, h800, this"):
        load_hardware("abacus")
    with pytest.raises(ConfigError, match=r"half: lacks .*bf16_tflops"):
        parse({"name": "half"}, "half")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name = ", "is not TOML"),
        ("efficiency = 3", "efficiency is 3"),
        ("", "lacks "),
        (None, "fp8_tflops is nan, wanted a finite number above 0"),
    ],
)
def test_a_wrong_hardware_file_is_one_line(text: str | None, words: str, tmp_path: Path) -> None:
    if text is None:
        shipped = resources.files("whalefall.plan").joinpath("hardware/h800.toml").read_text()
        text = re.sub(r"(?m)^fp8_tflops *=.*$", "fp8_tflops = nan", shipped)
    path = tmp_path / "own.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(words)):
        load_hardware(str(path))


@pytest.mark.parametrize("text", ["x8", "4x", "0x8", "4x8x2", "²x8", "100001x1", "9" * 30 + "x1"])
def test_a_unit_of_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="wanted NODESxGPUS"):
        capacity.parse_unit(text)


def test_hardware_names_all_load() -> None:
    for name in names():
        assert load_hardware(name).read_gb_s > 0


def test_the_command_prints_json(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(V3))
    command = [
        sys.executable,
        "-m",
        "whalefall",
        "plan",
        "capacity",
        "--model",
        str(path),
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    assert report["kv_bytes_token"] == 70_272
    assert 0 < report["published_daily_average"]["decode_utilisation"] < 1


def test_v3s_training_cost_comes_out() -> None:
    run = TrainingRun()
    assert run.total_hours == 2.788e6
    assert run.cost == 5.576e6
    assert run.tflops_gpu == pytest.approx(343, abs=1)
    assert run.utilisation == pytest.approx(0.35, abs=0.005)
    assert run.days(2048) == pytest.approx(56.7, abs=0.1)
    with pytest.raises(ConfigError, match="tokens is -1"):
        TrainingRun(tokens=-1)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Prices(hit=-1.0), "price of hit is -1.0, wanted a finite number >= 0"),
        (lambda: Prices(output=math.inf), "price of output is inf, wanted a finite number >= 0"),
        (lambda: TrainingRun(tokens=0), "plan train: tokens is 0, wanted a finite number above 0"),
        (lambda: TrainingRun(gpu_hour=math.nan), "plan train: gpu_hour is nan, wanted a finite"),
    ],
)
def test_numbers_that_price_nothing_are_refused(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        make()


def test_an_efficiency_is_a_share(tmp_path: Path) -> None:
    shipped = resources.files("whalefall.plan").joinpath("hardware/h800.toml").read_text()
    head, shares = shipped.split("[efficiency]")
    for wrong in ("0", "1.5", "true", "'half'"):
        path = tmp_path / "own.toml"
        path.write_text(f"{head}[efficiency]" + re.sub(r"(?m)= .*?(?=\s|$)", f"= {wrong}", shares))
        with pytest.raises(ConfigError, match=r"efficiency\.\w+ is .*, wanted above 0 to 1"):
            load_hardware(str(path))
