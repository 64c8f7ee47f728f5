"""Compat: the originals' import names, answered by whalefall's rooms.

`whalefall.compat.install()` makes `import ffrecord` (and the other names of `MODULES`) find the
module of this package that stands in for it, in this process only, also where the original is
installed. One file an original.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from whalefall.compat.absent import refuse_import

__all__ = ["MODULES", "install", "uninstall"]

MODULES = {
    "deep_gemm": "whalefall.compat.deep_gemm",
    "deep_gemm.layout": "whalefall.compat.deep_gemm.layout",
    "deep_gemm.math": "whalefall.gemm.casts",
    "deep_gemm.testing": "whalefall.compat.deep_gemm.testing",
    "deep_gemm.testing.bench": "whalefall.compat.deep_gemm.testing",
    "deep_gemm.testing.numeric": "whalefall.compat.deep_gemm.testing",
    "deep_gemm.testing.utils": "whalefall.compat.deep_gemm.testing",
    "deep_gemm.utils": "whalefall.compat.deep_gemm.utils",
    "deep_gemm.utils.layout": "whalefall.compat.deep_gemm.layout",
    "deep_gemm.utils.math": "whalefall.gemm.casts",
    "ffrecord": "whalefall.compat.ffrecord",
    "ffrecord.fileio": "whalefall.compat.ffrecord",
    "ffrecord.package": "whalefall.record.packed",
    "ffrecord.torch": "whalefall.record.torch",
    "ffrecord.utils": "whalefall.record.shards",
    "deep_ep": "whalefall.compat.deep_ep",
    "deep_ep.utils": "whalefall.ep.events",
    "deep_ep.utils.envs": "whalefall.compat.deep_ep.envs",
    "deep_ep.utils.event": "whalefall.ep.events",
    "deep_ep.utils.math": "whalefall.compat.deep_ep.math",
    "deep_ep.utils.testing": "whalefall.compat.deep_ep.testing",
    "flash_mla": "whalefall.compat.flash_mla",
    "flash_mla.flash_mla_interface": "whalefall.compat.flash_mla",
    "dualpipe": "whalefall.compat.dualpipe",
    "dualpipe.comm": "whalefall.compat.dualpipe",
    "dualpipe.dualpipe": "whalefall.compat.dualpipe",
    "dualpipe.dualpipev": "whalefall.compat.dualpipe",
    "dualpipe.utils": "whalefall.compat.dualpipe",
    "eplb": "whalefall.compat.eplb",
    "smallpond": "whalefall.compat.smallpond",
    "smallpond.common": "whalefall.compat.smallpond.common",
    "smallpond.contrib": "whalefall.compat.smallpond.contrib",
    "smallpond.contrib.copy_table": "whalefall.compat.smallpond.contrib.copy_table",
    "smallpond.contrib.log_dataset": "whalefall.compat.smallpond.contrib.log_dataset",
    "smallpond.dataframe": "whalefall.compat.smallpond.dataframe",
    "smallpond.execution": "whalefall.compat.smallpond.execution",
    "smallpond.execution.driver": "whalefall.data.driver",
    "smallpond.execution.task": "whalefall.compat.smallpond.execution.task",
    "smallpond.io": "whalefall.compat.smallpond.io",
    "smallpond.io.arrow": "whalefall.compat.smallpond.io.arrow",
    "smallpond.io.filesystem": "whalefall.compat.smallpond.io.filesystem",
    "smallpond.logical": "whalefall.compat.smallpond.logical",
    "smallpond.logical.dataset": "whalefall.compat.smallpond.logical.dataset",
    "smallpond.logical.node": "whalefall.compat.smallpond.logical.node",
    "smallpond.logical.optimizer": "whalefall.data.optimizer",
    "smallpond.logical.planner": "whalefall.data.planner",
    "smallpond.logical.udf": "whalefall.compat.smallpond.logical.udf",
    "smallpond.session": "whalefall.data.session",
    "smallpond.utility": "whalefall.compat.smallpond.utility",
}


class _StandIn(Loader):
    """Loads the module that stands in for an original's."""

    def __init__(self, name: str, target: str) -> None:
        self._name, self._target = name, target
        self._own_spec: ModuleSpec | None = None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(self._target)
        self._own_spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        # the import system has just written the original's name into it
        module.__spec__ = self._own_spec
        # A submodule behind another thing of its name, as the function deep_gemm.testing.bench is:
        # imported now, as in the original, since a later import would put it in that thing's place.
        for name, target in MODULES.items():
            package, _, last = name.rpartition(".")
            hidden = package == self._name and hasattr(module, last)
            if hidden and not isinstance(getattr(module, last), ModuleType):
                sys.modules[name] = importlib.import_module(target)


class _Finder(MetaPathFinder):
    """Finds the names of `MODULES`; says of what is not built what serves instead."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in MODULES:
            refuse_import(name.removeprefix(f"{__name__}."))  # `from` asks by the stand-in's name
            return None
        is_package = any(other.startswith(name + ".") for other in MODULES)
        return ModuleSpec(name, _StandIn(name, MODULES[name]), is_package=is_package)


_FINDER = _Finder()


def install() -> None:
    """Let the originals' names be found here, from now on; a second call does nothing."""
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)


def uninstall() -> None:
    """Take that back, and forget the modules imported under those names."""
    if _FINDER in sys.meta_path:
        sys.meta_path.remove(_FINDER)
    for name in MODULES:
        sys.modules.pop(name, None)
