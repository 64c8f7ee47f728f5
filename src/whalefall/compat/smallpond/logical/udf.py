"""smallpond.logical.udf: user functions in SQL."""

from whalefall.data.udf import *  # noqa: F403
from whalefall.data.udf import __all__ as __all__
