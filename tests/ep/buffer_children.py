"""What the processes of the Buffer tests run: named checks, judged by plain torch on all inputs."""

import gc
import os
import signal
import threading
import time
import traceback
from functools import partial

import pytest
import torch
import torch.distributed as dist

from whalefall import ep, trace
from whalefall.ep.library import library
from whalefall.ep.torch import combine as differentiable_combine
from whalefall.ep.torch import dispatch as differentiable_dispatch
from whalefall.ep.worker import Event
from whalefall.errors import (
    ConfigError,
    DtypeError,
    LimitError,
    RankFailure,
    ShapeError,
    WhalefallError,
)

H, E, K, M = 1024, 8, 4, 24
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn


def batch(rank: int, tokens: int | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [T, H], topk_idx [T, K] with holes, weights [T, K] of a rank; T differs between ranks."""
    generator = torch.Generator().manual_seed(rank)
    T = (7 * rank + 11) % M if tokens is None else tokens
    x = torch.randn(T, H, generator=generator).to(BF16)
    idx = torch.rand(T, E, generator=generator).argsort(1)[:, :K]
    idx[torch.rand(T, K, generator=generator) < 0.2] = -1
    if rank % 2 == 0:  # straight from the tensors; the others' go as arrays
        idx = idx.contiguous()
    return x, idx, torch.rand(T, K, generator=generator)


def arriving(rank: int, size: int) -> list[tuple[int, int]]:
    """(source, token) of every row that a rank receives, in order."""
    El = E // size
    return [
        (source, t)
        for source in range(size)
        for t, row in enumerate(batch(source)[1].tolist())
        if any(rank * El <= e < (rank + 1) * El for e in row)
    ]


def dispatch(buffer: ep.Buffer, x, idx, weights, **more):
    per_rank, per_host, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, E)
    return buffer.dispatch(
        x, None, per_rank, per_host, in_rank, per_expert, idx, weights, **more
    )  # fmt: skip


def wanted_x(buffer: ep.Buffer) -> torch.Tensor:
    rows = [batch(s)[0][t] for s, t in arriving(buffer.rank, buffer.group_size)]
    return torch.stack(rows) if rows else torch.empty(0, H, dtype=BF16)


def copies(idx: torch.Tensor, size: int) -> list[set[int]]:
    return [{e // (E // size) for e in row if e >= 0} for row in idx.tolist()]


def check_layout_counts_what_a_loop_counts(buffer: ep.Buffer) -> None:
    _, idx, _ = batch(buffer.rank)
    size = buffer.group_size
    per_rank, _, per_expert, in_rank, event = buffer.get_dispatch_layout(idx, E)
    to = copies(idx, size)
    assert per_rank.tolist() == [sum(r in ranks for ranks in to) for r in range(size)]
    assert per_expert.tolist() == [int((idx == e).sum()) for e in range(E)]
    assert in_rank.tolist() == [[r in ranks for r in range(size)] for ranks in to]
    assert per_rank.dtype == per_expert.dtype == torch.int32 and in_rank.dtype == torch.bool
    assert event.event is None


def check_rows_arrive_by_source_then_token(buffer: ep.Buffer) -> None:
    x, idx, weights = batch(buffer.rank)
    got, ids, ws, counts, handle, event = dispatch(buffer, x, idx, weights, expert_alignment=16)
    rank, size = buffer.rank, buffer.group_size
    rows, El = arriving(rank, size), E // size
    assert torch.equal(got, wanted_x(buffer))
    local = [[e - rank * El if e // El == rank and e >= 0 else -1
              for e in batch(s)[1][t].tolist()] for s, t in rows]  # fmt: skip
    assert ids.tolist() == local
    sent = [batch(s)[2][t].tolist() for s, t in rows]
    assert ws.tolist() == [
        [w if e >= 0 else 0.0 for w, e in zip(one, each, strict=True)]
        for one, each in zip(sent, local, strict=True)
    ]
    flat = [e for row in local for e in row]
    assert counts == [-(-flat.count(e) // 16) * 16 for e in range(El)]
    assert event.event is None
    ends = [sum(s <= i for s, _ in rows) for i in range(size)]
    if len(handle) == 6:
        prefix, _, _, source, in_rank, head = handle
        assert prefix[:, rank].tolist() == ends
        assert source.tolist() == [t for _, t in rows]
        assert head.shape == (len(x), size) and in_rank.shape == (len(x), size)
    else:
        assert handle[-4].tolist() == ends and handle[7].shape == (len(rows), 8)


def check_a_handle_repeats_its_layout(buffer: ep.Buffer) -> None:
    x, idx, weights = batch(buffer.rank)
    *_, handle, _ = dispatch(buffer, x, idx, weights)
    got, *nothing, _event = buffer.dispatch(x * 2, handle=handle)
    assert torch.equal(got, wanted_x(buffer) * 2) and nothing == [None] * 4
    back, _, _ = buffer.combine(got, handle)
    times = torch.tensor([len(r) for r in copies(idx, buffer.group_size)])[:, None]
    assert torch.equal(back, (x.float() * 2 * times).to(BF16))


def check_a_handle_repeats_where_one_rank_has_no_memory_to_offer(buffer: ep.Buffer) -> None:
    x, idx, weights = batch(buffer.rank)
    *_, handle, _ = dispatch(buffer, x, idx, weights)
    shared = buffer.runtime.normal.fabric.shared
    if shared is not None and buffer.rank == 0:
        shared.take = lambda nbytes: None
    try:
        got, *_ = buffer.dispatch(x * 4, handle=handle)
        again, _, _, counts, _, _ = dispatch(buffer, x, idx, weights)
    finally:
        if shared is not None and buffer.rank == 0:
            del shared.take
    assert torch.equal(got, wanted_x(buffer) * 4)
    assert torch.equal(again, wanted_x(buffer)) and len(counts) == E // buffer.group_size


def check_more_repeats_under_way_than_there_are_mailboxes(buffer: ep.Buffer) -> None:
    x, idx, weights = batch(buffer.rank)
    *_, handle, _ = dispatch(buffer, x, idx, weights)
    calls = [buffer.dispatch(x * i, handle=handle, async_finish=True) for i in range(1, 30)]
    for i, (got, *_, event) in enumerate(calls, 1):
        event.current_stream_wait()
        assert torch.equal(got, wanted_x(buffer) * i)


def check_ranks_that_disagree_on_a_repeat_all_say_so(buffer: ep.Buffer) -> None:
    x, idx, weights = batch(buffer.rank)
    *_, handle, _ = dispatch(buffer, x, idx, weights)
    with pytest.raises(ShapeError, match="x_bytes"):
        buffer.dispatch(x[:, : H // 2] if buffer.rank else x, handle=handle)
    got, *_ = buffer.dispatch(x, handle=handle)
    assert torch.equal(got, wanted_x(buffer))


def check_ranks_go_on_after_only_some_took_their_ticks(buffer: ep.Buffer) -> None:
    x, idx, weights = batch(buffer.rank, 700)  # more ticks than slots
    got, *_, handle, _ = dispatch(buffer, x, idx, weights)
    times = torch.tensor([len(r) for r in copies(idx, buffer.group_size)])[:, None]
    others = (lambda: dispatch(buffer, x, idx, weights), buffer.runtime.barrier)
    for i, other in enumerate((*others, *others)):
        call = other if buffer.rank == i // 2 else lambda: buffer.dispatch(x, handle=handle)
        with pytest.raises(ShapeError, match="all ranks must agree"):
            call()
        back, _, _ = buffer.combine(got.clone(), handle)
        assert torch.equal(back, (x.float() * times).to(BF16))
        again, *_ = dispatch(buffer, x * 2, idx, weights)
        assert torch.equal(again, got * 2)


def check_ranks_that_combine_differently_all_say_so(buffer: ep.Buffer) -> None:
    x, idx, weights = batch(buffer.rank, 700)
    got, _, ws, _, handle, _ = dispatch(buffer, x, idx, weights)
    for _ in range(2):
        narrow = got[:, : H // 2] if buffer.rank else got
        for rows, given, words in (
            (narrow, None, f"hidden: rank . gives ({H}|{H // 2}), rank . ({H}|{H // 2});"),
            (got, ws if buffer.rank else None, "rank .* bfloat16 with topk_weights"),
        ):
            with pytest.raises(ShapeError, match=words):
                buffer.combine(rows, handle, topk_weights=given)
        back, back_weights, _ = buffer.combine(got, handle, topk_weights=ws)
        times = torch.tensor([len(r) for r in copies(idx, buffer.group_size)])[:, None]
        assert torch.equal(back, (x.float() * times).to(BF16))
        assert torch.equal(back_weights, torch.where(idx >= 0, weights, torch.zeros(())))


def check_weights_as_received_in_the_worst_case_go_with_a_combine_buffer(
    buffer: ep.Buffer,
) -> None:
    x, idx, weights = batch(buffer.rank)
    worst = M * buffer.group_size
    rows, _, given, _, handle, _ = dispatch(buffer, x, idx, weights, num_worst_tokens=worst)
    wanted, summed, _ = buffer.combine(rows, handle, given)
    returned = buffer.get_combine_buffer(handle, H)
    returned[:] = rows[: len(returned)]
    for x in (returned, rows, rows[: len(returned) + 1]):
        for some in (given, given[: len(returned)]):
            out, again, _ = buffer.combine(x, handle, some)
            assert torch.equal(out, wanted) and torch.equal(again, summed)
    with pytest.raises(ShapeError, match="topk_weights"):
        buffer.combine(returned, handle, given[:-1])


def check_worst_case_rows_are_not_waited_for(buffer: ep.Buffer) -> None:
    x, idx, weights = batch(buffer.rank)
    worst, n = M * buffer.group_size, len(arriving(buffer.rank, buffer.group_size))
    for asynchronous in (False, True):
        got, ids, _, counts, handle, event = dispatch(
            buffer, x, idx, weights, num_worst_tokens=worst, async_finish=asynchronous
        )
        if asynchronous:
            event.current_stream_wait()
        assert counts == [] and len(got) == worst
        assert torch.equal(got[:n], wanted_x(buffer)) and (ids[n:] == -1).all()
        assert (ids[:n] >= 0).any(1).all()
        back, _, _ = buffer.combine(got, handle)
        times = torch.tensor([len(r) for r in copies(idx, buffer.group_size)])[:, None]
        assert torch.equal(back, (x.float() * times).to(BF16))
    with pytest.raises(LimitError, match="buffers have room for 1"):
        dispatch(buffer, x, idx, weights, num_worst_tokens=1)


def check_fp8_rows_bring_their_scales(buffer: ep.Buffer) -> None:
    x, idx, weights = batch(buffer.rank)
    scales = torch.rand(H // 128, len(x)).t()  # not contiguous
    (got, got_scales), *_ = dispatch(buffer, (x.to(FP8), scales), idx, weights)
    (same, same_scales), *_ = dispatch(buffer, (x.to(FP8), scales.contiguous()), idx, weights)
    assert torch.equal(same.view(torch.uint8), got.view(torch.uint8))
    assert torch.equal(same_scales, got_scales)
    assert torch.equal(got.view(torch.uint8), wanted_x(buffer).to(FP8).view(torch.uint8))
    all_scales = [None] * buffer.group_size
    dist.all_gather_object(all_scales, scales, group=buffer.group)
    rows = arriving(buffer.rank, buffer.group_size)
    assert got_scales.tolist() == [all_scales[s][t].tolist() for s, t in rows]


def check_logfmt_rounds_each_row_and_sends_fewer_bytes(buffer: ep.Buffer) -> None:
    for scale, share in ((0.01, 0.7), (100.0, 1.1)):  # all blocks are coded; none is
        x, idx, weights = batch(buffer.rank)
        x = (x.float() * scale).to(BF16)
        dispatch = partial(buffer.low_latency_dispatch, x, idx, M, E, use_fp8=False)
        got, _, handle, _, _ = dispatch()
        rows = got.clone()
        before = sent_between_hosts(buffer)
        plain, _, _ = buffer.low_latency_combine(rows, idx, weights, handle)
        as_bf16 = sent_between_hosts(buffer) - before
        _, _, handle, _, _ = dispatch()
        before = sent_between_hosts(buffer)
        back, _, _ = buffer.low_latency_combine(rows, idx, weights, handle, use_logfmt=True)
        sent = sent_between_hosts(buffer) - before
        row = through_logfmt(x)
        acc = torch.zeros(x.shape)
        for k in range(K):
            there = idx[:, k] >= 0
            acc[there] += weights[there, k, None] * row[there]
        assert torch.equal(back, acc.to(BF16))
        assert torch.equal(back, plain) == (scale > 1)
        if as_bf16 > 10_000:
            assert share - 0.1 < sent / as_bf16 < share
    with pytest.raises(ConfigError, match="use_logfmt and zero_copy exclude each other"):
        buffer.low_latency_combine(rows, idx, weights, handle, use_logfmt=True, zero_copy=True)


def sent_between_hosts(buffer: ep.Buffer) -> int:
    """Bytes that this rank has sent to other hosts, once nothing is under way."""
    dist.barrier(group=buffer.group)
    time.sleep(0.02)
    return buffer.runtime.low_latency.links.bytes_sent


def through_logfmt(x: torch.Tensor) -> torch.Tensor:
    """What bf16 rows are after they travelled as LogFMT-10, float32 (test_logfmt.py judges it)."""
    out = torch.empty(x.shape)
    library().wf_ep_through_log(x.data_ptr(), *x.shape, out.data_ptr())
    return out


def check_combine_adds_in_rank_order_after_the_bias(buffer: ep.Buffer) -> None:
    x, idx, weights = batch(buffer.rank)
    got, _, ws, _, handle, _ = dispatch(buffer, x, idx, weights)
    mine = (got.float() * (0.3 + buffer.rank)).to(BF16)
    bias = (torch.full_like(x, 0.7), torch.full_like(x, -2))
    back, back_weights, _ = buffer.combine(mine, handle, topk_weights=ws, bias=bias)
    acc = bias[0].float() + bias[1].float()
    hosts = buffer.runtime.topology.hosts
    to = copies(idx, buffer.group_size)
    for ranks in hosts:
        part = torch.zeros_like(acc) if len(hosts) > 1 else acc
        for rank in ranks:
            here = torch.tensor([rank in r for r in to], dtype=torch.bool)
            part[here] += (x.float() * (0.3 + rank)).to(BF16).float()[here]
        acc = acc + part.to(BF16).float() if len(hosts) > 1 else part
    assert torch.equal(back, acc.to(BF16))
    assert torch.equal(back_weights, torch.where(idx >= 0, weights, torch.zeros(())))
    none, nothing, _ = buffer.combine(mine, handle)
    assert nothing is None and none.shape == x.shape


def check_results_in_the_combine_buffer_are_added_where_they_are(buffer: ep.Buffer) -> None:
    x, idx, weights = batch(buffer.rank)
    received, _, ws, _, handle, _ = dispatch(buffer, x, idx, weights)
    for i in range(3):
        returned = (received.float() * (1.7 + i)).to(BF16)
        wanted = buffer.combine(returned, handle)[0]
        rows = buffer.get_combine_buffer(handle, H)
        assert rows.shape == received.shape and rows.dtype == BF16
        normal = buffer.runtime.normal
        if normal.is_direct and len(rows):
            assert normal.fabric.shared.find(rows.data_ptr(), rows.nbytes) >= 0
        rows.copy_(returned)
        if (buffer.rank + i) % 2:  # some ranks' results lie in memory of their own
            rows = returned
        got = buffer.combine(rows, handle)[0]
        rows.zero_()  # nobody reads any more
        assert torch.equal(got, wanted)
        for mine in (received, received.clone()) if buffer.rank % 2 else (received, received):
            _, back_weights, _ = buffer.combine(mine, handle, topk_weights=ws)
            assert torch.equal(back_weights, torch.where(idx >= 0, weights, torch.zeros(())))
    with pytest.raises(ConfigError, match="wanted dispatch's own"):
        buffer.get_combine_buffer((1, 2), H)


def spread(kind: str, rank: int, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A batch of a rank whose tokens spread in this way."""
    tokens = {"last is empty": 9 * (rank < size - 1), "first is empty": 9 * (rank > 0)}
    x, idx, weights = batch(rank, 0 if kind == "nobody has any" else tokens.get(kind, 5 + rank))
    if kind == "all to one expert":
        idx[:] = -1
        idx[:, 2] = E - 1
    if kind == "nobody sends":
        idx[:] = -1
    return x, idx.contiguous(), weights


SPREADS = [
    "at random", "last is empty", "first is empty", "all to one expert", "nobody sends",
    "nobody has any",
]  # fmt: skip


def check_empty_ranks_and_empty_receivers_take_part(buffer: ep.Buffer) -> None:
    rank, size = buffer.rank, buffer.group_size
    El = E // size
    for kind in SPREADS:
        every = [spread(kind, s, size) for s in range(size)]
        x, idx, weights = every[rank]
        rows = [
            x[t] for x, ids, _ in every for t in range(len(x))
            if any(e // El == rank for e in ids[t].tolist() if e >= 0)
        ]  # fmt: skip
        got, _, ws, counts, handle, _ = dispatch(buffer, x, idx, weights)
        assert torch.equal(got, torch.stack(rows) if rows else x[:0]), kind
        assert sum(counts) == sum(int((ids // El == rank).sum()) for _, ids, _ in every), kind
        for own in (got, got.clone()):  # read where they are, and staged
            back, back_weights, _ = buffer.combine(own, handle, topk_weights=ws)
            times = torch.tensor([[len(r)] for r in copies(idx, size)]).view(-1, 1)
            assert torch.equal(back, (x.float() * times).to(BF16)), kind
            wanted = torch.where(idx >= 0, weights, torch.zeros(()))
            assert torch.equal(back_weights, wanted), kind
        again, *_ = buffer.dispatch(x * 2, handle=handle)
        assert torch.equal(again, got * 2), kind
        if kind != "nobody has any":
            worst, _, _, _, _, _ = dispatch(buffer, x, idx, weights, num_worst_tokens=M * size)
            assert torch.equal(worst[: len(got)], got), kind


def check_gradients_reach_ranks_through_an_empty_receiver(buffer: ep.Buffer) -> None:
    x, idx, weights = spread("all to one expert", buffer.rank, buffer.group_size)
    x, weights = x.requires_grad_(), weights.requires_grad_()
    got, _, ws, _, _ = differentiable_dispatch(buffer, x, idx, weights, E)
    (ws.sum() * 3 + got.float().sum()).backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert torch.equal(weights.grad, 3.0 * (idx >= 0))


def check_asynchronous_calls_finish_with_their_events(buffer: ep.Buffer) -> None:
    x, idx, weights = batch(buffer.rank)
    previous = buffer.capture()
    for _ in range(3):
        got, _, _, _, handle, event = dispatch(
            buffer, x, idx, weights, previous_event=previous, async_finish=True,
            allocate_on_comm_stream=True,
        )  # fmt: skip
        back, _, previous = buffer.combine(
            got, handle, previous_event=event, async_finish=True, allocate_on_comm_stream=True
        )
    with previous:
        pass
    times = torch.tensor([len(r) for r in copies(idx, buffer.group_size)])[:, None]
    assert torch.equal(back, (x.float() * times).to(BF16))
    with pytest.raises(ConfigError, match="needs previous_event"):
        buffer.combine(got, handle, allocate_on_comm_stream=True)


def apart(t: torch.Tensor) -> torch.Tensor:
    """Zeros like `t`, no two elements of a row side by side."""
    return torch.zeros(*t.shape, 2, dtype=t.dtype)[..., 0]


def check_what_is_given_is_read_after_the_previous_event(buffer: ep.Buffer) -> None:
    x, idx, weights = batch(buffer.rank)
    scales, worst = torch.rand(len(x), H // 128), M * buffer.group_size
    wanted = dispatch(buffer, (x.to(FP8), scales), idx, weights)
    handle, (rows, row_scales) = wanted[4], wanted[0]
    added, summed, _ = buffer.combine(rows.to(BF16), handle, wanted[2], (x, x))
    layout = *buffer.get_dispatch_layout(idx, E)[:-1], idx, weights

    def call(form: str, values, given_scales, ids, ws, rows, row_weights, bias, **more):
        per_rank, per_host, per_expert, in_rank, *_ = layout
        if form == "handle":
            return buffer.dispatch((values, given_scales), handle, **more)
        if form == "combine":
            return buffer.combine(rows, handle, row_weights, (bias, bias), **more)
        return buffer.dispatch(
            (values, given_scales), None, per_rank, per_host, in_rank, per_expert, ids, ws,
            num_worst_tokens=worst if form == "worst" else 0, **more,
        )  # fmt: skip

    inputs = (x.to(FP8), scales, idx, weights, rows.to(BF16), wanted[2], x)
    for form in ("counts", "worst", "handle", "combine"):
        for late in (apart, torch.zeros_like):
            given, event = [late(t) for t in inputs], Event()
            previous = ep.EventOverlap(ep.EventHandle(event))
            if late is torch.zeros_like and form == "counts":
                given[1] = torch.zeros(H // 128, len(x)).t()
            got = call(form, *given, previous_event=previous, async_finish=True)
            for t, value in zip(given, inputs, strict=True):
                t.copy_(value)
            event.finish()
            got[-1].current_stream_wait()
            if form == "combine":
                assert torch.equal(got[0], added) and torch.equal(got[1], summed)
                continue
            n = len(rows)
            assert torch.equal(got[0][0][:n].view(torch.uint8), rows.view(torch.uint8)), form
            assert torch.equal(got[0][1][:n], row_scales), form
            if form != "handle":
                assert torch.equal(got[1][:n], wanted[1]), form
                assert torch.equal(got[2][:n], wanted[2]), form


def check_a_layout_is_counted_after_the_previous_event(buffer: ep.Buffer) -> None:
    idx, event = batch(buffer.rank)[1], Event()
    wanted, late = buffer.get_dispatch_layout(idx, E), torch.full_like(idx, -1)

    def later() -> None:
        late.copy_(idx)
        event.finish()

    threading.Timer(0.05, later).start()
    got = buffer.get_dispatch_layout(late, E, ep.EventOverlap(ep.EventHandle(event)))
    assert [torch.equal(a, b) for a, b in zip(got[2:4], wanted[2:4], strict=True)] == [True] * 2


def check_some_ranks_wait_for_a_dispatch_and_some_do_not(buffer: ep.Buffer) -> None:
    x, idx, weights = batch(buffer.rank)
    for i in range(4):
        later = (buffer.rank + i) % 2 == 0
        received, *_, handle, event = dispatch(buffer, x + i, idx, weights, async_finish=later)
        assert (event.event is not None) == later
        again = dispatch(buffer, x - i, idx, weights)[0]  # while the other may be under way
        if later:
            event.current_stream_wait()
        wanted = [batch(s)[0][t] - i for s, t in arriving(buffer.rank, buffer.group_size)]
        assert again.tolist() == [row.tolist() for row in wanted]
        wanted = [batch(s)[0][t] + i for s, t in arriving(buffer.rank, buffer.group_size)]
        assert received.tolist() == [row.tolist() for row in wanted]
        back = buffer.combine(received, handle)[0]
        ranks = torch.tensor([len(ranks) for ranks in copies(idx, buffer.group_size)])
        assert torch.equal(back, ((x + i).float() * ranks[:, None]).to(BF16))


def check_async_returns_before_the_data_arrive(buffer: ep.Buffer) -> None:
    x, idx, weights = batch(buffer.rank, 20)
    dispatch(buffer, x, idx, weights)
    late = buffer.group_size - 1
    *_, handle, _ = dispatch(buffer, x, idx, weights)
    dist.barrier(group=buffer.group)
    if buffer.rank == late:
        time.sleep(1.5)
    began = time.monotonic()
    _got, *_, event = buffer.dispatch(x, handle=handle, async_finish=True)
    returned = time.monotonic() - began
    event.current_stream_wait()
    if buffer.rank != late and buffer.group_size > 1:
        assert returned < 1.0 < time.monotonic() - began


def check_the_trace_shows_communication_under_compute(buffer: ep.Buffer) -> None:
    x, idx, weights = batch(buffer.rank)
    *_, handle, _ = dispatch(buffer, x, idx, weights)
    trace.start("check", rank=buffer.rank)
    if buffer.rank == 0:
        time.sleep(0.2)  # the others' communication waits that long
    *_, event = buffer.dispatch(x, handle=handle, async_finish=True)
    with trace.span("gemm", "compute"):
        time.sleep(0.4)
    event.current_stream_wait()
    spans = {e.name: e for e in trace.stop()}
    moving, computing = spans["ep.dispatch"], spans["gemm"]
    if buffer.rank:  # they began to compute while they waited for rank 0
        assert moving.duration_ns > 100e6
        assert computing.start_ns < moving.start_ns + moving.duration_ns
        assert moving.start_ns < computing.start_ns + computing.duration_ns


def low_latency(buffer: ep.Buffer, x, idx, **more):
    return buffer.low_latency_dispatch(x, idx, M, E, **more)


def selections_of(expert: int, size: int) -> list[list[int]]:
    """For each source, the tokens that chose the expert, in order."""
    return [
        [t for t, row in enumerate(batch(s)[1].tolist()) for e in row if e == expert]
        for s in range(size)
    ]


def check_low_latency_rows_and_ranges(buffer: ep.Buffer) -> None:
    x, idx, _weights = batch(buffer.rank)
    rank, size, El = buffer.rank, buffer.group_size, E // buffer.group_size
    stats, waited = torch.ones(El, dtype=torch.int32), torch.zeros(size, dtype=torch.int64)
    got, count, handle, _event, hook = low_latency(
        buffer, x, idx, use_fp8=False, cumulative_local_expert_recv_stats=stats,
        dispatch_wait_recv_cost_stats=waited,
    )  # fmt: skip
    source, ranges, *rest = handle
    assert rest == [M, H, E] and got.shape == (El, size * M, H) and hook is None
    for e in range(El):
        tokens = selections_of(rank * El + e, size)
        flat = [(s, t) for s, ts in enumerate(tokens) for t in ts]
        n = int(count[e])
        assert n == len(flat) and int(stats[e]) == n + 1
        assert source[e, :n].tolist() == [t for _, t in flat]
        wanted = [batch(s)[0][t] for s, t in flat]
        assert all(torch.equal(a, b) for a, b in zip(got[e, :n], wanted, strict=True))
        begins, lengths = ranges[e] >> 32, ranges[e] & 0xFFFFFFFF
        assert lengths.tolist() == [len(ts) for ts in tokens]
        assert begins.tolist() == [sum(len(ts) for ts in tokens[:s]) for s in range(size)]
    assert (waited >= 0).all()


def cast_slowly(x: torch.Tensor, round_scale: bool) -> tuple[torch.Tensor, torch.Tensor]:
    blocks = x.float().view(len(x), H // 128, 128)
    scale = blocks.abs().amax(2).clamp(min=1e-4) / 448
    if round_scale:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    codes = (blocks * (1 / scale)[..., None]).clamp(-448, 448).to(FP8)
    return codes.view(len(x), H), scale


def check_low_latency_fp8(buffer: ep.Buffer) -> None:
    x, idx, _ = batch(buffer.rank)
    size, El = buffer.group_size, E // buffer.group_size
    for round_scale, packed in ((False, False), (True, False), (True, True)):
        (got, scales), _count, *_ = low_latency(
            buffer, x, idx, round_scale=round_scale, use_ue8m0=packed
        )
        R, S = size * M, H // 512 if packed else H // 128
        assert got.dtype == FP8 and scales.shape == (El, R, S)
        assert scales.stride() == (R * S, 1, R)
        if packed:
            assert scales.dtype == torch.int32
            words = scales.reshape(-1).clone()
            exponents = words.view(torch.uint8).to(torch.int32).view(El, R, -1) << 23
            scales = exponents.view(torch.float32)
        for e in range(El):
            tokens = selections_of(buffer.rank * El + e, size)
            for s, ts in enumerate(tokens):
                at = sum(len(t) for t in tokens[:s])
                codes, wanted = cast_slowly(batch(s)[0][ts], round_scale)
                here = slice(at, at + len(ts))
                assert torch.equal(scales[e, here], wanted)
                assert torch.equal(got[e, here].view(torch.uint8), codes.view(torch.uint8))


def experts(got: torch.Tensor, first: int) -> torch.Tensor:
    factor = torch.arange(first, first + len(got))[:, None, None] * 0.3 + 1
    return (got.float() * factor).to(BF16)


def weighted(x: torch.Tensor, idx: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    acc = torch.zeros(x.shape)
    for k in range(K):
        row = (x.float() * (idx[:, k : k + 1] * 0.3 + 1)).to(BF16).float()
        acc = torch.where(idx[:, k : k + 1] >= 0, acc + weights[:, k : k + 1] * row, acc)
    return acc.to(BF16)


def check_low_latency_combine_in_every_form(buffer: ep.Buffer) -> None:
    x, idx, weights = batch(buffer.rank)
    first = buffer.rank * (E // buffer.group_size)
    wanted, seen = weighted(x, idx, weights), set()
    for form in ("plain", "hook", "async", "zero copy", "out"):
        hooked, asynchronous = form == "hook", form == "async"
        got, count, handle, event, hook = low_latency(
            buffer, x, idx, use_fp8=False, return_recv_hook=hooked, async_finish=asynchronous
        )
        if hooked:
            hook()
        if asynchronous:
            event.current_stream_wait()
        for e, n in enumerate(count.tolist()):
            got[e, n:] = 7  # garbage must not matter
        result = experts(got, first)
        if form == "zero copy":
            place = buffer.get_next_low_latency_combine_buffer(handle)
            assert place.stride(1) == H + H // 64
            for e, n in enumerate(count.tolist()):
                place[e, :n] = result[e, :n]
            result = torch.full_like(got, 3)
        out = torch.empty_like(x) if form == "out" else None
        back, event, hook = buffer.low_latency_combine(
            result, idx, weights, handle, zero_copy=form == "zero copy", out=out,
            async_finish=asynchronous, return_recv_hook=hooked,
        )  # fmt: skip
        if hooked:
            hook()
        if asynchronous:
            event.current_stream_wait()
        assert out is None or back is out
        assert torch.equal(back, wanted), form
        seen.add(back.view(torch.uint8).numpy().tobytes())
    assert len(seen) == 1


def check_two_low_latency_calls_may_be_under_way(buffer: ep.Buffer) -> None:
    x, idx, _weights = batch(buffer.rank)
    for _ in range(4):
        first = low_latency(buffer, x, idx, use_fp8=False, return_recv_hook=True)
        second = low_latency(buffer, x * 2, idx, use_fp8=False, return_recv_hook=True)
        first[4](), second[4]()
        for e, n in enumerate(first[1].tolist()):
            assert torch.equal(first[0][e, :n] * 2, second[0][e, :n])
    buffer.clean_low_latency_buffer(M, H, E)


def check_hooks_may_be_called_in_any_order(buffer: ep.Buffer) -> None:
    rank, first = buffer.rank, buffer.rank * (E // buffer.group_size)
    x, idx, weights = batch(rank)
    want, seen = weighted(x, idx, weights), []
    rows, count, *_ = low_latency(buffer, x, idx, use_fp8=False)
    for step in range(8):  # more than there are slots, mailboxes
        sign = -1 if step % 2 else 1  # a slot's rows are never those that lay there before
        orders = [0, 1, rank % 2, rank // 2 % 2]
        a, b = (
            low_latency(buffer, sign * f * x, idx, use_fp8=False, return_recv_hook=True)
            for f in (2, 4)
        )
        for hook in [a[4], b[4]][:: -1 if orders[step % 4] else 1]:
            time.sleep(0.02 * (rank == step % buffer.group_size))
            hook()
        late = low_latency(buffer, sign * x, idx, use_fp8=False, return_recv_hook=True)
        rows_a = experts(a[0], first)
        made = [buffer.low_latency_combine(rows_a, idx, weights, a[2])[0]]  # waited for
        time.sleep(0.02 * (rank == step % buffer.group_size))
        late[4]()
        for e, n in enumerate(count.tolist()):
            seen += [torch.equal(got[0][e, :n], sign * f * rows[e, :n])
                     for got, f in ((a, 2), (b, 4), (late, 1))]  # fmt: skip
        halves = [
            buffer.low_latency_combine(
                experts(got[0], first), idx, weights, got[2], return_recv_hook=True
            )
            for got in (b, late)
        ]
        for out in halves[:: -1 if orders[(step + 1) % 4] else 1]:
            time.sleep(0.02 * (rank == step % buffer.group_size))
            out[2]()
        made += [out for out, _, _ in halves]
        seen += [torch.equal(m, sign * f * want) for m, f in zip(made, (2, 4, 1), strict=True)]
    assert all(seen)


def check_a_hook_called_again_does_nothing(buffer: ep.Buffer) -> None:
    x, idx, weights = batch(buffer.rank)
    stats = torch.zeros(E // buffer.group_size, dtype=torch.int32)
    for _ in range(3):
        rows, count, handle, _, hook = low_latency(
            buffer, x, idx, use_fp8=False, return_recv_hook=True,
            cumulative_local_expert_recv_stats=stats.zero_(),
        )  # fmt: skip
        hook(), hook()
        assert torch.equal(stats, count)
        rows = experts(rows, buffer.rank * len(stats))
        out, _, hook = buffer.low_latency_combine(rows, idx, weights, handle, return_recv_hook=True)
        hook(), hook()
        assert torch.equal(out, weighted(x, idx, weights))


def check_a_hook_that_was_not_called_is_asked_for(buffer: ep.Buffer) -> None:
    x, idx, weights = batch(buffer.rank)
    first = buffer.rank * (E // buffer.group_size)
    rows, count, handle, _, hook = low_latency(buffer, x, idx, use_fp8=False, return_recv_hook=True)
    with pytest.raises(ConfigError, match="a dispatch whose hook was not called; call it first"):
        buffer.low_latency_combine(rows, idx, weights, handle)
    *_, second = low_latency(buffer, x, idx, return_recv_hook=True)
    for asynchronous in (False, True):
        with pytest.raises(ConfigError, match=r"dispatch: the hook of .* call 2 before was not"):
            low_latency(buffer, x, idx, async_finish=asynchronous)
    with pytest.raises(ConfigError, match="call it first"):
        buffer.clean_low_latency_buffer(M, H, E)
    hook()
    again = low_latency(buffer, -x, idx, return_recv_hook=True, use_fp8=False)
    again[4]()
    with pytest.raises(ConfigError, match=r"combine: the hook of .* call 2 before was not called"):
        buffer.low_latency_combine(rows, idx, weights, handle)
    del second  # nobody can call it any more
    out, _, _ = buffer.low_latency_combine(experts(rows, first), idx, weights, handle)
    assert torch.equal(out, weighted(x, idx, weights))
    assert torch.equal(again[1], count)


def check_a_combine_waits_for_its_asynchronous_dispatch(buffer: ep.Buffer) -> None:
    x, idx, weights = batch(buffer.rank)
    for asynchronous in (True, False):
        rows, _, handle, _, _ = low_latency(buffer, x, idx, use_fp8=False, async_finish=True)
        out, event, _ = buffer.low_latency_combine(
            rows, idx, weights, handle, async_finish=asynchronous
        )
        if asynchronous:
            event.current_stream_wait()
        assert torch.allclose(
            out.float(), x.float() * (weights * (idx >= 0)).sum(1)[:, None], atol=0.05, rtol=0.02
        )


def check_low_latency_refuses_before_it_sends(buffer: ep.Buffer) -> None:
    x, idx, weights = batch(buffer.rank, M + 1)
    with pytest.raises(
        LimitError, match=f"{M + 1} tokens, num_max_dispatch_tokens_per_rank is {M}"
    ):
        low_latency(buffer, x, idx)
    with pytest.raises(LimitError, match="need num_rdma_bytes"):
        buffer.low_latency_dispatch(x, idx, 4096, E)
    x, idx, weights = batch(buffer.rank, 5)
    with pytest.raises(ConfigError, match="exclude each other"):
        low_latency(buffer, x, idx, async_finish=True, return_recv_hook=True)
    with pytest.raises(ShapeError, match="multiple of 128"):
        low_latency(buffer, x[:, :100].contiguous(), idx)
    with pytest.raises(ShapeError, match=r"x is \[1024\], wanted \[tokens, hidden\]"):
        low_latency(buffer, x[0], idx)
    with pytest.raises(ConfigError, match="handle is a tuple, wanted low_latency_dispatch's own"):
        buffer.low_latency_combine(x, idx, weights, (1, 2))
    for rank in (-1, buffer.group_size):
        with pytest.raises(LimitError, match=f"rank_to_mask is {rank}"):
            buffer.low_latency_update_mask_buffer(rank, True)
    with pytest.raises(ShapeError, match=r"statistics are torch.int64 \[1\], wanted"):
        buffer.low_latency_query_mask_buffer(torch.zeros(1, dtype=torch.int64))
    got, _, handle, _, _ = low_latency(buffer, x, idx, use_fp8=False)
    with pytest.raises(ConfigError, match="not that of the dispatch"):
        buffer.low_latency_combine(got, idx.flip(0), weights, handle)


def check_a_hook_keeps_what_the_call_made_alive(buffer: ep.Buffer) -> None:
    x, idx, weights = batch(buffer.rank)
    got, _, handle, _, hook = low_latency(buffer, x, idx, use_fp8=False, return_recv_hook=True)
    hook()
    want, _, _ = buffer.low_latency_combine(got, idx, weights, handle)
    apart = weights.t().contiguous().t()  # the call makes a copy, which nobody else holds
    out, _, hook = buffer.low_latency_combine(got, idx, apart, handle, return_recv_hook=True)
    churn = [torch.full_like(weights, float("nan")) for _ in range(64)]  # takes freed memory
    hook()
    assert len(churn) == 64 and torch.equal(out, want)


def check_experts_dropped_since_the_dispatch_count_nothing(buffer: ep.Buffer) -> None:
    x, idx, weights = batch(buffer.rank)
    got, _, handle, _, _ = low_latency(buffer, x, idx, use_fp8=False)
    dropped, lighter = idx.clone(), weights.clone()
    dropped[:, 1], lighter[:, 1] = -1, 0
    out, _, _ = buffer.low_latency_combine(got, dropped, weights, handle)
    want, _, _ = buffer.low_latency_combine(got, idx, lighter, handle)
    assert torch.equal(out, want)


def check_gradients_are_those_of_one_process(buffer: ep.Buffer) -> None:
    x, idx, weights = batch(buffer.rank)
    x, weights = x.requires_grad_(), weights.requires_grad_()
    got, ids, ws, _, handle = differentiable_dispatch(buffer, x, idx, weights, E)
    scale = (ws * (ids >= 0)).sum(1, keepdim=True)
    out = differentiable_combine(buffer, (got * 0.5 * scale).to(BF16), handle)
    out.float().sum().backward()
    alone, w = x.detach().clone().requires_grad_(), weights.detach().clone().requires_grad_()
    total = (w * (idx >= 0)).sum(1, keepdim=True)
    (alone.float() * 0.5 * total).sum().backward()
    # bf16 gradients: a few roundings apart
    assert torch.allclose(x.grad.float(), alone.grad.float(), rtol=0.02, atol=0.02)
    assert torch.allclose(weights.grad, w.grad, rtol=0.02, atol=0.6)


def check_bad_arguments_are_refused(buffer: ep.Buffer) -> None:
    x, idx, weights = batch(buffer.rank, 4)
    with pytest.raises(ConfigError, match="come together"):
        dispatch(buffer, x, idx, None)
    with pytest.raises(DtypeError, match=r"topk_idx is torch.int32, wanted torch.int64"):
        buffer.get_dispatch_layout(idx.int(), E)
    layout = buffer.get_dispatch_layout(idx, E)
    with pytest.raises(ShapeError, match="is_token_in_rank"):
        buffer.dispatch(
            x[:2], None, layout[0], layout[1], layout[3], layout[2], idx[:2], weights[:2]
        )
    with pytest.raises(ConfigError, match="get_dispatch_layout gives them"):
        buffer.dispatch(x)
    for bad, words in (
        ([1, 2], "x is a list, wanted a tensor"),
        ((x, x, x), "x is a tuple of 3"),
        (x[0], r"x is \[1024\], wanted"),
    ):
        with pytest.raises(WhalefallError, match=words):
            buffer.dispatch(bad, None, *layout[:2], layout[3], layout[2], idx, weights)
    counts = layout[0] - 1
    with pytest.raises(ShapeError, match="num_tokens_per_rank does not count is_token_in_rank"):
        buffer.dispatch(x, None, counts, layout[1], layout[3], layout[2], idx, weights)
    with pytest.raises(ConfigError, match="num_worst_tokens is -3"):
        dispatch(buffer, x, idx, weights, num_worst_tokens=-3)
    got, *_, handle, _ = dispatch(buffer, x, idx, weights)
    with pytest.raises(ConfigError, match="handle is a tuple, wanted dispatch's own"):
        buffer.combine(got, (1, 2))
    with pytest.raises(ShapeError, match=r"topk_weights is float32 \[3, 3\], wanted float32"):
        buffer.combine(got, handle, topk_weights=torch.zeros(3, 3))
    with pytest.raises(ShapeError, match=r"bias is \[3, 3\], wanted \[4, 1024\]"):
        buffer.combine(got, handle, bias=torch.zeros(3, 3, dtype=BF16))
    with pytest.raises(ConfigError, match="expert_alignment is 0, wanted a whole number from 1"):
        dispatch(buffer, x, idx, weights, expert_alignment=0)
    with pytest.raises(ShapeError, match=r"topk_idx \(4, 4\), topk_weights \(4,\)"):
        dispatch(buffer, x, idx, weights[:, 0])
    with pytest.raises(ShapeError, match="topk_idx has 3 tokens, x has 4"):
        dispatch(buffer, x, idx[:3], weights[:3])
    with pytest.raises(ConfigError, match="without explicitly_destroy"):
        ep.Buffer.destroy(type("B", (), {"explicitly_destroy": False})())
    with pytest.raises(ConfigError, match="multiple of 128"):
        ep.Buffer(buffer.group, 100)


def check_counts_that_are_not_those_of_the_tokens_are_never_said(buffer: ep.Buffer) -> None:
    x, idx, weights = batch(buffer.rank)
    layout = buffer.get_dispatch_layout(idx, E)
    if buffer.rank == 0:
        for wrong in (layout[0] - 1, layout[0] + 1):
            with pytest.raises(ShapeError, match="num_tokens_per_rank does not count"):
                buffer.dispatch(x, None, wrong, layout[1], layout[3], layout[2], idx, weights)
    got, *_ = dispatch(buffer, x, idx, weights)
    assert torch.equal(got, wanted_x(buffer))


def check_a_handle_of_another_group_is_refused(buffer: ep.Buffer) -> None:
    x, idx, weights = batch(buffer.rank)
    got, *_, handle, _ = dispatch(buffer, x, idx, weights)
    size, rank = buffer.group_size, buffer.rank
    groups = [dist.new_group([r]) for r in range(size)]
    hint = ep.Buffer.get_low_latency_rdma_size_hint(M, H, 1, E)
    alone = ep.Buffer(groups[rank], 1 << 20, hint, low_latency_mode=True)
    own, *_, of_alone, _ = dispatch(alone, x, idx, weights)
    rows, _, low, _, _ = low_latency(alone, x, idx, use_fp8=False)
    for one, given, of, words in (
        (alone, got, handle, f"between {size} ranks of another group than this one of 1"),
        (buffer, own, of_alone, f"between 1 ranks of another group than this one of {size}"),
    ):
        with pytest.raises(ConfigError, match=words):
            one.combine(given, of)
        with pytest.raises(ConfigError, match=words):
            one.dispatch(x, handle=of)
    with pytest.raises(ConfigError, match="of another group"):
        buffer.low_latency_combine(rows, idx, weights, low)
    other = ep.Buffer(buffer.group, 1 << 20)  # of the same group
    back, _, _ = other.combine(got, handle)
    assert torch.equal(back, buffer.combine(got, handle)[0])


def check_local_memory_is_a_tensor(buffer: ep.Buffer) -> None:
    dist.barrier()  # others may still read from this rank's memory what the last check sent
    whole = buffer.get_local_buffer_tensor(torch.uint8)
    assert whole.shape == (buffer.num_nvl_bytes,)
    part = buffer.get_local_buffer_tensor(torch.int32, torch.Size((3, 4)), offset=64)
    part.fill_(5)
    assert (whole[64 : 64 + 48].view(torch.int32) == 5).all()
    with pytest.raises(LimitError, match="of a buffer of"):
        buffer.get_local_buffer_tensor(torch.uint8, offset=buffer.num_nvl_bytes + 128)


CHECKS = {n.removeprefix("check_"): f for n, f in globals().items() if n.startswith("check_")}


def join(folder: str, rank: int, size: int) -> dist.ProcessGroup:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=size)
    return dist.group.WORLD


def all_checks(folder: str, rank: int, size: int, hosts: list[str] | None) -> dict[str, str]:
    """Run every check; what went wrong with each ("" for nothing)."""
    if hosts:
        os.environ["WHALEFALL_HOST"] = hosts[rank]
    group, outcome = join(folder, rank, size), {}
    hint = ep.Buffer.get_low_latency_rdma_size_hint(M, H, size, E)
    buffer = ep.Buffer(group, 1 << 20, hint, low_latency_mode=True, explicitly_destroy=True)
    for name, check in CHECKS.items():
        try:
            check(buffer)
            outcome[name] = ""
        except Exception:
            outcome[name] = traceback.format_exc()
            break  # the ranks may be out of step now
    dist.barrier()
    buffer.destroy()
    dist.destroy_process_group()
    return outcome


def go_on_without_a_rank(
    folder: str, rank: int, size: int, victim: int, hosts: list[str] | None = None
) -> list:
    """A rank dies before a low-latency dispatch; the others mask it and go on, or name it."""
    if hosts:
        os.environ["WHALEFALL_HOST"] = hosts[rank]
    group = join(folder, rank, size)
    hint = ep.Buffer.get_low_latency_rdma_size_hint(M, H, size, E)
    buffer = ep.Buffer(group, 0, hint, low_latency_mode=True, enable_shrink=True)
    x, idx, weights = batch(rank)
    results, status = [], torch.zeros(size, dtype=torch.int32)
    for step in range(4):
        if step == 2:
            dist.barrier()  # what it sent before has arrived
            if rank == victim:
                os.kill(os.getpid(), signal.SIGKILL)
        first = rank * (E // size)
        try:
            got, _, handle, _, _ = low_latency(buffer, x, idx, use_fp8=False)
            back, _, _ = buffer.low_latency_combine(experts(got, first), idx, weights, handle)
        except RankFailure as error:
            results.append(error.rank)
            continue
        buffer.low_latency_query_mask_buffer(status)
        gone = status.nonzero().flatten().tolist()
        here = torch.where(torch.isin(idx // (E // size), torch.tensor(gone)), -1, idx)
        results.append([gone, bool(torch.equal(back, weighted(x, here, weights)))])
    buffer.low_latency_clean_mask_buffer()
    buffer.low_latency_update_mask_buffer(0, True)
    buffer.low_latency_query_mask_buffer(status)
    results.append(status.tolist())
    return results


def drop_under_way(folder: str, rank: int, size: int) -> list:
    """A buffer that nobody holds any more, while an async call and then a hook are under way."""
    group, same = join(folder, rank, size), []
    x, idx, weights = batch(rank)
    for way in ("async", "hook"):
        hint = ep.Buffer.get_low_latency_rdma_size_hint(M, H, size, E)
        buffer = ep.Buffer(group, 1 << 20, hint, low_latency_mode=True)
        wanted, *_, handle, _ = dispatch(buffer, x, idx, weights)
        count = low_latency(buffer, x, idx, use_fp8=False)[1]
        dist.barrier()
        if rank:
            time.sleep(0.3)
        if way == "async":
            got, *_, event = buffer.dispatch(x, handle=handle, async_finish=True)
            finish = event.current_stream_wait
        else:
            again = low_latency(buffer, x, idx, use_fp8=False, return_recv_hook=True)
            got, wanted, finish = again[1], count, again[-1]
            del again
        del buffer
        gc.collect()
        finish()
        same.append(torch.equal(got, wanted))
        finish = event = None
        gc.collect()
        time.sleep(0.2)
        same.append([t.name for t in threading.enumerate() if t.name == "ep"])
    return same


def use_after_destroy(folder: str, rank: int, size: int) -> list[str]:
    """What every call says of a destroyed buffer."""
    group = join(folder, rank, size)
    hint = ep.Buffer.get_low_latency_rdma_size_hint(M, H, size, E)
    buffer = ep.Buffer(group, 1 << 20, hint, low_latency_mode=True, explicitly_destroy=True)
    x, idx, weights = batch(rank)
    got, *_, handle, _ = dispatch(buffer, x, idx, weights)
    layout = buffer.get_dispatch_layout(idx, E)
    *_, hook = low_latency(buffer, x, idx, use_fp8=False, return_recv_hook=True)
    runtime, rows = buffer.runtime, torch.ones(3, 8).numpy()
    dist.barrier()
    buffer.destroy()
    calls = [
        lambda: dispatch(buffer, x, idx, weights),
        lambda: buffer.dispatch(
            x, None, *layout[:2], layout[3], layout[2], idx, weights, async_finish=True
        ),
        lambda: buffer.dispatch(x, handle=handle),
        lambda: buffer.combine(got, handle),
        lambda: buffer.combine(got.clone(), handle, async_finish=True),
        lambda: low_latency(buffer, x, idx),
        hook,
        lambda: buffer.get_local_buffer_tensor(torch.uint8),
        lambda: runtime.dispatch_selections(rows, idx[:3].numpy(), E),
        runtime.barrier,
    ]
    said = []
    for call in calls:
        try:
            call()
            said.append("nothing")
        except ConfigError as error:
            said.append(str(error))
    return said
