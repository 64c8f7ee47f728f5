"""Train a DeepSeek-V3-architecture model by a TOML recipe."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer

from whalefall.errors import ConfigError

app = typer.Typer(add_completion=False)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="the recipe, a TOML file (docs/train.md)")],
    resume: Annotated[
        bool, typer.Option("--resume", help="go on from the newest checkpoint in run.folder")
    ] = False,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="change a key: run.steps=100")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="read the recipe, train nothing")] = False,
    export: Annotated[
        Path | None, typer.Option(help="at the end write a Hugging Face folder here")
    ] = None,
) -> None:
    """Train a model; stop it at any time and go on with --resume."""
    from whalefall.train.export import export_checkpoint
    from whalefall.train.job import run
    from whalefall.train.recipe import read_recipe

    changes = dict(_change(text) for text in set_ or [])
    read = read_recipe(recipe, changes)
    if check:
        typer.echo(describe(read))
        return
    with _Bar(read.run.steps) as bar:
        run(recipe, resume=resume, changes=changes, progress=bar.show)
    typer.echo(f"{read.folder}: {read.run.steps} steps done; curves.svg, history.jsonl")
    if export is not None:
        size = export_checkpoint(read.checkpoints, export)
        typer.echo(f"{export}: model.safetensors has {size:,} bytes")


def _change(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise ConfigError(f"train: --set {text}, wanted KEY=VALUE, as run.steps=100")
    try:
        return name.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return name.strip(), value.strip()


def describe(recipe: Any) -> str:
    """A recipe in a few lines."""
    from whalefall.model.shapes import tensor_shapes

    parallel, config = recipe.parallel, recipe.config
    count = sum(_size(shape) for _, shape, _ in tensor_shapes(config))
    return "\n".join(
        [
            f"model: {count / 1e6:.2f} M parameters in the checkpoint, {config.num_layers} layers, "
            f"{config.num_experts} experts top-{config.num_experts_per_tok}",
            f"step: {recipe.rows} rows of {recipe.data.length} tokens; {recipe.run.steps} steps, "
            f"{recipe.rows * recipe.data.length * recipe.run.steps / 1e6:.2f} M tokens",
            f"ranks: {parallel.ranks} = {parallel.pipeline} pipeline ({parallel.schedule}, "
            f"{parallel.chunks} chunks) x {parallel.expert} expert x {parallel.data} data",
            f"precision: {recipe.run.precision}",
        ]
    )


def _size(shape: tuple[int, ...]) -> int:
    total = 1
    for length in shape:
        total *= length
    return total


class _Bar:
    """A progress bar on a terminal, a line now and then elsewhere."""

    LINE_S = 10.0

    def __init__(self, steps: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeRemainingColumn as Remaining

        self.console = Console()
        self.bar = Progress(
            BarColumn(), MofNCompleteColumn(), Remaining(), TextColumn("{task.description}"),
            console=self.console, disable=not self.console.is_terminal,
        )  # fmt: skip
        self.task = self.bar.add_task("starting", total=steps)
        self.printed = 0.0

    def __enter__(self) -> _Bar:
        self.bar.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self.bar.stop()

    def show(self, lines: list[dict[str, Any]]) -> None:
        """Show the newest of some history lines."""
        import time

        from whalefall.train.trainer import report_line

        text = report_line(lines[-1])
        self.bar.update(self.task, completed=lines[-1]["step"] + 1, description=text)
        if self.bar.disable and time.monotonic() - self.printed > self.LINE_S:
            typer.echo(text)
            self.printed = time.monotonic()
