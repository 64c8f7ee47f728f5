// One node's placement: replica counts, heaviest first to the lightest GPU, then local search.
// Bound: a search is O(slots^2) per step; a node of 72 slots takes tens of microseconds.
#pragma once
#include <cmath>
#include <functional>
#include <numeric>
#include <queue>
#include <random>
#include <utility>
#include <vector>

#include "bound.h"
#include "exact.h"
#include "hottest.h"
#include "search.h"

namespace eplb {

constexpr double kFar = 1.003;  // this far from it, other replica counts are tried
constexpr double kKick = 1.05;  // farther than this, other packings of the same counts cannot help
constexpr int kCountSteps = 8;
constexpr double kMissed = 1.01;  // what is to be reached: the search takes pains above it
constexpr int kRoomSteps = 3;

struct Node {
  std::vector<int> slot;  // local expert of each slot, GPU by GPU
  double load = 0;
  int64_t work = 0;
};

inline double largest(const std::vector<int>& slot, const double* w, int experts, int gpus) {
  std::vector<int> count(experts, 0);
  for (int e : slot) ++count[e];
  const int per_gpu = int(slot.size()) / gpus;
  double most = 0;
  for (int g = 0; g < gpus; ++g) {
    double load = 0;
    for (int s = g * per_gpu; s < (g + 1) * per_gpu; ++s) load += w[slot[s]] / count[slot[s]];
    most = std::max(most, load);
  }
  return most;
}

// Replicas by falling share, each to the lightest GPU with room that lacks the expert.
inline void spread(Search& search, const std::vector<int>& count) {
  std::vector<int> item;
  for (int e = 0; e < search.num_experts; ++e) item.insert(item.end(), count[e], e);
  std::vector<double> share(search.num_experts);
  for (int e = 0; e < search.num_experts; ++e) share[e] = search.weight[e] / count[e];
  std::stable_sort(item.begin(), item.end(), [&](int a, int b) { return share[a] > share[b]; });
  if (search.per_gpu == 2) {  // the heaviest with the lightest: optimal for given counts
    for (int g = 0; g < search.num_gpus; ++g) {
      search.slot[2 * g] = item[g];
      search.slot[2 * g + 1] = item[search.num_slots - 1 - g];
    }
    search.index();
    return;
  }
  using Gpu = std::pair<double, int>;  // load, number: the lightest first, ties to the first
  std::priority_queue<Gpu, std::vector<Gpu>, std::greater<Gpu>> open;
  for (int g = 0; g < search.num_gpus; ++g) open.push({0.0, g});
  std::vector<int> fill(search.num_gpus, 0), having;  // with room, but with the expert already
  const auto put_back = [&] {
    for (int g : having) open.push({search.load[g], g});
    having.clear();
  };
  bool apart = true;  // a GPU without the expert is left
  for (size_t i = 0; i < item.size(); ++i) {
    const int e = item[i];  // the replicas of an expert come one after the other
    if (i && item[i - 1] != e) put_back(), apart = true;
    if (open.empty()) put_back(), apart = false;
    const int g = open.top().second;
    open.pop();
    search.slot[g * search.per_gpu + fill[g]++] = e;
    search.load[g] += share[e];
    if (fill[g] == search.per_gpu) continue;
    if (apart)
      having.push_back(g);
    else
      open.push({search.load[g], g});
  }
  search.index();
}

// Two replicas of one expert on a GPU: one changes place with the replica that makes the larger of
// the two loads smallest.
inline void separate(Search& search) {
  for (int a = 0; a < search.num_slots && search.work < kWork; ++a) {
    const int g = a / search.per_gpu, x = search.slot[a];
    if (search.held(g, x) < 2) continue;
    search.work += 2 * search.num_slots;
    int best = -1;
    double best_value = 0;
    for (int b = 0; b < search.num_slots; ++b) {
      const int h = b / search.per_gpu, y = search.slot[b];
      if (h / search.domain != g / search.domain) continue;
      if (search.held(h, x) || search.held(g, y)) continue;
      const double less = search.share(x) - search.share(y);
      const double value = std::max(search.load[g] - less, search.load[h] + less);
      if (best < 0 || value < best_value) best = b, best_value = value;
    }
    if (best >= 0) search.apply({best_value, 0, a, best, -1, 0});
  }
}

// Leaves a local optimum: the heaviest GPU exchanges replicas at random, then is relieved again.
inline void kick(Search& search, std::mt19937& random, double target, int rounds) {
  std::vector<int> best_slot = search.slot;
  double best = search.largest();
  for (int round = 0; round < rounds && best > target; ++round) {
    const int g =
        int(std::max_element(search.load.begin(), search.load.end()) - search.load.begin());
    for (int n = 0; n < 3; ++n) {
      const int from = n == 0 ? g : int(random() % search.num_gpus);
      const int a = from * search.per_gpu + int(random() % search.per_gpu);
      const int b = int(random() % search.num_slots), h = b / search.per_gpu;
      const int x = search.slot[a], y = search.slot[b];
      if (h == from || search.held(h, x) || search.held(from, y)) continue;
      search.apply({0, 0, a, b, -1, 0});
    }
    search.run(target, 4 * search.num_slots);
    if (search.largest() < best * (1 - 1e-12)) {
      best = search.largest();
      best_slot = search.slot;
    } else {
      search.slot = best_slot;
      search.index();
    }
  }
}

// `count` with the spare slots given out: to the largest shares, or (dilute) to the lightest
// experts, which makes company for the heavy ones. Empty: too few slots, or no counts.
inline std::vector<int> filled(const double* w, std::vector<int> count, int slots, int cap,
                               bool dilute) {
  const int experts = int(count.size());
  int left = slots - std::accumulate(count.begin(), count.end(), 0);
  if (left < 0 || count.empty()) return {};
  // the largest share first, or the smallest; ties to the first expert
  std::priority_queue<std::pair<double, int>> next;
  const auto offer = [&](int e) {
    if (count[e] < cap) next.push({dilute ? -(w[e] / count[e]) : w[e] / count[e], -e});
  };
  for (int e = 0; e < experts; ++e) offer(e);
  for (; left > 0; --left) {  // `cap` leaves room for all
    const int e = -next.top().second;
    next.pop();
    ++count[e];
    offer(e);
  }
  return count;
}

// Replica counts that keep every share at or below `limit`.
inline std::vector<int> counts_for(const double* w, int experts, int slots, int cap, double limit,
                                   bool dilute) {
  std::vector<int> count(experts);
  for (int e = 0; e < experts; ++e) count[e] = int(std::min(double(cap), needed(w[e], limit)));
  return filled(w, count, slots, cap, dilute);
}
// Fewer replicas of the hottest experts leave GPUs free of them: other counts, each searched.
inline void other_counts(Search& search, Node& best, int cap, double share, double enough) {
  const double ceiling = std::max(best.load, share * 1.0001);
  std::vector<std::vector<int>> seen;
  for (int step = 0; step <= kCountSteps && best.load > enough; ++step)
    for (bool dilute : {false, true}) {
      if (best.load <= enough) return;
      const double limit = share * std::pow(ceiling / share, double(step) / kCountSteps);
      const auto count = counts_for(search.weight, search.num_experts, search.num_slots, cap,
                                    limit * (1 + 1e-9), dilute);
      if (count.empty() || std::find(seen.begin(), seen.end(), count) != seen.end()) continue;
      seen.push_back(count);
      search.clear();
      spread(search, count);
      separate(search);
      search.run(enough, 4 * search.num_slots);
      if (search.largest() < best.load) best = {search.slot, search.largest(), 0};
    }
}

// Counts for `c` replicas of the hottest expert: the others small enough for the room beside it,
// but for those that save most replicas by being whole on the GPUs without it.
inline std::vector<int> counts_beside(const Search& search, int c, double limit) {
  const double* w = search.weight;
  const int hottest = int(std::max_element(w, w + search.num_experts) - w);
  const double room = limit - w[hottest] / c;
  if (room <= limit * 1e-9) return {};
  std::vector<int> count(search.num_experts, 1);
  std::vector<std::pair<double, int>> saving;
  for (int e = 0; e < search.num_experts; ++e) {
    const double most = search.num_slots;
    count[e] = e == hottest ? c : int(std::min(most, needed(w[e], room)));
    if (e != hottest && count[e] > 1) saving.push_back({(1 - count[e]) / w[e], e});
  }
  std::sort(saving.begin(), saving.end());
  double left = (search.num_gpus - c) * limit;
  int places = (search.num_gpus - c) * search.per_gpu;
  for (const auto& [_, e] : saving)
    if (places > 0 && w[e] <= left) count[e] = 1, left -= w[e], --places;
  return count;
}

// For each number of replicas of the hottest expert that is not refuted, counts that fit beside it.
inline void beside_hottest(Search& search, Node& best, int cap, double enough) {
  Hottest hottest(search.weight, search.num_experts, search.num_slots, search.num_gpus);
  const double most = *std::max_element(search.weight, search.weight + search.num_experts);
  const int first = int(std::min(needed(most, best.load), double(search.num_gpus)));
  for (int c = first; c <= std::min(first + kCountSteps, search.num_gpus); ++c)
    for (int step = 0; step <= kRoomSteps; ++step)
      for (bool dilute : {false, true}) {
        const double limit = enough + (best.load - enough) * step / (kRoomSteps + 1);
        if (best.load <= enough || hottest.lacks_room(c, limit) || hottest.lacks_slots(c, limit))
          continue;
        const auto count =
            filled(search.weight, counts_beside(search, c, limit), search.num_slots, cap, dilute);
        if (count.empty()) continue;
        search.clear();
        spread(search, count);
        separate(search);
        search.run(enough, 4 * search.num_slots);
        if (search.largest() < best.load) best = {search.slot, search.largest(), 0};
      }
}

inline Node solve_node(const double* w, int experts, int slots, int gpus, double target,
                       double enough) {
  const int cap = std::max(gpus, (slots + experts - 1) / experts);
  std::vector<int> count;
  const double share = min_max_share(w, experts, slots, cap, count);
  Search search(w, experts, slots, gpus, gpus);
  spread(search, count);
  separate(search);
  search.run(enough, 8 * slots);
  Node node{search.slot, search.largest(), 0};
  if (node.load > target * kFar && slots / gpus > 1) other_counts(search, node, cap, share, enough);
  if (node.load > enough && node.load < target * kKick && slots > kExactSlots && slots / gpus > 2) {
    search.slot = node.slot;
    search.index();
    std::mt19937 random(1);
    kick(search, random, enough, 24);
    if (search.largest() < node.load) node = {search.slot, search.largest(), 0};
  }
  if (node.load > target * kMissed && slots / gpus > 2) beside_hottest(search, node, cap, enough);
  if (node.load > target * (1 + 1e-12) && slots <= kExactSlots) {
    Exact exact(w, experts, slots, gpus, node.load);
    if (!exact.found.empty()) node = {exact.found, exact.best, 0};
  }
  node.work = search.work;
  return node;
}

}  // namespace eplb
