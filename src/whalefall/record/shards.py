"""Record room: a data set in several files: written in parallel, and added to.

In: anything with `len` and `[]` that gives buffers, or a folder of files. Out: `PART_%05d.ffr` in a
folder. Workers are forked processes; one that fails stops the whole and its error is raised.
Source: FFRecord 1.4.0 `utils.dump`.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

from whalefall.errors import ConfigError, MissingError, WhalefallError
from whalefall.record.packed import Tree, pack_files, scan
from whalefall.record.writer import FileWriter

__all__ = ["ShardError", "append_shards", "dump", "pack_shards"]

_REPORT_EVERY = 64
Progress = Callable[[int], object]


class Samples(Protocol):
    """What can be written: a length, and a buffer at each index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


class ShardError(WhalefallError, RuntimeError):
    """A worker could not write its shard."""


def dump(
    dataset: Samples,
    fname: str | os.PathLike[str],
    nfiles: int,
    verbose: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Write a data set to one file, or to `nfiles` files in a folder.

    Args:
        dataset: anything with `len` and `[]` that gives buffers.
        fname: the file (nfiles = 1) or the folder, which is made; it may hold no `.ffr` yet.
        nfiles: number of files; where the samples do not suffice, fewer are made, with a warning.
        verbose: print each finished file.
        workers: processes, by default one a core, 16 at most.
        progress: called with the number of samples written so far, all workers together.
    Returns: the files.
    Raises: ConfigError, ShardError.
    Source: FFRecord `utils.dump`.
    """
    if nfiles < 1:
        raise ConfigError(f"record: nfiles is {nfiles}, wanted at least 1")
    if nfiles == 1:
        path = Path(fname)
        _write(dataset, 0, len(dataset), path, progress or (lambda count: None))
        return [path]
    folder = Path(fname)
    folder.mkdir(parents=True, exist_ok=True)
    if found := sorted(folder.glob("*.ffr")):
        raise ConfigError(
            f"record: {folder} holds {found[0].name} already; append_shards adds to a data set"
        )
    return _dump_parts(dataset, folder, 0, nfiles, verbose, workers, progress)


def append_shards(
    dataset: Samples,
    folder: str | os.PathLike[str],
    nfiles: int = 1,
    workers: int | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Add further files to a data set; the samples there keep their indices.

    Args: as for `dump`; the new files sort after the old ones.
    Returns: the new files.
    Raises: MissingError, ConfigError if the folder's files are not `PART_%05d.ffr`.
    """
    here = Path(folder)
    if not here.is_dir():
        raise MissingError(f"record: {here} is no folder; dump makes a new data set")
    names = sorted(path.name for path in here.glob("*.ffr"))
    strange = [n for n in names if not (n[:5] == "PART_" and n[5:-4].isdigit() and len(n) == 14)]
    if strange:
        raise ConfigError(f"record: {here} holds {strange[0]}, wanted only PART_%05d.ffr")
    first = int(names[-1][5:-4]) + 1 if names else 0
    return _dump_parts(dataset, here, first, nfiles, False, workers, progress)


def pack_shards(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    nfiles: int,
    workers: int | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Pack a folder into several packed files, which `PackedFolder(out)` joins again.

    Args:
        folder: as for `pack_folder`; an empty folder inside stays in the first shard.
        out: a folder, which is made.
        nfiles: number of shards; each holds files that follow one another in the tree.
    Returns: the shards.
    """
    tree, paths = scan(Path(folder))
    target = Path(out)
    target.mkdir(parents=True, exist_ok=True)
    if found := sorted(target.glob("*.ffr")):
        raise ConfigError(f"record: {target} holds {found[0].name} already, wanted an empty folder")
    each = max(1, -(-len(paths) // nfiles))
    starts = range(0, max(1, len(paths)), each)
    tasks = []
    for number, start in enumerate(starts):
        end = min(start + each, len(paths))
        part = _part(tree, start, end, keep_empty=number == 0)
        name = target / f"PART_{number:05d}.ffr"
        tasks.append((name, _packing(part, paths[start:end], name)))
    _run(tasks, workers, progress, False)
    return [name for name, _ in tasks]


def _packing(tree: Tree, paths: list[Path], name: Path) -> Callable[[Progress], None]:
    return lambda report: pack_files(tree, paths, name, report)


def _part(tree: Tree, start: int, end: int, keep_empty: bool) -> Tree:
    """The tree with only the files start … end - 1, renumbered from 0."""
    out: Tree = type(tree)()
    for name, child in tree.items():
        if not isinstance(child, int):
            inside = _part(child, start, end, keep_empty)
            if inside or (keep_empty and not child):
                out[name] = inside
        elif start <= child < end:
            out[name] = child - start
    return out


def _dump_parts(
    dataset: Samples,
    folder: Path,
    first: int,
    nfiles: int,
    verbose: bool,
    workers: int | None,
    progress: Progress | None,
) -> list[Path]:
    count = len(dataset)
    each = max(1, -(-count // nfiles))
    tasks = []
    for number, start in enumerate(range(0, max(1, count), each)):
        name = folder / f"PART_{first + number:05d}.ffr"
        tasks.append((name, _writing(dataset, start, min(start + each, count), name)))
    if len(tasks) != nfiles:
        warnings.warn(
            f"{count} samples make {len(tasks)} files, not {nfiles}: no file is left empty",
            stacklevel=3,
        )
    _run(tasks, workers, progress, verbose)
    return [name for name, _ in tasks]


def _writing(dataset: Samples, start: int, end: int, name: Path) -> Callable[[Progress], None]:
    return lambda report: _write(dataset, start, end, name, report)


def _write(dataset: Samples, start: int, end: int, name: Path, report: Progress) -> None:
    with FileWriter(name, end - start) as writer:
        for index in range(start, end):
            writer.write_one(dataset[index])
            report(index - start + 1)


def _run(
    tasks: Sequence[tuple[Path, Callable[[Progress], None]]],
    workers: int | None,
    progress: Progress | None,
    verbose: bool,
) -> None:
    """Do the tasks in forked processes, `workers` at a time; stop all at the first error."""
    limit = max(1, min(workers or os.cpu_count() or 1, 16))
    fork = multiprocessing.get_context("fork")
    waiting, done = list(tasks), dict.fromkeys((name for name, _ in tasks), 0)
    running: dict[Any, tuple[Path, Any]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < limit:
                name, task = waiting.pop(0)
                ours, theirs = fork.Pipe(duplex=False)
                process = fork.Process(target=_child, args=(task, theirs), daemon=True)
                process.start()
                theirs.close()
                running[ours] = (name, process)
            for pipe in wait(list(running)):
                name, process = running[pipe]
                message = _receive(pipe)
                if isinstance(message, int):
                    done[name] = message
                    if progress is not None:
                        progress(sum(done.values()))
                    continue
                del running[pipe]
                process.join()
                if message != "done":
                    why = message or f"its process ended with status {process.exitcode}"
                    raise ShardError(f"record: {name} could not be written: {why}")
                if verbose:
                    print(f"{name}: {done[name]} samples", flush=True)
    finally:
        for _, process in running.values():
            process.terminate()
            process.join()


def _receive(pipe: Any) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        return ""


def _child(task: Callable[[Progress], None], pipe: Connection) -> None:
    written = [0]

    def report(count: int) -> None:
        written[0] = count
        if count % _REPORT_EVERY == 0:
            pipe.send(count)

    try:
        task(report)
        pipe.send(written[0])
        pipe.send("done")
    except KeyboardInterrupt:
        os._exit(130)
    except BaseException as error:
        with contextlib.suppress(OSError):
            pipe.send(f"{type(error).__name__}: {error}")
        os._exit(1)
