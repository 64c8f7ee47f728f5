"""Model room: the tensors of a Hugging Face folder, memory-mapped and read in place.

In: a folder with `model.safetensors`, or shards and `model.safetensors.index.json`. Out: read-only
numpy views on the mapped files; nothing is copied, so processes share the page cache.
Own reader: safetensors' numpy interface copies, and knows no FP8. Format: safetensors' README.
"""

from __future__ import annotations

import json
import mmap
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from whalefall.errors import CorruptError, MissingError, UnsupportedError

__all__ = ["DTYPES", "Checkpoint", "ShardWriter", "Tensor", "write_safetensors"]

DTYPES: dict[str, Any] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
}
_MAX_HEADER = 100 << 20  # the format's own limit
_POPULATE_READ = 22  # MADV_POPULATE_READ, not in Python's mmap


@dataclass(frozen=True)
class Tensor:
    """Where one tensor lies: its file, dtype name, shape, and bytes [start, end) in the file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file, checked against its size.

    Raises: MissingError for no file, CorruptError for a truncated or malformed one.
    """
    if not path.is_file():
        raise MissingError(f"model: no file {path}; download the missing shard")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little") if size >= 8 else -1
        if not 0 < length <= min(_MAX_HEADER, size - 8):
            raise CorruptError(f"{path}: header of {length} bytes in a file of {size}; {_AGAIN}")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            found = {name: _tensor(path, 8 + length, entry) for name, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as problem:
            raise CorruptError(f"{path}: malformed header ({problem!r}); {_AGAIN}") from None
    for name, tensor in found.items():
        _check(name, tensor, size)
    return found


_AGAIN = "download the file again"


def _tensor(path: Path, data: int, entry: dict[str, Any]) -> Tensor:
    start, end = entry["data_offsets"]
    shape = tuple(int(n) for n in entry["shape"])
    return Tensor(path, str(entry["dtype"]), shape, data + int(start), data + int(end))


def _check(name: str, tensor: Tensor, size: int) -> None:
    if tensor.end > size:
        raise CorruptError(
            f"{tensor.path}: truncated: {name} ends at byte {tensor.end}, the file at {size};"
            f" {_AGAIN}"
        )
    if tensor.dtype not in DTYPES:
        raise UnsupportedError(f"{tensor.path}: {name} has dtype {tensor.dtype}")
    count = 1
    for n in tensor.shape:
        count *= n
    wanted = count * DTYPES[tensor.dtype].itemsize
    if tensor.end - tensor.start != wanted or min(tensor.shape, default=0) < 0:
        raise CorruptError(
            f"{tensor.path}: {name} {tensor.dtype}{list(tensor.shape)} takes"
            f" {tensor.end - tensor.start} bytes, wanted {wanted}; {_AGAIN}"
        )


def shard_paths(folder: Path) -> list[Path]:
    """The safetensors files of a folder, by its index where there is one."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as problem:
            raise CorruptError(f"{index}: not an index ({problem!r}); {_AGAIN}") from None
        for name in names:
            if Path(name).name != name:
                raise CorruptError(f"{index}: shard {name!r} lies outside the folder")
        return [folder / name for name in names]
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    others = sorted(p.name for p in folder.glob("*.safetensors"))
    hint = f"; found {', '.join(others[:3])} but no index" if others else ""
    raise MissingError(f"model: {folder} has no model.safetensors or shards{hint}")


class Checkpoint:
    """The tensors of a checkpoint folder by name; headers are read at once, data when asked for.

    Attributes:
        folder: the checkpoint.
        tensors: name → where it lies.
    """

    def __init__(self, folder: str | Path) -> None:
        """Read all headers. Raises: MissingError, CorruptError, UnsupportedError."""
        self.folder = Path(folder)
        self.tensors: dict[str, Tensor] = {}
        for path in shard_paths(self.folder):
            self.tensors.update(read_header(path))
        self._maps: dict[Path, mmap.mmap] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.end - t.start for t in self.tensors.values())

    def array(self, name: str) -> np.ndarray:
        """A read-only view of tensor `name` on the mapped file; MissingError where absent."""
        tensor = self.tensors.get(name)
        if tensor is None:
            raise MissingError(f"model: {self.folder} has no tensor {name}; a shard is missing?")
        data = np.frombuffer(
            self._map(tensor.path), np.uint8, tensor.end - tensor.start, tensor.start
        )
        dtype = DTYPES[tensor.dtype]
        if tensor.start % dtype.itemsize:  # old writers did not align; views then need a copy
            data = data.copy()
        return data.view(dtype).reshape(tensor.shape)

    def _map(self, path: Path) -> mmap.mmap:
        if path not in self._maps:
            with path.open("rb") as file:
                self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps[path]

    def populate(self) -> threading.Thread:
        """Start reading all mapped files into the page cache, in the background."""
        maps = [self._map(path) for path in {t.path for t in self.tensors.values()}]

        def read() -> None:
            for area in maps:
                for start in range(0, len(area), 64 << 20):
                    try:
                        area.madvise(_POPULATE_READ, start, min(64 << 20, len(area) - start))
                    except (OSError, ValueError):
                        return  # an older kernel: pages come on first use

        thread = threading.Thread(target=read, name="whalefall-populate", daemon=True)
        thread.start()
        return thread


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write a safetensors file under a temporary name, fsync, rename; tensors are streamed."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, array in tensors.items():
        end = offset + array.nbytes
        header[name] = {
            "dtype": names[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for array in tensors.values():
                file.write(np.ascontiguousarray(array).view(np.uint8).data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class ShardWriter:
    """Writes a checkpoint's tensors as shards of bounded size, and their index last.

    A run that was interrupted leaves no index, so nothing half-written ever loads.
    """

    def __init__(self, folder: Path, shard_bytes: int = 1 << 30) -> None:
        self._folder = folder
        self._shard_bytes = shard_bytes
        self._shard: dict[str, np.ndarray] = {}
        self._held = 0
        self._files: dict[str, str] = {}
        self._count = 0

    def add(self, name: str, array: np.ndarray) -> None:
        """Take a tensor; a full shard goes to the disk."""
        self._shard[name] = array
        self._held += array.nbytes
        if self._held >= self._shard_bytes:
            self._flush()

    def _flush(self) -> None:
        self._count += 1
        file = f"model-{self._count:05d}.safetensors"
        write_safetensors(self._folder / file, self._shard)
        self._files.update(dict.fromkeys(self._shard, file))
        self._shard, self._held = {}, 0

    def close(self) -> None:
        """Write the last shard and the index (or one plain model.safetensors)."""
        if not self._files:
            write_safetensors(self._folder / "model.safetensors", self._shard)
            return
        if self._shard:
            self._flush()
        index = {"metadata": {}, "weight_map": self._files}
        path = self._folder / "model.safetensors.index.json"
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(index, indent=1), encoding="utf-8")
        os.replace(temporary, path)
