"""What the ranks of the agreement tests run: they call differently, and all must hear it."""

import os
import time
import traceback
from itertools import permutations

import ml_dtypes
import numpy as np
import pytest
import torch
import torch.distributed as dist
from buffer_children import BF16, E, H, M, batch, copies, dispatch, join, low_latency, weighted
from buffer_children import experts as through_experts

from whalefall import ep
from whalefall.errors import ShapeError

GIVES = r"rank \d gives the handle of dispatch \d{1,3}, rank \d that of dispatch \d{1,3}; all"


def summed(buffer: ep.Buffer, x: torch.Tensor, idx: torch.Tensor) -> torch.Tensor:
    """What comes back to x where every rank returns its rows as they are (exact for few ranks)."""
    times = torch.tensor([len(r) for r in copies(idx, buffer.group_size)]).view(-1, 1)
    return (x.float() * times).to(BF16)


def whole_numbers(rank: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A batch whose sums are exact in bf16, in whatever order."""
    x, idx, weights = batch(rank, tokens)
    return torch.randint(-30, 30, x.shape).to(BF16), idx, weights


def finish(event: ep.EventOverlap, hook) -> None:
    if hook is not None:
        hook()
    if event.event is not None:
        event.current_stream_wait()


def check_repeats_and_combines_by_different_handles_are_refused(buffer: ep.Buffer) -> None:
    for tokens in (0, 9, 700):  # also where nobody has a token: then no data say anything
        x, idx, weights = whole_numbers(buffer.rank, tokens)
        first, *_, one, _ = dispatch(buffer, x, idx, weights)
        *_, two, _ = dispatch(buffer, x, idx.flip(0), weights)
        mine = one if buffer.rank else two
        for own in (first, first.clone()):
            with pytest.raises(ShapeError, match=GIVES):
                buffer.combine(own if buffer.rank else own.new_ones(M * 99, H), mine)
            with pytest.raises(ShapeError, match=GIVES):
                buffer.dispatch(x, handle=mine)
        again, *_ = buffer.dispatch(x, handle=one)
        assert torch.equal(again, first)
        assert torch.equal(buffer.combine(again, one)[0], summed(buffer, x, idx))


def check_handles_of_two_buffers_are_told_apart(buffer: ep.Buffer) -> None:
    others = [ep.Buffer(buffer.group, 1 << 20) for _ in range(2)]
    x, idx, weights = whole_numbers(buffer.rank, 9)
    made = [dispatch(other, x, idx, weights) for other in others]  # the first of each
    mine = made[buffer.rank % 2]
    with pytest.raises(ShapeError, match=r"of dispatch \d of Buffer \(or engine\) \d+, rank \d"):
        others[0].combine(mine[0], mine[4])
    for got, _, _, _, handle, _ in made:
        assert torch.equal(others[0].combine(got, handle)[0], summed(buffer, x, idx))


def check_low_latency_combines_by_different_handles_are_refused(buffer: ep.Buffer) -> None:
    x, idx, weights = batch(buffer.rank)
    first = buffer.rank * (E // buffer.group_size)
    rows, _, one, _, _ = low_latency(buffer, x, idx, use_fp8=False)
    _, _, two, _, _ = low_latency(buffer, x, idx, use_fp8=False)
    mine = one if buffer.rank else two
    for way in ("plain", "hook", "async") * 2:  # more than there are slots
        more = {"return_recv_hook": way == "hook", "async_finish": way == "async"}
        with pytest.raises(ShapeError, match=GIVES):
            finish(*buffer.low_latency_combine(rows, idx, weights, mine, **more)[1:])
        more["use_logfmt"] = buffer.rank > 0
        with pytest.raises(ShapeError, match=r"use_logfmt: .* bfloat16 with use_logfmt"):
            finish(*buffer.low_latency_combine(rows, idx, weights, one, **more)[1:])
    out, _, _ = buffer.low_latency_combine(through_experts(rows, first), idx, weights, one)
    assert torch.equal(out, weighted(x, idx, weights))


def check_low_latency_dispatches_that_differ_are_refused_again_and_again(buffer: ep.Buffer) -> None:
    x, idx, weights = batch(buffer.rank)
    first = buffer.rank * (E // buffer.group_size)
    for way in ("plain", "hook", "async") * 2:  # more than there are slots
        more = {"return_recv_hook": way == "hook", "async_finish": way == "async"}
        with pytest.raises(ShapeError, match=r"x_bytes = \d+, rank"):
            finish(*low_latency(buffer, x, idx, use_fp8=buffer.rank > 0, **more)[3:])
    rows, _, handle, _, _ = low_latency(buffer, x, idx, use_fp8=False)
    out, _, _ = buffer.low_latency_combine(through_experts(rows, first), idx, weights, handle)
    assert torch.equal(out, weighted(x, idx, weights))


def check_low_latency_calls_of_other_kinds_are_refused_by_all(buffer: ep.Buffer) -> None:
    x, idx, weights = batch(buffer.rank)
    first = buffer.rank * (E // buffer.group_size)
    rows, _, handle, _, _ = low_latency(buffer, x, idx, use_fp8=False)
    combine = buffer.low_latency_combine
    calls = {
        "dispatch": lambda **more: low_latency(buffer, x, idx, use_fp8=False, **more)[3:],
        "combine": lambda **more: buffer.low_latency_combine(rows, idx, weights, handle, **more)[
            1:
        ],
        "clean": lambda **_: (buffer.clean_low_latency_buffer(M, H, E), None),
    }
    for other, mine in permutations(calls, 2):
        for way in ("plain", "hook", "async"):
            more = {"return_recv_hook": way == "hook", "async_finish": way == "async"}
            with pytest.raises(ShapeError, match=rf"calls (.*)({other}|{mine}).* rank \d "):
                finish(*calls[mine if buffer.rank else other](**more))
            got, _, made, _, _ = low_latency(buffer, x, idx, use_fp8=False)
            out, _, _ = combine(through_experts(got, first), idx, weights, made)
            assert torch.equal(out, weighted(x, idx, weights))


def check_rows_of_two_types_are_refused(buffer: ep.Buffer) -> None:
    engine = buffer.runtime
    x, idx, weights = (t.numpy() for t in (torch.ones(9, 64), *batch(buffer.rank, 9)[1:]))
    received = engine.dispatch_selections(x, idx, E)
    rows = np.ones((len(received.x), 64), ml_dtypes.bfloat16 if buffer.rank else np.float32)
    with pytest.raises(ShapeError, match=r"dtype.*: rank \d gives (bfloat16|float32), rank \d"):
        engine.combine_selections(rows, received.handle, weights)
    out = engine.combine_selections(np.ones_like(received.x), received.handle)
    assert np.array_equal(out[..., 0], idx >= 0)


def check_a_handle_needs_nothing_that_its_caller_has(buffer: ep.Buffer) -> None:
    x, idx, weights = whole_numbers(buffer.rank, 700)  # several ticks
    wanted = summed(buffer, x, idx)
    for worst in (0, len(x) * buffer.group_size):
        per_rank, per_host, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, E)
        own_idx, own_weights = idx.clone(), weights.clone()
        rows, ids, ws, _, handle, _ = buffer.dispatch(
            x, None, per_rank, per_host, in_rank, per_expert, own_idx, own_weights,
            num_worst_tokens=worst,
        )  # fmt: skip
        seen = [t.clone() for t in handle]
        given = per_rank, per_expert, in_rank, own_idx, own_weights, ids, ws, *handle
        for tensor in (t for t in given if t is not None):
            tensor.fill_(1)
        assert torch.equal(buffer.combine(rows, handle)[0], wanted)
        again, *_ = buffer.dispatch(x, handle=handle)
        assert torch.equal(again, rows[: len(again)]) and len(seen) in (6, 10)
    x, idx, weights = whole_numbers(buffer.rank, 20)
    own = idx.clone()
    rows, _, handle, _, _ = low_latency(buffer, x, own, use_fp8=False)
    own.fill_(0)
    for tensor in handle[:2]:
        tensor.fill_(0)
    first = buffer.rank * (E // buffer.group_size)
    out, _, _ = buffer.low_latency_combine(through_experts(rows, first), idx, weights, handle)
    assert torch.equal(out, weighted(x, idx, weights))
    array = idx.numpy().copy()
    received = buffer.runtime.dispatch_selections(x.float().numpy(), array, E)
    array[:] = 0
    out = buffer.runtime.combine_selections(received.x, received.handle, weights.numpy())
    assert np.allclose(
        out, x.float().numpy() * (weights * (idx >= 0)).sum(1).numpy()[:, None], 1e-4
    )


def check_queued_calls_go_on_in_step_after_ranks_disagreed(buffer: ep.Buffer) -> None:
    x, idx, weights = whole_numbers(buffer.rank, 700)  # several ticks
    got, *_, handle, _ = dispatch(buffer, x, idx, weights)
    *_, other, _ = dispatch(buffer, x, idx, weights)
    wanted = summed(buffer, x, idx)
    for culprit in range(buffer.group_size):
        mine = buffer.rank == culprit
        time.sleep(0.02 * (buffer.rank == (culprit + 1) % buffer.group_size))
        wrong = [
            buffer.combine(got, other if mine else handle, async_finish=True)[-1],
            buffer.dispatch(x, handle=other if mine else handle, async_finish=True)[-1],
            buffer.dispatch(x[:, : H // 2] if mine else x, handle=handle, async_finish=True)[-1],
            buffer.combine(got[:, : H // 2] if mine else got, handle, async_finish=True)[-1],
        ]
        again, *_, right = buffer.dispatch(x, handle=handle, async_finish=True)
        back, _, last = buffer.combine(got, handle, async_finish=True)
        for event in wrong:
            with pytest.raises(ShapeError, match="all ranks must agree"):
                event.current_stream_wait()
        right.current_stream_wait()
        last.current_stream_wait()
        assert torch.equal(again, got) and torch.equal(back, wanted)
        rows, *_ = dispatch(buffer, x, idx, weights)
        assert torch.equal(rows, got)


def check_calls_in_another_order_are_never_mixed_up(buffer: ep.Buffer) -> None:
    x, idx, weights = whole_numbers(buffer.rank, 20)
    got, *_, handle, _ = dispatch(buffer, x, idx, weights)

    def again() -> ep.EventOverlap:
        return buffer.dispatch(x, handle=handle, async_finish=True)[-1]

    def back() -> ep.EventOverlap:
        return buffer.combine(got.clone(), handle, async_finish=True)[-1]

    for _ in range(3):
        calls = (back, again) if buffer.rank else (again, back)
        for event in [call() for call in calls]:
            with pytest.raises(ShapeError, match="agree on their calls and the order of them"):
                event.current_stream_wait()
        assert torch.equal(buffer.dispatch(x, handle=handle)[0], got)
        assert torch.equal(buffer.combine(got, handle)[0], summed(buffer, x, idx))


CHECKS = {n.removeprefix("check_"): f for n, f in globals().items() if n.startswith("check_")}


def all_checks(
    folder: str, rank: int, size: int, hosts: list[str] | None, slots: bool
) -> dict[str, str]:
    """Run every check; what went wrong with each ("" for nothing)."""
    if hosts:
        os.environ["WHALEFALL_HOST"] = hosts[rank]
    group, outcome = join(folder, rank, size), {}
    torch.manual_seed(rank)
    hint = ep.Buffer.get_low_latency_rdma_size_hint(M, H, size, E)
    buffer = ep.Buffer(group, 1 << 20, hint, low_latency_mode=True)
    buffer.runtime.normal.is_direct &= not slots
    for name, check in CHECKS.items():
        try:
            check(buffer)
            outcome[name] = ""
        except Exception:
            outcome[name] = traceback.format_exc()
            break  # the ranks may be out of step now
    dist.barrier()
    dist.destroy_process_group()
    return outcome
