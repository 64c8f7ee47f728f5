"""compat: `import deep_ep` gives whalefall's Buffer, and the original's calling sequence runs."""

import os
import subprocess
import sys

SCRIPT = """
import torch, torch.distributed as dist
import whalefall.compat
whalefall.compat.install()
import deep_ep
from deep_ep import Buffer, Config, EventHandle, EventOverlap

dist.init_process_group("gloo", "file://{store}", rank=0, world_size=1)
buffer = Buffer(dist.group.WORLD, int(2e6 // 128 * 128))
Buffer.set_num_sms(24)
x = torch.randn(16, 128).to(torch.bfloat16)
idx = torch.arange(16 * 2, dtype=deep_ep.topk_idx_t).view(16, 2) % 8
previous = Buffer.capture()
per_rank, per_node, per_expert, in_rank, event = buffer.get_dispatch_layout(
    idx, 8, previous_event=previous, async_finish=True, allocate_on_comm_stream=True)
recv_x, recv_idx, recv_weights, counts, handle, event = buffer.dispatch(
    x, topk_idx=idx, topk_weights=torch.ones(16, 2), num_tokens_per_rank=per_rank,
    num_tokens_per_rdma_rank=per_node, is_token_in_rank=in_rank,
    num_tokens_per_expert=per_expert, previous_event=event, async_finish=True,
    allocate_on_comm_stream=True)
combined, _, event = buffer.combine(recv_x, handle, async_finish=True, previous_event=event,
                                    allocate_on_comm_stream=True)
event.current_stream_wait()
assert torch.equal(combined, x) and counts == [4] * 8 and per_node is None
print(deep_ep.__name__, isinstance(event, EventOverlap))
"""


def test_the_originals_calling_sequence_runs(tmp_path) -> None:
    code = SCRIPT.replace("{store}", str(tmp_path / "store"))
    env = {**os.environ, "PYTHONPATH": ":".join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["whalefall.compat.deep_ep", "True"]
