"""FFRecord files: pack a folder, list, verify, show and unpack."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from whalefall.errors import ConfigError, CorruptError, MissingError, WhalefallError
from whalefall.record.packed import PackedFolder, pack_folder, scan
from whalefall.record.reader import FileReader
from whalefall.record.shards import pack_shards

app = typer.Typer(add_completion=False, no_args_is_help=True)
Json = Annotated[bool, typer.Option("--json", help="print JSON")]
Source = Annotated[str, typer.Argument(help="a .ffr file, a folder of them, or an fsspec URL")]
_VERIFY_BATCH = 256


@app.callback()
def record() -> None:
    """Many small files in few large ones, with random access."""


@contextmanager
def _progress(title: str, total: int) -> Iterator[Callable[[int], object]]:
    """A bar on stderr; gives the function that sets it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.update(task, completed=done)


@app.command()
def pack(
    folder: Annotated[Path, typer.Argument(help="the folder to pack")],
    out: Annotated[Path, typer.Argument(help="a .ffr file; with --shards a folder")],
    shards: Annotated[int, typer.Option(help="number of files, written in parallel")] = 1,
    workers: Annotated[int | None, typer.Option(help="processes (default: one a core)")] = None,
) -> None:
    """Pack a folder, keeping names, into one file or several."""
    if shards < 1:
        raise ConfigError(f"record pack: --shards is {shards}, wanted at least 1")
    count = len(scan(folder)[1])
    with _progress("packing", count) as done:
        if shards == 1:
            pack_folder(folder, out, progress=done)
        else:
            pack_shards(folder, out, shards, workers, done)
    typer.echo(f"{out}: {count} files")


@app.command("ls")
def list_(
    source: Source,
    path: Annotated[str, typer.Argument(help="a folder inside")] = "",
    recursive: Annotated[bool, typer.Option("--recursive", "-r")] = False,
    as_json: Json = False,
) -> None:
    """List a packed folder's names and sizes, or a data set's files and samples."""
    packed = _packed(source)
    if packed is None:
        rows = _files(source)
    else:
        names = [str(n) for n in packed.list(path, recursive=recursive)]
        full = [os.path.join(path, name) for name in names]
        samples = [packed.sample(n) if packed.is_file(n) else None for n in full]
        sizes = iter(packed.reader.sizes([s for s in samples if s is not None]).tolist())
        rows = [
            {"name": name, "bytes": next(sizes)} if s is not None else {"name": name + "/"}
            for name, s in zip(names, samples, strict=True)
        ]
    if as_json:
        typer.echo(json.dumps(rows))
        return
    for row in rows:
        typer.echo(f"{row.get('bytes', ''):>12}  {row['name']}" + _samples(row))


@app.command()
def verify(source: Source, as_json: Json = False) -> None:
    """Read everything and check every checksum; exit 1 if anything is damaged."""
    damaged: list[str] = []
    with FileReader(source) as reader:
        with _progress("verifying", reader.n) as done:
            for start in range(0, reader.n, _VERIFY_BATCH):
                batch = range(start, min(start + _VERIFY_BATCH, reader.n))
                damaged += _damage(reader, batch)
                done(batch.stop)
        result = {"samples": reader.n, "files": len(reader.fnames), "damaged": damaged}
    if as_json:
        typer.echo(json.dumps(result))
    else:
        for line in damaged:
            typer.echo(line, err=True)
        typer.echo(f"{reader.n} samples in {len(reader.fnames)} files, {len(damaged)} damaged")
    if damaged:
        raise typer.Exit(1)


@app.command()
def cat(
    source: Source,
    which: Annotated[list[str], typer.Argument(help="names inside, or numbers of samples")],
) -> None:
    """Write samples to standard output, as they are."""
    packed = _packed(source)
    reader = FileReader(source) if packed is None else packed.reader
    for name in which:
        if packed is not None and packed.is_file(name):
            data = packed.read_one(name)
        elif name.isdigit():
            data = reader.read_one(int(name))
        else:
            raise MissingError(f"record cat: {source} has no {name}; `ls` lists what there is")
        sys.stdout.buffer.write(data.data)
    sys.stdout.buffer.flush()


@app.command()
def unpack(
    source: Source,
    out: Annotated[Path, typer.Argument(help="a folder; files there are not overwritten")],
) -> None:
    """Write a packed folder's files out again; samples without names become 000000.bin, …"""
    packed = _packed(source)
    reader = FileReader(source) if packed is None else packed.reader
    digits = max(6, len(str(reader.n)))
    names = (
        [(f"{i:0{digits}d}.bin", i) for i in range(reader.n)]
        if packed is None
        else list(packed.walk())
    )
    with _progress("unpacking", len(names)) as done:
        for count, (name, sample) in enumerate(names, 1):
            target = _inside(out, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                with target.open("xb") as file:
                    file.write(reader.read_one(sample).data)
            except FileExistsError:
                raise ConfigError(f"record unpack: {target} is there already") from None
            done(count)
    typer.echo(f"{out}: {len(names)} files")


def _inside(folder: Path, name: str) -> Path:
    """The path, refused if a name leads out of the folder."""
    parts = Path(name).parts
    if not parts or ".." in parts or Path(name).is_absolute() or "\0" in name:
        raise CorruptError(f"record unpack: the name {name!r} leads out of the folder")
    return folder.joinpath(*parts)


def _packed(source: str) -> PackedFolder | None:
    """The packed folder, or None if the files hold samples without names."""
    from whalefall.record.packed import NotPackedError

    try:
        return PackedFolder(source)
    except NotPackedError:
        return None


def _files(source: str) -> list[dict[str, Any]]:
    with FileReader(source) as reader:
        return [
            {
                "name": name,
                "bytes": int(reader.get_offsets(i)[-1]),
                "samples": len(reader.get_checksums(i)),
            }
            for i, name in enumerate(reader.fnames)
        ]


def _samples(row: dict[str, Any]) -> str:
    return f"  {row['samples']} samples" if "samples" in row else ""


def _damage(reader: FileReader, batch: range) -> list[str]:
    try:
        reader.read(batch)
        return []
    except WhalefallError:
        pass  # a batch names only its first bad sample: below each one is asked, and says why
    found = []
    for sample in batch:
        try:
            reader.validate_sample(sample)
        except WhalefallError as error:
            found.append(str(error))
    return found
