"""`import eplb` and `import dualpipe` find whalefall, with the originals' signatures."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from whalefall import compat  # noqa: E402

WEIGHT = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]


@pytest.fixture(autouse=True)
def _installed() -> Iterator[None]:
    compat.install()
    yield
    compat.uninstall()


def names(function: object) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


def test_eplb_has_the_originals_functions_and_arguments() -> None:
    import eplb

    sizes = ["num_groups", "num_nodes", "num_gpus"]
    assert eplb.__all__ == ["rebalance_experts"]
    assert names(eplb.rebalance_experts) == ["weight", "num_replicas", *sizes]
    assert names(eplb.balanced_packing) == ["weight", "num_packs"]
    assert names(eplb.replicate_experts) == ["weight", "num_phy"]
    assert names(eplb.rebalance_experts_hierarchical) == ["weight", "num_physical_experts", *sizes]


def test_the_readme_of_eplb_runs() -> None:
    import eplb

    weight = torch.tensor(WEIGHT)
    phy2log, log2phy, logcnt = eplb.rebalance_experts(weight, 16, 4, 2, 8)
    assert phy2log.shape == (2, 16)
    assert logcnt.sum(1).tolist() == [16, 16]
    assert log2phy.max() == 15
    slots, _, _ = eplb.rebalance_experts_hierarchical(weight, 16, 4, 2, 8)
    assert slots[0].tolist() == [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1]


def test_dualpipe_has_the_originals_names_and_arguments() -> None:
    import dualpipe
    from dualpipe.comm import append_irecv, append_isend
    from dualpipe.utils import WeightGradStore, run_backward

    build = ["modules", "batch_dim", "process_group", "rank_mapping"]
    step = ["inputs", "num_chunks", "criterion", "labels", "return_outputs"]
    for kind in (dualpipe.DualPipe, dualpipe.DualPipeV):
        assert names(kind) == build
        assert names(kind.step) == step
    assert dualpipe.WeightGradStore is WeightGradStore
    assert names(append_isend) == ["ops", "tensors", "dst", "group"]
    assert names(append_irecv) == ["ops", "src", "group"]
    assert names(run_backward) == ["tensors", "grad_tensors"]


def test_the_originals_helpers_cut_and_join() -> None:
    from dualpipe.utils import cat_tensor, chunk_tensor, gather, scatter

    x = torch.arange(6.0)
    assert scatter([x, None], 3, 0)[1][0].tolist() == [2, 3]
    assert scatter([x, None], 3, 0)[1][1] is None
    assert scatter([], 2, 0) == [(), ()]
    assert gather([[part] for part in chunk_tensor(x, 3, 0)], 0)[0].tolist() == x.tolist()
    assert cat_tensor([None, None], 0) is None


def test_nccl_means_gloo_and_gathers_into_a_stack(tmp_path: Path) -> None:
    code = f"""
from whalefall.compat.cuda import emulate
emulate()
import torch, torch.distributed as dist
dist.init_process_group(backend="nccl", init_method="file://{tmp_path}/meet", rank=0, world_size=1)
stack = torch.empty(1, 2, 3)
dist.all_gather_into_tensor(stack, torch.ones(2, 3))
print(dist.get_backend(), float(stack.sum()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["gloo", "6.0"]
