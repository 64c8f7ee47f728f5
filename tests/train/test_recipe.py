"""A bad recipe gets one line that names file, key, value and what was wanted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from tests.train import jobs
from whalefall import train
from whalefall.cli import main
from whalefall.errors import CorruptError, MissingError, ShapeError, WhalefallError
from whalefall.train import read_recipe, write_rows, write_stream
from whalefall.train.data import Rows

BAD = {
    "run.steps=0": "run.steps is 0: wanted greater than or equal to 1",
    "run.precision='fp4'": "run.precision is 'fp4': wanted 'fp8', 'bf16' or 'fp32'",
    "run.stepz=1": "unknown key run.stepz",
    "optimizer.rate='fast'": "optimizer.rate is 'fast': wanted a valid number",
    "parallel.data=3": "8 rows a step, wanted a multiple of 3 = 3 shards x 1 chunks",
    "parallel.schedule='gpipe'": "parallel.schedule is 'gpipe': wanted '1f1b'",
    "parallel.expert=8": "8 rows a step",
    "data.length=65": "data.length is 65, the model has 64 positions",
    "data.source=[]": "data.source is []: List should have at least 1 item",
    "model.hidden_size=-1": r"[model]: hidden_size is -1, wanted a whole number from 0",
}


def test_the_public_names() -> None:
    assert train.__all__ == [
        "DivergedError", "Precision", "Rank", "Recipe", "Report", "draw_curves",
        "export_checkpoint", "read_history", "read_recipe", "read_tensors", "run", "train",
        "write_rows", "write_stream",
    ]  # fmt: skip
    assert all(hasattr(train, name) for name in train.__all__)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return jobs.folder_with_recipe(tmp_path)


@pytest.mark.parametrize("change", BAD)
def test_a_bad_key_is_one_line(
    recipe: Path, change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = ["--set", "parallel.chunks=2"] if "expert" in change else []
    with pytest.raises(SystemExit) as stop:
        main(["train", str(recipe), "--check", "--set", change, *extra])
    assert stop.value.code == 2
    text = capsys.readouterr().err
    assert BAD[change] in text
    assert str(recipe) in text
    assert text.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"parallel.pipeline": 3, "parallel.schedule": "dualpipe"}, "even number of ranks"),
        ({"parallel.pipeline": 2, "parallel.schedule": "dualpipev"}, "at least 4 chunks"),
        ({"parallel.expert": 3}, "divisor of the model's 8 experts"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(recipe: Path, changes: dict, text: str) -> None:
    with pytest.raises(WhalefallError, match=text):
        read_recipe(recipe, changes | {"data.source": [{"files": "stream.ffr", "rows": 12}]})


def test_check_says_what_would_be_trained(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", str(recipe), "--check", "--set", "parallel.data=2"])
    assert stop.value.code == 0
    assert "ranks: 2 = 1 pipeline (1f1b, 1 chunks) x 1 expert x 2 data" in capsys.readouterr().out


def test_no_recipe_and_broken_toml(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="no recipe"):
        read_recipe(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("[run\n")
    with pytest.raises(WhalefallError, match=r"bad.toml: Expected"):
        read_recipe(tmp_path / "bad.toml")
    (tmp_path / "empty.toml").write_text("")
    with pytest.raises(WhalefallError, match=r"empty\.toml: no model; it has no default"):
        read_recipe(tmp_path / "empty.toml")


def test_rows_that_are_no_rows_are_named(tmp_path: Path, recipe: Path) -> None:
    with pytest.raises(MissingError, match="no files"):
        Rows(read_recipe(recipe, {"data.source": [{"files": "none-*.ffr", "rows": 8}]}))
    write_stream(tmp_path / "long.ffr", range(90), 18)
    rows = Rows(read_recipe(recipe, {"data.source": [{"files": "long.ffr", "rows": 8}]}))
    with pytest.raises(CorruptError, match=r"has 72 bytes, wanted 64 or 192 for data\.length 16"):
        rows.batch(0)
    write_stream(tmp_path / "wrong.ffr", range(1, 1601), 16)
    rows = Rows(read_recipe(recipe, {"data.source": [{"files": "wrong.ffr", "rows": 8}]}))
    with pytest.raises(CorruptError, match="the model knows 0 … 95"):
        rows.batch(0)
    with pytest.raises(ShapeError, match=r"\[2, 16\]"):
        write_rows(tmp_path / "two.ffr", [np.zeros((2, 16), np.int32)])
