"""Plan room: the published day's ledger, and what another day, fleet or price would make of it.

In: token counts, prices, a fleet over a day. Out: a `Ledger` of cost, revenue and margin.
Truth: the published day of the V3/R1 inference system (open-source week, day 6); every figure that
was published is kept apart from those computed here.
"""

from whalefall.plan.fleet import Fleet, published_fleet
from whalefall.plan.ledger import Ledger, Prices, Traffic, WhatIf, ledger

__all__ = [
    "Fleet",
    "Ledger",
    "Prices",
    "Traffic",
    "WhatIf",
    "ledger",
    "published_fleet",
]
