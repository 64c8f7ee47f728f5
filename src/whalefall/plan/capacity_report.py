"""The report of `plan capacity`: both phases, with the published averages beside the peaks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from whalefall.errors import ConfigError
from whalefall.model.config import ModelConfig, load_config, parse_config
from whalefall.plan import published
from whalefall.plan.capacity import Phase, decode_capacity, parse_unit, prefill_capacity
from whalefall.plan.hardware_files import load_hardware

__all__ = ["capacity_report", "print_capacity", "read_config"]


def read_config(path: Path) -> ModelConfig:
    """The config of a checkpoint folder, or of a config.json alone."""
    if path.suffix != ".json":
        return load_config(path)
    import json

    if not path.is_file():
        raise ConfigError(f"plan capacity: no file {path}")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"plan capacity: {path} is not JSON ({error})") from None
    return parse_config(raw, str(path))


def capacity_report(
    model: Path,
    hardware_name: str,
    prefill: str,
    decode: str,
    redundant: int,
    kv_length: float,
    prompt: float,
    hit_rate: float,
    tpot_ms: float,
    kv_bytes: int,
) -> dict[str, Any]:
    """Both phases of a model on a kind of node.

    `prefill.tokens_s_node` counts every input token, cached ones included, as the published rate
    does; the published averages belong to V3 on H800 and stand beside the peaks only there.
    """
    if not 0 <= hit_rate < 1 or prompt <= 0 or kv_length <= 0 or tpot_ms <= 0 or kv_bytes < 1:
        raise ConfigError(
            f"plan capacity: hit rate {hit_rate}, prompt {prompt}, KV length {kv_length}, "
            f"{tpot_ms} ms: wanted 0 <= rate < 1 and the others above 0"
        )
    config, hardware = read_config(model), load_hardware(hardware_name)
    first = prefill_capacity(
        config, hardware, parse_unit(prefill, redundant), prompt, prompt * hit_rate
    )
    second = decode_capacity(
        config, hardware, parse_unit(decode, redundant), kv_length, tpot_ms / 1e3, kv_bytes
    )
    with_hits = first.tokens_s_node / (1 - hit_rate)
    report = {
        "model": config.model_type,
        "hardware": hardware.name,
        "prefill": {"computed_tokens_s_node": first.tokens_s_node, **phase_dict(first, with_hits)},
        "decode": phase_dict(second, second.tokens_s_node),
        "kv_bytes_token": config.latent_dim * kv_bytes * config.num_layers,
    }
    if hardware_name == "h800" and config.hidden_size == 7168 and config.num_layers == 61:
        report["published_daily_average"] = {
            "prefill_tokens_s_node": published.PREFILL_TOKENS_S_NODE,
            "prefill_utilisation": published.PREFILL_TOKENS_S_NODE / with_hits,
            "decode_tokens_s_node": published.DECODE_TOKENS_S_NODE,
            "decode_utilisation": published.DECODE_TOKENS_S_NODE / second.tokens_s_node,
        }
    return report


def phase_dict(phase: Phase, tokens_s_node: float) -> dict[str, Any]:
    """A phase for JSON, its rate replaced by `tokens_s_node`."""
    return phase.as_dict() | {"tokens_s_node": tokens_s_node}


def print_capacity(report: dict[str, Any]) -> None:
    """Print the report as text."""
    typer.echo(f"{report['model']} on {report['hardware']}: peak by roofline, not a measurement")
    for name in ("prefill", "decode"):
        phase = report[name]
        per = "input tokens/s a node, hits included" if name == "prefill" else "tokens/s a node"
        typer.echo(f"\n{name}: {phase['tokens_s_node']:,.0f} {per}")
        typer.echo(f"  batch {phase['batch']:,.0f} a GPU, step {phase['step_s'] * 1e3:,.1f} ms")
        typer.echo(f"  bound by {phase['bound']}; {phase['kv_gb']:.0f} GB a GPU beside the weights")
        for kernel in phase["kernels"]:
            us = kernel["seconds"] * 1e6
            typer.echo(f"    {kernel['name']:16} {us:>10,.1f} us a layer  {kernel['bound']}")
    average = report.get("published_daily_average")
    if average:
        typer.echo("\npublished daily averages over all nodes, and the utilisation they imply:")
        for name in ("prefill", "decode"):
            rate, share = average[f"{name}_tokens_s_node"], average[f"{name}_utilisation"]
            typer.echo(f"  {name}: {rate:,.0f} tokens/s a node, {share:.0%} of the peak above")
