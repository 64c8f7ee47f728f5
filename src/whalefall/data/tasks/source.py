"""Tasks that the driver runs itself: naming a source, dividing files without reading them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from whalefall.data.dataset import DataSet
from whalefall.data.errors import PlanError
from whalefall.data.memory import ArrowTableDataSet
from whalefall.data.parquet import ParquetDataSet
from whalefall.data.tasks.base import Input, Task
from whalefall.data.tasks.parquet_out import ParquetOptions, TableWriter, file_in

__all__ = ["DataSourceTask", "DivideTask", "TableSourceTask"]


class DataSourceTask(Task):
    """Names a data set's files."""

    in_driver = True
    kept = False

    def __init__(self, node: Any, dataset: DataSet) -> None:
        super().__init__(node, ())
        self.dataset = dataset
        self._identity = dataset.identity()

    def content(self) -> Sequence[Any]:
        return self._identity

    def run(self, inputs: list[DataSet]) -> list[DataSet]:
        return [self.dataset]


class TableSourceTask(DataSourceTask):
    """Writes an Arrow table, so that other processes can read it."""

    kept = True

    def run(self, inputs: list[DataSet]) -> list[DataSet]:
        if not isinstance(self.dataset, ArrowTableDataSet):
            raise PlanError(f"{self.dataset} is no table in memory")
        path = file_in(self.runtime_output_abspath, f"{self.output_filename}.parquet")
        writer = TableWriter(path, ParquetOptions(), self.parquet_metadata())
        writer.write(self.dataset.table)
        return [writer.close()]


class DivideTask(Task):
    """Divides a data set into parts by naming files or row ranges.

    Args:
        divide: data set → parts.
        tag: what `divide` does, for the content hash.
    """

    in_driver = True
    kept = False

    def __init__(
        self,
        node: Any,
        inputs: Sequence[Input],
        num_outputs: int,
        divide: Callable[[DataSet], Sequence[DataSet]],
        tag: Sequence[Any],
        partition_key: Any = (),
    ) -> None:
        super().__init__(node, inputs, partition_key, num_outputs)
        self.divide, self.tag = divide, tag

    def content(self) -> Sequence[Any]:
        return self.tag

    def run(self, inputs: list[DataSet]) -> list[DataSet]:
        parts = list(self.divide(inputs[0]))
        if len(parts) != self.num_outputs:
            raise PlanError(f"{self.label}: {len(parts)} parts, wanted {self.num_outputs}")
        return parts


def by_rows_or_files(dataset: DataSet, count: int) -> list[DataSet]:
    """Parts of nearly equal size: row ranges of Parquet files, else whole files."""
    if isinstance(dataset, ParquetDataSet) and dataset.resolved_paths:
        return dataset.partition_by_rows(count)
    return dataset.partition_by_files(count)
