"""`whalefall eplb plan`: what a user types, and what he sees."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

from whalefall.cli import main


def run(*args: object) -> int:
    with pytest.raises(SystemExit) as left:
        main(["eplb", "plan", *map(str, args)])
    return int(left.value.code or 0)


@pytest.fixture
def loads(tmp_path: Path) -> Path:
    path = tmp_path / "loads.npy"
    np.save(path, np.random.default_rng(0).lognormal(0, 1, (4, 32)))
    return path


def test_plan_prints_json_and_writes_a_heat_map(
    loads: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, output = tmp_path / "map.html", tmp_path / "plan.json"
    assert (
        run(loads, "--replicas", 40, "--gpus", 8, "--html", page, "--output", output, "--json") == 0
    )
    facts = json.loads(capsys.readouterr().out)
    assert facts["utilisation_before"] < facts["utilisation"] <= 1
    written = json.loads(output.read_text())
    assert np.array(written["phy2log"]).shape == (4, 40)
    text = page.read_text()
    assert "http" not in text.replace("http://www.w3.org", "")  # nothing is fetched
    maps = text.split("<svg")[1:]
    assert len(maps) == 2
    for one in maps:
        drawing = ElementTree.fromstring("<svg" + one.split("</svg>")[0] + "</svg>")
        cells = [e for e in drawing.iter() if e.tag.endswith("rect")]
        assert len(cells) == 4 * 8


def test_plan_from_a_previous_placement(
    loads: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "plan.json"
    assert run(loads, "--replicas", 40, "--gpus", 8, "--output", output) == 0
    capsys.readouterr()
    sizes = (loads, "--replicas", 40, "--gpus", 8)
    assert run(*sizes, "--previous", output, "--max-moves", 2, "--json") == 0
    assert json.loads(capsys.readouterr().out)["moves"] <= 2 * 4


@pytest.mark.parametrize("text", ["[[1, 2], [3]]", "{}", "not json"])
def test_an_unreadable_file_is_one_line_and_exit_code_2(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "loads.json"
    path.write_text(text)
    assert run(path, "--replicas", 4, "--gpus", 2) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_an_object_without_its_key_names_it(loads: Path, tmp_path: Path, capsys) -> None:
    path = tmp_path / "object.json"
    for option, given, key in (
        ((), {"phy2log": [[0, 1]]}, "weight"), (("--previous",), {"weight": [[1, 2]]}, "phy2log"),
        ((), {}, "weight"),
    ):  # fmt: skip
        path.write_text(json.dumps(given))
        assert run(*((loads, *option) if option else ()), path, "--replicas", 40, "--gpus", 8) == 2
        said = capsys.readouterr().err
        assert f"no key '{key}'; its keys: {next(map(repr, given), 'none')}" in said
        assert said.count("\n") == 1


def test_a_missing_file_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "none.npy", "--replicas", 4, "--gpus", 2) == 2
    assert "no file" in capsys.readouterr().err


def test_an_empty_file_of_loads_is_one_line(tmp_path, capsys) -> None:
    (tmp_path / "loads.csv").write_text("\n")
    with pytest.raises(SystemExit) as left:
        main(["eplb", "plan", str(tmp_path / "loads.csv"), "--replicas", "4", "--gpus", "2"])
    said = capsys.readouterr().err
    assert left.value.code == 2 and "the file is empty" in said and said.count("\n") == 1


def test_json_that_nests_too_deeply_is_one_line(tmp_path, capsys) -> None:
    (tmp_path / "loads.json").write_text("[" * 100_000)
    assert run(tmp_path / "loads.json", "--replicas", 4, "--gpus", 2) == 2
    said = capsys.readouterr().err
    assert "nests too deeply" in said and said.count("\n") == 1


@pytest.mark.parametrize("option", ["--output", "--html"])
def test_what_cannot_be_written_is_named_as_given(option, loads, tmp_path, capsys) -> None:
    sizes = (loads, "--replicas", 40, "--gpus", 8, option)
    (tmp_path / "file").touch()
    for target, error, why in (
        (tmp_path / "no" / "x.json", "FileNotFoundError", "No such file or directory"),
        (tmp_path / "file" / "x.json", "NotADirectoryError", "Not a directory"),
        (tmp_path, "IsADirectoryError", "Is a directory"),
    ):
        assert run(*sizes, target) == 2
        assert capsys.readouterr().err == f"{error}: {target}: {why}\n"
