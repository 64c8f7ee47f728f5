"""ep: the documentation's first example runs as written, and the example says what it should."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_first_example_of_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "ep.md").read_text()
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert code
    exec(compile(code[1], "docs/ep.md", "exec"), {})
    assert "rows of each local expert" in capsys.readouterr().out


@pytest.mark.ranks
def test_the_example_has_the_bits_of_one_process() -> None:
    command = [sys.executable, str(ROOT / "examples" / "02_deep_ep.py")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    out = done.stdout.splitlines()
    assert len(out) == 4
    assert all(re.fullmatch(r"rank \d: received \d+ rows, the bits of one process", o) for o in out)
    assert sum(int(o.split()[3]) for o in out) == 4 * 64 * 2
