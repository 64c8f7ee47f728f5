// How good a layer's placement can be at most, for judging: slower than what the search itself
// uses.
#pragma once
#include <set>
#include <vector>

#include "bound.h"
#include "hottest.h"
#include "packing.h"

namespace eplb {

// The largest limit, up to `high`, that can be refuted for one node; at least `low`.
inline double sharpen(const std::vector<double>& w, int slots, int gpus, double low, double high) {
  const int per_gpu = slots / gpus, experts = int(w.size());
  if (per_gpu < 2 || low >= high) return low;
  Refuter refuter{w.data(), experts, slots, per_gpu, std::vector<int64_t>(experts)};
  Hottest hottest(w.data(), experts, slots, gpus);
  for (int round = 0; round < 12 && high - low > low * 1e-4; ++round) {
    const double middle = (low + high) / 2;
    (hottest.refuted(middle) || refuter.refuted(middle) ? low : high) = middle;
  }
  return low;
}

// The best packing by sharpened bounds, which are found for those nodes only that could make the
// best one; `low` where there are too many packings to see them all.
inline double sharpen_layer(const double* w, const Shape& shape, double low, double high) {
  Packing packing(w, shape);
  packing.floor = low;
  std::set<std::vector<int>> sharp;
  for (;;) {
    packing.seek(high);
    if (!packing.complete) return low;
    if (packing.best_nodes.empty()) return high;
    bool news = false;
    for (const auto& groups : packing.best_nodes) {
      if (!sharp.insert(groups).second) continue;
      double& known = packing.known[groups];
      const double before = known;
      known = sharpen(weights_of(groups, w, packing.per_group), packing.slots, packing.gpus, known,
                      high);
      news |= known > before;
    }
    if (!news || packing.all_steps > 2 * kPackingSteps) return std::max(low, packing.best);
  }
}

}  // namespace eplb
