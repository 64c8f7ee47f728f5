"""The thread pool: each task once, any thread count, nested callers, forks."""

from __future__ import annotations

import ctypes
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from whalefall import jit
from whalefall.errors import ConfigError

SOURCE = """
#include "whalefall/pool.h"
WF_EXPORT void count(int64_t tasks, int64_t* hits, int64_t* threads) {
  wf::parallel_for(tasks, [&](int64_t i, int thread) {
    hits[i] += 1;
    threads[i] = thread;
  });
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> jit.Library:
    path = tmp_path_factory.mktemp("pool") / "count.cpp"
    path.write_text(SOURCE)
    return jit.build(path, level="any")


def run(library: jit.Library, tasks: int) -> tuple[np.ndarray, np.ndarray]:
    hits, threads = np.zeros(tasks, np.int64), np.zeros(tasks, np.int64)
    pointer = ctypes.c_void_p
    library.count(ctypes.c_int64(tasks), pointer(hits.ctypes.data), pointer(threads.ctypes.data))
    return hits, threads


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("tasks", [0, 1, 2, 7, 10_000])
def test_every_task_runs_exactly_once(library: jit.Library, count: int, tasks: int) -> None:
    before = jit.get_num_threads()
    jit.set_num_threads(count)
    try:
        for _ in range(50):
            hits, threads = run(library, tasks)
            assert (hits == 1).all()
            assert ((threads >= 0) & (threads < count)).all()
    finally:
        jit.set_num_threads(before)


def test_callers_on_several_python_threads_do_not_mix(library: jit.Library) -> None:
    failures = []

    def call() -> None:
        for _ in range(200):
            if not (run(library, 100)[0] == 1).all():
                failures.append(1)

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not failures


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_computes(library: jit.Library) -> None:
    run(library, 100)
    child = os.fork()
    if child == 0:
        os._exit(0 if (run(library, 1000)[0] == 1).all() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("count", [0, -1, 4097, 10**6, 2**32 + 1, "x", None, 1.5])
def test_counts_of_threads_that_make_no_sense_are_refused(count: Any) -> None:
    before = jit.get_num_threads()
    with pytest.raises(
        ConfigError, match=f"set_num_threads: count is {count!r}, wanted a whole number from 1"
    ):
        jit.set_num_threads(count)
    assert jit.get_num_threads() == before


def test_sources_of_the_room_are_where_a_wheel_carries_them() -> None:
    folder = Path(jit.__file__).parent
    assert (folder / "include/whalefall/pool.h").is_file()
