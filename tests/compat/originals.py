"""Runs the test scripts of DeepGEMM and FlashMLA on the CPU: `originals.py TESTS_FOLDER [SCRIPT…]`.

In: the `tests` folder of a checkout of the original. Out: a line a function, `ROW script function |
cases | passed` or what was raised, or `no case` where it looked at none; cases are – where a script
runs as a program. The scripts run as published, with two changes for a CPU:
shapes are shortened (the published ones take a GPU seconds and a CPU days), and of long lists every
n-th case is taken. Timings through CUDA's profiler are left out.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton.testing

from whalefall.compat import install
from whalefall.compat.cuda import emulate

GEMM_SCRIPTS = {
    "test_layout.py": (
        *("test_sf_layout_kernels", "test_k_grouped_sf_layout_kernels"),
        "test_k_grouped_psum_sf_layout_kernels",
    ),
    "test_bf16.py": (
        *("test_gemm", "test_m_grouped_gemm_contiguous", "test_m_grouped_gemm_masked"),
        *("test_k_grouped_gemm_contiguous", "test_cublaslt_gemm"),
    ),
    "test_fp8_fp4.py": (
        *("test_gemm", "test_m_grouped_gemm_contiguous", "test_m_grouped_gemm_masked"),
        "test_k_grouped_gemm_contiguous",
    ),
    "test_attention.py": ("test_gemm_skip_head_mid", "test_mqa_logits", "test_paged_mqa_logits"),
    "test_einsum.py": (),
    "test_hyperconnection.py": (),
    "test_lazy_init.py": (),
    "test_legacy.py": (),
    "test_mega_moe.py": (),
    "test_sanitizer.py": (),
}
# script: its function, and of how many cases one is taken
MLA_SCRIPTS = {
    "test_flash_mla_dense_decoding.py": ("test_flash_mla", 37),
    "test_flash_mla_sparse_prefill.py": ("run_test", 29),
    "test_flash_mla_sparse_decoding.py": ("test_flash_mla", 1),
    "test_fmha_sm100.py": ("test_flash_attention", 1),
}


def shortened(enumerate_cases: Callable[..., Iterator[tuple[Any, ...]]], every: int) -> Any:
    """An enumeration of `generators.py` with sizes cut to at most 512, without the repeats."""

    def cut(value: Any) -> Any:
        return min(value, 512) if type(value) is int else value

    @functools.wraps(enumerate_cases)
    def run(*args: Any, **kwargs: Any) -> Iterator[tuple[Any, ...]]:
        seen = set()
        for case in enumerate_cases(*args, **kwargs):
            small = tuple(cut(value) for value in case)
            if enumerate_cases.__name__ == "enumerate_k_grouped_contiguous":
                groups, m, n, major_a, major_b, real, _, each, run_of, alignment, psum = case
                real = [max(1, k // 16) for k in real]
                aligned = [-(-k // alignment) * alignment for k in real]
                small = (groups, min(m, 512), min(n, 512), major_a, major_b, real, aligned, each)
                small += (run_of, alignment, psum)
            elif enumerate_cases.__name__ == "enumerate_sf_layout":
                small = (case[0] // 8 + case[0] % 8, -(-case[1] // 1024) * 128, *case[2:])
            elif enumerate_cases.__name__ == "enumerate_k_grouped_sf_layout":
                small = (case[0] // 16, *case[1:])
            elif enumerate_cases.__name__ == "enumerate_m_grouped_masked":
                small = (*case[:2], min(case[2], 4), 256, min(case[4], 160), *small[5:])
            key = repr(small)
            if key not in seen:
                seen.add(key)
                if len(seen) % every == 0:
                    yield small

    return run


def namespace_of(script: Path) -> dict[str, Any]:
    """The script's names; what it would do as a program is its function `original_main`."""
    text = script.read_text()
    for quote in "\"'":
        text = text.replace(f"if __name__ == {quote}__main__{quote}:", "def original_main():")
    module = ModuleType(script.stem)
    module.__file__ = str(script)
    sys.modules[script.stem] = module  # dataclasses look their module up
    exec(compile(text, str(script), "exec"), module.__dict__)
    return module.__dict__


def outcome(body: Callable[[], Any]) -> str:
    """`passed`, or the exception in a line."""
    try:
        body()
    except (Exception, SystemExit) as error:
        return f"{type(error).__name__}: {error}".splitlines()[0][:120]
    return "passed"


def verdict(said: str, cases: int) -> str:
    """What a function said, but for one that looked at nothing."""
    return "no case" if said == "passed" and cases == 0 else said


