"""`deep_gemm.utils`: casts and layouts in one place."""

from whalefall.compat.absent import absent
from whalefall.compat.deep_gemm import layout as layout
from whalefall.compat.deep_gemm.layout import *  # noqa: F403
from whalefall.gemm import casts as math  # noqa: F401
from whalefall.gemm.casts import *  # noqa: F403

__getattr__ = absent("deep_gemm.utils")
