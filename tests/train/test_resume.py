"""A run that was killed goes on as if nothing had been; a checkpoint is whole or not there."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from tests.pipeline import ranks
from tests.train import jobs
from whalefall.errors import ConfigError, CorruptError, MissingError
from whalefall.train import read_history, read_recipe, read_tensors, run
from whalefall.train.checkpoint import Store
from whalefall.train.data import Rows

CHANGES: dict[str, Any] = jobs.layout(data=2) | {"optimizer.average": 0.9}


def numbers(folder: Path) -> list[tuple[Any, ...]]:
    """A run's history without its times."""
    lines = read_history(folder / "history.jsonl")
    return [tuple(v for k, v in sorted(line.items()) if k != "seconds") for line in lines]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    jobs.on_ranks(jobs.run_to_end, jobs.folder_with_recipe(folder), CHANGES, False)
    return folder / "run"


def start(path: Path) -> list[Any]:
    """The run's two ranks as processes."""
    port = ranks.free_port()
    started = []
    for rank in range(2):
        _, there = ranks.CONTEXT.Pipe(duplex=False)
        arguments = (there, jobs.run_to_end, rank, 2, port, (str(path), CHANGES, False))
        process = ranks.CONTEXT.Process(target=ranks._main, args=arguments)
        process.start()
        started.append(process)
    return started


@pytest.mark.ranks
@pytest.mark.parametrize("at", [3, 5])  # just before a checkpoint is written or while it is; after
def test_kill_9_and_resume_give_the_same_losses_and_weights(
    tmp_path: Path, undisturbed: Path, at: int
) -> None:
    path = jobs.folder_with_recipe(tmp_path)
    started = start(path)
    while len(read_history(tmp_path / "run/history.jsonl")) < at:
        time.sleep(0.001)
        assert all(process.is_alive() for process in started)
    for process in started:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    jobs.on_ranks(jobs.run_to_end, path, CHANGES, True)
    assert numbers(tmp_path / "run") == numbers(undisturbed)
    mine, wanted = (read_tensors(str(folder))[0] for folder in (tmp_path / "run", undisturbed))
    assert mine.keys() == wanted.keys()
    assert all(np.array_equal(mine[name], wanted[name]) for name in wanted)


def test_a_step_s_rows_depend_on_the_step_alone(tmp_path: Path) -> None:
    path = jobs.folder_with_recipe(tmp_path)
    whole = Rows(read_recipe(path)).batch(200).tokens.tolist()
    parts = Rows(read_recipe(path, jobs.layout(data=2, chunks=2)))
    shards = [parts.batch(200, shard).tokens.tolist() for shard in range(2)]
    assert sorted(whole) == sorted(shards[0] + shards[1])
    again = Rows(read_recipe(path, jobs.layout(data=2, chunks=2)))
    assert again.batch(200, 1).tokens.tolist() == shards[1]


def test_every_row_comes_once_an_epoch(tmp_path: Path) -> None:
    rows = Rows(read_recipe(jobs.folder_with_recipe(tmp_path)))
    stream = rows.sources[0]
    total = len(stream.reader)
    seen = [row[0].tobytes() for row in stream.read(0, total)]
    assert sorted(seen) == sorted(bytes(sample) for sample in stream.reader.read(range(total)))
    assert seen != [row[0].tobytes() for row in stream.read(total, total)]


@pytest.mark.ranks
def test_another_layout_goes_on_from_a_checkpoint(tmp_path: Path, undisturbed: Path) -> None:
    path = jobs.folder_with_recipe(tmp_path)
    jobs.on_ranks(jobs.run_to_end, path, {"optimizer.average": 0.9, "run.steps": 8}, False)
    store = Store(str(tmp_path / "run/checkpoints"), 2)
    store.files.clear("step-00000008")
    other = jobs.layout(pipeline=2, schedule="dualpipe", chunks=4) | {"optimizer.average": 0.9}
    jobs.on_ranks(jobs.run_to_end, path, other, True)
    losses = [line["loss"] for line in read_history(tmp_path / "run/history.jsonl")]
    wanted = [line["loss"] for line in read_history(undisturbed / "history.jsonl")]
    assert losses == pytest.approx(wanted, rel=1e-5)


def test_the_newest_checkpoints_stay(undisturbed: Path) -> None:
    names = sorted(path.name for path in (undisturbed / "checkpoints").iterdir())
    assert names == ["step-00000006", "step-00000008"]


@pytest.mark.ranks
def test_what_was_half_written_is_no_checkpoint(tmp_path: Path, undisturbed: Path) -> None:
    half = tmp_path / "step-00000009.new"
    half.mkdir()
    (half / "__0_0.distcp").write_bytes(b"torn")
    assert Store(str(tmp_path), 2).steps() == []
    with pytest.raises(MissingError, match="no checkpoint"):
        read_tensors(str(tmp_path))


@pytest.mark.ranks
def test_checkpoints_may_be_at_a_url(tmp_path: Path) -> None:
    path = jobs.folder_with_recipe(tmp_path)
    changes = {"checkpoint.folder": f"file://{tmp_path}/far", "optimizer.betas": [0.9, 0.95]}
    jobs.on_ranks(jobs.run_to_end, path, changes, False)
    assert Store(changes["checkpoint.folder"], 2).steps() == [6, 8]
    here, stamp = read_tensors(f"{changes['checkpoint.folder']}/step-00000006")
    assert stamp.step == 6
    Store(changes["checkpoint.folder"], 2).files.clear("step-00000008")
    lines = numbers(tmp_path / "run")
    jobs.on_ranks(jobs.run_to_end, path, changes, True)
    assert numbers(tmp_path / "run") == lines
    assert not np.array_equal(
        read_tensors(changes["checkpoint.folder"])[0]["lm_head.weight"], here["lm_head.weight"]
    )


def test_a_damaged_checkpoint_is_named(tmp_path: Path, undisturbed: Path) -> None:
    import shutil

    shutil.copytree(undisturbed / "checkpoints/step-00000008", tmp_path / "step-00000008")
    data = next(tmp_path.glob("step-*/*.distcp"))
    data.write_bytes(data.read_bytes()[:1000])
    with pytest.raises(CorruptError, match="step-00000008 cannot be read"):
        read_tensors(str(tmp_path / "step-00000008"))


@pytest.mark.parametrize("change", [{"optimizer.rate": 1e-3}, {"model.hidden_size": 64}])
def test_a_checkpoint_of_another_recipe_is_refused(
    tmp_path: Path, undisturbed: Path, change: dict[str, Any]
) -> None:
    path = jobs.folder_with_recipe(tmp_path)
    changes = {"run.folder": str(undisturbed), "optimizer.average": 0.9} | change
    with pytest.raises(ConfigError, match=r"step-00000008 is of another recipe"):
        run(path, resume=True, changes=changes)
    with pytest.raises(AssertionError, match="is of another recipe"):
        jobs.on_ranks(jobs.run_to_end, path, changes, True)


def test_data_that_is_not_there_is_said_before_ranks_start(tmp_path: Path) -> None:
    path = jobs.folder_with_recipe(tmp_path)
    (tmp_path / "stream.ffr").unlink()
    with pytest.raises(MissingError, match=r"no files .*stream\.ffr"):
        run(path)


def test_a_used_folder_wants_resume(tmp_path: Path, undisturbed: Path) -> None:
    path = jobs.folder_with_recipe(tmp_path)
    with pytest.raises(ConfigError, match="has a checkpoint of step 8; --resume goes on"):
        run(path, changes=CHANGES | {"run.folder": str(undisturbed)})
