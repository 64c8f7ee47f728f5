"""The example and the page's first code run as they are written, with the output they promise."""

from __future__ import annotations

import os
import subprocess
import sys
import zlib
from pathlib import Path

import duckdb

from whalefall.data.graysort import make_records

ROOT = Path(__file__).parents[2]


# the calls of smallpond's README, with its relative paths
README = """
import smallpond
sp = smallpond.init()
df = sp.read_parquet("prices.parquet")
df = df.repartition(3, hash_by="ticker")
df = sp.partial_sql("SELECT ticker, min(price), max(price) FROM {0} GROUP BY ticker", df)
df.write_parquet("output/")
print(df.to_pandas())
"""


def run(*command: str, cwd: Path | None = None, **settings: str) -> str:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **settings}
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True, text=True, env=env, check=False, cwd=cwd, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_example_prints_what_it_should() -> None:
    lines = run(str(ROOT / "examples" / "05_smallpond.py")).splitlines()
    assert [line.split() for line in lines[:4]] == [
        ["ticker", "min(price)", "max(price)"],
        ["AMZN", "100", "106"],
        ["GOOG", "100", "106"],
        ["MSFT", "100", "106"],
    ]
    assert lines[4] == (
        "[{'ticker': 'MSFT', 'name': 'Microsoft'}, {'ticker': 'GOOG', 'name': '?'}]"
    )
    total = sum(zlib.crc32(row) for row in make_records(1_000_000))
    assert lines[5] == f"1000000 records, checksum {total:x}, in order: True"


def test_the_first_code_of_the_page_runs() -> None:
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    code = page.split("```python\n")[1].split("```")[0]
    out = run("-c", code)
    assert "[{'city': 'A', 'total':" in out
    assert "SqlEngineNode" in out and "HashPartitionNode" in out


def test_smallponds_readme_runs_in_a_fresh_folder(tmp_path: Path) -> None:
    duckdb.execute(
        "copy (select 'T' || (i % 5) as ticker, i * 0.5 as price from range(100) t(i)) "
        f"to '{tmp_path}/prices.parquet'"
    ).fetchall()
    (tmp_path / "script.py").write_text(README)
    root = {"SP_DATA_ROOT": str(tmp_path / "jobs")}
    out = run("-m", "whalefall.compat", "script.py", cwd=tmp_path, **root)
    assert sorted(line.split()[1] for line in out.splitlines()[1:]) == [f"T{i}" for i in range(5)]
    written = duckdb.sql(f"select ticker, \"max(price)\" from '{tmp_path}/output/*.parquet'")
    assert sorted(written.fetchall()) == [(f"T{i}", (95 + i) * 0.5) for i in range(5)]
