"""The planner's cuts against trying all of them, and the picture it draws."""

from __future__ import annotations

import itertools
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from whalefall import trace
from whalefall.cli import main
from whalefall.errors import ConfigError
from whalefall.pipeline import execute, make, simulate, timeline
from whalefall.pipeline.planning import Layer, Workload, even_cut, plan, uniform


def cuts(layers: int, stages: int) -> list[tuple[int, ...]]:
    """Every way to cut layers into stages."""
    return [
        tuple(b - a for a, b in itertools.pairwise((0, *inner, layers)))
        for inner in itertools.combinations(range(1, layers), stages - 1)
    ]


@pytest.mark.parametrize("costs", [[1, 1, 1, 1, 5], [3, 1, 4, 1, 5, 9, 2, 6], [1] * 7])
@pytest.mark.parametrize("stages", [1, 2, 4])
def test_the_even_cut_has_the_cheapest_worst_stage(costs: list[float], stages: int) -> None:
    def worst(cut: tuple[int, ...]) -> float:
        bounds = [0, *itertools.accumulate(cut)]
        return max(sum(costs[a:b]) for a, b in itertools.pairwise(bounds))

    found = even_cut(costs, stages)
    assert worst(found) == min(worst(cut) for cut in cuts(len(costs), stages))


def test_more_stages_than_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match="3 layers cannot make 4 stages"):
        even_cut([1, 1, 1], 4)


def test_dualpipe_wins_where_everything_is_even() -> None:
    found = plan(Workload(uniform(8, 1, 2, 1), 4, 12))
    assert found[0].schedule.name == "dualpipe"
    assert found[0].cut == (2, 2, 2, 2)
    assert {c.schedule.name for c in found} == {
        "1f1b", "zb1p", "interleaved", "dualpipe", "dualpipev",
    }  # fmt: skip


def test_a_heavy_last_layer_gets_a_stage_with_few_others() -> None:
    layers = [*uniform(11, 1, 2, 1), Layer(4, 8, 4)]
    (found,) = plan(Workload(layers, 4, 12), ["1f1b"])
    assert found.cut[-1] < found.cut[0]
    naive = plan(Workload(uniform(12, 1.25, 2.5, 1.25), 4, 12), ["1f1b"])[0]
    assert found.step < 1.35 * naive.step


def test_a_memory_limit_puts_what_fits_first() -> None:
    layers = [Layer(1, 2, 1, parameters=10, activations=1) for _ in range(8)]
    free = plan(Workload(layers, 4, 12))
    assert free[0].schedule.name == "dualpipe"  # two copies of the parameters
    tight = plan(Workload(layers, 4, 12, memory_limit=30))
    assert tight[0].fits
    assert tight[0].schedule.name != "dualpipe"
    assert not next(c for c in tight if c.schedule.name == "dualpipe").fits


def test_sizes_that_allow_no_schedule_say_why() -> None:
    with pytest.raises(ConfigError, match="even number of ranks"):
        plan(Workload(uniform(6, 1, 2, 1), 3, 6), ["dualpipe"])


def boxes(path: Path) -> int:
    root = ElementTree.parse(path).getroot()
    return sum(1 for e in root.iter() if e.tag.endswith("rect") and e.find("*") is not None)


def test_plan_and_real_run_are_drawn_under_one_another(tmp_path: Path) -> None:
    class Nothing:
        def run(self, action: object) -> None:
            pass

        def begin(self, action: object) -> object:
            return lambda: None

    schedule = make("dualpipe", 2, 4)
    paths = []
    for rank in range(2):
        trace.start(rank=rank)
        execute(schedule.ranks[rank], Nothing())
        paths.append(tmp_path / f"{rank}.json")
        trace.stop(paths[-1])
    trace.merge(paths, tmp_path / "all.json")
    real = timeline.of_trace("real", trace.TraceFile(tmp_path / "all.json"))
    planned = timeline.of_result("plan", simulate(schedule))
    assert [[b.kind for b in row] for _, row in real.rows] == [
        [b.kind for b in row] for _, row in planned.rows
    ]
    assert [[b.label for b in row] for _, row in real.rows] == [
        [b.label for b in row] for _, row in planned.rows
    ]
    timeline.write([planned, real], tmp_path / "both.svg")
    actions = sum(len(schedule.compute(rank)) for rank in range(2))
    assert boxes(tmp_path / "both.svg") == 2 * actions


def run(*args: object) -> int:
    with pytest.raises(SystemExit) as left:
        main(["plan", "pipeline", *map(str, args)])
    return int(left.value.code or 0)


def test_the_command_prints_the_formulas_and_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    svg = tmp_path / "p.svg"
    assert run("--ranks", 4, "--chunks", 12, "--svg", svg, "--json") == 0
    rows = {row["schedule"]: row for row in json.loads(capsys.readouterr().out)}
    for name in ("1f1b", "zb1p", "dualpipe", "dualpipev"):
        assert rows[name]["bubble"] == pytest.approx(rows[name]["formula_bubble"])
    assert boxes(svg) > 100


def test_the_command_reads_layers_and_refuses_bad_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "layers.json"
    path.write_text(json.dumps([{"f": 1, "b": 2, "w": 1, "parameters": 5}] * 8))
    assert run("--ranks", 2, "--chunks", 4, "--layers", path, "--memory-limit", 25) == 0
    assert "does not fit" in capsys.readouterr().out
    path.write_text('[{"f": 1, "b": 1, "w": 2}]')
    assert run("--ranks", 1, "--chunks", 2, "--layers", path) == 2
    path.write_text("[3]")
    assert run("--layers", path) == 2
    assert run("--layers", tmp_path / "none.json") == 2
    assert capsys.readouterr().err.count("\n") == 3
