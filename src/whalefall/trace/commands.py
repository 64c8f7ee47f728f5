"""Read execution traces: what ran, what overlapped, what is wrong with the file.

`whalefall trace summary|overlap|check|diff|cut|merge|html`: our own traces, and the PyTorch
profiler's.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from whalefall.arguments import whole
from whalefall.errors import MissingError
from whalefall.trace import rules as rules_

app = typer.Typer(add_completion=False)
File = Annotated[Path, typer.Argument(help="a Chrome trace, .json or .json.gz")]
RulesFile = Annotated[
    Path | None,
    typer.Option("--rules", help="JSON: a list of (pattern, kind), the first match decides"),
]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]

NO_WORK = (
    "no work in this trace: no event with a duration is of category compute, communication, "
    + ", ".join(sorted(rules_.WORK))
)


@app.callback()
def main() -> None:
    """Read execution traces: what ran, what overlapped, what is wrong with the file."""


def _rules(path: Path | None) -> rules_.Rules:
    return rules_.Rules() if path is None else rules_.load(path)


def _milliseconds(us: float) -> str:
    return f"{us / 1000:,.3f} ms"


def _say(text: str) -> None:
    """Print a line; what the terminal cannot show, such as half a surrogate pair, as an escape."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    typer.echo(text.encode(encoding, "backslashreplace").decode(encoding))


def _check_folder(path: Path) -> None:
    if not path.parent.is_dir():
        raise MissingError(f"trace: no folder {path.parent} to write {path.name} into")


@app.command()
def summary(
    file: File,
    rules: RulesFile = None,
    top: Annotated[int, typer.Option(help="kernels to print")] = 15,
    as_json: AsJson = False,
) -> None:
    """Streams, top kernels, overlap, idle gaps, steps."""
    from whalefall.trace.summary import summarize

    whole("trace summary: top", top, 0)
    found = summarize(file, _rules(rules))
    if as_json:
        _say(json.dumps(found.as_dict()))
        return
    if found.dropped:
        _say(f"{found.dropped} events are missing: the recorder's buffer was full (max_events)")
    if not found.streams:
        _say(NO_WORK)
        return
    _say(f"span {_milliseconds(found.span_us)}")
    for stream in found.streams:
        busy = stream.busy_us / stream.span_us if stream.span_us else 0.0
        _say(
            f"stream {stream.id:12} {stream.kernels:8} kernels  busy "
            f"{_milliseconds(stream.busy_us)} of {_milliseconds(stream.span_us)} ({busy:.1%})"
        )
    _print_overlap(found.compute_us, found.communication_us, found.overlapped_us)
    for name, step in found.steps.items():
        _say(f"steps {name}  {step['count']} x {_milliseconds(step['mean_us'])}")
    for gap in found.gaps[:3]:
        _say(
            f"idle {_milliseconds(gap.duration_us)} on {gap.stream} at "
            f"{_milliseconds(gap.start_us)}"
        )
    _say("top by time:")
    for kernel in found.kernels[:top]:
        _say(
            f"  {_milliseconds(kernel.total_us):>14} {kernel.count:7} x  {kernel.kind:13} "
            f"{kernel.name[:90]}"
        )


def _print_overlap(compute_us: float, communication_us: float, overlapped_us: float) -> None:
    ratio = overlapped_us / communication_us if communication_us else 0.0
    _say(f"compute       {_milliseconds(compute_us)}")
    _say(f"communication {_milliseconds(communication_us)}")
    _say(f"overlapped    {_milliseconds(overlapped_us)} ({ratio:.1%} of communication)")


@app.command()
def overlap(file: File, rules: RulesFile = None, as_json: AsJson = False) -> None:
    """The share of communication time during which compute runs, per device."""
    from whalefall.trace.summary import summarize

    found = summarize(file, _rules(rules))
    if as_json:
        devices = [asdict(device) for device in found.devices]
        _say(json.dumps({"overlap_ratio": found.overlap_ratio, "devices": devices}))
        return
    if not found.devices:
        _say(NO_WORK)
    for device in found.devices:
        _say(f"device {device.device}")
        _print_overlap(device.compute_us, device.communication_us, device.overlapped_us)


@app.command()
def check(file: File, as_json: AsJson = False) -> None:
    """Look for faults; exit code 1 if there are any."""
    from whalefall.trace.checker import check as check_

    report = check_(file)
    if as_json:
        problems = [asdict(problem) for problem in report.problems.values()]
        _say(json.dumps({"events": report.events, "problems": problems}))
    else:
        _say(f"{report.events} events, {len(report.problems)} kinds of fault")
        for problem in report.problems.values():
            _say(f"  {problem.count:6} x {problem.kind}: {problem.example}")
    raise typer.Exit(1 if report.problems else 0)


@app.command()
def diff(a: File, b: File, rules: RulesFile = None, as_json: AsJson = False) -> None:
    """Kernels whose total time changed most from trace A to trace B."""
    from whalefall.trace.summary import summarize

    totals = [
        {kernel.name: kernel for kernel in summarize(path, _rules(rules)).kernels}
        for path in (a, b)
    ]
    rows = []
    for name in {*totals[0], *totals[1]}:
        before, after = (side[name].total_us if name in side else 0.0 for side in totals)
        rows.append((after - before, name, before, after))
    rows.sort(key=lambda row: (-abs(row[0]), row[1]))
    if as_json:
        keys = ("change_us", "name", "a_us", "b_us")
        _say(json.dumps([dict(zip(keys, row, strict=True)) for row in rows]))
        return
    for change, name, before, after in rows[:20]:
        _say(
            f"{change / 1000:+12.3f} ms  {before / 1000:10.3f} -> {after / 1000:10.3f}  {name[:80]}"
        )


@app.command()
def cut(
    file: File,
    output: Annotated[Path, typer.Argument(help="the file to write")],
    start: Annotated[float, typer.Option("--from", help="ms from the first event")] = 0.0,
    end: Annotated[float, typer.Option("--to", help="ms from the first event")] = 1e12,
) -> None:
    """Write the part of a trace between two times."""
    from whalefall.trace.cutting import cut as cut_

    _check_folder(output)
    _say(f"{cut_(file, output, start * 1000, end * 1000)} events to {output}")


@app.command()
def merge(
    files: Annotated[list[Path], typer.Argument(help="traces of several processes")],
    output: Annotated[Path, typer.Option("--output", "-o", help="the file to write")],
) -> None:
    """Join traces of several processes on one clock."""
    from whalefall.trace.merging import merge as merge_

    _check_folder(output)
    _say(f"{merge_(files, output)} events to {output}")


@app.command()
def html(
    file: File,
    output: Annotated[Path | None, typer.Argument(help="default: beside the trace")] = None,
    rules: RulesFile = None,
) -> None:
    """Write the timeline as one self-contained page."""
    from whalefall.trace.page import write_page

    target = output or file.with_name(file.name.split(".json")[0] + ".html")
    _check_folder(target)
    _say(f"{write_page(file, target, _rules(rules))} events to {target}")
