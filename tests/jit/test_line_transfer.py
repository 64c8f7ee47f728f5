"""How far two cores are from each other, as benchmarks say beside their figures."""

import os
import subprocess
import sys

import pytest

from whalefall.jit import machine

ASK = "from whalefall.jit import machine; print(machine.line_transfer_ns())"


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_two_cores_are_some_nanoseconds_apart() -> None:
    seconds = machine._library().wf_seconds_of_turns
    cores = sorted(os.sched_getaffinity(0))
    distance = machine.line_transfer_ns(rounds=200)
    assert distance is not None and 1 < distance < 1e6
    assert seconds(2000, cores[0], cores[1]) > 2000 * 2 * 1e-9  # every turn waits for the other
    assert sorted(os.sched_getaffinity(0)) == cores  # only its own threads were moved


def test_one_core_has_no_distance() -> None:
    core = min(os.sched_getaffinity(0))
    command = ["taskset", "-c", str(core), sys.executable, "-c", ASK]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert said.stdout.strip() == "None"
