"""Our traces in other people's readers: a browser draws them, HolisticTraceAnalysis loads them."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from whalefall import trace
from whalefall.cli import main

TRACES = Path(__file__).parents[2] / "docs" / "traces"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)


def drawn(page: Path, folder: Path) -> str:
    """The page's elements after its script has run, without a network."""
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=3000", "--no-first-run",
        "--host-resolver-rules=MAP * ~NOTFOUND", "--disable-background-networking", "--dump-dom",
        page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    return done.stdout


@pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")
def test_a_browser_draws_the_page_of_a_shipped_trace(tmp_path: Path) -> None:
    page = tmp_path / "train.html"
    with pytest.raises(SystemExit) as left:
        main(["trace", "html", str(TRACES / "train.json.gz"), str(page)])
    assert not left.value.code
    lanes = page.read_text().count('"label":')
    assert lanes > 4 and f'data-drawn="{lanes}"' in drawn(page, tmp_path)
    broken = tmp_path / "broken.html"
    broken.write_text(page.read_text().replace("const TRACE=", "const NOTHING="))
    assert "data-drawn" not in drawn(broken, tmp_path)


@pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")
@pytest.mark.parametrize("name", ["<!--<script>", "</script>"])
def test_a_browser_draws_the_page_of_any_names(name: str, tmp_path: Path) -> None:
    kernel = {"ph": "X", "cat": "kernel", "name": name, "pid": 0, "tid": name, "ts": 0, "dur": 9}
    (tmp_path / "t.json").write_text(json.dumps([kernel]))
    trace.write_page(tmp_path / "t.json", tmp_path / "t.html")
    assert 'data-drawn="1"' in drawn(tmp_path / "t.html", tmp_path)


@pytest.mark.filterwarnings("ignore")  # of that package, about its own use of pandas
def test_holistic_trace_analysis_loads_our_traces(tmp_path: Path) -> None:
    analysis = pytest.importorskip("hta.trace_analysis")
    files = {}
    for rank in range(2):
        trace.start(f"rank {rank}", rank=rank)
        for _ in range(3):
            with trace.span("gemm", category="compute"), trace.span("ep.dispatch", "communication"):
                pass
        files[rank] = str(tmp_path / f"rank{rank}.json.gz")
        trace.stop(files[rank])
    found = analysis.TraceAnalysis(trace_files=files, trace_dir=str(tmp_path))
    assert sorted(found.t.traces) == [0, 1]
    names = found.t.symbol_table.get_sym_table()
    assert "gemm" in names and all(len(frame) >= 6 for frame in found.t.traces.values())


@pytest.mark.filterwarnings("ignore")
def test_holistic_trace_analysis_loads_merged_traces_of_one_device_number(tmp_path: Path) -> None:
    analysis = pytest.importorskip("hta.trace_analysis")
    for name in ("gemm", "ncclDevKernel"):
        kernel = {
            "ph": "X", "cat": "kernel", "name": name, "pid": 0, "tid": 7, "ts": 0, "dur": 9,
            "args": {"device": 0, "stream": 7, "correlation": 1},
        }  # fmt: skip
        (tmp_path / f"{name}.json").write_text(json.dumps({"traceEvents": [kernel]}))
    merged = tmp_path / "merged.json.gz"
    trace.merge([tmp_path / "gemm.json", tmp_path / "ncclDevKernel.json"], merged)
    found = analysis.TraceAnalysis(trace_files={0: str(merged)}, trace_dir=str(tmp_path))
    _, kernels = found.get_gpu_kernel_breakdown(visualize=False, num_kernels=9)
    assert {"gemm", "ncclDevKernel"} <= set(kernels["name"])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["train", "prefill", "decode"])
def test_holistic_trace_analysis_breaks_the_shipped_traces_down(tmp_path: Path, name: str) -> None:
    analysis = pytest.importorskip("hta.trace_analysis")
    file = TRACES / f"{name}.json.gz"
    found = analysis.TraceAnalysis(trace_files={0: str(file)}, trace_dir=str(tmp_path))
    _, kernels = found.get_gpu_kernel_breakdown(visualize=False, num_kernels=100)
    ours = {kernel.name for kernel in trace.summarize(file).kernels}
    assert len(ours) > 3 and ours <= set(kernels["name"])
