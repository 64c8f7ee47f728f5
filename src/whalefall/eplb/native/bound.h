// What no placement can beat: lower bounds on the largest GPU load of one node.
#pragma once
#include <algorithm>
#include <cmath>
#include <queue>
#include <utility>
#include <vector>

namespace eplb {

// Replica counts that make the largest share w / count smallest: each further slot goes to the
// expert with the largest share (ties: the fewest replicas, then the lowest index). Optimal, since
// shares only fall.
inline double min_max_share(const double* w, int experts, int slots, int max_count,
                            std::vector<int>& count) {
  count.assign(experts, 1);
  using Item = std::pair<double, int>;
  auto lighter = [&](const Item& a, const Item& b) {
    if (a.first != b.first) return a.first < b.first;
    if (count[a.second] != count[b.second]) return count[a.second] > count[b.second];
    return a.second > b.second;
  };
  std::vector<Item> items(experts);
  for (int e = 0; e < experts; ++e) items[e] = {w[e], e};
  std::priority_queue<Item, std::vector<Item>, decltype(lighter)> heap(lighter, std::move(items));
  double capped = 0;  // experts that may not get a further replica
  for (int s = experts; s < slots && !heap.empty();) {
    const auto [share, e] = heap.top();
    heap.pop();
    if (count[e] >= max_count) {
      capped = std::max(capped, share);
      continue;
    }
    ++count[e];
    ++s;
    heap.push({w[e] / count[e], e});
  }
  return heap.empty() ? capped : std::max(capped, heap.top().first);
}

// Whether a largest load of `limit` can be refuted. A GPU with a replica of e also holds per_gpu -
// 1 others. Spare slots (those that no expert needs to stay under `limit`) may dilute the lightest
// experts, so each is counted at its lightest: that understates the others, never overstates.
inline bool refuted(const double* w, int experts, int slots, int per_gpu, double limit,
                    std::vector<std::pair<double, int64_t>>& lightest) {
  auto needed_under = [&](double most) {
    const double per_load = (1 - 1e-12) / most;
    int64_t needed = 0;  // whole numbers, so that the compiler may add many at a time
    for (int e = 0; e < experts; ++e) needed += int64_t(std::max(1.0, std::ceil(w[e] * per_load)));
    return needed;
  };
  int64_t needed = needed_under(limit);
  if (needed > slots) return true;
  const int64_t spare = slots - needed;
  const double per_load = (1 - 1e-12) / limit;
  lightest.resize(experts);
  for (int e = 0; e < experts; ++e) {
    const int64_t copies = int64_t(std::max(1.0, std::ceil(w[e] * per_load))) + spare;
    lightest[e] = {w[e] / double(copies), copies};
  }
  double others = 0;
  int64_t left = per_gpu - 1;
  const size_t take = std::min<size_t>(left, lightest.size());
  std::partial_sort(lightest.begin(), lightest.begin() + take, lightest.end());
  for (size_t k = 0; k < take && left > 0; ++k)
    for (int64_t c = lightest[k].second; c > 0 && left > 0; --c, --left)
      others += lightest[k].first;
  if (others >= limit) return true;
  return needed_under(limit - others) > slots;
}

// A sharper refutation. Fix v <= limit / 2. A GPU that holds a share above limit - v ("heavy")
// holds nothing else above v, so (per_gpu - 1) * heavy replicas <= replicas of at most v ("small").
// If even the counts that favour small over heavy most, among those that use exactly `slots`, break
// this, no placement exists. The minimum over counts is bounded below by its Lagrangian, for any
// price.
struct Refuter {
  const double* w;
  int experts, slots, per_gpu;
  std::vector<int64_t> floor_;  // replicas an expert needs to stay at or below the limit

  static int64_t ceil_div(double a, double b) {
    return int64_t(std::max(1.0, std::ceil(a / b * (1 - 1e-12))));
  }

  // min over counts of (per_gpu - 1) heavy - small + price * (count - slots): convex pieces, so
  // only their ends matter.
  double dual(double limit, double v, double price, int64_t spare) const {
    double sum = -price * slots;
    for (int e = 0; e < experts; ++e) {
      const int64_t low = floor_[e], high = low + spare;
      const int64_t light = ceil_div(w[e], limit - v), small = ceil_div(w[e], v);
      double best = INFINITY;
      for (int64_t c : {low, light - 1, light, small - 1, small, high}) {
        if (c < low || c > high) continue;
        const double value = c < light ? (per_gpu - 1.0) * c : (c >= small ? -double(c) : 0.0);
        best = std::min(best, value + price * c);
      }
      sum += best;
    }
    return sum;
  }

  bool refuted(double limit) {
    int64_t needed = 0;
    for (int e = 0; e < experts; ++e) needed += floor_[e] = ceil_div(w[e], limit);
    if (needed > slots) return true;
    for (int step = 1; step <= 12; ++step)
      for (double price : {0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 5.0})
        if (dual(limit, limit * step / 24, price, slots - needed) > 1e-6) return true;
    return false;
  }
};

// The better of: the mean; the smallest possible largest share with its lightest company.
inline double lower_bound(const double* w, int experts, int slots, int gpus, double share) {
  double total = 0;
  for (int e = 0; e < experts; ++e) total += w[e];
  double low = std::max(total / gpus, share);
  const int per_gpu = slots / gpus;
  if (per_gpu < 2) return low;
  std::vector<std::pair<double, int64_t>> scratch;
  if (!refuted(w, experts, slots, per_gpu, low * (1 + 1e-9), scratch)) return low;
  double high = low * 2 + 1e-30;
  while (refuted(w, experts, slots, per_gpu, high, scratch)) low = high, high *= 2;
  for (int round = 0; round < 30 && high - low > low * 1e-5; ++round) {
    const double middle = (low + high) / 2;
    (refuted(w, experts, slots, per_gpu, middle, scratch) ? low : high) = middle;
  }
  return low;
}

}  // namespace eplb
