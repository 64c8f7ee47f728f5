"""Compat room: `deep_ep` — DeepEP's first API, on whalefall's `ep`.

`Buffer`, `Config`, `EventHandle`, `EventOverlap`, `topk_idx_t`, as `import deep_ep` has them. Not
here: the second API (`ElasticBuffer`), which is not built.
"""

from __future__ import annotations

import torch

from whalefall.ep.torch import Buffer, Config, EventHandle, EventOverlap

__all__ = ["Buffer", "Config", "EventHandle", "EventOverlap", "topk_idx_t"]
__version__ = "2.1.0+whalefall"

topk_idx_t = torch.int64
