"""The benchmark harness: turns, medians, and the pages that it writes."""

import json
from pathlib import Path

import pytest

from whalefall import jit
from whalefall.testing import benchmark
from whalefall.testing.benchmark import Row, interleave


def test_contenders_run_in_turns_after_their_warmups() -> None:
    ran: list[str] = []
    took = interleave({"a": lambda: ran.append("a"), "b": lambda: ran.append("b")}, 3, warmups=2)
    assert "".join(ran) == "aabb" + "ab" * 3
    assert {name: timing.rounds for name, timing in took.items()} == {"a": 3, "b": 3}


def test_a_short_call_is_repeated_to_last_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: now[0])

    def call() -> None:
        now[0] += 0.125

    took = interleave({"a": call}, rounds=2, min_time_s=1.0)
    assert now[0] == 0.125 * (1 + 2 * 8) and took["a"].median_s == 0.125


def test_timing_gives_the_middle_the_quartiles_and_the_best() -> None:
    timing = benchmark.timing([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (timing.low_s, timing.median_s, timing.high_s) == (2.0, 3.0, 4.0)
    assert (timing.best_s, timing.rounds) == (1.0, 5)


@pytest.mark.parametrize(
    ("value", "shown"), [(None, "–"), (0.12345, "0.123"), (12.0, "12"), (1234.5, "1,234")]
)
def test_a_figure_has_three_digits(value: float | None, shown: str) -> None:
    assert benchmark.figure(value) == shown


def result(room: str, *rows: Row, **facts: object) -> dict[str, object]:
    return {
        "room": room, "date": "2026-01-02", "cpu": "Some CPU", "isa": "avx2", "cores": 2,
        "commit": "abc", "command": f"whalefall bench {room}", "versions": {"peer": "1.0"},
        "rows": [vars(row) for row in rows], **facts,
    }  # fmt: skip


GOOD = Row("reading", "a peer", ">= 1x", 2.0, 1.0, "GB/s", 2.0, True)
BAD = Row("writing", "a peer", ">= 1x", 0.5, 1.0, "GB/s", 0.5, False, note="why")
WORSE = Row("sorting", "a peer", ">= 1x", 0.1, 1.0, "GB/s", 0.1, False)
FREE = Row("standing", "nobody", "", None, None, "s", None, None)


def test_a_section_names_machine_command_and_verdicts() -> None:
    text = benchmark.section(result("fs", GOOD, BAD, FREE, core_to_core_ns=[57.6, 61.0]))
    assert "2 cores 58 ns apart, ISA level `avx2`, commit abc, peer 1.0." in text
    assert "| writing (why) | a peer | 0.5 GB/s | 1 GB/s | 0.5 | >= 1x | **no** |" in text
    assert text.count("| yes |") == 1 and text.count("| – |") == 2
    moved = benchmark.section(result("fs", GOOD, core_to_core_ns=[57.6, 203.0]))
    assert "2 cores 58 to 203 ns apart, ISA" in moved
    assert "2 cores, ISA" in benchmark.section(result("fs", GOOD))  # measured before it was asked


def test_pages_hold_every_miss_and_the_readme_the_worst_of_each_room(tmp_path: Path) -> None:
    folder = tmp_path / "docs" / "benchmarks"
    folder.mkdir(parents=True)
    for one in (result("fs", GOOD, BAD, WORSE), result("trace", GOOD)):
        (folder / f"{one['room']}.json").write_text(json.dumps(one))
    (folder / "fs.notes.md").write_text("Notes of fs.\n")
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- figures -->\nold\n<!-- /figures -->\nafter\n")
    benchmark.write_page(tmp_path)
    benchmark.write_page(tmp_path)  # nothing is added twice
    page = (tmp_path / "docs" / "benchmarks.md").read_text()
    assert page.index("- fs: sorting") < page.index("## fs") < page.index("Notes of fs.")
    assert page.index("Notes of fs.") < page.index("## trace")
    assert page.count("- fs: ") == 2 and "- trace" not in page
    said = readme.read_text()
    assert said.startswith("before\n") and said.endswith("<!-- /figures -->\nafter\n")
    assert "old" not in said and "writing" not in said
    assert "| fs | reading | a peer | 2 | >= 1x | 1 of 3 |" in said
    assert "|  | sorting | a peer | 0.1 | >= 1x | **missed** |" in said
    assert said.count("| trace |") == 1


def test_notes_stand_once_behind_the_results_of_all_levels(tmp_path: Path) -> None:
    folder = tmp_path / "docs" / "benchmarks"
    folder.mkdir(parents=True)
    for room in ("gemm-amx", "gemm-avx2", "record"):
        (folder / f"{room}.json").write_text(json.dumps(result(room, GOOD)))
    (folder / "gemm.notes.md").write_text("Notes of gemm.\n")
    (tmp_path / "README.md").write_text("<!-- figures --><!-- /figures -->")
    benchmark.write_page(tmp_path)
    page = (tmp_path / "docs" / "benchmarks.md").read_text()
    assert page.count("Notes of gemm.") == 1
    assert page.index("## gemm-avx2") < page.index("Notes of gemm.") < page.index("## record")


def test_a_result_is_kept_under_its_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHALEFALL_ISA", "any")
    assert benchmark.by_level("gemm") == "gemm-any"
    monkeypatch.delenv("WHALEFALL_ISA")
    assert benchmark.by_level("gemm") == f"gemm-{jit.levels()[-1]}"


def test_a_command_is_shown_without_this_machines_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark.sys, "argv", ["x", "--folder", "/some/where/claim", "--cold"])
    monkeypatch.delenv("WHALEFALL_ISA", raising=False)
    assert benchmark.command_of("record") == "whalefall bench record --folder claim --cold"
    monkeypatch.setenv("WHALEFALL_ISA", "avx2")
    assert benchmark.command_of("gemm-avx2").startswith("WHALEFALL_ISA=avx2 whalefall bench gemm ")
