"""Bundled checkpoint: the training loop, data-parallel over one-thread processes.

In: `pages.jsonl` and `names.jsonl`. Out: `state.pt` in the work folder, written every few minutes
and at the end; a run that was stopped goes on from it. The learning rate follows the clock, so
that its decay is finished when `--minutes` of training have passed, on a busy machine too.
Source: DeepSeek-V3 report, 2.1.2 (auxiliary-loss-free balancing), 2.2 (MTP); the sizes are ours.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import time
from collections import Counter, deque
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from corpus import Page, read_names
from questions import Conversations, no_entry
from tokenizer import ASSISTANT, BOS, EOS, USER, save, train_tokenizer
from tokenizers import Tokenizer
from torch import Tensor

from model import Model, MoE, Rows, Shape

HELD_OUT_PAGES = 40
PROSE_LENGTH = 256
CHAT_LENGTH = 160
# The first token of an answer says whether the name is known, and there is one in a dozen tokens.
# The doubt goes to "no manual entry": known names are learnt until none is left.
KNOWN_WEIGHT, UNKNOWN_WEIGHT = 6.0, 18.0


def read_pages(work: Path) -> list[Page]:
    """The corpus, in order."""
    with open(work / "pages.jsonl") as file:
        return [Page(**json.loads(line)) for line in file]


def held_out(pages: list[Page]) -> list[Page]:
    """The pages that training never sees: long ones of sections 1 and 8, by a fixed seed."""
    long = [page for page in pages if page.section in "18" and len(page.text) > 4000]
    return random.Random(8).sample(long, HELD_OUT_PAGES)


def common_words(pages: list[Page], count: int = 8000) -> list[str]:
    """The corpus' most frequent words, which made-up names and noise are drawn from."""
    found = Counter(w for page in pages for w in re.findall(r"\b[A-Za-z]{2,12}\b", page.text))
    return [word for word, _ in found.most_common(count)]


def prepare(work: Path) -> None:
    """Train the tokenizer and encode the corpus, once for all ranks."""
    pages = read_pages(work)
    if not (work / "tokenizer.json").exists():
        texts = [page.text for page in pages] + [entry.line for entry in read_names()]
        save(train_tokenizer(texts), work, Shape().max_position_embeddings)
    if not (work / "prepared.pt").exists():
        tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
        unseen = {(page.name, page.section) for page in held_out(pages)}
        seen = [page for page in pages if (page.name, page.section) not in unseen]
        ids: list[int] = []
        for encoding in tokenizer.encode_batch([page.text for page in seen]):
            ids += encoding.ids + [tokenizer.token_to_id(EOS)]
        prose = torch.tensor(ids, dtype=torch.int16)
        torch.save({"prose": prose, "words": common_words(seen)}, work / "prepared.pt")


@dataclass
class Batch:
    """Tokens of one step, the next token of each (-1: not learnt), its share of the loss, and
    the rows they form."""

    tokens: Tensor
    labels: Tensor
    mtp_labels: Tensor
    weight: Tensor
    groups: list[Rows]


class Data:
    """Draws batches: windows of prose, and rows of packed conversations."""

    def __init__(self, work: Path, seed: int) -> None:
        self.random = random.Random(seed)
        self.tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
        self.bos, self.eos, self.user, self.assistant = (
            self.tokenizer.token_to_id(token) for token in (BOS, EOS, USER, ASSISTANT)
        )
        self.no = self.encode(no_entry("name"))[0]
        prepared = torch.load(work / "prepared.pt")
        self.prose = prepared["prose"].long()
        self.conversations = Conversations(read_names(), prepared["words"], seed)
        self.waiting: deque[tuple[list[int], list[bool]]] = deque()

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).ids

    def conversation(self) -> tuple[list[int], list[bool]]:
        """Token ids of one conversation, and which of them are to be learnt (answers, EOS)."""
        system, turns = self.conversations.draw()
        ids = [self.bos, *self.encode(system)]
        learnt = [False] * len(ids)
        for question, answer in turns:
            asked = [self.user, *self.encode(question), self.assistant]
            answered = [*self.encode(answer), self.eos]
            if len(ids) + len(asked) + len(answered) > CHAT_LENGTH:
                break
            ids += asked + answered
            learnt += [False] * len(asked) + [True] * len(answered)
        return ids, learnt

    def chat_row(self, length: int = CHAT_LENGTH) -> tuple[list[int], list[int], list[bool]]:
        """One row of whole conversations: ids, document numbers (-1: padding), learnt."""
        ids: list[int] = []
        document: list[int] = []
        learnt: list[bool] = []
        number = 0
        while True:
            while len(self.waiting) < 24:
                self.waiting.append(self.conversation())
            fits = [c for c in self.waiting if len(ids) + len(c[0]) <= length]
            if not fits:
                break
            chosen = fits[0] if not ids else max(fits, key=lambda c: len(c[0]))
            self.waiting.remove(chosen)
            ids += chosen[0]
            learnt += chosen[1]
            document += [number] * len(chosen[0])
            number += 1
        padding = length - len(ids)
        return ids + [2] * padding, document + [-1] * padding, learnt + [False] * padding

    def batch(self, prose_rows: int, chat_rows: int) -> Batch:
        """Draw one step's batch."""
        length = PROSE_LENGTH + 2
        starts = [self.random.randrange(len(self.prose) - length) for _ in range(prose_rows)]
        window = torch.stack([self.prose[s : s + length] for s in [*starts, 0]])[:-1]
        rows = [self.chat_row() for _ in range(chat_rows)]
        ids, document = torch.tensor([r[0] for r in rows]), torch.tensor([r[1] for r in rows])
        learnt = torch.tensor([r[2] for r in rows])
        labels, mtp_labels = (_shifted(ids, document, learnt, by) for by in (1, 2))
        same = document[:, None, :, None] == document[:, None, None, :]
        mask = same & torch.ones(CHAT_LENGTH, CHAT_LENGTH, dtype=torch.bool).tril()
        tokens = torch.cat([window[:, :-2].flatten(), ids.flatten()])
        all_labels = torch.cat([window[:, 1:-1].flatten(), labels.flatten()])
        first = torch.where(all_labels == self.no, UNKNOWN_WEIGHT, KNOWN_WEIGHT)
        weight = torch.where(tokens == self.assistant, first, 1.0)
        return Batch(
            tokens,
            all_labels,
            # the last position of a row has no next token in the row: not learnt
            torch.cat([_without_last(window[:, 2:]).flatten(), mtp_labels.flatten()]),
            weight / weight[all_labels >= 0].sum(),
            [Rows(prose_rows, PROSE_LENGTH, None)] * (prose_rows > 0)
            + [Rows(chat_rows, CHAT_LENGTH, mask)],
        )


