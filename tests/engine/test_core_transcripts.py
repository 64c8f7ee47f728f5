"""Scheduler and block manager as transcripts: a command, and what the core then does.

`REWRITE=1 pytest tests/engine` renews the expected lines; review them as a diff. Invariants of the
books are checked after each command. Commands:

    new blocks=N budget=N sequences=N [strict]
    add NAME LENGTH [like=OTHER:COUNT] [salt=S] [priority=P] [ends=LENGTH]
                                    a prompt, sharing OTHER's beginning; its answer ends there
    step [COUNT] [drafts=N] [right=M]
                                    schedule and compute; sampled sequences learn a token, and the
                                    first M of their drafts are right
    finish NAME                     an answer has ended, or was cancelled
    cache                           what the prefix cache was asked for and had
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from whalefall.engine.core import Batch, BlockManager, Scheduler, Sequence

TRANSCRIPTS = sorted((Path(__file__).parent / "transcripts").glob("*.txt"))


class Machine:
    def __init__(self) -> None:
        self.sequences: dict[str, Sequence] = {}
        self.prompts: dict[str, list[int]] = {}

    def run(self, command: str) -> list[str]:
        name, *words = command.split()
        plain = [word for word in words if "=" not in word]
        options = dict(word.split("=") for word in words if "=" in word)
        lines: list[str] = getattr(self, name)(*plain, **options)
        broken = self.blocks.broken_invariants(list(self.sequences.values()))
        return lines + [f"BROKEN {line}" for line in broken]

    def new(self, *flags: str, blocks: str, budget: str, sequences: str) -> list[str]:
        self.sequences.clear()
        self.blocks = BlockManager(int(blocks), strict_prefix="strict" in flags)
        self.scheduler = Scheduler(self.blocks, int(budget), int(sequences))
        return []

    def add(
        self,
        name: str,
        length: str,
        like: str = "",
        salt: str = "",
        priority: str = "0",
        ends: str = "9999",
    ) -> list[str]:
        number = len(self.prompts)
        prompt = [1000 * (number + 1) + i for i in range(int(length))]
        if like:
            other, count = like.split(":")
            prompt[: int(count)] = self.prompts[other][: int(count)]
        self.prompts[name] = prompt
        seq = Sequence(name, list(prompt), len(prompt), salt, int(priority), number, int(ends))
        self.sequences[name] = seq
        self.scheduler.add(seq)
        return []

    def step(self, count: str = "1", drafts: str = "0", right: str = "0") -> list[str]:
        lines: list[str] = []
        for _ in range(int(count)):
            batch = self.scheduler.schedule(int(drafts))
            last = self.show(batch)
            for item in batch.scheduled:
                if item.is_last:
                    self.prompts[item.seq.seq_id] = item.seq.tokens
            sampled = [item for item in batch.scheduled if item.is_last]
            self.scheduler.commit(batch)
            for item in sampled:
                for _ in range(min(int(right), item.num_drafts)):
                    item.seq.tokens.append(7)
                    self.scheduler.accept(item.seq)
                item.seq.tokens.append(7)
            lines = last
        return lines

    def show(self, batch: Batch) -> list[str]:
        lines = [f"swap out {seq.seq_id} {blocks}" for seq, blocks in batch.swap_out]
        lines += [f"swap in {seq.seq_id} {blocks}" for seq, blocks in batch.swap_in]
        for item in batch.scheduled:
            form = "prompt" if item.in_prompt else "generated"
            span = f"[{item.start}, {item.start + item.count})"
            sampled = " then sample" if item.is_last else ""
            span += f" and {item.num_drafts} drafts" if item.num_drafts else ""
            lines.append(f"{item.seq.seq_id} {form} {span} blocks {item.seq.blocks}{sampled}")
        waiting = " ".join(seq.seq_id for seq in self.scheduler.waiting)
        return [*(lines or ["nothing"]), f"free {self.blocks.num_free} waiting [{waiting}]"]

    def finish(self, name: str) -> list[str]:
        self.scheduler.remove(self.sequences.pop(name))
        return [f"free {self.blocks.num_free}"]

    def cache(self) -> list[str]:
        return [f"asked {self.blocks.query_tokens} found {self.blocks.hit_tokens}"]


@pytest.mark.parametrize("path", TRANSCRIPTS, ids=lambda path: path.stem)
def test_transcript(path: Path) -> None:
    machine, lines = Machine(), []
    before = path.read_text(encoding="utf-8")
    for line in before.splitlines():
        if line.startswith("> "):
            lines += [line, *machine.run(line[2:])]
        elif line.startswith("#") or not line:
            lines.append(line)
    after = "\n".join(lines) + "\n"
    if os.environ.get("REWRITE"):
        path.write_text(after, encoding="utf-8")
    assert "BROKEN" not in after
    assert after == before
