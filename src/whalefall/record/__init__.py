"""Record: many small samples in few large files, with random access and checksums.

Follows FFRecord: `FileWriter`, `FileReader`, `PackedFolder`, `pack_folder`, and for torch
`Dataset`, `Subset`, `ConcatDataset`, `ReaderRegistry`, `DataLoader` (offered lazily, torch is
optional). Files are byte-identical with the original's, both ways. Ours: any fsspec URL,
`read_into`, shards written in parallel and appended, a global shuffle that any number of ranks
resumes.
"""

from typing import Any

from whalefall.record.layout import ChecksumError, IndexRangeError
from whalefall.record.packed import PackedFolder, pack_folder
from whalefall.record.reader import FileReader
from whalefall.record.shards import append_shards, dump, pack_shards
from whalefall.record.shuffle import GlobalShuffle, permute
from whalefall.record.writer import FileWriter

__all__ = [
    "ChecksumError",
    "ConcatDataset",
    "DataLoader",
    "Dataset",
    "FileReader",
    "FileWriter",
    "GlobalShuffle",
    "IndexRangeError",
    "PackedFolder",
    "ReaderRegistry",
    "Subset",
    "append_shards",
    "dump",
    "pack_folder",
    "pack_shards",
    "permute",
]

_TORCH = {"ConcatDataset", "DataLoader", "Dataset", "ReaderRegistry", "Subset"}


def __getattr__(name: str) -> Any:
    if name in _TORCH:
        from whalefall.record import torch

        return getattr(torch, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
