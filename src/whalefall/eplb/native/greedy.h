// The published greedy algorithm, in float32 as published: the start that is never made worse.
// Source: EPLB `balanced_packing`, `replicate_experts` (behaviour; written anew).
#pragma once
#include <algorithm>
#include <numeric>
#include <vector>

namespace eplb {

// Items by falling weight, each to the lightest pack with room: pack of each item.
inline std::vector<int> balanced_packing(const std::vector<float>& weight, int packs) {
  const int items = int(weight.size()), room = items / packs;
  std::vector<int> order(items), pack_of(items), fill(packs, 0);
  std::iota(order.begin(), order.end(), 0);
  if (room == 1) return order;
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return weight[a] > weight[b]; });
  std::vector<float> sum(packs, 0.f);
  for (int item : order) {
    int best = -1;
    for (int k = 0; k < packs; ++k)
      if (fill[k] < room && (best < 0 || sum[k] < sum[best])) best = k;
    pack_of[item] = best;
    ++fill[best];
    sum[best] += weight[item];
  }
  return pack_of;
}

// Expert of each slot: the experts themselves, then copies of whichever has the largest share.
inline std::vector<int> replicate(const std::vector<float>& weight, int slots) {
  const int experts = int(weight.size());
  std::vector<int> slot(slots), count(experts, 1);
  std::iota(slot.begin(), slot.begin() + experts, 0);
  for (int s = experts; s < slots; ++s) {
    int best = 0;
    for (int e = 1; e < experts; ++e)
      if (weight[e] / float(count[e]) > weight[best] / float(count[best])) best = e;
    slot[s] = best;
    ++count[best];
  }
  return slot;
}

// One node: slots packed to GPUs, GPU by GPU.
inline std::vector<int> place(const std::vector<float>& weight, int slots, int gpus) {
  const std::vector<int> expert = replicate(weight, slots);
  std::vector<int> count(weight.size(), 0), fill(gpus, 0), placed(slots);
  for (int e : expert) ++count[e];
  std::vector<float> share(slots);
  for (int s = 0; s < slots; ++s) share[s] = weight[expert[s]] / float(count[expert[s]]);
  const std::vector<int> gpu = balanced_packing(share, gpus);
  const int per_gpu = slots / gpus;
  for (int s = 0; s < slots; ++s) placed[gpu[s] * per_gpu + fill[gpu[s]]++] = expert[s];
  return placed;
}

}  // namespace eplb
