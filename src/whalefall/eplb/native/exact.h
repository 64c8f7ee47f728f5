// Exhaustive search for small nodes: all replica counts, all packings, pruned by the best so far.
#pragma once
#include <algorithm>
#include <numeric>
#include <vector>

namespace eplb {

constexpr int kExactSlots = 10;  // C(9, 4) counts times a few hundred packings at most

struct Exact {
  const double* weight;
  int experts, slots, gpus, per_gpu;
  double best;  // only placements below this are of interest
  std::vector<int> found;
  int64_t steps = 0, max_steps = 200000;

  std::vector<int> count, item, at;
  std::vector<double> share, load;
  std::vector<int> fill;

  void counts(int e, int left) {
    if (e == experts - 1) {
      count[e] = left;
      pack_all();
      return;
    }
    const int most = std::min(gpus, left - (experts - 1 - e));
    for (int c = 1; c <= most; ++c) {
      count[e] = c;
      if (weight[e] / c < best) counts(e + 1, left - c);
    }
  }

  void pack_all() {
    if (count[experts - 1] > gpus) return;
    item.clear();
    for (int e = 0; e < experts; ++e) item.insert(item.end(), count[e], e);
    std::stable_sort(item.begin(), item.end(),
                     [&](int a, int b) { return weight[a] / count[a] > weight[b] / count[b]; });
    std::fill(load.begin(), load.end(), 0.0);
    std::fill(fill.begin(), fill.end(), 0);
    pack(0);
  }

  bool holds(int g, int e) const {
    for (int k = 0; k < fill[g]; ++k)
      if (at[g * per_gpu + k] == e) return true;
    return false;
  }

  void pack(int i) {
    if (++steps > max_steps) return;
    if (i == slots) {
      best = *std::max_element(load.begin(), load.end());
      found = at;
      return;
    }
    const int e = item[i];
    const double part = weight[e] / count[e];
    bool empty_tried = false;
    for (int g = 0; g < gpus; ++g) {
      if (fill[g] == per_gpu || load[g] + part >= best * (1 - 1e-12) || holds(g, e)) continue;
      if (fill[g] == 0 && empty_tried) continue;  // empty GPUs are alike
      empty_tried |= fill[g] == 0;
      const double before = load[g];
      at[g * per_gpu + fill[g]++] = e;
      load[g] += part;
      pack(i + 1);
      load[g] = before;
      --fill[g];
    }
  }

  Exact(const double* w, int experts, int slots, int gpus, double below)
      : weight(w),
        experts(experts),
        slots(slots),
        gpus(gpus),
        per_gpu(slots / gpus),
        best(below),
        count(experts),
        at(slots),
        load(gpus),
        fill(gpus) {
    counts(0, slots);
  }
};

}  // namespace eplb
