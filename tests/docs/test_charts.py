"""Drawing a chart leaves the import system as it was."""

from __future__ import annotations

import importlib.util
import sys

from whalefall import charts


def test_charts_leave_no_import_hook_behind() -> None:
    assert charts.pygal().XY is not None
    assert all(hasattr(finder, "find_spec") for finder in sys.meta_path)
    assert importlib.util.find_spec("nowhere_to_be_found") is None  # a warning is an error here
