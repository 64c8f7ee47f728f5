"""Serve a model over OpenAI's API, with a chat page (whalefall serve --model PATH)."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
from functools import partial
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from whalefall import env
from whalefall.arguments import whole
from whalefall.errors import ConfigError
from whalefall.options import within
from whalefall.serve.settings import Settings

if TYPE_CHECKING:
    from whalefall.serve.units import UnitsConfig

app = typer.Typer(add_completion=False, invoke_without_command=True)
SWITCH_S = 0.0005  # Python's own 5 ms is a fifth of a step


def bundled_path() -> Path:
    """The checkpoint that comes with the package."""
    return Path(str(resources.files("whalefall.model"))) / "bundled"


def listen(host: str, port: int) -> socket.socket:
    """A bound socket, taken before the model is loaded; ConfigError where the port is in use."""
    whole("serve: --port", port, 0, 65535)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    server = socket.socket(family, socket.SOCK_STREAM)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        server.bind((host, port))
    except OSError as error:
        server.close()
        raise ConfigError(
            f"serve: cannot listen on {host}:{port} ({error.strerror}); try another --port"
        ) from None
    return server


@app.callback()
def serve(
    context: typer.Context,
    model: Annotated[
        Path | None, typer.Option(help="checkpoint folder (default: the bundled model)")
    ] = None,
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port to listen on; 0: any free one")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(help="key clients must send (also WHALEFALL_API_KEY)")
    ] = None,
    served_model_name: Annotated[str | None, typer.Option(help="name shown to clients")] = None,
    compute: Annotated[str, typer.Option(help="w8a16, w8a8 or fp32")] = "w8a16",
    kv: Annotated[str, typer.Option(help="bf16, fp32 or fp8")] = "bf16",
    max_model_len: Annotated[
        int | None, typer.Option(callback=within(1, 1e9), help="context limit in tokens")
    ] = None,
    max_num_seqs: Annotated[
        int, typer.Option(callback=within(1, 65536), help="sequences in a batch")
    ] = 32,
    max_num_batched_tokens: Annotated[
        int, typer.Option(callback=within(1, 1 << 20), help="tokens in a step")
    ] = 512,
    kv_cache_gb: Annotated[
        float, typer.Option(callback=within(0, 1e6), help="memory for the KV cache, in GB")
    ] = 1.0,
    strict_prefix: Annotated[
        bool, typer.Option(help="never reuse the blocks of earlier answers")
    ] = False,
    speculate: Annotated[
        bool | None,
        typer.Option(
            "--speculate/--no-speculate",
            help="draft tokens with the MTP layer, same answers (default: in large models)",
        ),
    ] = None,
    draft_tokens: Annotated[
        int, typer.Option(callback=within(1, 64), help="drafts a sequence and step, at most")
    ] = 1,
    max_queue: Annotated[
        int, typer.Option(callback=within(1, 1e9), help="waiting requests before a 429")
    ] = 256,
    max_request_bytes: Annotated[
        int, typer.Option(callback=within(1024, 1e12), help="largest request body")
    ] = 8 << 20,
    node_hour: Annotated[
        float, typer.Option(callback=within(0, 1e9), help="what this machine costs an hour, in $")
    ] = 0.10,
    threads: Annotated[
        int | None,
        typer.Option(callback=within(1, 4096), help="kernel threads (default: all cores)"),
    ] = None,
    kv_cache: Annotated[
        str, typer.Option(help="folder or URL that keeps prompts' KV, shared and after a restart")
    ] = "",
    kv_cache_disk_gb: Annotated[
        float, typer.Option(callback=within(0, 1e9), help="what it may take, in GB; 0: no limit")
    ] = 0.0,
    prefill: Annotated[
        str | None, typer.Option(help="prefill UNITSxRANKS as processes; 1-3x2 follows the load")
    ] = None,
    decode: Annotated[str | None, typer.Option(help="decode UNITSxRANKS as processes")] = None,
    kv_transfer: Annotated[
        str, typer.Option(help="how KV gets from prefill to decode units: shm or tcp")
    ] = "shm",
    overlap: Annotated[
        bool, typer.Option(help="dual-batch overlap in units of several ranks")
    ] = True,
    redundant_experts: Annotated[
        int,
        typer.Option(
            callback=within(0, 1024),
            help="replicas of experts that a unit holds beside one of each",
        ),
    ] = 0,
    prefill_set_point: Annotated[
        float,
        typer.Option(
            callback=within(0, 1e12, above=True),
            help="prompt tokens a second that a prefill unit is meant to run at",
        ),
    ] = 1000.0,
    decode_set_point: Annotated[
        float,
        typer.Option(
            callback=within(0, 1e12, above=True),
            help="tokens a second that a decode unit is meant to run at",
        ),
    ] = 50.0,
    drain_seconds: Annotated[
        float,
        typer.Option(
            callback=within(0, 1e9), help="for open answers to finish, after SIGTERM or Ctrl-C"
        ),
    ] = 30.0,
    trace_units: Annotated[
        Path | None, typer.Option(help="a folder for one trace of each rank")
    ] = None,
) -> None:
    """Serve a model over OpenAI's API at http://HOST:PORT, with a chat page at /."""
    if context.invoked_subcommand is not None:
        return
    folder = model or bundled_path()
    settings = Settings(
        model_name=served_model_name or ("whalefall-manpages" if model is None else folder.name),
        host=host,
        api_key=api_key or env.get("WHALEFALL_API_KEY") or None,
        max_queue=max_queue,
        max_request_bytes=max_request_bytes,
        node_hour=node_hour,
        drain_s=drain_seconds,
    )
    check_units(prefill, decode, trace_units)
    options: dict[str, Any] = {
        "compute": compute,
        "kv": kv,
        "max_model_len": max_model_len,
        "max_sequences": max_num_seqs,
        "max_batch_tokens": max_num_batched_tokens,
        "kv_cache_bytes": int(kv_cache_gb * 1e9),
        "strict_prefix": strict_prefix,
        "speculative": speculate,
        "draft_tokens": draft_tokens,
        "prefix_cache": kv_cache,
        "prefix_cache_bytes": int(kv_cache_disk_gb * 1e9),
    }
    server = listen(host, port)
    signal.signal(signal.SIGTERM, leave)  # while uvicorn does not heed it
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    if prefill is not None and decode is not None:
        from whalefall.serve.units import units_config

        if trace_units is not None:
            trace_units.mkdir(parents=True, exist_ok=True)  # or say now that it cannot be
        config = units_config(
            prefill,
            decode,
            options,
            prefill_set_point,
            decode_set_point,
            transfer=kv_transfer,
            overlap=overlap,
            redundant=redundant_experts,
            threads=threads or 0,
            trace=str(trace_units.absolute()) if trace_units else "",
        )
        run_units(server, folder, config, settings)
        return
    from whalefall.engine import Engine, EngineConfig
    from whalefall.jit import set_num_threads

    if threads is not None:
        set_num_threads(threads)
    run(server, Engine(folder, EngineConfig(**options)), settings)


