"""Day 5, smallpond: prices by ticker over partitions, a join, and a million records sorted.

Run: python examples/05_smallpond.py
"""

import tempfile
from pathlib import Path

import whalefall.compat

whalefall.compat.install()

import smallpond  # noqa: E402  (whalefall's, from here on)

from whalefall.data.graysort import gensort, sort_file, valsort  # noqa: E402


def prices(sp: smallpond.Session, folder: Path) -> None:
    """smallpond's own first example: a query a partition, written and shown."""
    rows = [{"ticker": ["AMZN", "GOOG", "MSFT"][i % 3], "price": 100 + i % 7} for i in range(42)]
    df = sp.from_items(rows)
    df = df.repartition(3, hash_by="ticker")
    df = sp.partial_sql("select ticker, min(price), max(price) from {0} group by ticker", df)
    df.write_parquet(str(folder / "prices"))
    print(df.to_pandas().sort_values("ticker").to_string(index=False))

    # beyond smallpond: whole frames, sorted and joined
    names = sp.from_items([{"ticker": "MSFT", "name": "Microsoft"}])
    joined = sp.read_parquet(str(folder / "prices")).join(names, "ticker", how="left")
    print(joined.sort("ticker desc").map("ticker, coalesce(name, '?') as name").take(2))


def graysort(folder: Path) -> None:
    """The Sort Benchmark's records, sorted in 32 MB."""
    unsorted, ordered = str(folder / "in.dat"), str(folder / "out.dat")
    gensort(unsorted, 1_000_000)
    sort_file(unsorted, ordered, memory=32 << 20)
    found = valsort([ordered])
    print(f"{found.records} records, checksum {found.checksum:x}, in order: {found.ok}")


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with smallpond.init(data_root=str(folder / "jobs")) as sp:
            prices(sp, folder)
        graysort(folder)


if __name__ == "__main__":
    main()
