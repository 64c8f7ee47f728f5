"""Hardware `this`: shares of the measured peaks that our kernels reach, probed once and kept."""

import dataclasses
import math

import pytest

from whalefall.errors import WhalefallError
from whalefall.plan import this_machine
from whalefall.plan.hardware_files import Efficiency, load_hardware


def test_a_probe_is_judged_against_the_limit_by_medians() -> None:
    clock = iter([0.01] * 100)
    found = this_machine._against({"half": (lambda: next(clock), 1e-9)}, lambda: 1e9)
    assert 0 < found["half"] <= 1.0
    fast = this_machine._against({"faster": (lambda: None, 1e18)}, lambda: 1.0)
    assert fast == {"faster": 1.0}  # a share, whatever the clock's luck


def test_a_probe_without_work_is_refused() -> None:
    with pytest.raises(WhalefallError, match="the probe none took no time"):
        this_machine._against({"none": (lambda: None, 0.0)}, lambda: 1.0)


def test_probes_count_the_work_they_do() -> None:
    copies = this_machine.FRESH_BYTES // (192 * 128)
    assert this_machine._product(rows=1, n=192, k=128)[1] == copies * 192 * 128
    assert this_machine._product(rows=16, n=192, k=128)[1] == 2 * 16 * 192 * 128
    assert this_machine._decode(heads=1, keys=128, requests=3)[1] == 3 * 128 * 1152
    assert this_machine._decode(heads=4, keys=128, requests=3)[1] == 2 * 3 * 128 * 4 * (576 + 512)
    assert this_machine._varlen(tokens=10)[1] == 2 * 55 * 8 * (192 + 128)


def test_this_machine_has_every_share_and_keeps_it(monkeypatch) -> None:
    hardware = load_hardware("this")
    shares = dataclasses.asdict(hardware.efficiency)
    assert shares.keys() == {f.name for f in dataclasses.fields(Efficiency)}
    assert all(0 < share <= 1 for share in shares.values()), shares
    assert math.isclose(shares["gemm_wgrad"], shares["gemm"])

    def measured() -> dict[str, float]:
        raise AssertionError("measured again")

    monkeypatch.setattr(this_machine, "_measured", measured)
    assert load_hardware("this") == hardware
