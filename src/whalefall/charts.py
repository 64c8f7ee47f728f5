"""pygal, which draws all charts, without the import hook that it leaves behind."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

__all__ = ["pygal"]


@cache
def pygal() -> Any:
    """The module `pygal`.

    Its finder for map plug-ins lacks `find_spec`: Python 3.11 warns at each later import of what
    is not installed (an error in tests), and 3.12 does not ask it any more.
    """
    import pygal

    sys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != "PluginImportFixer"]
    return pygal
