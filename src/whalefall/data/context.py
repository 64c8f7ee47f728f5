"""What the nodes of one plan share: numbering, user functions, who reads whom.

Source: smallpond `logical.node.Context` and `logical.udf`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from whalefall.data.udf import (
    DuckDbExtensionContext,
    ExternalModuleContext,
    PythonUDFContext,
    UDFContext,
    UserDefinedFunction,
)
from whalefall.errors import ConfigError

__all__ = ["Context", "NodeId"]


class NodeId(int):
    """A node's number; six digits as text."""

    def __str__(self) -> str:
        return f"{int(self):06d}"


class Context:
    """Numbers nodes from 1, and knows the user functions that SQL may call.

    Attributes:
        consumers: node id → how many nodes read it; two readers keep it from being fused away.
    """

    def __init__(self) -> None:
        self._next_node = 1
        self.udfs: dict[str, UDFContext] = {}
        self.consumers: Counter[int] = Counter()

    def new_node_id(self, inputs: Sequence[Any]) -> NodeId:
        """The next number, for a node that reads `inputs`."""
        for node in inputs:
            self.consumers[node.id] += 1
        number = self._next_node
        self._next_node += 1
        return NodeId(number)

    def create_function(
        self,
        name: str,
        func: Callable[..., Any],
        params: Any,
        return_type: Any,
        use_arrow_type: bool = False,
    ) -> str:
        """Make a Python function callable from SQL; nodes name it in `udfs`.

        Args:
            params: `UDFType`s of the arguments, or `UDFAnyParameters()`, or None to have DuckDB
                read the function's annotations.
            use_arrow_type: the function takes and returns Arrow arrays, a batch at a time.
        Returns: the name.
        """
        self.udfs[name] = PythonUDFContext(name, func, params, return_type, use_arrow_type)
        return name

    def create_external_module(self, module_path: str, name: str | None = None) -> str:
        """Name a Python module whose `@udf` functions SQL may call; returns the name."""
        name = name or os.path.splitext(os.path.basename(module_path))[0]
        self.udfs[name] = ExternalModuleContext(name, module_path)
        return name

    def create_duckdb_extension(self, extension_path: str, name: str | None = None) -> str:
        """Name a DuckDB extension file that tasks load; returns the name."""
        name = name or os.path.basename(extension_path)
        self.udfs[name] = DuckDbExtensionContext(name, extension_path)
        return name

    def udf_contexts(self, udfs: Sequence[str | UserDefinedFunction]) -> list[UDFContext]:
        """The functions that a node names.

        Raises: ConfigError for a name that was never created.
        """
        found: list[UDFContext] = []
        for item in udfs:
            if isinstance(item, UserDefinedFunction):
                found.append(item.context())
            elif item in self.udfs:
                found.append(self.udfs[item])
            else:
                known = ", ".join(self.udfs) or "none"
                raise ConfigError(f"udfs: no function {item!r}; created so far: {known}")
        return found
