"""Day 4, EPLB: place 12 experts with 4 extra replicas on 2 nodes of 4 GPUs."""

from whalefall import eplb

# tokens routed to each expert, two layers (the original's example)
weight = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]

plan = eplb.rebalance(weight, num_replicas=16, num_groups=4, num_nodes=2, num_gpus=8)
for layer, used in enumerate(plan.balance):
    print(
        f"layer {layer}: utilisation {used:.3f}, at best {plan.mean[layer] / plan.bound[layer]:.3f}"
    )
print("experts of GPU 0, layer 0:", sorted(plan.phy2log[0, :2].tolist()))

# An hour later expert 7 is hot. Move at most two replicas per layer.
weight[0][7], weight[1][7] = 200, 300
before = eplb.gpu_loads(weight, plan.phy2log, 8)
moved = eplb.rebalance(weight, 16, 4, 2, 8, previous=plan, max_moves=2)
for layer in range(2):
    stale = before[layer].mean() / before[layer].max()
    print(f"layer {layer}: {stale:.3f} -> {moved.balance[layer]:.3f}, {moved.moves[layer]} moves")
