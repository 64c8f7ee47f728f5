"""Train room: checkpoints that are whole or not there.

In: named tensors of all ranks, of which several may hold the same. Out: a folder `step-00000100`,
written beside as `.new`, synced and renamed; the newest few stay. Names are those of published
checkpoints, so that another layout of ranks, or an export, can read them.
Source: torch.distributed.checkpoint.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from whalefall.errors import CorruptError, MissingError

__all__ = ["Store", "Stamp", "read_tensors"]

_NAME = re.compile(r"step-(\d{8})")
_STAMP = "whalefall.json"


@dataclass(frozen=True)
class Stamp:
    """What a checkpoint says of itself beside its tensors.

    Attributes:
        step: optimizer steps done.
        fingerprint: of the recipe.
        config: the model's `config.json`.
    """

    step: int
    fingerprint: str
    config: Mapping[str, Any]


class Store:
    """The checkpoints of one run.

    Args:
        folder: on a local disk, or any fsspec URL.
        keep: how many of the newest stay.
    """

    def __init__(self, folder: str, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self.files: _Files = _Remote(folder) if "://" in folder else _Local(Path(folder))

    def steps(self) -> list[int]:
        """The steps of whole checkpoints, in order."""
        found = (_NAME.fullmatch(name) for name in self.files.names())
        return sorted(int(match[1]) for match in found if match)

    def path(self, step: int) -> str:
        """Where the checkpoint of a step is, or will be."""
        return self.files.path(f"step-{step:08}")

    def save(self, tensors: Mapping[str, Tensor], stamp: Stamp) -> str:
        """Write a checkpoint; collective over the default group. Gives its path.

        A process may be killed at any moment: what had its name before still has it, whole.
        """
        name = f"step-{stamp.step:08}"
        first = dist.get_rank() == 0
        if first:
            self.files.clear(f"{name}.new")
        dist.barrier()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save(dict(tensors), storage_writer=self.files.writer(f"{name}.new"))
        if first:
            self.files.write(f"{name}.new", _STAMP, json.dumps(asdict(stamp)).encode())
            self.files.publish(f"{name}.new", name)
            for old in self.steps()[: -self.keep]:
                self.files.clear(f"step-{old:08}")
        dist.barrier()
        return self.files.path(name)

    def stamp(self, step: int) -> Stamp:
        """What a checkpoint says of itself.

        Raises: MissingError, CorruptError.
        """
        name = f"step-{step:08}"
        try:
            return Stamp(**json.loads(self.files.read(name, _STAMP)))
        except FileNotFoundError as error:
            raise MissingError(f"train: checkpoint {self.files.path(name)}: {error}") from None
        except (ValueError, TypeError) as error:
            raise _unreadable(self.files.path(name), error) from None

    def load(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Fill tensors in place from a checkpoint; collective over the default group.

        Raises: MissingError, CorruptError.
        """
        name = f"step-{step:08}"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                dcp.load(dict(tensors), storage_reader=self.files.reader(name))
        except FileNotFoundError as error:
            raise MissingError(f"train: checkpoint {self.files.path(name)}: {error}") from None
        except (Exception, dcp.api.CheckpointException) as error:
            raise _unreadable(self.files.path(name), error) from None


class _Local:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def names(self) -> list[str]:
        return [p.name for p in self.folder.iterdir()] if self.folder.is_dir() else []

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def writer(self, name: str) -> Any:
        return dcp.FileSystemWriter(self.folder / name, sync_files=True)

    def reader(self, name: str) -> Any:
        if not (self.folder / name).is_dir():
            raise FileNotFoundError("it is not there")
        return dcp.FileSystemReader(self.folder / name)

    def clear(self, name: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / name
        if path.exists():  # under its own name it must be whole to the end
            doomed = path.with_suffix(".old")
            path.rename(doomed)
            shutil.rmtree(doomed)
        for stale in self.folder.glob("step-*.old"):
            shutil.rmtree(stale)

    def write(self, name: str, file: str, data: bytes) -> None:
        with open(self.folder / name / file, "wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())

    def read(self, name: str, file: str) -> bytes:
        return (self.folder / name / file).read_bytes()

    def publish(self, old: str, new: str) -> None:
        _sync(self.folder / old)
        self.clear(new)
        (self.folder / old).rename(self.folder / new)
        _sync(self.folder)


class _Remote:
    """A URL: what `rename` means there is the file system's affair."""

    def __init__(self, url: str) -> None:
        import fsspec

        self.url = url.rstrip("/")
        self.fs, self.root = fsspec.core.url_to_fs(self.url)

    def names(self) -> list[str]:
        if not self.fs.exists(self.root):
            return []
        return [str(p).rstrip("/").rsplit("/", 1)[-1] for p in self.fs.ls(self.root, detail=False)]

    def path(self, name: str) -> str:
        return f"{self.url}/{name}"

    def writer(self, name: str) -> Any:
        from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter

        return FsspecWriter(self.path(name), sync_files=False)

    def reader(self, name: str) -> Any:
        from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader

        return FsspecReader(self.path(name))

    def clear(self, name: str) -> None:
        self.fs.makedirs(self.root, exist_ok=True)
        if self.fs.exists(f"{self.root}/{name}"):
            self.fs.rm(f"{self.root}/{name}", recursive=True)

    def write(self, name: str, file: str, data: bytes) -> None:
        self.fs.pipe_file(f"{self.root}/{name}/{file}", data)

    def read(self, name: str, file: str) -> bytes:
        return bytes(self.fs.cat_file(f"{self.root}/{name}/{file}"))

    def publish(self, old: str, new: str) -> None:
        self.clear(new)
        self.fs.mv(f"{self.root}/{old}", f"{self.root}/{new}", recursive=True)


_Files = _Local | _Remote


def _sync(folder: Path) -> None:
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def read_tensors(path: str) -> tuple[dict[str, Tensor], Stamp]:
    """All tensors of a checkpoint folder under their names, without a process group.

    Args:
        path: one checkpoint, or a run's folder, whose newest is taken.
    Raises: MissingError, CorruptError.
    """
    if not _NAME.fullmatch(path.rstrip("/").rsplit("/", 1)[-1]):
        store = Store(path, 1)
        steps = store.steps() or Store(f"{path.rstrip('/')}/checkpoints", 1).steps()
        if not steps:
            raise MissingError(f"train: no checkpoint in {path}; wanted a folder step-NNNNNNNN")
        inner = path if store.steps() else f"{path.rstrip('/')}/checkpoints"
        return read_tensors(Store(inner, 1).path(steps[-1]))
    folder, name = path.rstrip("/").rsplit("/", 1) if "/" in path.rstrip("/") else (".", path)
    files: _Files = _Remote(folder) if "://" in folder else _Local(Path(folder))
    try:
        reader = files.reader(name)
        metadata = reader.read_metadata().state_dict_metadata
        tensors = {
            key: torch.empty(tuple(entry.size), dtype=entry.properties.dtype)
            for key, entry in metadata.items()
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(tensors, storage_reader=files.reader(name), no_dist=True)
        return tensors, Stamp(**json.loads(files.read(name, _STAMP)))
    except FileNotFoundError as error:
        raise MissingError(f"train: checkpoint {path}: {error}") from None
    except (Exception, dcp.api.CheckpointException) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: str, error: BaseException) -> CorruptError:
    """A damaged file raises almost anything; torch puts the cause on the last line."""
    lines = str(error).strip().splitlines() or [repr(error)]
    return CorruptError(f"train: checkpoint {path} cannot be read: {lines[-1]}")
