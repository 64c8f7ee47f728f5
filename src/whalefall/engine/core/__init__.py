"""Engine core: what to compute next and where its KV lies, decided without IO, clock or arrays.

`BlockManager` owns the pages of the KV cache and the prefix cache over them; `Scheduler` fills
each step's token budget; `DraftPolicy` says how many tokens to draft. The server's units and the
cluster simulator drive the same code.
"""

from whalefall.engine.core.block_manager import BlockManager
from whalefall.engine.core.drafting import DraftPolicy, StepCosts
from whalefall.engine.core.scheduler import Batch, Scheduled, Scheduler
from whalefall.engine.core.sequence import Sequence

__all__ = [
    "Batch",
    "BlockManager",
    "DraftPolicy",
    "Scheduled",
    "Scheduler",
    "Sequence",
    "StepCosts",
]
