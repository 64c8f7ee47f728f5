"""What this machine is: cores, ISA level, compiler, memory, measured bandwidth and peak, GPU.

Asked by `whalefall doctor`, `model check`, `plan` and the benchmarks. Measurements are kept in the
cache folder under a key of CPU model, core count and level, so another machine measures anew.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import json
import mmap
import os
import shutil
import statistics
import subprocess
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from whalefall import env
from whalefall.jit import isa, pool
from whalefall.jit.compile import CompileError, Library, build
from whalefall.jit.compiler import find_compiler, without

__all__ = [
    "cpu_model",
    "denormals_are_slow",
    "describe",
    "dot_is_fast",
    "fma_peak",
    "halves_are_fast",
    "kept",
    "limits",
    "line_transfer_ns",
    "memory_bytes",
    "read_bandwidth",
    "tile_is_fast",
    "tile_peak",
]

_READ_BYTES = 1 << 29
# Of one round of limits.cpp on a thread: 128 times 14 vectors of 16, 4 products of 16 x 16 x 32.
_FMA_FLOPS = 2 * 128 * 14 * 16
_TILE_FLOPS = 2 * 4 * 16 * 16 * 32
WITHOUT_COMPILER = (  # `make` and README say the same
    "none: models, gemm and attention answer by the numpy reference, slowly; pip install ziglang"
)


def cpu_model() -> str:
    """The CPU's name with family and model, since clouds hide the marketing name."""
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    name = fields.get("model name", os.uname().machine)
    if "cpu family" not in fields:
        return name
    return f"{name} (family {fields['cpu family']} model {fields.get('model', '?')})"


