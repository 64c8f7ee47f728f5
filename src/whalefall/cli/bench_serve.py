"""`whalefall bench serve --url URL`: a concurrency sweep of any OpenAI-compatible server."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any

import typer

from whalefall import env
from whalefall.errors import ConfigError
from whalefall.options import within

__all__ = ["app"]

MAX_CLIENTS = 4096

app = typer.Typer(add_completion=False)


@app.command()
def sweep(
    url: Annotated[str, typer.Option(help="the server, http://HOST:PORT")],
    concurrency: Annotated[str, typer.Option(help="clients at a time, a list")] = "1,2,4,8",
    requests: Annotated[
        int | None,
        typer.Option(
            callback=within(1, 1e9), help="requests of each (default: 4 a client, at least 8)"
        ),
    ] = None,
    words: Annotated[int, typer.Option(callback=within(1, 1e7), help="words of a prompt")] = 64,
    max_tokens: Annotated[
        int, typer.Option(callback=within(1, 1e9), help="tokens of an answer, at most")
    ] = 64,
    ignore_eos: Annotated[
        bool, typer.Option(help="answers of exactly --max-tokens (vLLM's and our field)")
    ] = False,
    model_name: Annotated[str, typer.Option(help="(default: the server's first)")] = "",
    api_key: Annotated[str, typer.Option(help="its key (also WHALEFALL_API_KEY)")] = "",
    seed: Annotated[int, typer.Option(help="another seed, other prompts")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Drive an OpenAI-compatible server with load: throughput, TTFT, TPOT and ITL."""
    from whalefall.testing.load import Server, drive

    try:
        counts = [int(part) for part in concurrency.split(",")]
    except ValueError:
        counts = [0]
    if not 1 <= min(counts) <= max(counts) <= MAX_CLIENTS:
        raise ConfigError(
            f"bench serve: --concurrency is {concurrency!r}, wanted 1,2,4,… up to {MAX_CLIENTS}"
        )
    server = Server(url, api_key or env.get("WHALEFALL_API_KEY") or "", model_name)
    warmup = server.ask("hello", 2)
    if warmup.error:
        raise ConfigError(f"bench serve: {url} refuses a request: {warmup.error}")
    lines: list[dict[str, Any]] = []
    for number, count in enumerate(counts):
        chosen = requests or max(8, 4 * count)
        # Other prompts each time: what the server has seen before would come from its cache.
        start = 1000 * seed + number
        line = drive(server, count, chosen, words, max_tokens, ignore_eos, start)
        lines.append(asdict(line))
        if not as_json:
            show(lines[-1], first=number == 0)
    if as_json:
        typer.echo(json.dumps({"url": url, "model": server.model, "sweep": lines}, indent=1))
    if all(line["answered"] == 0 for line in lines):
        raise ConfigError(f"bench serve: no request was answered; the first: {lines[0]['error']}")


COLUMNS = ("clients", "answers", "failed", "req/s", "in tok/s", "out tok/s")
TIMES = ("ttft_ms", "tpot_ms", "itl_ms")


def show(line: dict[str, Any], first: bool) -> None:
    """One line of the table, its head before the first."""
    if first:
        heads = [f"{name:>9}" for name in COLUMNS]
        heads += [f"{name[:-3].upper() + ' ms':>24}" for name in TIMES]
        typer.echo("  ".join(heads) + "\n" + " " * 64 + ("mean / median / p99".rjust(26)) * 3)
    cells = [f"{line['concurrency']:9d}", f"{line['answered']:9d}", f"{line['failed']:9d}"]
    cells += [f"{line[k]:9.2f}" for k in ("requests_s", "input_tokens_s", "output_tokens_s")]
    cells += [f"{spread(line[name]):>24}" for name in TIMES]
    typer.echo("  ".join(cells) + (f"  {line['error'][:100]}" if line["error"] else ""))


def spread(values: dict[str, float] | None) -> str:
    """Mean / median / p99."""
    if values is None:
        return "–"
    parts: Sequence[float] = (values["mean"], values["median"], values["p99"])
    return " / ".join(f"{value:.1f}" for value in parts)
