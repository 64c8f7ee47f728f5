"""What each rank of benchmarks/ep.py runs: our `Buffer` and gloo in turns, in the same process."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from whalefall import ep

HIDDEN, EXPERTS, TOP_K, GROUPS = 7168, 256, 8, 4
COPY_BYTES = 64 << 20
IN_A_ROW = 3


def join(folder: str, rank: int, size: int, hosts: list[str] | None) -> ep.Buffer:
    """The process group and the buffer on it."""
    if hosts:
        os.environ["WHALEFALL_HOST"] = hosts[rank]
    os.environ["WHALEFALL_EP_TIMEOUT"] = "60"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=size)
    return ep.Buffer(dist.group.WORLD, 256 << 20)


def tokens_of(
    rank: int, tokens: int, groups: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, topk_idx, topk_weights; the experts as the gate of V3 chooses them."""
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(tokens, HIDDEN, generator=generator).to(torch.bfloat16)
    logits = torch.randn(tokens, EXPERTS, generator=generator).numpy()
    idx, weights = ep.route(logits, None, TOP_K, 8 if groups else 1, groups or 1)
    return x, torch.from_numpy(idx), torch.from_numpy(weights)


def timed(buffer: ep.Buffer, call: Callable[[], object]) -> float:
    """Seconds of one collective, from a common start: a barrier in shared memory, which lets the
    ranks go some microseconds apart (gloo's: up to a millisecond, as long as a whole dispatch)."""
    buffer.runtime.barrier()
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def compare(folder: str, rank: int, size: int, tokens: int, rounds: int) -> dict[str, object]:
    """Dispatch + combine, gloo's two exchanges of the same bytes, a plain copy: seconds a round."""
    buffer = join(folder, rank, size, None)
    x, idx, weights = tokens_of(rank, tokens, groups=0)
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, EXPERTS)

    def dispatch() -> tuple:
        return buffer.dispatch(x, None, per_rank, None, in_rank, per_expert, idx, weights)

    received, *_, handle, _ = dispatch()
    rows = handle.native.rows
    sent, got = rows[rank].tolist(), rows[:, rank].tolist()
    own = received.clone()  # experts' results in memory of the caller's own
    outgoing = torch.empty(sum(sent), HIDDEN, dtype=torch.bfloat16).fill_(1)
    incoming = torch.empty(sum(got), HIDDEN, dtype=torch.bfloat16).fill_(1)
    a, b = torch.ones(COPY_BYTES, dtype=torch.uint8), torch.zeros(COPY_BYTES, dtype=torch.uint8)
    contenders = {
        "dispatch": dispatch,
        "combine": lambda: buffer.combine(received, handle),  # as the original's own benchmark does
        "combine, own memory": lambda: buffer.combine(own, handle),
        "gloo dispatch": lambda: dist.all_to_all_single(incoming, outgoing, got, sent),
        "gloo combine": lambda: dist.all_to_all_single(outgoing, incoming, sent, got),
    }
    if tokens >= 512:  # else it would empty the caches before the next contender only
        contenders["copy"] = lambda: b.copy_(a)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):  # in turns, each IN_A_ROW times after once that warms the caches for it
        for name, call in contenders.items():
            timed(buffer, call)
            seconds[name] += [timed(buffer, call) for _ in range(IN_A_ROW)]
    return {"seconds": seconds, "bytes": received.nbytes, "torch": str(torch.__version__)}


def wire_bytes(folder: str, rank: int, size: int, tokens: int, hosts: list[str]) -> dict[str, int]:
    """Bytes that this rank's sockets sent to other hosts, for one dispatch and one combine."""
    buffer = join(folder, rank, size, hosts)
    x, idx, weights = tokens_of(rank, tokens, GROUPS)
    per_rank, per_host, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, EXPERTS)
    layout = per_rank, per_host, in_rank, per_expert, idx, weights
    scales = torch.ones(tokens, HIDDEN // 128)
    out, count = {}, buffer.runtime
    before = count.bytes_sent_to_other_hosts
    received, *_, handle, _ = buffer.dispatch(x, None, *layout)
    dist.barrier()
    out["dispatch"] = count.bytes_sent_to_other_hosts - before
    before = count.bytes_sent_to_other_hosts
    buffer.combine(received, handle)
    dist.barrier()
    out["combine"] = count.bytes_sent_to_other_hosts - before
    before = count.bytes_sent_to_other_hosts
    buffer.dispatch((x.to(torch.float8_e4m3fn), scales), None, *layout)
    dist.barrier()
    out["fp8 dispatch"] = count.bytes_sent_to_other_hosts - before
    others = [r for r in range(size) if hosts[r] != hosts[rank]]
    out["naive rows"] = int(in_rank[:, others].sum())
    return out


def overlap(folder: str, rank: int, size: int, tokens: int, rounds: int) -> dict[str, float]:
    """Communication alone, compute alone, both at once: seconds, medians."""
    from whalefall import trace

    buffer = join(folder, rank, size, None)
    x, idx, weights = tokens_of(rank, tokens, groups=0)
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, EXPERTS)
    *_, handle, _ = buffer.dispatch(x, None, per_rank, None, in_rank, per_expert, idx, weights)
    matrix = torch.randn(128, 128)

    def compute(seconds: float) -> None:
        end = time.perf_counter() + seconds
        with trace.span("gemm", "compute"):
            while time.perf_counter() < end:
                matrix @ matrix

    def both(seconds: float) -> None:
        *_, event = buffer.dispatch(x, handle=handle, async_finish=True)
        compute(seconds)
        event.current_stream_wait()

    alone = sorted(timed(buffer, lambda: buffer.dispatch(x, handle=handle)) for _ in range(rounds))
    communication = alone[rounds // 2]
    trace.start("overlap", rank=rank)
    together = sorted(timed(buffer, lambda: both(communication)) for _ in range(rounds))[
        rounds // 2
    ]
    trace.stop(f"{folder}/trace-{rank}.json.gz")
    summary = trace.summarize(f"{folder}/trace-{rank}.json.gz")
    return {"communication": communication, "both": together, "overlap": summary.overlap_ratio}
