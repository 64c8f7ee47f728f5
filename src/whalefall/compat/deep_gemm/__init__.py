"""`import deep_gemm`: the gemm room under the original's module names.

Source: DeepGEMM 2.6.1 (`deep_gemm/__init__.py`).
"""

from whalefall.compat.absent import absent
from whalefall.compat.deep_gemm import layout as layout
from whalefall.compat.deep_gemm import testing as testing
from whalefall.compat.deep_gemm import utils as utils
from whalefall.gemm import *  # noqa: F403
from whalefall.gemm import casts as math  # noqa: F401

__version__ = "2.6.1"  # what the stand-in follows
calc_diff = testing.calc_diff
__getattr__ = absent("deep_gemm")
