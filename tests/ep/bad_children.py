"""What the bad-arguments test runs: every public call with every wrong thing in every place."""

import numpy as np
import torch
from buffer_children import BF16, E, H, K, M, batch, dispatch, join

from whalefall import ep
from whalefall.errors import WhalefallError


def wrong_things() -> list[object]:
    t, k = 6, K
    return [
        None, 0, -1, 1.5, "a", [], {}, float("nan"), 1 << 70, -(1 << 70), True, b"", range(3),
        object(), print, np.float32, np.ones(3), np.ones((t, H), np.float32), torch.tensor(1),
        torch.ones(3), torch.ones(t, H), torch.ones(0, H, dtype=BF16), torch.ones(t, 0, dtype=BF16),
        torch.ones(2, t, H, dtype=BF16), torch.ones(t, H, dtype=torch.complex64),
        torch.full((t, k), 99), torch.full((t, k), -7), torch.full((t, k), 1 << 40),
        torch.ones(t, 1, dtype=torch.bool), torch.ones(1, dtype=torch.int32),
        torch.full((E,), 1 << 30, dtype=torch.int32), torch.empty(t, H, device="meta"),
        torch.ones(t, H).to_sparse(), torch.ones(t, 3000, dtype=torch.int64), (None, None),
    ]  # fmt: skip


