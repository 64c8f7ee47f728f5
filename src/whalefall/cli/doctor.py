"""`whalefall doctor`: what this machine has (cores, ISA, compiler, memory, GPU), what will run."""

from __future__ import annotations

import json
from typing import Annotated

import typer

app = typer.Typer(add_completion=False)


@app.command()
def doctor(
    measure: Annotated[bool, typer.Option(help="measure bandwidths and peaks anew")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Say what this machine has, and what will run on it."""
    from whalefall.jit import machine

    facts = machine.describe(measure=measure)
    if measure and "bf16_gflops" in facts:  # kernels run
        from whalefall.plan.this_machine import shares

        facts |= {f"{name}_share": round(share, 2) for name, share in shares(measure=True).items()}
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
        return
    for name, value in facts.items():
        text = ", ".join(map(str, value)) if isinstance(value, list) else value
        typer.echo(f"{name.replace('_', ' '):24} {text}")