def _shifted(ids: Tensor, document: Tensor, learnt: Tensor, by: int) -> Tensor:
    """Labels `by` tokens ahead, -1 where they are not learnt or of another document."""
    labels = torch.full_like(ids, -1)
    good = learnt[:, by:] & (document[:, by:] == document[:, :-by])
    labels[:, :-by] = torch.where(good, ids[:, by:], -1)
    return labels


def _without_last(labels: Tensor) -> Tensor:
    labels = labels.clone()
    labels[:, -1] = -1
    return labels


class Optimizer:
    """AdamW over two flat buffers (decayed and not), with an average of the weights."""

    def __init__(self, model: Model) -> None:
        matrices = [p for p in model.parameters() if p.dim() > 1]
        vectors = [p for p in model.parameters() if p.dim() == 1]
        self.flat = [_flatten(matrices), _flatten(vectors)]
        groups = [
            {"params": [self.flat[0]], "weight_decay": 0.1},
            {"params": [self.flat[1]], "weight_decay": 0.0},
        ]
        self.adam = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
        self.average = [flat.detach().clone() for flat in self.flat]

    def step(self, rate: float, step: int, world: int) -> float:
        """Sum gradients over the ranks, clip at 1.0, step, follow with the average."""
        if world > 1:
            for flat in self.flat:
                dist.all_reduce(flat.grad)
                flat.grad /= world
        norm = torch.nn.utils.clip_grad_norm_(self.flat, 1.0)
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()
        keep = min(0.995, (1 + step) / (10 + step))
        for average, flat in zip(self.average, self.flat, strict=True):
            average.lerp_(flat.detach(), 1 - keep)
            flat.grad.zero_()
        return norm.item()


def _flatten(parameters: list[torch.nn.Parameter]) -> torch.nn.Parameter:
    """Move parameters and their gradients into one buffer each, as views of it."""
    flat = torch.nn.Parameter(torch.cat([p.detach().flatten() for p in parameters]))
    flat.grad = torch.zeros_like(flat)
    start = 0
    for parameter in parameters:
        end = start + parameter.numel()
        parameter.data = flat.data[start:end].view(parameter.shape)
        parameter.grad = flat.grad[start:end].view(parameter.shape)
        start = end
    return flat


def learning_rate(progress: float, step: int, peak: float) -> float:
    """50 steps of warm-up, constant to 30 % of the time, then linear to 2 % of the peak."""
    decay = 1.0 if progress < 0.3 else max(0.02, 1 - 0.98 * (progress - 0.3) / 0.7)
    return peak * min(1.0, (step + 1) / 50) * decay


def balance(model: Model, world: int, speed: float) -> float:
    """Move each expert's bias against its load; give the worst layer's max/mean load."""
    blocks: list[MoE] = model.moe_layers()
    load = torch.stack([block.load for block in blocks])
    if world > 1:
        dist.all_reduce(load)
    for block, counts in zip(blocks, load, strict=True):
        if counts.sum() > 0:
            block.bias += speed * (counts.mean() - counts).sign()
        block.load.zero_()
    return (load.amax(1) / load.mean(1).clamp(min=1)).max().item()