def every_call(buffer: ep.Buffer, folder: str) -> dict[str, tuple]:
    """Each call with right arguments."""
    x, idx, weights = batch(0, 6)
    idx = idx.contiguous()
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, E)
    got, _, ws, _, handle, _ = dispatch(buffer, x, idx, weights)
    rows, _, low, _, _ = buffer.low_latency_dispatch(x, idx, M, E, use_fp8=False)
    engine, xs, ids, wn = buffer.runtime, x.float().numpy(), idx.numpy(), weights.numpy()
    one, many = engine.dispatch(xs, ids, E, wn), engine.dispatch_selections(xs, ids, E)
    layout = {
        "num_tokens_per_rank": per_rank, "is_token_in_rank": in_rank,
        "num_tokens_per_expert": per_expert, "topk_idx": idx, "topk_weights": weights,
    }  # fmt: skip
    ways = {"async_finish": False, "return_recv_hook": False}
    low_sizes = {"num_max_dispatch_tokens_per_rank": M, "num_experts": E}
    stats = {"cumulative_local_expert_recv_stats": None, "dispatch_wait_recv_cost_stats": None}
    hint = {**low_sizes, "hidden": H, "num_ranks": 1}
    config = dict.fromkeys(ep.Config.__dataclass_fields__, 8)
    config["num_max_nvl_chunked_recv_tokens"] = config["num_max_rdma_chunked_recv_tokens"] = 99
    return {
        "layout": (buffer.get_dispatch_layout, {"topk_idx": idx, "num_experts": E}),
        "dispatch": (buffer.dispatch, {
            "x": x, **layout, "expert_alignment": 1, "num_worst_tokens": 0, "async_finish": False,
            "allocate_on_comm_stream": False, "previous_event": None}),
        "worst": (buffer.dispatch, {"x": x, **layout, "num_worst_tokens": 64}),
        "again": (buffer.dispatch, {"x": x, "handle": handle}),
        "combine": (buffer.combine, {"x": got, "handle": handle, "topk_weights": ws, "bias": None}),
        "rows": (buffer.get_combine_buffer, {"handle": handle, "hidden": H}),
        "low": (buffer.low_latency_dispatch, {
            "x": x, "topk_idx": idx, **low_sizes, **stats, **ways, "use_fp8": True,
            "round_scale": False, "use_ue8m0": False}),
        "low back": (buffer.low_latency_combine, {
            "x": rows, "topk_idx": idx, "topk_weights": weights, "handle": low, **ways,
            "use_logfmt": False, "zero_copy": False, "out": None,
            "combine_wait_recv_cost_stats": None}),
        "next": (buffer.get_next_low_latency_combine_buffer, {"handle": low}),
        "clean": (buffer.clean_low_latency_buffer, {**low_sizes, "hidden": H}),
        "local": (buffer.get_local_buffer_tensor, {
            "dtype": torch.int32, "size": torch.Size((2, 2)), "offset": 0,
            "use_rdma_buffer": False}),
        "mask": (buffer.low_latency_update_mask_buffer, {"rank_to_mask": 0}),
        "query": (buffer.low_latency_query_mask_buffer, {"mask_status": torch.zeros(1).int()}),
        "sms": (buffer.set_num_sms, {"new_num_sms": 0}),
        "sizes": (buffer.get_dispatch_config, {"num_ranks": 8}),
        "hint": (buffer.get_low_latency_rdma_size_hint, hint),
        "nvl": (ep.Config().get_nvl_buffer_size_hint, {"hidden_bytes": 512, "num_ranks": 8}),
        "rdma": (ep.Config().get_rdma_buffer_size_hint, {"hidden_bytes": 512, "num_ranks": 16}),
        "config": (ep.Config, config),
        "buffer": (ep.Buffer, {"group": buffer.group, "num_nvl_bytes": 1 << 20,
                               "num_rdma_bytes": 1 << 22, "low_latency_mode": True}),
        "engine layout": (engine.layout, {"topk_idx": ids, "num_experts": E}),
        "one row": (engine.dispatch, {
            "x": xs, "topk_idx": ids, "num_experts": E, "topk_weights": wn, "scale": None}),
        "one back": (engine.combine, {
            "rows": one.x, "handle": one.handle, "topk_weights": one.topk_weights,
            "bias": (None, None), "out": None}),
        "many": (engine.dispatch_selections, {"x": xs, "topk_idx": ids, "num_experts": E}),
        "many back": (engine.combine_selections, {
            "rows": many.x, "handle": many.handle, "topk_weights": wn, "out": None}),
        "empty": (engine.empty, {"shape": (3, 4), "dtype": np.float32}),
        "gather": (engine.gather, {"number": 3}),
        "gate": (ep.route, {
            "logits_TE": np.ones((3, 8), np.float32), "bias_E": None, "top_k": 2, "num_groups": 2,
            "topk_groups": 1, "scoring": "sigmoid", "normalize": True, "scale": 1.0}),
        "hosts": (ep.hosts_touched, {"topk_idx": ids, "num_experts": 8, "num_hosts": 2}),
        "engine": (ep.Engine, {
            "group": ep.FileGroup(folder + "/g", 0, 1), "chunk_bytes": 1 << 16,
            "low_latency_bytes": 0, "slot_bytes": 0, "timeout_s": 1.0, "shrink": False,
            "num_threads": 0, "hidden": None, "num_experts": None, "host": None,
            "shared_bytes": 1 << 20}),
        "files": (ep.FileGroup, {"folder": folder, "rank": 0, "size": 1, "timeout_s": 1.0}),
    }  # fmt: skip


def refuse_everything(folder: str, rank: int, size: int) -> list[str]:
    """What was neither taken nor refused in one line, or left the ranks out of step."""
    group, said = join(folder, rank, size), []
    hint = ep.Buffer.get_low_latency_rdma_size_hint(M, H, size, E)
    buffer = ep.Buffer(group, 1 << 20, hint, low_latency_mode=True)
    for name, (call, right) in every_call(buffer, folder).items():
        for where in right:
            for wrong in wrong_things():
                try:
                    finish(call(**{**right, where: wrong}))
                except WhalefallError as error:
                    if "\n" in str(error) or len(str(error)) > 400:
                        said.append(f"{name}({where}): {error}")
                except Exception as error:
                    said.append(f"{name}({where} = a {type(wrong).__name__}): {error!r}")
        finish(call(**right))
    return said


def finish(result: object) -> None:
    for one in result if isinstance(result, tuple) else ():
        if isinstance(one, ep.EventOverlap):
            if one.event is not None:
                one.current_stream_wait()
        elif callable(one):
            one()
