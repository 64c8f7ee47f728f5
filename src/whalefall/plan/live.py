"""The ledger of a running server, read from its `/metrics` page."""

from __future__ import annotations

import urllib.error
import urllib.request
from typing import Any

from whalefall.errors import ConfigError, MissingError
from whalefall.plan.ledger import Ledger, Prices, Traffic, ledger

__all__ = ["live_ledger", "live_report", "live_rows"]

PREFIX = "whalefall_ledger_"


def live_ledger(
    hit_tokens: float,
    miss_tokens: float,
    output_tokens: float,
    uptime_s: float,
    node_hour: float,
    prices: Prices | None = None,
) -> tuple[Traffic, Ledger]:
    """The ledger of a server that has run for `uptime_s` on one node at `node_hour` dollars."""
    traffic = Traffic(hit_tokens + miss_tokens, hit_tokens, output_tokens)
    return traffic, ledger(traffic, prices or Prices(), uptime_s / 3600 * node_hour)


def live_report(url: str) -> dict[str, Any]:
    """Fetch `url`/metrics and return its ledger lines by name.

    Raises: MissingError where nothing answers, ConfigError where it is no whalefall server.
    """
    address = url.rstrip("/") + "/metrics"
    try:
        with urllib.request.urlopen(address, timeout=10) as answer:
            text = answer.read(8 << 20).decode("utf-8", "replace")
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise MissingError(f"plan live: {address} does not answer ({error})") from None
    report = {}
    for line in text.splitlines():
        if line.startswith(PREFIX):
            name, _, value = line.partition(" ")
            report[name.removeprefix(PREFIX)] = float(value)
    if not report:
        raise ConfigError(f"plan live: {address} shows no {PREFIX}* lines; is it whalefall serve?")
    return report


def live_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """(line, value) of the printed ledger."""
    money = ("revenue", "cost", "profit")
    rows = []
    for name, value in report.items():
        label = name.replace("_", " ")
        if any(name.startswith(key) for key in money):
            rows.append((label.removesuffix(" dollars"), f"${value:,.6f}"))
        elif name == "margin":
            rows.append((label, f"{value:.1%}"))
        else:
            rows.append((label, f"{value:,.0f}"))
    return rows
