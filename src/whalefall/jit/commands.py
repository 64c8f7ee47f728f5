"""Compile kernels ahead of time, or empty the cache of compiled kernels."""

from __future__ import annotations

import typer

from whalefall import env

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.command()
def clear() -> None:
    """Delete every compiled kernel of the cache."""
    count = 0
    for path in (env.cache_dir() / "jit").glob("*.so"):
        path.unlink(missing_ok=True)
        count += 1
    typer.echo(f"deleted {count} compiled kernels")


@app.command()
def warm() -> None:
    """Compile what serving needs, for the best level of this machine."""
    from whalefall.jit import machine

    machine.limits()
    typer.echo(f"compiled kernels are in {env.cache_dir() / 'jit'}")
