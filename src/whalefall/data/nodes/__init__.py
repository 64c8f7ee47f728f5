"""Nodes: the logical plan. A frame's methods make them; each knows which tasks it becomes.

Source: smallpond `logical.node`, whose names and arguments these are.
"""

from whalefall.data.context import Context, NodeId
from whalefall.data.nodes.base import (
    ConsolidateNode,
    DataSinkNode,
    DataSourceNode,
    Node,
    ProjectionNode,
    RootNode,
    TaskGroup,
    UnionNode,
)
from whalefall.data.nodes.compute import (
    ArrowBatchNode,
    ArrowComputeNode,
    ArrowStreamNode,
    PandasBatchNode,
    PandasComputeNode,
    PythonScriptNode,
)
from whalefall.data.nodes.exchange import HashPartitionNode, RangePartitionNode, ShuffleNode
from whalefall.data.nodes.partition import (
    DataSetPartitionNode,
    EvenlyDistributedPartitionNode,
    LoadPartitionedDataSetNode,
    PartitionNode,
    RepeatPartitionNode,
    UserDefinedPartitionNode,
    UserPartitionedDataSourceNode,
)
from whalefall.data.nodes.sql import LimitNode, SqlEngineNode

__all__ = [
    "ArrowBatchNode",
    "ArrowComputeNode",
    "ArrowStreamNode",
    "ConsolidateNode",
    "Context",
    "DataSetPartitionNode",
    "DataSinkNode",
    "DataSourceNode",
    "EvenlyDistributedPartitionNode",
    "HashPartitionNode",
    "LimitNode",
    "LoadPartitionedDataSetNode",
    "Node",
    "NodeId",
    "PandasBatchNode",
    "PandasComputeNode",
    "PartitionNode",
    "ProjectionNode",
    "PythonScriptNode",
    "RangePartitionNode",
    "RepeatPartitionNode",
    "RootNode",
    "ShuffleNode",
    "SqlEngineNode",
    "TaskGroup",
    "UnionNode",
    "UserDefinedPartitionNode",
    "UserPartitionedDataSourceNode",
]
