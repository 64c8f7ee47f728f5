"""Engine room: paged latent KV, prefix cache, continuous batching, sampling.

Follows DeepSeek's V3/R1 inference system and vLLM's habits: `LLM` for scripts, `Engine` for
servers (`add`, `step`, `cancel`), `engine.core` for whoever schedules without a model.
"""

from whalefall.engine.config import EngineConfig
from whalefall.engine.engine import Engine
from whalefall.engine.llm import LLM
from whalefall.engine.outputs import Completion, Delta, EngineStats, RequestOutput
from whalefall.engine.sampling import TokenLogprobs
from whalefall.engine.sampling_params import SamplingParams
from whalefall.engine.structured import StructuredOutputs

__all__ = [
    "LLM",
    "Completion",
    "Delta",
    "Engine",
    "EngineConfig",
    "EngineStats",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputs",
    "TokenLogprobs",
]
