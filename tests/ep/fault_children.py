"""What the ranks of the fault tests run: collectives in a loop until one of the ranks is lost."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from whalefall.ep import Engine, FileGroup
from whalefall.errors import RankFailure

E, K, H = 8, 4, 256


def calls(engine: Engine) -> dict[str, Callable[[], object]]:
    """One step of each way of using an engine; sizes so that a step takes several ticks."""
    rng = np.random.default_rng(engine.rank)
    x = rng.standard_normal((300, H)).astype(np.float32)
    idx = np.argsort(rng.random((300, E)), 1)[:, :K].astype(np.int64)
    weights = np.ones((300, K), np.float32)

    def one_row_a_rank() -> None:
        got = engine.dispatch(x, idx, E, weights)
        engine.combine(got.x, got.handle, got.topk_weights)

    def selections() -> None:
        got = engine.dispatch_selections(x, idx, E)
        engine.combine_selections(got.x, got.handle, weights)

    def threaded() -> None:
        got, moved = engine.begin_dispatch_selections(x, idx, E)
        moved.wait()
        _, added = engine.begin_combine_selections(got.x, got.handle, weights)
        added.wait()

    return {
        "dispatch": one_row_a_rank, "selections": selections, "threads": threaded,
        "barrier": engine.barrier,
    }  # fmt: skip


def low_latency(folder: str, rank: int, size: int, way: str) -> Iterator[Callable[[], object]]:
    """A step of the low-latency form (and of repeats by handle) on a Buffer."""
    import torch
    import torch.distributed as dist

    from whalefall import ep

    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=size)
    hint = ep.Buffer.get_low_latency_rdma_size_hint(64, H, size, E)
    buffer = ep.Buffer(dist.group.WORLD, 1 << 20, hint, low_latency_mode=True)
    x, idx = torch.ones(64, H, dtype=torch.bfloat16), torch.rand(64, E).argsort(1)[:, :K]
    weights = torch.ones(64, K)
    layout = buffer.get_dispatch_layout(idx, E)
    *_, handle, _ = buffer.dispatch(x, None, *layout[:2], layout[3], layout[2], idx, weights)

    def step(way: str = way) -> None:
        if way == "handle":
            got, *_, event = buffer.dispatch(x, handle=handle, async_finish=True)
            buffer.combine(got, handle, previous_event=event, async_finish=True)[2]
            buffer.combine(got, handle)
            return
        more = {"return_recv_hook": way == "hook"}
        rows, _, low, _, hook = buffer.low_latency_dispatch(x, idx, 64, E, use_fp8=False, **more)
        if hook:
            hook()
        *_, hook = buffer.low_latency_combine(rows, idx, weights, low, **more)
        if hook:
            hook()

    yield step
    yield lambda: buffer.runtime.close()


def until_a_rank_is_lost(
    folder: str, rank: int, size: int, way: str, hosts: list[str] | None, victim: int,
    after_s: float, how: str, timeout_s: float, slots: bool = False,
) -> dict:  # fmt: skip
    """What this rank hears once `victim` has been killed or stopped in the middle."""
    os.environ["WHALEFALL_EP_TIMEOUT"] = str(timeout_s)
    if hosts:
        os.environ["WHALEFALL_HOST"] = hosts[rank]
    if way in ("low latency", "hook", "handle"):
        step, close = low_latency(folder, rank, size, way)
    else:
        more = {"shared_bytes": 0} if slots else {}
        engine = Engine(FileGroup(folder, rank, size), chunk_bytes=64 << 10, **more)
        step, close = calls(engine)[way], engine.close
    step()
    number = signal.SIGKILL if how == "kill" else signal.SIGSTOP
    if rank == victim:
        threading.Timer(after_s, os.kill, (os.getpid(), number)).start()
    began = time.monotonic()
    try:
        for _ in range(100_000):
            step()
    except RankFailure as error:
        return {"error": str(error), "rank": error.rank, "seconds": time.monotonic() - began}
    finally:
        close()
    return {"error": "nothing", "rank": None}


def one_form_then_the_other(
    folder: str, rank: int, size: int, forms: list[str], hosts: list[str] | None
) -> list[tuple[int, float]]:
    """Rank 1 does not come to one form in time, then calls the other: whom calls name, when."""
    import torch.distributed as dist

    os.environ["WHALEFALL_EP_TIMEOUT"] = "1"
    if hosts:
        os.environ["WHALEFALL_HOST"] = hosts[rank]
    step, close = low_latency(folder, rank, size, forms[0])
    said = []
    for form in forms:
        step(form)
    dist.barrier()
    if rank == 1:
        time.sleep(4 if hosts else 1.6)  # another host's rank gets more time
    for form in forms if rank != 1 else forms[1:]:
        began = time.monotonic()
        try:
            step(form)
        except RankFailure as error:
            said.append((error.rank, time.monotonic() - began))
    dist.barrier()
    close()
    return said


def one_form_each(folder: str, rank: int, size: int) -> str:
    """Rank 0 makes a low-latency call, rank 1 a normal one a little later."""
    os.environ["WHALEFALL_EP_TIMEOUT"] = "1"
    step, close = low_latency(folder, rank, size, "hook")
    time.sleep(0.3 * rank)
    try:
        step("handle" if rank else "hook")
    except RankFailure as error:
        return str(error)
    finally:
        close()
    return "nothing"


def while_a_rank_is_slow(folder: str, rank: int, size: int, hosts: list[str] | None) -> int:
    """Many steps, while the parent stops a rank for a while; how many were wrong."""
    host = hosts[rank] if hosts else None
    wrong = 0
    with Engine(FileGroup(folder, rank, size), chunk_bytes=64 << 10, host=host) as engine:
        x = np.arange(200 * H, dtype=np.float32).reshape(200, H)
        idx = np.random.default_rng(rank).permuted(np.tile(np.arange(E), (200, 1)), axis=1)[:, :K]
        (Path(folder) / f"ready {rank}").touch()
        for i in range(400):
            got = engine.dispatch_selections(x + i, idx, E)
            back = engine.combine_selections(got.x, got.handle)
            wrong += not (back == (x + i)[:, None]).all()
        engine.barrier()
    return wrong


def make_while_a_rank_dies(
    folder: str, rank: int, size: int, hosts: list[str] | None, step: int
) -> str:
    """Rank 1 is killed at a step of making a Buffer; what the others hear."""
    import torch.distributed as dist

    from whalefall.ep import Buffer, TorchGroup

    if hosts:
        os.environ["WHALEFALL_HOST"] = hosts[rank]
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=size)
    if rank == 1:
        steps, gather = iter(range(step + 1)), TorchGroup.all_gather

        def all_gather(group: TorchGroup, message: bytes) -> list[bytes]:
            if next(steps) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return gather(group, message)

        TorchGroup.all_gather = all_gather  # type: ignore[method-assign]
    try:
        Buffer(dist.group.WORLD, 1 << 20)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "made"