def memory_bytes() -> int:
    """Physical memory, or the control group's limit where that is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        text = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except OSError:
        return total
    return min(total, int(text)) if text.isdigit() else total


def _library(level: str | None = None) -> Library:
    library = build(Path(__file__).parent / "native" / "limits.cpp", level=level)
    library.wf_read.restype = ctypes.c_int64
    library.wf_read.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    library.wf_fma.restype = ctypes.c_double
    library.wf_fma.argtypes = [ctypes.c_int64, ctypes.c_void_p]
    library.wf_seconds_with_factor.restype = ctypes.c_double
    library.wf_seconds_with_factor.argtypes = [ctypes.c_int64, ctypes.c_float, ctypes.c_void_p]
    library.wf_seconds_of_dots.restype = ctypes.c_double
    library.wf_seconds_of_dots.argtypes = [ctypes.c_int64]
    library.wf_seconds_of_tiles.restype = ctypes.c_double
    library.wf_seconds_of_tiles.argtypes = [ctypes.c_int64]
    library.wf_tiles.restype = ctypes.c_double
    library.wf_tiles.argtypes = [ctypes.c_int64]
    library.wf_seconds_of_turns.restype = ctypes.c_double
    library.wf_seconds_of_turns.argtypes = [ctypes.c_int64, ctypes.c_int32, ctypes.c_int32]
    return library


def read_bandwidth(rounds: int = 7) -> float:
    """Bytes a second that all kernel threads read from memory (median), huge pages asked for."""
    library = _library()
    with mmap.mmap(-1, _READ_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:
        area.madvise(mmap.MADV_HUGEPAGE)
        view = ctypes.c_char.from_buffer(area)
        address = ctypes.addressof(view)
        ctypes.memset(address, 1, _READ_BYTES)

        def read() -> float:
            library.wf_read(address, _READ_BYTES)
            return _READ_BYTES

        speed = _rate(read, rounds)
        del view
    return speed


def fma_peak(rounds: int = 7) -> float:
    """FLOP/s of fp32 multiply-adds in registers on all kernel threads (median)."""
    library, sink = _library(), (ctypes.c_float * 64)()
    return _rate(lambda: library.wf_fma(6_000, sink), rounds)


def tile_peak(rounds: int = 7) -> float:
    """FLOP/s of bf16 products of AMX tiles on all kernel threads (median); 0 without AMX."""
    library = _library()
    return _rate(lambda: library.wf_tiles(50_000), rounds)


def _rate(work: Callable[[], float], rounds: int) -> float:
    """What `work` says it did, a second (median)."""
    samples = []
    for _ in range(rounds):
        start = time.perf_counter()
        done = work()
        samples.append(done / (time.perf_counter() - start))
    return statistics.median(samples)


def line_transfer_ns(rounds: int = 2_000) -> float | None:
    """Nanoseconds that a cache line takes from the first core to the last; None with one core.

    Where they share a last-level cache it is some 40 to 70, else 150 and more. A virtual machine's
    cores may be in one cache now and in two later, and with two, memory is read nearly twice as
    fast: a figure of many gigabytes a second means little without this one.
    """
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        return None
    turns = _library().wf_seconds_of_turns
    seconds = min(turns(rounds, cores[0], cores[-1]) for _ in range(25))
    return seconds / (2 * rounds) * 1e9


@functools.cache
def denormals_are_slow() -> bool:
    """Whether multiply-adds with a subnormal factor trap to microcode on this CPU (kept on disk).

    They run at full speed on AMD's Zen; where they do not, `whalefall/simd.h` decodes E4M3 without
    them (WF_SLOW_DENORMALS).
    """

    def measured() -> dict[str, float]:
        seconds, sink = _library().wf_seconds_with_factor, (ctypes.c_float * 64)()
        slow, plain = undisturbed(
            lambda: seconds(60, 2.0**-128, sink), lambda: seconds(60, 1.0, sink)
        )
        return {"subnormal_over_normal": slow / plain}

    return kept(f"{cpu_model()}|denormals", measured)["subnormal_over_normal"] > 3


@functools.cache
def dot_is_fast(level: str) -> bool:
    """Whether bf16 dots do clearly more than fp32 multiply-adds at `level` (kept on disk).

    They do twice as much on AMD's Zen 4 and 5, half as much on some Xeons that have them too.
    Kernels' last bits hang on the answer, so whichever process measures first does it for all that
    share the cache folder.
    """
    if isa.LEVELS[level].rank < isa.LEVELS["avx512bf16"].rank or find_compiler() is None:
        return False

    def measured() -> dict[str, float]:
        library, sink = _library(level), (ctypes.c_float * 64)()
        dots, fmas = library.wf_seconds_of_dots, library.wf_seconds_with_factor
        dot, fma = undisturbed(lambda: dots(250), lambda: fmas(250, 1.0, sink))
        # as many instructions in both, each dot doing twice the products
        return {"dot_over_fma": 2 * fma / dot if dot else 0.0}

    return kept(f"{cpu_model()}|{level}|dot", measured)["dot_over_fma"] > 1.3


@functools.cache
def tile_is_fast(level: str) -> bool:
    """Whether AMX's tiles multiply bf16 clearly faster than fp32 multiply-adds (kept on disk).

    Sixteen times as fast on a Xeon of 2023; where they are, dots are not asked for.
    """
    if isa.LEVELS[level].rank < isa.LEVELS["amx"].rank or find_compiler() is None:
        return False

    def measured() -> dict[str, float]:
        library, sink = _library(level), (ctypes.c_float * 64)()
        tiles, fmas = library.wf_seconds_of_tiles, library.wf_seconds_with_factor
        tile, fma = undisturbed(lambda: tiles(500), lambda: fmas(250, 1.0, sink))
        return {"tile_over_fma": _TILE_FLOPS * 500 / tile / (_FMA_FLOPS * 250 / fma)}

    return kept(f"{cpu_model()}|{level}|tile", measured)["tile_over_fma"] > 1.3


def halves_are_fast(level: str) -> bool:
    """Whether kernels at `level` multiply bf16 as bf16, by tiles or dots, instead of fp32."""
    return tile_is_fast(level) or dot_is_fast(level)


def undisturbed(
    first: Callable[[], float], second: Callable[[], float], rounds: int = 400
) -> tuple[float, float]:
    """The least that two measurements say when taken in turn, each time seen twice.

    A neighbour only ever adds to a time, so the least is the truth once another sample comes within
    3 % of it: at once on a quiet machine, later on a crowded one. After `rounds` the least counts.
    """
    samples: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for taken, measure in zip(samples, (first, second), strict=True):
            taken.append(measure())
        if len(samples[0]) >= 9 and all(_seen_twice(taken) for taken in samples):
            break
    return min(samples[0]), min(samples[1])


def _seen_twice(samples: list[float]) -> bool:
    least, next_least = sorted(samples)[:2]
    return next_least <= least * 1.03


def kept(key: str, measure: Callable[[], dict[str, float]], anew: bool = False) -> dict[str, float]:
    """What machine.json says under `key`; where it says nothing, `measure`, once for all processes.

    Others that ask meanwhile wait and take the first one's answer.

    Args:
        key: what was measured, with all that the figures hang on (CPU, threads, level, version).
        anew: measure in any case.
    """
    known = _remembered()
    if anew or key not in known:
        with _locked(f"{zlib.crc32(key.encode()):08x}"):  # `measure` may ask for other keys
            known = _remembered()
            if anew or key not in known:
                found = measure()
                with _locked("machine"):
                    known = _write({**_remembered(), key: found})
    return known[key]


def _remembered() -> dict[str, dict[str, float]]:
    try:
        found = json.loads(_path().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {key: figures for key, figures in found.items() if _are_figures(figures)}


def _are_figures(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(figure, int | float) for figure in value.values())
    )


@contextlib.contextmanager
def _locked(name: str) -> Iterator[None]:
    """No other process holds the lock of that name in the cache folder meanwhile."""
    with env.using_cache():
        lock = open(_path().with_name(f"{name}.lock"), "ab")  # noqa: SIM115
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _write(known: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    temporary = _path().with_suffix(f".{os.getpid()}.tmp")
    with env.using_cache():
        temporary.write_text(json.dumps(known, indent=1), encoding="utf-8")
        os.replace(temporary, _path())
    return known


def _path() -> Path:
    return env.cache_dir() / "machine.json"


def limits(measure: bool = False) -> dict[str, float]:
    """Measured `read_bytes_s` and `fma_flops` of this machine, from the cache unless `measure`."""
    key = f"{cpu_model()}|{pool.get_num_threads()}|{isa.best_level()}"
    return kept(
        key, lambda: {"read_bytes_s": read_bandwidth(), "fma_flops": fma_peak()}, anew=measure
    )


def bf16_flops() -> float:
    """The measured peak of what kernels multiply bf16 with: tiles, dots or FMAs."""
    level, peak = isa.best_level(), limits()["fma_flops"]
    if tile_is_fast(level):
        return peak * _remembered()[f"{cpu_model()}|{level}|tile"]["tile_over_fma"]
    if not dot_is_fast(level):
        return peak
    return peak * _remembered()[f"{cpu_model()}|{level}|dot"]["dot_over_fma"]


def gpus() -> list[str]:
    """Names of NVIDIA GPUs that nvidia-smi lists; empty where there is none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=name", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    return done.stdout.split("\n")[:-1] if done.returncode == 0 else []