def save_state(path: Path, model: Model, optimizer: Optimizer, step: int, elapsed: float) -> None:
    """Write the state beside and rename it, so that a killed run leaves a whole one."""
    state = {
        "step": step,
        "elapsed": elapsed,
        "flat": [flat.detach() for flat in optimizer.flat],
        "average": optimizer.average,
        "adam": optimizer.adam.state_dict(),
        "bias": [block.bias for block in model.moe_layers()],
    }
    torch.save(state, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


def load_state(path: Path, model: Model, optimizer: Optimizer) -> tuple[int, float]:
    """Go on from `save_state`; gives the step and the seconds trained."""
    state = torch.load(path)
    for mine, theirs in zip(
        [*optimizer.flat, *optimizer.average], [*state["flat"], *state["average"]], strict=True
    ):
        mine.data.copy_(theirs)
    optimizer.adam.load_state_dict(state["adam"])
    for block, bias in zip(model.moe_layers(), state["bias"], strict=True):
        block.bias.copy_(bias)
    return state["step"], state["elapsed"]


def train(rank: int, args: argparse.Namespace) -> None:
    """One rank's part of the training."""
    torch.set_num_threads(1)
    if args.ranks > 1:
        store = f"file://{args.work.absolute()}/rendezvous"
        dist.init_process_group(
            "gloo", store, rank=rank, world_size=args.ranks, timeout=timedelta(hours=12)
        )
    torch.manual_seed(args.seed)
    model = Model(Shape())
    optimizer = Optimizer(model)
    step, elapsed = 0, 0.0
    state = args.work / "state.pt"
    if state.exists():
        step, elapsed = load_state(state, model, optimizer)
        print(f"rank {rank}: going on from step {step}, {elapsed / 60:.1f} min", flush=True)
    data = Data(args.work, seed=args.seed + 1000 * step + rank)
    budget = args.minutes * 60
    saved, last = elapsed, time.monotonic()
    sums: Counter[str] = Counter()
    while elapsed < budget:
        progress = elapsed / budget
        late = progress > args.late
        prose = args.prose_rows if late or step % args.prose_every == 0 else 0
        batch = data.batch(prose, args.chat_rows)
        hidden = model.hidden(batch.tokens, batch.groups)
        main = model.loss(hidden, batch.labels, batch.weight)
        loss = main
        if step % 2 == 0 or progress > 0.95:  # the MTP layer costs a fifth of a step
            ahead = model.mtp_hidden(hidden, batch.tokens, batch.groups)
            mtp = model.loss(ahead, batch.mtp_labels, batch.weight)
            loss = main + (0.3 if progress < 0.7 else 0.1) * mtp
            sums.update(mtp=mtp.item(), mtp_steps=1)
        loss.backward()
        norm = optimizer.step(learning_rate(progress, step, args.rate), step, args.ranks)
        worst = balance(model, args.ranks, 0.002 if progress < 0.9 else 0.0)
        step += 1
        now = time.monotonic()
        elapsed += min(now - last, 60.0)  # time stopped does not count
        last = now
        if args.ranks > 1:
            clock = torch.tensor(elapsed, dtype=torch.float64)
            dist.broadcast(clock, 0)
            elapsed = clock.item()
        sums.update(main=main.item(), norm=norm, worst=worst, tokens=len(batch.tokens), n=1)
        if rank == 0 and step % args.report == 0:
            n = sums["n"]
            print(
                f"step {step} min {elapsed / 60:.1f} loss {sums['main'] / n:.3f} "
                f"mtp {sums['mtp'] / max(1, sums['mtp_steps']):.3f} norm {sums['norm'] / n:.2f} "
                f"load max/mean {sums['worst'] / n:.2f} "
                f"tokens/step {args.ranks * sums['tokens'] / n:.0f}",
                flush=True,
            )
            sums.clear()
        if rank == 0 and elapsed - saved > 120:
            save_state(state, model, optimizer, step, elapsed)
            saved = elapsed
    if rank == 0:
        save_state(state, model, optimizer, step, elapsed)
        print("finished", flush=True)


def main() -> None:
    """Train the bundled checkpoint; export.py then writes the Hugging Face folder."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/bundled"))
    parser.add_argument("--minutes", type=float, default=90.0, help="training time, for the decay")
    parser.add_argument("--ranks", type=int, default=2, help="one-thread processes")
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--prose-rows", type=int, default=1, help="rows of 256 tokens a rank")
    parser.add_argument("--chat-rows", type=int, default=6, help="rows of 160 tokens a rank")
    parser.add_argument("--prose-every", type=int, default=1, help="steps, before --late")
    parser.add_argument("--late", type=float, default=0.7, help="when every step has prose")
    parser.add_argument("--report", type=int, default=50, help="steps between two lines")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    prepare(args.work)
    (args.work / "rendezvous").unlink(missing_ok=True)
    # glibc would give freed activations back to the kernel and fault them in again
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(1 << 30))
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(1 << 30))
    torch.multiprocessing.spawn(train, (args,), nprocs=args.ranks)


if __name__ == "__main__":
    main()
