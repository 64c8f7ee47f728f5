"""`whalefall bench ROOM`: runs `benchmarks/ROOM.py` of a checkout and renews docs/benchmarks.md."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Annotated

import typer

import whalefall
from whalefall.errors import MissingError

app = typer.Typer(add_completion=False)


def checkout() -> Path:
    """The root of the repository this package is run from; MissingError for an installed wheel."""
    root = Path(whalefall.__file__).resolve().parents[2]
    if not (root / "benchmarks").is_dir():
        raise MissingError(
            f"whalefall bench: no benchmarks/ in {root}; run it from a checkout of the repository"
        )
    return root


HELP = ("--help", "-h")
NATIVE_ONLY = ("attention", "gemm")  # rooms whose functions have numpy in their place


# `--help` is no option of ours: after a room it is the room's.
@app.command(
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": [],
    }
)
def bench(
    context: typer.Context,
    room: Annotated[
        str, typer.Argument(help="a room: gemm, attention, fs, …, or `all`, or `table`")
    ],
) -> None:
    """Measure a room; its own options follow its name (whalefall bench ROOM --help).

    `whalefall bench serve --url URL` drives any OpenAI-compatible server (--url URL --help).
    """
    if room in HELP:
        typer.echo(context.get_help())
        return
    if room == "serve" and any(arg.split("=")[0] == "--url" for arg in context.args):
        drive_server(context.args)
        return
    if room == "serve" and set(context.args) & set(HELP):
        typer.echo("With --url, of any server:\n")
        drive_server(["--help"])
        typer.echo("Without --url, of this checkout against its peers:\n")
    from whalefall.jit.compiler import compiler

    root = checkout()
    if room == "table":
        from whalefall.testing.benchmark import write_page

        write_page(root)
        return
    names = sorted(p.stem for p in (root / "benchmarks").glob("*.py") if p.stem[0] != "_")
    if room != "all" and room not in names:
        raise MissingError(f"whalefall bench: no benchmark {room!r}; there are {', '.join(names)}")
    for name in names if room == "all" else [room]:
        if name in NATIVE_ONLY:
            compiler()
        sys.argv = [f"whalefall bench {name}", *context.args]
        sys.path.insert(0, str(root))
        runpy.run_path(str(root / "benchmarks" / f"{name}.py"), run_name="__main__")


def drive_server(args: list[str]) -> None:
    """`bench serve --url …`; needs no checkout."""
    from whalefall.cli.bench_serve import app as load

    typer.main.get_command(load).main(
        args=args, prog_name="whalefall bench serve", standalone_mode=False
    )
