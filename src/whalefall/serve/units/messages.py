"""What the gateway and the ranks say to each other; msgspec headers of `comm` frames."""

from __future__ import annotations

from typing import Any

import msgspec

from whalefall.engine import SamplingParams, TokenLogprobs

__all__ = [
    "Admitted",
    "Cancel",
    "Command",
    "Decode",
    "Event",
    "Hello",
    "Lost",
    "Placed",
    "Prefill",
    "Prefilled",
    "Refused",
    "Release",
    "Report",
    "Stats",
    "Tokens",
    "Transfer",
]


class Transfer(msgspec.Struct):
    """Where an answer's KV can be fetched: a region of shared memory, or a port.

    Attributes:
        name: of the region, or the answer's key.
        host, port: where its rank listens; port 0: shared memory.
        shape: [layers, blocks, 64, latent + rope].
        dtype: of the KV cache.
    """

    name: str
    host: str
    port: int
    shape: list[int]
    dtype: str


class Job(msgspec.Struct):
    """An answer as every rank that works on it must know it; `seed` and `index` fix its draws."""

    key: str
    prompt: list[int]
    params: SamplingParams
    seed: int
    index: int
    priority: int = 0
    salt: str = ""


class Prefill(msgspec.Struct, tag=True):
    """Compute a prompt and its first token; `silent`: the client has that token already."""

    job: Job
    silent: bool = False


class Decode(msgspec.Struct, tag=True):
    """Fetch a prompt's KV and go on after the tokens generated so far."""

    job: Job
    generated: list[int]
    cached: int
    transfer: Transfer


class Cancel(msgspec.Struct, tag=True):
    """Forget an answer."""

    key: str


class Release(msgspec.Struct, tag=True):
    """Give the memory of a hand-over back."""

    key: str


class Placed(msgspec.Struct, tag=True):
    """A new placement of experts, used by all ranks from the same step on."""

    version: int
    phy2log: list[list[int]]


Body = Prefill | Decode | Cancel | Release | Placed


class Command(msgspec.Struct):
    """Gateway to rank. Every rank of a unit gets every number, most without a body: so all know
    that there is something to do, and none sleeps while another waits for it."""

    number: int
    body: Body | None = None


class Hello(msgspec.Struct):
    """A rank is ready."""

    unit: str
    rank: int
    pid: int
    max_model_len: int
    kv_tokens: int


class Tokens(msgspec.Struct, tag=True):
    """What a step added to an answer."""

    key: str
    token_ids: list[int]
    text: str
    logprobs: list[TokenLogprobs] | None
    finish_reason: str | None
    stop_reason: str | int | None
    cached: int


class Prefilled(msgspec.Struct, tag=True):
    """A prompt's KV can be fetched."""

    key: str
    transfer: Transfer


class Admitted(msgspec.Struct, tag=True):
    """A prompt's KV was fetched."""

    key: str


class Lost(msgspec.Struct, tag=True):
    """A prompt's KV was not where it should be."""

    key: str


class Refused(msgspec.Struct, tag=True):
    """An answer that this engine cannot give."""

    key: str
    message: str


Event = Tokens | Prefilled | Admitted | Lost | Refused


class Stats(msgspec.Struct):
    """Counters of a rank since its start, and its present load."""

    running: int = 0
    waiting: int = 0
    kv_used: int = 0
    kv_total: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    rounds: int = 0
    placement: int = 0
    communication_s: float = 0.0
    overlapped_s: float = 0.0
    disk_hits: int = 0
    disk_failures: int = 0
    spec_drafted: int = 0
    spec_accepted: int = 0


class Report(msgspec.Struct):
    """Rank to gateway, after a step."""

    events: list[Event]
    stats: Stats
    expert_load: list[list[int]] | None = None
    extra: dict[str, Any] | None = None
