"""smallpond.logical.dataset: the data sets."""

from whalefall.data.dataset import CsvDataSet, DataSet, FileSet, JsonDataSet, PartitionedDataSet
from whalefall.data.memory import ArrowTableDataSet, PandasDataSet, SqlQueryDataSet
from whalefall.data.parquet import ParquetDataSet

__all__ = [
    "ArrowTableDataSet",
    "CsvDataSet",
    "DataSet",
    "FileSet",
    "JsonDataSet",
    "PandasDataSet",
    "ParquetDataSet",
    "PartitionedDataSet",
    "SqlQueryDataSet",
]
