"""smallpond.execution.task: the job, the plan that runs, the tasks."""

from whalefall.data.planner import ExecutionPlan
from whalefall.data.runtime import JobId, PartitionInfo, RuntimeContext
from whalefall.data.tasks.arrow import (
    ArrowBatchTask,
    ArrowComputeTask,
    ArrowStreamTask,
    PandasBatchTask,
    PandasComputeTask,
    PythonScriptTask,
    StreamOutput,
)
from whalefall.data.tasks.base import Task
from whalefall.data.tasks.exchange import HashPartitionTask
from whalefall.data.tasks.sink import DataSinkTask
from whalefall.data.tasks.source import DataSourceTask
from whalefall.data.tasks.sql import SqlEngineTask

__all__ = [
    "ArrowBatchTask",
    "ArrowComputeTask",
    "ArrowStreamTask",
    "DataSinkTask",
    "DataSourceTask",
    "ExecutionPlan",
    "HashPartitionTask",
    "JobId",
    "PandasBatchTask",
    "PandasComputeTask",
    "PartitionInfo",
    "PythonScriptTask",
    "RuntimeContext",
    "SqlEngineTask",
    "StreamOutput",
    "Task",
]
