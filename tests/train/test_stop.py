"""What stops a run says why, where, and leaves the last checkpoint whole."""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("torch")

from tests.train import jobs
from whalefall.errors import RankFailure
from whalefall.launch import Group
from whalefall.train import job, read_history, read_tensors, run


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("layout", "victim", "tensor"),
    [
        (jobs.layout(data=2), 1, "output of model.layers.3"),
        (jobs.layout(pipeline=2, chunks=2), 0, "output of model.layers.2"),
    ],
    ids=["data", "pipeline"],
)
def test_nan_names_step_rank_and_tensor_and_spares_the_checkpoint(
    tmp_path: Path, layout: dict, victim: int, tensor: str
) -> None:
    path = jobs.folder_with_recipe(tmp_path)
    found = jobs.on_ranks(jobs.poisoned, path, layout, victim)
    assert found[0] == found[1]
    assert f"step 4: rank {victim}: {tensor} is NaN or infinite" in found[0]
    assert found[0].endswith("step-00000003")
    tensors, stamp = read_tensors(found[0].rsplit(" ", 1)[1])
    assert stamp.step == 3
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())


@pytest.mark.ranks
def test_a_killed_rank_ends_the_job_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = jobs.folder_with_recipe(tmp_path)
    groups: list[Group] = []

    class Watched(Group):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)  # type: ignore[arg-type]
            groups.append(self)

    def kill() -> None:
        while not read_history(tmp_path / "run/history.jsonl"):
            time.sleep(0.01)
        groups[0].kill("rank 1")

    monkeypatch.setattr(job, "Group", Watched)
    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(RankFailure) as error:
        run(path, changes=jobs.layout(data=2) | {"run.steps": 100000})
    killer.join()
    first = str(error.value).splitlines()[0]
    assert re.match(r"launch: rank 1 \(pid \d+\) ended with SIGKILL after", first)
    assert all(member.exit() is not None for member in groups[0].members.values())