def describe(measure: bool = False) -> dict[str, Any]:
    """Everything `whalefall doctor` says, as plain values for JSON."""
    tool = find_compiler()
    facts: dict[str, Any] = {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "isa": isa.best_level(),
        "isa_levels": list(isa.levels()),
        "memory_gb": round(memory_bytes() / 1e9, 1),
        "compiler": f"{' '.join(tool.command)}: {tool.version}" if tool else without(),
        "gpu": gpus() or "none",
        "kernels": "native" if tool else WITHOUT_COMPILER,
    }
    if tool:
        try:
            facts |= _measured(measure)
        except CompileError as error:  # what there is to say of a machine is said all the same
            facts["kernels"] = f"none: {str(error).splitlines()[0]}"
    return facts


def _measured(anew: bool) -> dict[str, Any]:
    measured = limits(anew)
    facts: dict[str, Any] = {
        "threads": pool.get_num_threads(),
        "read_gb_s": round(measured["read_bytes_s"] / 1e9, 1),
        "fma_gflops": round(measured["fma_flops"] / 1e9, 1),
        "bf16_gflops": round(bf16_flops() / 1e9, 1),
    }
    if anew and (line_ns := line_transfer_ns()) is not None:
        facts["core_to_core_ns"] = round(line_ns)
    return facts
