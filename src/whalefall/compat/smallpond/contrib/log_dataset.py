"""smallpond.contrib.log_dataset: a node that writes the first rows of its input to the log."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from whalefall.data.context import Context
from whalefall.data.nodes import Node, PythonScriptNode

__all__ = ["LogDataSet"]


class LogDataSet(PythonScriptNode):
    """Logs `num_rows` rows of each input."""

    def __init__(
        self, ctx: Context, input_deps: Sequence[Node], num_rows: int = 200, **kwargs: Any
    ) -> None:
        super().__init__(ctx, input_deps, **kwargs)
        self.num_rows = num_rows

    def process(self, runtime_ctx: Any, input_datasets: Sequence[Any], output_path: str) -> bool:
        """Log each input's first rows."""
        for dataset in input_datasets:
            dataset.log(self.num_rows)
        return True
