"""Model room: the DeepSeek architectures (MLA and MoE) and their checkpoints.

Follows DeepSeek-V3's published model: config, memory-mapped weights, tokenizer and chat template,
the plain numpy definition (`reference`) and the native forward step that the engine calls.
"""

from whalefall.model.checkpoint import Checkpoint
from whalefall.model.config import ModelConfig, load_config
from whalefall.model.tokenizer import Detokenizer, Tokenizer, load_tokenizer
from whalefall.model.weights import Weights, load_weights

__all__ = [
    "Checkpoint",
    "Detokenizer",
    "ModelConfig",
    "Tokenizer",
    "Weights",
    "load_config",
    "load_tokenizer",
    "load_weights",
]
