"""Serve room: an OpenAI-compatible server over the engine, with a page, metrics and a ledger.

In: HTTP requests. Out: answers as OpenAI's API shapes them, whole or as server-sent events.
Truth: the official `openai` client and the tables of the API's reference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from whalefall.serve.app import create_app
    from whalefall.serve.settings import Settings

__all__ = ["Settings", "create_app"]


def __getattr__(name: str) -> Any:
    if name == "create_app":
        from whalefall.serve.app import create_app

        return create_app
    if name == "Settings":
        from whalefall.serve.settings import Settings

        return Settings
    raise AttributeError(f"module 'whalefall.serve' has no attribute {name!r}")
