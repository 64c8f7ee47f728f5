"""Scripts written for deep_gemm run unchanged: imports, names, CUDA devices mapped to the CPU."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType

import pytest

from whalefall import compat

# Written for the original: what its own test_fp8_fp4.py does for one dense and one grouped shape.
SCRIPT = """
import sys
import torch
import deep_gemm
from deep_gemm.testing import bench_kineto, calc_diff, get_arch_major
from deep_gemm.utils.math import per_block_cast_to_fp8, per_token_cast_to_fp8
from deep_gemm.utils import get_mn_major_tma_aligned_tensor

torch.manual_seed(0)
torch.backends.cuda.matmul.allow_tf32 = True
m, n, k = 128, 576, 1024
a = torch.randn((m, k), device='cuda', dtype=torch.bfloat16)
b = torch.randn((n, k), device='cuda', dtype=torch.bfloat16)
d = torch.empty((m, n), device='cuda', dtype=torch.bfloat16)
x, y = per_token_cast_to_fp8(a, use_ue8m0=False), per_block_cast_to_fp8(b, use_ue8m0=False)
x = (x[0], get_mn_major_tma_aligned_tensor(x[1]))
deep_gemm.fp8_gemm_nt(x, y, d)
diff = calc_diff(d, a @ b.t())
assert diff < 1e-3, diff
t = bench_kineto(lambda: deep_gemm.fp8_gemm_nt(x, y, d), 'fp8_gemm', suppress_kineto_output=True)
index = torch.arange(2, device='cuda', dtype=torch.int32).repeat_interleave(64)
w = (torch.stack([y[0], y[0]]), torch.stack([y[1], y[1] * 2]))
deep_gemm.m_grouped_fp8_gemm_nt_contiguous(x, w, d, index)
ref = a @ b.t()
ref[64:] *= 2
assert calc_diff(d, ref) < 1e-3
torch.cuda.synchronize()
print('passed', deep_gemm.__version__, get_arch_major(), sys.argv[1], t > 0)
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "whalefall.compat", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_script_of_the_original_runs_on_the_cpu(tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    done = run("--device", "cpu", str(path), "word")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "passed 2.6.1 9 word True\n"


def test_install_and_uninstall() -> None:
    compat.install()
    try:
        import deep_gemm  # type: ignore[import-not-found]
        from deep_gemm.utils import layout  # type: ignore[import-not-found]

        from whalefall import gemm

        assert deep_gemm.fp8_gemm_nt is gemm.fp8_gemm_nt
        assert layout.get_tma_aligned_size(5, 4) == 8
        assert deep_gemm.testing.calc_diff is not None
    finally:
        compat.uninstall()
    with pytest.raises(ImportError):
        import deep_gemm


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "usage: python -m whalefall.compat"),
        (("--device", "tpu", "x.py"), "--device 'tpu', wanted cpu or cuda"),
        (("nowhere.py",), "no script nowhere.py"),
    ],
)
def test_a_bad_command_line_gets_one_line_and_exit_code_2(
    arguments: tuple[str, ...], words: str
) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


# module and what is there; signatures as recorded of DeepGEMM 54e2261
RECORDED = """
testing.bench: bench(fn, num_warmups=5, num_tests=10, high_precision=False)
testing.bench: bench_kineto(fn, kernel_names, num_tests=30, suppress_kineto_output=False, \
trace_path=None, flush_l2=True, with_multiple_kernels=False, barrier=None)
testing.bench: class empty_suppress()
testing.bench: class suppress_stdout_stderr()
testing.numeric: assert_bitwise_equal(x, y, label='')
testing.numeric: calc_diff(x, y)
testing.numeric: count_bytes(*tensors)
testing.utils: get_arch_major()
testing.utils: ignore_env(name, condition)
testing.utils: test_filter(condition)
layout: get_tma_aligned_size(x, element_size, /)
utils.layout: get_tma_aligned_size(x, element_size, /)
math: align(x, y)
utils.math: per_block_cast_to_fp8(x, use_ue8m0, gran_k=128)
"""


@pytest.fixture
def installed() -> Iterator[None]:
    compat.install()
    yield
    compat.uninstall()


@pytest.mark.parametrize("line", RECORDED.strip().splitlines())
def test_submodules_have_the_recorded_functions_and_classes(installed: None, line: str) -> None:
    module, _, signature = line.partition(": ")
    is_class = signature.startswith("class ")
    signature = signature.removeprefix("class ")
    name = signature.split("(")[0]
    package = importlib.import_module("deep_gemm." + module.split(".")[0])
    found = getattr(importlib.import_module(f"deep_gemm.{module}"), name)
    assert found is getattr(package, name)
    assert isinstance(found, type if is_class else FunctionType)
    ours = inspect.signature(found)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in ours.parameters.values()]
    assert name + str(inspect.Signature(bare)) == signature


@pytest.mark.parametrize("name", ["empty_suppress", "suppress_stdout_stderr"])
def test_blocks_that_suppress_let_errors_out(installed: None, name: str) -> None:
    suppress = getattr(importlib.import_module("deep_gemm.testing"), name)
    with suppress() as block:
        assert isinstance(block, suppress)
    with pytest.raises(KeyError), suppress():
        raise KeyError


def test_the_function_bench_hides_the_module_of_its_name(installed: None) -> None:
    import deep_gemm.testing.bench
    from deep_gemm.testing import bench  # type: ignore[import-not-found]

    assert isinstance(deep_gemm.testing.bench, FunctionType) and deep_gemm.testing.bench is bench
