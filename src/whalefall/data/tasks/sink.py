"""The task that hands results over: a folder with files and manifest, all there or not at all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from whalefall.data import storage
from whalefall.data.dataset import DataSet, FileSet
from whalefall.data.parquet import ParquetDataSet
from whalefall.data.paths import is_url
from whalefall.data.tasks.base import Input, Task

__all__ = ["MANIFEST", "DataSinkTask"]

MANIFEST = ".MANIFEST.txt"


@dataclass(frozen=True)
class SinkOptions:
    """Where to, whether by link or copy, or only a list of the files."""

    path: str
    kind: str = "link"
    manifest_only: bool = False


class DataSinkTask(Task):
    """Puts the files of its inputs into one folder (or lists them in its manifest)."""

    in_driver = True
    kept = False
    is_sink = True
    manifest_filename = MANIFEST

    def __init__(self, node: Any, inputs: Sequence[Input], options: SinkOptions) -> None:
        super().__init__(node, inputs)
        self.options = options
        self._rewritten: list[str] = []

    def content(self) -> Sequence[Any]:
        return (self.options,)

    def evidence(self, outputs: Sequence[DataSet]) -> Any:
        """The manifest and files as they are; on a store never the same, so it is written anew."""
        if is_url(self.options.path):
            return object()
        manifest = os.path.join(self.options.path, MANIFEST)
        return [_seen(path) for d in outputs for path in [manifest, *d.resolved_paths]]

    def run(self, inputs: list[DataSet]) -> list[DataSet]:
        if self.options.manifest_only:
            paths = [path for dataset in inputs for path in dataset.resolved_paths]
            storage.write_manifest(self.options.path, paths)
            return [FileSet([]).with_paths(paths)]
        files = list(self._files(inputs))
        placed = storage.commit_folder(self.options.path, files, link=self.options.kind != "copy")
        if all(isinstance(d, ParquetDataSet) for d in inputs):
            return [ParquetDataSet([]).with_paths(placed)]
        return [FileSet([]).with_paths(placed)]

    def _files(self, inputs: Sequence[DataSet]) -> list[storage.Placed]:
        files: list[storage.Placed] = []
        for dataset in inputs:
            if isinstance(dataset, ParquetDataSet) and dataset._ranges is not None:
                files += self._parquet_files(dataset)
            else:
                files += [storage.Placed(path) for path in dataset.resolved_paths]
        full = [f for f in files if f.num_rows != 0]
        return full or files[:1]

    def _parquet_files(self, dataset: ParquetDataSet) -> list[storage.Placed]:
        """The files, those of which only a range of rows is meant rewritten first."""
        from whalefall.data.arrowio import load_from_parquet_files
        from whalefall.data.tasks.parquet_out import ParquetOptions, TableWriter, file_in

        files = []
        for part in dataset.resolved_row_ranges:
            if part.whole or part.num_rows == 0:
                files.append(storage.Placed(part.path, part.num_rows))
                continue
            name = f"{self.label}-{len(self._rewritten)}.parquet"
            path = file_in(self.runtime_output_abspath, name)
            self._rewritten.append(path)
            writer = TableWriter(path, ParquetOptions(), {})
            writer.write(load_from_parquet_files([part]))
            writer.close()
            files.append(storage.Placed(path, part.num_rows))
        return files


def _seen(path: str) -> tuple[int, ...]:
    """Which file a path names and how it was last written; empty where there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return ()
    return status.st_ino, status.st_size, status.st_mtime_ns
