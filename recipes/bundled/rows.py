"""Bundled checkpoint: training data as token rows for `whalefall train recipe.toml`.

In: what `train.py` prepares (tokenizer, encoded corpus) and the conversations it draws. Out:
`rows/prose-*.ffr`, windows of manual pages, and `rows/chat.ffr`, rows of packed conversations, in
the form of `whalefall.train.data`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from train import Data, prepare
from whalefall.train import write_rows, write_stream

LENGTH = 256


def chat_rows(data: Data, count: int) -> list[np.ndarray]:
    """Rows of whole conversations, each [3, LENGTH]: tokens, document numbers, learnt."""
    rows = []
    for _ in range(count):
        ids, document, learnt = data.chat_row(LENGTH)
        rows.append(np.array([ids, document, learnt], np.int32))
    return rows


def main() -> None:
    """Write the rows; the recipe's shuffle draws their order."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--work", type=Path, default=Path("../../build/bundled"))
    parser.add_argument("--out", type=Path, default=None, help="default: rows/ in --work")
    parser.add_argument("--chat-rows", type=int, default=30000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    out = args.out or args.work / "rows"
    out.mkdir(parents=True, exist_ok=True)
    prepare(args.work)
    data = Data(args.work, args.seed)
    # a second cut, half a row on, gives windows that begin elsewhere
    count = sum(
        write_stream(out / f"prose-{shift}.ffr", data.prose[shift:].numpy(), LENGTH)
        for shift in (0, LENGTH // 2)
    )
    write_rows(out / "chat.ffr", chat_rows(data, args.chat_rows))
    print(f"{out}: {count} rows of prose, {args.chat_rows} of conversations, {LENGTH} tokens each")


if __name__ == "__main__":
    main()
