"""The room's names, and the original's recorded signatures (signatures.txt: DeepGEMM 54e2261)."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from whalefall import gemm

TEXT = (Path(__file__).parent / "signatures.txt").read_text(encoding="utf-8")
RECORDED = TEXT.replace("\n    ", " ").splitlines()


def test_all_names_exist_and_are_sorted() -> None:
    assert all(hasattr(gemm, name) for name in gemm.__all__)
    assert list(gemm.__all__) == sorted(gemm.__all__)
    assert len(gemm.__all__) == 66


@pytest.mark.parametrize("line", RECORDED, ids=lambda line: line.split("(")[0])
def test_signatures_are_the_recorded_ones(line: str) -> None:
    name = line.split("(")[0]
    ours = inspect.signature(getattr(gemm, name))
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in ours.parameters.values()]
    assert name + str(inspect.Signature(bare)) == line