def gemm_rows(folder: Path, script: str) -> Iterator[tuple[str, int | str, str]]:
    """One row for each function of a DeepGEMM script."""
    sys.modules.pop("generators", None)  # the last script's, whose enumerations are cut already
    generators = importlib.import_module("generators")
    count = made = 0

    def counted(enumerate_cases: Any) -> Any:
        @functools.wraps(enumerate_cases)
        def run(*args: Any, **kwargs: Any) -> Iterator[tuple[Any, ...]]:
            nonlocal count
            for case in enumerate_cases(*args, **kwargs):
                count += 1
                yield case

        return run

    def noted(generate: Any) -> Any:
        @functools.wraps(generate)
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal made
            made += 1
            return generate(*args, **kwargs)

        return run

    for name in dir(generators):
        if name.startswith("enumerate_") and "test_variants" not in name:
            every = 5 if name == "enumerate_sf_layout" else 1
            cut = shortened(getattr(generators, name), every)
            setattr(generators, name, counted(cut))
        elif name == "generate_normal":  # once a case, where a script has its own list
            setattr(generators, name, noted(getattr(generators, name)))
    names: dict[str, Any] = {}

    def load() -> None:
        nonlocal names
        names = namespace_of(folder / script)

    said = outcome(load)
    if said != "passed" or not GEMM_SCRIPTS[script]:
        yield script, "–", said if said != "passed" else outcome(names["original_main"])
        return
    for function in GEMM_SCRIPTS[script]:
        count = made = 0
        said = outcome(names[function])
        cases = count or made
        yield f"{script} {function}", cases, verdict(said, cases)


def smaller(case: Any) -> Any:
    """A FlashMLA test case, shortened in place."""
    limits = {"b": 4, "s_k": 700, "s_q": 7, "s_kv": 2100, "topk": 576, "num_runs": 0}
    for name, most in limits.items():
        if isinstance(getattr(case, name, None), int):
            setattr(case, name, min(getattr(case, name), most))
    if getattr(case, "decode", None) is not None:
        case.decode.b = min(case.decode.b, 4)
    if hasattr(case, "test_performance"):
        case.test_performance = False
    return case


def mla_rows(folder: Path, script: str) -> Iterator[tuple[str, int, str]]:
    """One row for a FlashMLA script; sparse decoding and dense prefill in their two parts."""
    function, every = MLA_SCRIPTS[script]
    names: dict[str, Any] = {}

    def load() -> None:
        nonlocal names
        names = namespace_of(folder / script)

    said = outcome(load)
    if said != "passed":
        yield f"{script} {function}", 0, said
        return
    original = names[function]
    split = {"test_flash_mla_sparse_decoding.py", "test_fmha_sm100.py"} & {script}
    for part in ("first", "second") if split else ("all",):
        ran = 0
        counter = itertools.count()

        def one(*args: Any, part: str = part, counter: Any = counter, **kwargs: Any) -> Any:
            nonlocal ran
            args, label, take = chosen(script, args, part, next(counter), every)
            if not take:
                return SKIPPED
            ran += 1
            names.update(label)
            with torch.set_grad_enabled(part == "second"):  # forward refuses to drop a gradient
                result = original(*args, **kwargs)
            if result is False or getattr(result, "is_correct", True) is False:
                raise AssertionError(f"wrong: {args[0]}")
            return result

        names[function] = one
        said = outcome(names["original_main"])
        name = f"{script} {function}{LABELS.get((script, part), '')}"
        yield name, ran, verdict(said, ran)


LABELS = {
    ("test_flash_mla_sparse_decoding.py", "first"): ", 656-byte rows",
    ("test_flash_mla_sparse_decoding.py", "second"): ", 584-byte rows",
    ("test_fmha_sm100.py", "first"): ", forward",
    ("test_fmha_sm100.py", "second"): ", backward",
}


class _Skipped:
    """What a case left out looks like to the scripts: correct, and without figures."""

    is_correct = True
    achieved_tflops = achieved_gBps = compute_memory_ratio = time_usage_per_us = 0.0

    def __bool__(self) -> bool:
        return True


SKIPPED = _Skipped()


def chosen(
    script: str, args: tuple[Any, ...], part: str, index: int, every: int
) -> tuple[tuple[Any, ...], dict[str, Any], bool]:
    """The arguments of a case, names that its function expects to be global, whether it runs."""
    if script == "test_fmha_sm100.py":
        b, q, k, varlen, h, h_k, d, dv, causal, window, backward, _ = args
        q, k = q // 32, k // 32
        h, h_k = (8, 8) if h == h_k else (8, 1)
        wanted = not backward or part == "second"
        args = (b, q, k, varlen, h, h_k, d, dv, causal, window, part == "second", True)
        return args, {"h": h, "h_k": h_k}, wanted or part == "first"
    case = args[0]
    if script == "test_flash_mla_sparse_decoding.py":
        wanted = (case.d_qk == 576) == (part == "first")
        every = 13 if part == "first" else 400
        return (smaller(case),), {}, wanted and index % every == 0
    return (smaller(case),), {}, index % every == 0


def seconds_of(body: Callable[[], Any], **_: Any) -> float:
    """Stands in for Triton's timer, which wants a GPU; milliseconds."""
    start = time.perf_counter()
    body()
    return (time.perf_counter() - start) * 1e3


def main(arguments: list[str]) -> None:
    """Print the rows of the scripts of a folder."""
    folder = Path(arguments[0]).resolve()
    scripts = arguments[1:] or [p.name for p in sorted(folder.glob("test_*.py"))]
    install()
    emulate()
    triton.testing.do_bench = seconds_of
    torch.set_num_threads = lambda count: None  # type: ignore[assignment] # 32 on two cores
    sys.path.insert(0, str(folder))
    for script in scripts:
        sys.argv = [script]
        rows = gemm_rows if script in GEMM_SCRIPTS else mla_rows
        for name, cases, said in rows(folder, script):
            print(flush=True)  # a script may have left a line open
            print(f"ROW {name} | {cases} | {said}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
