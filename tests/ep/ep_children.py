"""What the processes of the ep tests run: named checks on one engine, judged by plain numpy.

Every rank can make every rank's input from its seed, so each knows what must arrive.
"""

import os
import signal
import time
import traceback

import ml_dtypes
import numpy as np
import pytest

from whalefall.ep import Engine, FileGroup, TcpGroup
from whalefall.errors import ConfigError, RankFailure, ShapeError, WhalefallError

BF16 = ml_dtypes.bfloat16
Batch = tuple[np.ndarray, np.ndarray, np.ndarray]


def batch(seed: int, tokens: int, hidden: int, experts: int, top_k: int, form: str) -> Batch:
    """x [T, H] bf16, topk_idx [T, K], weights [T, K] of one rank."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, hidden)).astype(BF16)
    idx = np.argsort(rng.random((tokens, experts)), 1)[:, :top_k].astype(np.int64)
    if form == "holes":
        idx[rng.random(idx.shape) < 0.4] = -1
    if form == "one expert":
        idx[:] = -1
        idx[:, 0] = experts - 1
    return x, idx, rng.random((tokens, top_k)).astype(np.float32)


def batches(
    size: int, form: str, hidden: int = 64, experts: int = 16, top_k: int = 4
) -> list[Batch]:
    """One batch a rank; ragged, some of them empty."""
    tokens = [(37 * r + 5) % 61 if r % 3 != 1 or form != "empty ranks" else 0 for r in range(size)]
    return [batch(r, t, hidden, experts, top_k, form) for r, t in enumerate(tokens)]


def by_selection(all_: list[Batch], rank: int, each: int) -> tuple[np.ndarray, list[int]]:
    """What must arrive: for each expert of the rank, by source, token, lane."""
    rows, counts = [], []
    for expert in range(rank * each, (rank + 1) * each):
        here = [x[t] for x, idx, _ in all_ for t, k in np.argwhere(idx == expert)]
        rows += here
        counts.append(len(here))
    return np.array(rows, BF16).reshape(len(rows), all_[0][0].shape[1]), counts


def expert(rows: np.ndarray, number: int) -> np.ndarray:
    """A stand-in for an expert: elementwise, so a row's result does not depend on its place."""
    return (rows.astype(np.float32) * (1 + number) + number).astype(BF16)


def through_experts(received, rank: int, each: int) -> np.ndarray:
    out = np.empty_like(received.x)
    at = 0
    for e, n in enumerate(received.per_expert):
        out[at : at + n] = expert(received.x[at : at + n], rank * each + e)
        at += int(n)
    return out


