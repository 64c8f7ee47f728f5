"""Units: prefill and decode as processes, behind the API of one engine.

Follows the published V3/R1 inference system: `Gateway` is what the API server talks to; `rank` is a
process of a unit; decisions are those of `serve.core`.
"""

from whalefall.serve.units.gateway import Gateway
from whalefall.serve.units.layout import Layout, UnitsConfig, parse_layout, units_config

__all__ = ["Gateway", "Layout", "UnitsConfig", "parse_layout", "units_config"]
