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


def test_this_machine_has_every_share_and_keeps_it(monkeypatch) -> None:
    hardware = load_hardware("this")
    shares = dataclasses.asdict(hardware.efficiency)
    assert shares.keys() == {f.name for f in dataclasses.fields(Efficiency)}
    assert all(0 < share <= 1 for share in shares.values()), shares
    # probes that are an order of magnitude off count something else than they say
    assert min(shares["gemm"], shares["read"], shares["mla_read"]) > 0.1
    assert math.isclose(shares["gemm_wgrad"], shares["gemm"])

    def measured() -> dict[str, float]:
        raise AssertionError("measured again")

    monkeypatch.setattr(this_machine, "_measured", measured)
    assert load_hardware("this") == hardware
