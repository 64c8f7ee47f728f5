"""Pipeline room, on torch modules: `DualPipe`, `DualPipeV`, any schedule, delayed weight gradients.

In: stages as modules, a torch.distributed group. Out: steps that give a single process's gradients.
"""

from whalefall.pipeline.torch.dual import DualPipe, DualPipeV, Pipeline
from whalefall.pipeline.torch.exchange import BufferExchange, Exchange, Routed
from whalefall.pipeline.torch.expert_stage import ExpertStage
from whalefall.pipeline.torch.mirrors import sync_mirrors
from whalefall.pipeline.torch.p2p import set_p2p_tensor_dtype, set_p2p_tensor_shapes
from whalefall.pipeline.torch.store import WeightGradStore

__all__ = [
    "BufferExchange",
    "DualPipe",
    "DualPipeV",
    "Exchange",
    "ExpertStage",
    "Pipeline",
    "Routed",
    "WeightGradStore",
    "set_p2p_tensor_dtype",
    "set_p2p_tensor_shapes",
    "sync_mirrors",
]