def check_units(prefill: str | None, decode: str | None, traces: Path | None) -> None:
    """Raise ConfigError for options of units where there are none, or of one kind only."""
    if (prefill is None) != (decode is None):
        raise ConfigError(
            f"serve: --prefill is {prefill}, --decode is {decode}; wanted both, or neither for one "
            "process"
        )
    if traces is not None and prefill is None:
        raise ConfigError(
            f"serve: --trace-units {traces} is for --prefill and --decode; one process records "
            "with WHALEFALL_TRACE=FOLDER"
        )


def run_units(server: socket.socket, folder: Path, config: UnitsConfig, settings: Settings) -> None:
    """`run` in front of prefill and decode units, each of its own processes.

    Raises: what ended a unit, once all are closed.
    """
    from whalefall.serve.units import Gateway

    end = partial(os.kill, os.getpid(), signal.SIGTERM)
    with contextlib.closing(Gateway(folder, config, end)) as gateway:
        try:
            run(server, gateway, settings)
        finally:
            if gateway.failure is not None:
                raise gateway.failure


def leave(*_: object) -> None:
    """Heed a signal where no answer is open."""
    sys.exit(0)


def warn_of_tokenizer(engine: Any) -> None:
    """Say in one line where the tokenizer looks like another checkpoint's."""
    from whalefall.model.tokenizer import small_tokenizer

    if engine.tokenizer is not None:
        line = small_tokenizer(engine.tokenizer, engine.model.vocab_size)
        if line is not None:
            typer.echo(f"warning: {line}", err=True)


def run(server: socket.socket, engine: object, settings: Settings) -> None:
    """Serve until SIGTERM or Ctrl-C; then open answers get `drain_s` to finish."""
    import uvicorn

    from whalefall.serve.app import create_app
    from whalefall.serve.draining import DrainingServer

    # The engine's thread comes back from a step to its next one while the event loop runs Python.
    sys.setswitchinterval(SWITCH_S)
    warn_of_tokenizer(engine)
    signal.signal(signal.SIGINT, leave)
    server.listen(2048)
    address = server.getsockname()
    host = f"[{address[0]}]" if ":" in address[0] else address[0]
    typer.echo(f"whalefall serves {settings.model_name} at http://{host}:{address[1]}")
    application = create_app(engine, settings)  # type: ignore[arg-type]
    config = uvicorn.Config(application, log_level="warning", access_log=False)
    DrainingServer(config, application.state.worker, settings.drain_s).run(sockets=[server])


@app.command("simulate")
def simulate_day(
    model: Annotated[Path, typer.Option(help="a checkpoint folder or its config.json")],
    hardware: Annotated[str, typer.Option(help="h800, h200, this, or a .toml file")] = "h800",
    prefill: Annotated[str, typer.Option(help="NODESxGPUS of a prefill unit")] = "4x8",
    decode: Annotated[str, typer.Option(help="NODESxGPUS of a decode unit")] = "18x8",
    traffic: Annotated[
        Path | None, typer.Option(help="relative loads, one a line (default: one smooth night)")
    ] = None,
    hours: Annotated[
        float, typer.Option(callback=within(0, 168, above=True), help="how much of the day")
    ] = 24.0,
    weight: Annotated[
        int, typer.Option(callback=within(1, 1e9), help="real requests a simulated one stands for")
    ] = 300,
    seed: Annotated[int, typer.Option(help="of arrivals and lengths")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Run the published day's traffic through the server's own balancers and autoscaler."""
    from whalefall.serve.day_report import run_day

    run_day(model, hardware, prefill, decode, traffic, hours, weight, seed, as_json)