def in_one_process(x: np.ndarray, idx: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The sum over a token's experts in float32, in top-k order."""
    acc = np.zeros(x.shape, np.float32)
    for k in range(idx.shape[1]):
        for t in np.flatnonzero(idx[:, k] >= 0):
            acc[t] += weights[t, k] * expert(x[t], int(idx[t, k])).astype(np.float32)
    return acc


def selections(engine: Engine, form: str) -> None:
    all_ = batches(engine.num_ranks, form)
    x, idx, weights = all_[engine.rank]
    each = 16 // engine.num_ranks
    received = engine.dispatch_selections(x, idx, 16)
    rows, counts = by_selection(all_, engine.rank, each)
    assert received.per_expert.tolist() == counts
    assert np.array_equal(received.x.view(np.uint16), rows.view(np.uint16))
    results = through_experts(received, engine.rank, each)
    got = engine.combine_selections(results, received.handle, weights)
    assert np.array_equal(got, in_one_process(x, idx, weights)), "not the bits of one process"
    rows = engine.combine_selections(results, received.handle)
    for t, k in np.ndindex(idx.shape):
        wanted = expert(x[t], int(idx[t, k])) if idx[t, k] >= 0 else np.zeros(64, BF16)
        assert np.array_equal(rows[t, k], wanted)


def check_selections_random(engine: Engine) -> None:
    selections(engine, "random")


def check_selections_with_holes(engine: Engine) -> None:
    selections(engine, "holes")


def check_selections_all_to_one_expert(engine: Engine) -> None:
    selections(engine, "one expert")


def check_selections_from_empty_ranks(engine: Engine) -> None:
    selections(engine, "empty ranks")


def check_float32_rows(engine: Engine) -> None:
    all_ = batches(engine.num_ranks, "random")
    x, idx, weights = all_[engine.rank]
    received = engine.dispatch_selections(x.astype(np.float32), idx, 16)
    assert received.x.dtype == np.float32
    got = engine.combine_selections(received.x * np.float32(1.1), received.handle, weights)
    wanted = np.zeros_like(got)
    for k in range(4):
        wanted += weights[:, k : k + 1] * (x.astype(np.float32) * np.float32(1.1))
    assert np.array_equal(got, wanted)


def check_one_row_a_rank(engine: Engine) -> None:
    size, each = engine.num_ranks, 16 // engine.num_ranks
    all_ = batches(size, "holes")
    x, idx, weights = all_[engine.rank]
    received = engine.dispatch(x, idx, 16, weights)
    mine = range(engine.rank * each, (engine.rank + 1) * each)
    rows, ids, ws = [], [], []
    for sx, si, sw in all_:
        for t in range(len(sx)):
            local = [int(e) - mine.start if e in mine else -1 for e in si[t]]
            if max(local) >= 0:
                rows.append(sx[t])
                ids.append(local)
                ws.append([w if e >= 0 else 0 for w, e in zip(sw[t], local, strict=True)])
    assert np.array_equal(received.x, np.array(rows, BF16).reshape(len(rows), 64))
    assert received.topk_idx.tolist() == ids
    assert np.array_equal(received.topk_weights, np.array(ws, np.float32).reshape(len(rows), 4))
    # ranks return different rows; the sum must be the one in rank order, rounded once
    results = (received.x.astype(np.float32) * (1 + engine.rank)).astype(BF16)
    bias = [np.full((len(x), 64), v, BF16) for v in (0.5, -3)]
    got, got_weights = engine.combine(results, received.handle, received.topk_weights, tuple(bias))
    acc = bias[0].astype(np.float32) + bias[1].astype(np.float32)
    several = len(engine.topology.hosts) > 1
    for ranks in engine.topology.hosts:
        part = np.zeros_like(acc) if several else acc
        for r in ranks:
            sent = ((idx >= r * each) & (idx < (r + 1) * each)).any(1)
            part[sent] += (x[sent].astype(np.float32) * (1 + r)).astype(BF16).astype(np.float32)
        acc = acc + part.astype(BF16).astype(np.float32) if several else part
    assert np.array_equal(got, acc.astype(BF16))
    assert np.array_equal(got_weights, np.where(idx >= 0, weights, 0).astype(np.float32))


def check_odd_hidden_sizes_and_no_vectors(engine: Engine) -> None:
    for hidden in (1, 7, 24, 77):
        all_ = batches(engine.num_ranks, "holes", hidden=hidden)
        x, idx, weights = all_[engine.rank]
        received = engine.dispatch_selections(x, idx, 16)
        each = 16 // engine.num_ranks
        results = through_experts(received, engine.rank, each)
        got = engine.combine_selections(results, received.handle, weights)
        assert np.array_equal(got, in_one_process(x, idx, weights))
        received = engine.dispatch(x, idx, 16)
        got, _ = engine.combine(received.x, received.handle)
        copies = [len({int(e) // each for e in row if e >= 0}) for row in idx]
        wanted = x.astype(np.float32) * np.array(copies, np.float32)[:, None]
        assert np.array_equal(got, wanted.astype(BF16))  # copies ≤ 8 of one bf16: exact, or rounded


def check_a_stalled_reader_loses_nothing(engine: Engine) -> None:
    x = np.arange(300 * 64, dtype=np.float32).reshape(300, 64)
    idx = np.tile(np.arange(0, 16, 4), (300, 1))
    if engine.rank == engine.num_ranks - 1:
        time.sleep(0.3)  # the others fill their slots and wait
    received = engine.dispatch_selections(x, idx, 16)
    got = engine.combine_selections(received.x, received.handle)
    assert np.array_equal(got, np.repeat(x[:, None], 4, 1))


def is_shared(engine: Engine, array: np.ndarray) -> bool:
    shared = engine.normal.fabric.shared
    return shared is not None and shared.find(array.ctypes.data, array.nbytes) >= 0


def direct(engine: Engine) -> bool:
    return len(engine.topology.hosts) == 1 and engine.normal.fabric.plan.shared_bytes > 0


def check_results_are_written_in_place_once_pieces_are_large_enough(engine: Engine) -> None:
    x = np.full((2000, 64), engine.rank, np.float32)
    idx = np.zeros((2000, 1), np.int64)  # rank 0 gets far more than it sends
    seen = []
    for _ in range(2):
        received = engine.dispatch_selections(x, idx, 16)
        if engine.rank == 0:
            assert received.x[:, 0].tolist() == np.repeat(range(engine.num_ranks), 2000).tolist()
        seen.append(is_shared(engine, received.x))
        assert np.array_equal(engine.combine_selections(received.x, received.handle)[:, 0], x)
    few = engine.num_ranks == 1  # nothing comes but what it sent
    if engine.rank == 0:
        assert seen == [direct(engine) and few, direct(engine)]


def check_results_stay_while_somebody_has_them(engine: Engine) -> None:
    kept = []
    for i in range(6):
        x, idx, _ = batches(engine.num_ranks, "random")[engine.rank]
        received = engine.dispatch_selections(x.astype(np.float32) + i, idx, 16)
        kept.append((received.x, received.x.copy()))
    assert all(np.array_equal(a, b) for a, b in kept)
    first = kept.pop()[0]
    place = first.ctypes.data
    del first, received
    engine.barrier()
    again = engine.dispatch_selections(x.astype(np.float32), idx, 16)
    if direct(engine):
        assert again.x.ctypes.data == place, "a piece that came back is not used again"


def check_rows_in_shared_memory_are_combined_where_they_are(engine: Engine) -> None:
    x, idx, weights = batches(engine.num_ranks, "holes")[engine.rank]
    each = 16 // engine.num_ranks
    for _ in range(3):
        received = engine.dispatch_selections(x, idx, 16)
        rows = engine.empty(received.x.shape, BF16)
        assert is_shared(engine, rows) == (direct(engine) and rows.size > 0)
        rows[:] = through_experts(received, engine.rank, each)
        got = engine.combine_selections(rows, received.handle, weights)
        rows[:] = 0  # nobody reads any more
        assert np.array_equal(got, in_one_process(x, idx, weights))


def check_some_ranks_rows_lie_in_shared_memory_and_some_do_not(engine: Engine) -> None:
    each = 16 // engine.num_ranks
    for sharing in (lambda rank: rank % 2, lambda rank: rank == 0, lambda _: True):
        x, idx, weights = batches(engine.num_ranks, "holes")[engine.rank]
        received = engine.dispatch_selections(x, idx, 16)
        rows = through_experts(received, engine.rank, each)
        plain = engine.dispatch(x, idx, 16)
        returned = (plain.x.astype(np.float32) * 1.7).astype(BF16)
        wanted = engine.combine(returned, plain.handle)[0]
        if sharing(engine.rank):
            rows, own = engine.empty(rows.shape, BF16), rows
            rows[:] = own
            returned, own = engine.empty(returned.shape, BF16), returned
            returned[:] = own
        got = engine.combine_selections(rows, received.handle, weights)
        assert np.array_equal(got, in_one_process(x, idx, weights))
        assert np.array_equal(engine.combine(returned, plain.handle)[0], wanted)


def check_the_same_bits_again(engine: Engine) -> None:
    x, idx, weights = batches(engine.num_ranks, "random")[engine.rank]
    results = []
    for _ in range(5):
        received = engine.dispatch(x, idx, 16, weights)
        scaled = (received.x.astype(np.float32) * 1.7).astype(BF16)
        results.append(engine.combine(scaled, received.handle)[0].tobytes())
    assert len(set(results)) == 1


def check_ranks_that_disagree_all_say_so_and_go_on(engine: Engine) -> None:
    if engine.num_ranks == 1:
        return
    x, idx, _ = batches(engine.num_ranks, "random")[engine.rank]
    wrong = x[:, :32] if engine.rank == 1 else x
    with pytest.raises(ShapeError, match=r"x_bytes = (64|128), rank \d with (64|128)"):
        engine.dispatch_selections(wrong, idx, 16)
    selections(engine, "random")


def check_bad_input_is_refused_before_anything_is_sent(engine: Engine) -> None:
    x, idx, _ = batches(engine.num_ranks, "random")[0]
    bad = idx.copy()
    bad[3, 1] = 16
    for call, words in [
        (lambda: engine.dispatch(x, bad, 16), "token 3 names experts"),
        (lambda: engine.dispatch(x, idx[1:], 16), "topk_idx has"),
        (lambda: engine.dispatch(x, idx, 5000), "5000 experts"),
        (lambda: engine.dispatch(x, idx.astype(np.int32), 16), "wanted int64"),
    ]:
        with pytest.raises(WhalefallError, match=words):
            call()
    received = engine.dispatch(x, idx, 16)
    for more, words in [
        ({"topk_weights": np.zeros((3, 3), np.float32)}, r"topk_weights is float32 \[3, 3\]"),
        ({"bias": (np.zeros((1, 64), BF16), None)}, r"bias is bfloat16 \[1, 64\]"),
        ({"out": np.zeros((1, 64), BF16)}, r"out is bfloat16 \[1, 64\]"),
    ]:
        with pytest.raises(ShapeError, match=words):
            engine.combine(received.x, received.handle, **more)
    selections(engine, "random")  # all ranks erred alike: they go on together


def check_barrier(engine: Engine) -> None:
    time.sleep(0.02 * engine.rank)
    engine.barrier()


CHECKS = {name.removeprefix("check_"): f for name, f in globals().items() if name[:6] == "check_"}


def all_checks(
    folder: str, rank: int, size: int, chunk_bytes: int, hosts: list[str] | None, slots: bool
) -> dict[str, str]:
    """Run every check; what went wrong with each ("" for nothing)."""
    outcome = {}
    host = hosts[rank] if hosts else None
    group, threads = FileGroup(folder, rank, size), 1 + chunk_bytes // 8192 % 2 * 2
    more = {"shared_bytes": 0} if slots else {}
    with Engine(group, chunk_bytes=chunk_bytes, host=host, num_threads=threads, **more) as engine:
        for name, check in CHECKS.items():
            try:
                check(engine)
                outcome[name] = ""
            except Exception:
                outcome[name] = traceback.format_exc()
                break  # the ranks may be out of step now
        engine.barrier()
    return outcome


def lose_a_rank(
    folder: str, rank: int, size: int, how: str, timeout_s: float, hosts: list[str] | None = None
) -> dict[str, object]:
    """Rank 1 dies or stops in the middle of a dispatch; what the others see, and when."""
    engine = Engine(
        FileGroup(folder, rank, size), timeout_s=timeout_s, host=hosts[rank] if hosts else None
    )
    x, idx, _ = batches(size, "random")[rank]
    selections(engine, "random")
    if rank == 1:
        at = engine.normal if hosts is None else engine.normal.counts
        name = "announce" if hosts is None else "collect"  # between them and the rows
        inside = getattr(at, name)

        def learn_then_go(*arguments: object) -> object:
            heads = inside(*arguments)
            os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGSTOP)
            return heads

        setattr(at, name, learn_then_go)
    began = time.monotonic()
    try:
        received = engine.dispatch_selections(x, idx, 16)
        engine.combine_selections(received.x, received.handle)
        return {"error": "none"}
    except RankFailure as error:
        said = {"error": str(error), "rank": error.rank, "seconds": time.monotonic() - began}
    with pytest.raises(RankFailure, match="that ended this Buffer's") as again:
        engine.barrier()  # at once: nothing is tried again
    assert again.value.rank == 1 and time.monotonic() - began < said["seconds"] + 1
    return said


def overwrite_what_was_combined(folder: str, rank: int, size: int) -> list[bool]:
    """Rank 0 has nothing to add up, returns first and overwrites what rank 1 still adds up."""
    more, same = {"chunk_bytes": 128 << 20, "num_threads": 1}, []  # one tick, one thread
    with Engine(FileGroup(folder, rank, size), **more) as engine:
        x = np.ones((8000 if rank else 0, 2048), np.float32)
        received = engine.dispatch(x, np.zeros((len(x), 1), np.int64), 2)
        rows = engine.empty(received.x.shape, np.float32)
        out = np.empty_like(x)
        for _ in range(10):
            rows[:], out[:] = 1, 0
            engine.barrier()
            engine.combine(rows, received.handle, out=out)
            rows[-1:] = 2  # the last that anybody reads
            same.append(bool((out == x).all()))
        engine.barrier()
    return same


def disagree_at_construction(folder: str, rank: int, size: int) -> str:
    try:
        Engine(FileGroup(folder, rank, size), hidden=64 + rank)
        return "none"
    except ConfigError as error:
        return str(error)


def over_network(host: str, port: int, rank: int, size: int, token: str, name: str) -> dict:
    """One rank of a group on several (network namespace) hosts."""
    group = TcpGroup(host, port, rank, size, token.encode())
    with Engine(group, host=name) as engine:
        for check in (check_selections_random, check_one_row_a_rank, check_barrier):
            check(engine)
        sent = engine.bytes_sent_to_other_hosts
        engine.barrier()
    return {"sent": sent}
