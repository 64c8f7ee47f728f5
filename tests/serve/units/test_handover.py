"""KV pages arrive as they were, through shared memory and TCP, and leave nothing behind."""

import ml_dtypes
import numpy as np
import pytest

from whalefall import comm
from whalefall.errors import LimitError, MissingError
from whalefall.serve.units.handover import Outbox, fetch

TOKEN = b"a" * 64


def pages(blocks: int) -> np.ndarray:
    rng = np.random.default_rng(blocks)
    return rng.standard_normal((3, blocks, 64, 80)).astype(ml_dtypes.bfloat16)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("blocks", [0, 1, 7])
def test_pages_arrive_as_they_were(shared, blocks) -> None:
    outbox = Outbox("kv-test", "bf16", TOKEN, shared)
    sent = pages(blocks)
    transfer = outbox.put("a", sent)
    assert (transfer.port == 0) == shared
    assert fetch(transfer, TOKEN).tobytes() == sent.tobytes()
    assert fetch(transfer, TOKEN).tobytes() == sent.tobytes()  # until it is released
    outbox.release("a")
    outbox.release("a")
    assert len(outbox) == 0
    with pytest.raises(MissingError):
        fetch(transfer, TOKEN)
    assert comm.sweep("kv-test") == []


def test_full_shared_memory_turns_to_tcp(monkeypatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise LimitError("comm: no memory")

    monkeypatch.setattr(comm.Region, "create", full)
    outbox = Outbox("kv-test", "bf16", TOKEN)
    transfer = outbox.put("a", pages(2))
    assert transfer.port
    assert fetch(transfer, TOKEN).tobytes() == pages(2).tobytes()


def test_a_stranger_gets_nothing() -> None:
    transfer = Outbox("kv-test", "bf16", TOKEN, shared=False).put("a", pages(1))
    with pytest.raises(MissingError, match="refused our token"):
        fetch(transfer, b"b" * 64)


def test_a_rank_that_is_gone_is_missing() -> None:
    outbox = Outbox("kv-test", "bf16", TOKEN, shared=False)
    transfer = outbox.put("a", pages(1))
    transfer.port = 1
    with pytest.raises(MissingError, match="hand-over: a"):
        fetch(transfer, TOKEN)
