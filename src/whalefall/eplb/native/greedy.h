// The published greedy algorithm, in float32 as published: the start that is never made worse.
// Source: EPLB `balanced_packing`, `replicate_experts` (behaviour; written anew).
#pragma once
#include <algorithm>
#include <functional>
#include <numeric>
#include <queue>
#include <utility>
#include <vector>

namespace eplb {

// Items by falling weight, each to the lightest pack with room: pack of each item.
inline std::vector<int> balanced_packing(const std::vector<float>& weight, int packs) {
  const int items = int(weight.size()), room = items / packs;
  std::vector<int> order(items), pack_of(items), fill(packs, 0);
  std::iota(order.begin(), order.end(), 0);
  if (room == 1) return order;
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return weight[a] > weight[b]; });
  using Pack = std::pair<float, int>;  // sum, number: the lightest first, ties to the first
  std::priority_queue<Pack, std::vector<Pack>, std::greater<Pack>> open;
  for (int k = 0; k < packs; ++k) open.push({0.f, k});
  for (int item : order) {
    const auto [sum, k] = open.top();
    open.pop();
    pack_of[item] = k;
    if (++fill[k] < room) open.push({sum + weight[item], k});
  }
  return pack_of;
}

// Expert of each slot: the experts themselves, then copies of whichever has the largest share.
inline std::vector<int> replicate(const std::vector<float>& weight, int slots) {
  const int experts = int(weight.size());
  std::vector<int> slot(slots), count(experts, 1);
  std::iota(slot.begin(), slot.begin() + experts, 0);
  using Share = std::pair<float, int>;  // of the largest, ties to the first expert
  std::priority_queue<Share> largest;
  for (int e = 0; e < experts; ++e) largest.push({weight[e], -e});
  for (int s = experts; s < slots; ++s) {
    const int best = -largest.top().second;
    largest.pop();
    slot[s] = best;
    ++count[best];
    largest.push({weight[best] / float(count[best]), -best});
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
