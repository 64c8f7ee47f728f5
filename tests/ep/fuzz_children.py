"""What the ranks of the fuzz run: random sequences of Buffer calls, judged by plain loops.

All ranks draw the same sequence and can make every rank's input, so each knows what must come.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from buffer_children import join

from whalefall import ep

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
M = 24
Check = Callable[[], None]


@dataclass
class Sent:
    """One dispatch: what every rank put in, and what it left."""

    x: list[torch.Tensor]  # of each rank
    idx: list[torch.Tensor]
    weights: list[torch.Tensor]
    experts: int
    low: bool
    handle: tuple = ()
    event: ep.EventOverlap | None = None
    rows: torch.Tensor | None = None

    def ranks_of(self, source: int, size: int) -> list[list[int]]:
        """The ranks that hold each token's experts, in order."""
        each = self.experts // size
        return [sorted({e // each for e in row if e >= 0}) for row in self.idx[source].tolist()]


@dataclass
class Low:
    """A low-latency call under way, and what must hold once it has ended."""

    sent: Sent
    check: Check
    event: ep.EventOverlap
    hook: Callable[[], None] | None
    rows: torch.Tensor | None = None  # what the experts read
    count: torch.Tensor | None = None
    handle: tuple = ()
    fp8: bool = False


@dataclass
class Player:
    """One rank; `dice` fall the same on all of them."""

    buffer: ep.Buffer
    dice: random.Random
    sent: list[Sent] = field(default_factory=list)
    later: list[Check] = field(default_factory=list)

    @property
    def rank(self) -> int:
        return self.buffer.rank

    @property
    def size(self) -> int:
        return self.buffer.group_size

    # ---- inputs

    def draw(self, low: bool) -> Sent:
        dice, size = self.dice, self.size
        experts = size * dice.choice([1, 2, 4])
        top_k = dice.randint(1, min(4, experts))
        hidden = dice.choice([128, 512, 1024]) if low else dice.choice([1, 8, 77, 128, 512])
        kind = dice.choice(
            ["random", "random", "empty ranks", "one expert", "holes", "same", "none"]
        )
        generator = torch.Generator().manual_seed(dice.randrange(1 << 30))
        made = Sent([], [], [], experts, low)
        for rank in range(size):
            tokens = dice.randint(0, M)
            tokens = 0 if kind == "empty ranks" and dice.random() < 0.6 else tokens
            x = torch.randn(tokens, hidden, generator=generator).to(BF16)
            idx = torch.rand(tokens, experts, generator=generator).argsort(1)[:, :top_k]
            if kind == "one expert":
                idx[:, 1:], idx[:, :1] = -1, experts - 1
            elif kind == "same" and not low:
                idx[:] = idx[:, :1].clone()  # one expert several times in a token
            elif kind == "none":
                idx[:] = -1
            else:
                idx[
                    torch.rand(idx.shape, generator=generator) < (0.5 if kind == "holes" else 0.1)
                ] = -1
            made.x.append(x)
            made.idx.append(idx.contiguous() if rank % 2 else idx)
            made.weights.append(torch.rand(tokens, top_k, generator=generator))
        return made

    def wait_or_remember(self, event: ep.EventOverlap | None, check: Check) -> None:
        """Check at once, or some time after."""

        def checked() -> None:
            if event is not None and event.event is not None:
                event.current_stream_wait()
            check()

        self.later.append(checked)
        if self.dice.random() < 0.5:
            self.settle()

    def settle(self) -> None:
        while self.later:
            self.later.pop(0)()

    # ---- normal mode

    def arriving(self, sent: Sent) -> list[tuple[int, int]]:
        return [
            (s, t) for s in range(self.size) for t, ranks in enumerate(sent.ranks_of(s, self.size))
            if self.rank in ranks
        ]  # fmt: skip

    def dispatch(self) -> None:
        sent, dice, me = self.draw(low=False), self.dice, self.rank
        fp8, top_k = dice.random() < 0.3, dice.random() < 0.8
        align, asynchronous = dice.choice([1, 1, 16]), dice.random() < 0.4
        worst = M * self.size + dice.randint(0, 9) if top_k and dice.random() < 0.2 else 0
        scales = [torch.rand(len(x), 3) + s for s, x in enumerate(sent.x)]
        for s, one in enumerate(scales):
            one.copy_(torch.arange(3 * len(one)).view(-1, 3) + 1000 * s)
        per_rank, per_host, per_expert, in_rank, _ = self.buffer.get_dispatch_layout(
            sent.idx[me], sent.experts
        )
        x = (sent.x[me].to(FP8), scales[me]) if fp8 else sent.x[me]
        previous = self.buffer.capture() if asynchronous and dice.random() < 0.5 else None
        got, ids, weights, counts, sent.handle, sent.event = self.buffer.dispatch(
            x, None, per_rank, per_host, in_rank, per_expert, sent.idx[me] if top_k else None,
            sent.weights[me] if top_k else None, expert_alignment=align, num_worst_tokens=worst,
            async_finish=asynchronous, previous_event=previous,
            allocate_on_comm_stream=previous is not None,
        )  # fmt: skip
        rows, each = self.arriving(sent), sent.experts // self.size
        if not fp8:
            sent.rows = got

        def check() -> None:
            values, got_scales = got if fp8 else (got, None)
            n = len(rows)
            assert len(values) == (worst or n)
            wanted = [sent.x[s][t] for s, t in rows]
            wanted = torch.stack(wanted) if wanted else sent.x[0][:0]
            assert bits(values[:n]) == bits(wanted.to(FP8) if fp8 else wanted)
            if fp8:
                assert got_scales[:n].tolist() == [scales[s][t].tolist() for s, t in rows]
            if not top_k:
                assert ids is None and weights is None
                return
            local = [
                [
                    e - me * each if e >= 0 and e // each == me else -1
                    for e in sent.idx[s][t].tolist()
                ]
                for s, t in rows
            ]
            assert ids[:n].tolist() == local
            assert (ids[n:] == -1).all()
            assert weights[:n].tolist() == [
                [w if e >= 0 else 0.0 for w, e in zip(sent.weights[s][t].tolist(), l, strict=True)]
                for (s, t), l in zip(rows, local, strict=True)
            ]
            flat = [e for row in local for e in row]
            if not worst:
                assert counts == [-(-flat.count(e) // align) * align for e in range(each)]

        self.sent.append(sent)
        self.wait_or_remember(sent.event, check)

    def repeat(self) -> None:
        sent = self.pick(low=False)
        if sent is None:
            return
        factor, me = self.dice.choice([1, 2, 0.5]), self.rank
        asynchronous = self.dice.random() < 0.5
        got, *nothing, event = self.buffer.dispatch(
            sent.x[me] * factor, handle=sent.handle, async_finish=asynchronous
        )
        wanted = [sent.x[s][t] * factor for s, t in self.arriving(sent)]

        def check() -> None:
            assert nothing == [None] * 4
            assert bits(got) == bits(torch.stack(wanted) if wanted else sent.x[0][:0])

        self.wait_or_remember(event, check)

    def pick(self, low: bool) -> Sent | None:
        some = [s for s in self.sent if s.low == low]
        return self.dice.choice(some) if some else None

    def combine(self) -> None:
        sent = self.pick(low=False)
        if sent is None:
            return
        dice, me, size = self.dice, self.rank, self.size
        own, biases = dice.choice(["own", "copy", "strided"]), dice.choice([0, 0, 1, 2])
        asynchronous, weighted = dice.random() < 0.4, dice.random() < 0.5
        # what each rank gives back for (source, token): x, scaled by the rank where it is a copy
        factor = [1.0 if own == "own" else 0.3 + r for r in range(size)]
        mine = [(sent.x[s][t].float() * factor[me]).to(BF16) for s, t in self.arriving(sent)]
        x = torch.stack(mine) if mine else sent.x[0][:0]
        if sent.event is not None and sent.event.event is not None:
            sent.event.current_stream_wait()
        if own == "own" and sent.rows is not None:
            x = sent.rows
        if own == "strided" and len(x):
            wide = torch.empty(len(x), x.shape[1] + 5, dtype=BF16)
            wide[:, : x.shape[1]] = x
            x = wide[:, : sent.x[0].shape[1]]
        T, K = sent.weights[me].shape
        top_k = self.has_top_k(sent)
        given = None
        if weighted and top_k:
            given = torch.full((len(x), K), float(me + 1))
        bias = [torch.full_like(sent.x[me], 0.7 - b) for b in range(biases)]
        back, back_weights, event = self.buffer.combine(
            x, sent.handle, topk_weights=given,
            bias=None if not bias else bias[0] if biases == 1 else tuple(bias),
            async_finish=asynchronous,
        )  # fmt: skip
        wanted = self.sums(sent, factor, bias)
        times = torch.tensor([[float(sum(r + 1 for r in to))] for to in sent.ranks_of(me, size)])

        def check() -> None:
            assert bits(back) == bits(wanted)
            assert (back_weights is None) == (given is None)
            if given is not None:
                assert torch.equal(back_weights, times.view(-1, 1).expand(T, K))

        self.wait_or_remember(event, check)

    @staticmethod
    def has_top_k(sent: Sent) -> bool:
        return sent.handle.native.want.top_k > 0

    def sums(self, sent: Sent, factor: list[float], bias: list[torch.Tensor]) -> torch.Tensor:
        x, to = sent.x[self.rank], sent.ranks_of(self.rank, self.size)
        acc = torch.zeros(x.shape)
        for one in bias:
            acc = acc + one.float()
        hosts = self.buffer.runtime.topology.hosts
        for ranks in hosts:
            part = torch.zeros(x.shape) if len(hosts) > 1 else acc
            for rank in ranks:
                here = torch.tensor([rank in r for r in to], dtype=torch.bool)
                part[here] += (x.float() * factor[rank]).to(BF16).float()[here]
            acc = acc + part.to(BF16).float() if len(hosts) > 1 else part
        return acc.to(BF16)

    # ---- low latency

    def low_latency(self) -> None:
        """Dispatch and combine; halves by hook or event, another call in between."""
        self.settle()
        one = self.low_dispatch()
        if one.hook is not None and self.dice.random() < 0.3:
            self.combine()
        between = self.dice.choice(["nothing", "a batch", "a combine"])
        if between == "nothing":
            self.end(one)
            self.end(self.low_combine(one))
            return
        if between == "a combine":
            self.end(one)
        other = self.low_dispatch()
        if between == "a batch":
            self.end(one, other)
            self.end(self.low_combine(one), self.low_combine(other))
            return
        back = self.low_combine(one)
        self.end(back, other)
        self.end(self.low_combine(other))

    def end(self, *calls: Low) -> None:
        """Wait for calls under way, each rank in an order of its own, and check what they bring."""
        turned = (self.rank >> self.dice.randrange(2)) % 2  # the same dice on all ranks
        for call in reversed(calls) if turned else calls:
            finish(call.event, call.hook)
            call.check()

    def low_dispatch(self) -> Low:
        sent, dice, me = self.draw(low=True), self.dice, self.rank
        way = dice.choice(["plain", "hook", "hook", "async"])
        more = {"return_recv_hook": way == "hook", "async_finish": way == "async"}
        each, fp8 = sent.experts // self.size, dice.random() < 0.3
        got, count, handle, event, hook = self.buffer.low_latency_dispatch(
            sent.x[me], sent.idx[me], M, sent.experts, use_fp8=fp8, **more
        )

        def check() -> None:
            for e in range(each):
                rows = [
                    sent.x[s][t] for s in range(self.size)
                    for t, row in enumerate(sent.idx[s].tolist()) for i in row if i == me * each + e
                ]  # fmt: skip
                assert int(count[e]) == len(rows)
                wanted = torch.stack(rows) if rows else sent.x[0][:0]
                if fp8:
                    wanted = cast(wanted)
                assert bits((got[0] if fp8 else got)[e, : len(rows)]) == bits(wanted)

        rows = torch.zeros(got[0].shape, dtype=BF16) if fp8 else got
        return Low(sent, check, event, hook, rows, count, handle, fp8)

    def low_combine(self, call: Low) -> Low:
        sent, dice, me, fp8 = call.sent, self.dice, self.rank, call.fp8
        way, zero_copy = dice.choice(["plain", "hook", "hook", "async"]), dice.random() < 0.3
        more = {"return_recv_hook": way == "hook", "async_finish": way == "async"}
        each = sent.experts // self.size
        factor = torch.arange(me * each, (me + 1) * each).view(-1, 1, 1) * 0.3 + 1
        result = (call.rows.float() * factor).to(BF16)
        if zero_copy:
            place = self.buffer.get_next_low_latency_combine_buffer(call.handle)
            for e, n in enumerate(call.count.tolist()):
                place[e, :n] = result[e, :n]
        back, event, hook = self.buffer.low_latency_combine(
            result, sent.idx[me], sent.weights[me], call.handle, zero_copy=zero_copy, **more
        )
        acc, idx = torch.zeros(sent.x[me].shape), sent.idx[me]
        for k in range(0 if fp8 else idx.shape[1]):
            row = (sent.x[me].float() * (idx[:, k : k + 1] * 0.3 + 1)).to(BF16).float()
            acc = torch.where(
                idx[:, k : k + 1] >= 0, acc + sent.weights[me][:, k : k + 1] * row, acc
            )

        def check() -> None:
            assert bits(back) == bits(acc.to(BF16))

        return Low(sent, check, event, hook)

    def others(self) -> None:
        what = self.dice.choice(["barrier", "clean", "forget", "threads"])
        if what == "barrier":
            self.buffer.runtime.barrier()
        elif what == "clean":
            self.settle()
            self.buffer.clean_low_latency_buffer(M, 128, self.size)
        elif what == "forget":
            self.settle()
            self.sent = self.sent[-1:]
        else:
            self.settle()
            ep.Buffer.set_num_sms(self.dice.choice([0, 2, 4]))


def bits(t: torch.Tensor) -> bytes:
    return t.contiguous().view(torch.uint8).numpy().tobytes() if t.numel() else b""


def cast(x: torch.Tensor) -> torch.Tensor:
    blocks = x.float().view(len(x), x.shape[1] // 128, 128)
    scale = blocks.abs().amax(2, keepdim=True).clamp(min=1e-4) / 448
    return (blocks * (1 / scale)).clamp(-448, 448).to(FP8).view(x.shape)


def finish(event: ep.EventOverlap, hook: Callable[[], None] | None) -> None:
    if hook is not None:
        hook()
    if event.event is not None:
        event.current_stream_wait()


def play(
    folder: str, rank: int, size: int, hosts: list[str] | None, seeds: list[int], steps: int
) -> str:
    """Play sequences; what went wrong first ("" for nothing)."""
    if hosts:
        os.environ["WHALEFALL_HOST"] = hosts[rank]
    group = join(folder, rank, size)
    hint = ep.Buffer.get_low_latency_rdma_size_hint(M, 1024, size, 4 * size)
    for seed in seeds:
        buffer = ep.Buffer(group, (1 << 16) << seed % 5, hint, low_latency_mode=True)
        player = Player(buffer, random.Random(seed))
        moves = [player.dispatch, player.repeat, player.combine, player.low_latency, player.others]
        for step in range(steps):
            move = player.dice.choices(moves, [4, 3, 5, 2, 1])[0]
            try:
                move()
            except Exception as error:
                error.add_note(f"seed {seed}, step {step}, {move.__name__}, rank {rank} of {size}")
                raise
        player.settle()
    dist.barrier()
    dist.destroy_process_group()
    return ""
