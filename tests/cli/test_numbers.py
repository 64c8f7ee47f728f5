"""Every numeric option of `plan` and `serve` refuses what makes no sense, in one line."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import get_args, get_type_hints

import pytest

from whalefall.cli.dispatch import main

# Options of which any whole number is good.
ANY = {"--seed"}
NEEDED = {"capacity": ["--model", "none.json"], "simulate": ["--model", "none.json"]}


def numeric_options() -> Iterator[tuple[list[str], str, bool]]:
    """(command line so far, option, whether fractions are allowed) of each."""
    for room in ("plan", "serve"):
        app = importlib.import_module(f"whalefall.{room}.commands").app
        commands = {
            each.name or each.callback.__name__: each.callback for each in app.registered_commands
        }
        commands[""] = app.registered_callback.callback
        for name, function in commands.items():
            name = name.removesuffix("_day")
            before = [room, *([name] if name else []), *NEEDED.get(name, [])]
            for parameter, hint in get_type_hints(function).items():
                kinds = {hint, *get_args(hint)} & {int, float}
                if kinds:
                    yield before, "--" + parameter.replace("_", "-"), float in kinds


OPTIONS = list(numeric_options())


def refused(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What the command line says, having exited with 2 in one line."""
    with pytest.raises(SystemExit) as ended:
        main(args)
    said = capsys.readouterr()
    assert ended.value.code == 2, said
    assert said.err.count("\n") == 1 and not said.out
    return said.err


def test_the_options_are_found() -> None:
    names = {option for _, option, _ in OPTIONS}
    assert len(OPTIONS) > 50
    assert {"--gpu-hour", "--kv-cache-gb", "--hours", "--ranks", "--port"} <= names


@pytest.mark.parametrize(("before", "option", "fractions"), OPTIONS)
def test_a_number_that_makes_no_sense_is_one_line(
    before: list[str], option: str, fractions: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = ["text", ""]
    if option not in ANY:
        bad += ["-1", "-inf", "inf", "nan", "1e300"] if fractions else ["-1", str(10**25)]
    for value in bad:
        said = refused([*before, option, value], capsys)
        assert said.startswith(("ConfigError: ", "UsageError: ")) and option in said


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["plan", "day", "--gpu-hour", "nan"], "--gpu-hour is nan, wanted 0 to 1e+09"),
        (["plan", "train", "--tokens", "0"], "--tokens is 0.0, wanted above 0 to 1e+21"),
        (["plan", "day", "--none", "1"], "No such option: --none"),
        (["plan", "capacity"], "Missing option '--model'"),
        (["plan", "pipeline", "--weight", "3"], "a weight part within the backward"),
        (["plan", "pipeline", "--overlapped", "0.5"], "wanted at least 0.667"),
        (["plan", "pipeline", "--svg", "."], "is a folder, wanted a file"),
        (["bench", "serve", "--url", "http://x", "--words", "0"], "--words is 0, wanted 1 to"),
        (["bench", "serve", "--url", "http://x", "--requests", "-1"], "--requests is -1"),
        (["bench", "serve", "--url", "http://x", "--max-tokens", "0"], "--max-tokens is 0"),
        (["bench", "serve", "--url", "http://x", "--concurrency", "1,99999"], "up to 4096"),
        (["plan", "capacity", "--model", "x.json", "--prefill", "9" * 30 + "x8"], "x.json"),
    ],
)
def test_a_line_says_what_would_be_right(
    args: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refused(args, capsys)
