"""Check, describe, quantise or make up a DeepSeek-architecture checkpoint."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, no_args_is_help=True)
_Json = Annotated[bool, typer.Option("--json", help="machine-readable")]


@app.command()
def check(path: Path, as_json: _Json = False) -> None:
    """Read a checkpoint's headers: is it supported, what does it need, how fast will it be?"""
    from whalefall.errors import WhalefallError
    from whalefall.jit import machine
    from whalefall.model.check import check as run

    facts = {"memory_bytes": float(machine.memory_bytes())}
    with contextlib.suppress(WhalefallError):  # no compiler: no measurement, hence no estimate
        facts["read_bytes_s"] = machine.limits()["read_bytes_s"]
    report = run(path, facts)
    if as_json:
        typer.echo(json.dumps(report.as_json(), indent=1))
    else:
        for line in _lines(report.as_json()):
            typer.echo(line)
    if report.problems:
        raise typer.Exit(2)


def _lines(r: dict[str, object]) -> list[str]:
    def number(name: str) -> float:
        value = r[name]
        return float(value) if isinstance(value, int | float) else 0.0

    weights, memory = number("weight_bytes") / 1e9, number("memory_bytes") / 1e9
    kv, mha = number("kv_token_bytes"), number("mha_token_bytes")
    lines = [
        f"{r['architecture']} ({r['model_type']}): "
        + ("supported" if not r["problems"] else "cannot be served"),
    ]
    problems = r["problems"]
    lines += [f"  problem: {p}" for p in (problems if isinstance(problems, tuple) else ())]
    warnings = r["warnings"]
    lines += [f"  warning: {w}" for w in (warnings if isinstance(warnings, tuple) else ())]
    if not r["has_weights"]:
        lines.append("  no weights here: sizes are those the config stands for")
    lines += [
        f"  parameters   {number('parameters') / 1e9:.2f} B,"
        f" {number('active_parameters') / 1e9:.2f} B active for a token",
        f"  weights      {weights:.1f} GB, used in place; this machine has {memory:.1f} GB"
        + ("" if weights < memory else ": they will be read from the disk again and again"),
        f"  KV cache     {kv:,.0f} bytes a token in BF16;"
        f" MHA would take {mha:,.0f} ({mha / kv:.0f}x)",
        f"  context      {r['context']:,} tokens, MTP layers: {r['mtp_layers']}",
        f"  a token      reads {number('token_bytes') / 1e9:.3f} GB of weights",
    ]
    if r["tokens_per_s"] and weights < memory:
        lines.append(f"  bound here   {number('tokens_per_s'):.1f} tokens/s for one sequence")
    return lines


@app.command()
def info(path: Path, as_json: _Json = False) -> None:
    """Show a checkpoint's architecture as its config.json says it."""
    from dataclasses import asdict

    from whalefall.model.check import kv_bytes, mha_kv_bytes
    from whalefall.model.config import load_config

    config = load_config(path)
    facts = asdict(config)
    facts |= {
        "softmax_scale": config.softmax_scale,
        "kv_token_bytes": kv_bytes(config),
        "mha_token_bytes": mha_kv_bytes(config),
    }
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
        return
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        typer.echo(f"{name:{width}}  {value}")


@app.command()
def synth(
    path: Path,
    shape: Annotated[str, typer.Option(help="tiny, or mid (3.1 GB)")] = "tiny",
    bf16: Annotated[bool, typer.Option("--bf16", help="BF16 instead of FP8 blocks")] = False,
    fp8_head: Annotated[bool, typer.Option("--fp8-head", help="the output head in FP8")] = False,
    seed: int = 0,
) -> None:
    """Write a checkpoint with random weights, for tests and benchmarks."""
    from whalefall.model.synth import synth as run

    typer.echo(f"wrote {run(path, shape, fp8=not bf16, fp8_head=fp8_head, seed=seed)}")


@app.command()
def quantize(source: Path, target: Path) -> None:
    """Write an FP8 copy (128 x 128 blocks) of a BF16 checkpoint into a new folder."""
    from rich.progress import Progress

    from whalefall.model.quantize import quantize as run

    with Progress() as progress:
        task = progress.add_task("quantising", total=None)
        run(source, target, lambda done, of: progress.update(task, completed=done, total=of))
    typer.echo(f"wrote {target}")
