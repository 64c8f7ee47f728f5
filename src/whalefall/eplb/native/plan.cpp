// Expert placement, layer by layer.
//   groups -> nodes    every packing (branch and bound), judged by the bound of its worst node
//   inside a node      replica counts, heaviest first to the lightest GPU, then local search
// The published greedy placement is computed too; the result is never heavier than it.
// node.h plans a node, packing.h the groups of nodes, split.h divides tokens between replicas.
#include <cstring>
#include <memory>

#include "greedy.h"
#include "node.h"
#include "packing.h"
#include "split.h"

namespace {
using namespace eplb;

constexpr double kClose = 2e-3;  // this close to the bound, a search stops

// The published placement of a layer, in global expert numbers.
std::vector<int> published(const float* w, const Shape& s) {
  const int per_group = s.experts / s.groups, per_node = s.groups / s.nodes;
  std::vector<float> group(s.groups, 0.f);
  for (int e = 0; e < s.experts; ++e) group[e / per_group] += w[e];
  const std::vector<int> node_of = balanced_packing(group, s.nodes);
  std::vector<int> out;
  for (int n = 0; n < s.nodes; ++n) {
    std::vector<int> expert;
    std::vector<std::pair<int, int>> ranked;
    for (int k = 0; k < s.groups; ++k)
      if (node_of[k] == n) ranked.push_back({0, k});
    // groups keep the order in which they arrived: by falling weight
    if (per_node > 1)
      std::stable_sort(ranked.begin(), ranked.end(),
                       [&](auto& a, auto& b) { return group[a.second] > group[b.second]; });
    for (auto& [_, k] : ranked)
      for (int i = 0; i < per_group; ++i) expert.push_back(k * per_group + i);
    std::vector<float> local(expert.size());
    for (size_t i = 0; i < expert.size(); ++i) local[i] = w[expert[i]];
    for (int e : place(local, s.slots / s.nodes, s.gpus / s.nodes)) out.push_back(expert[e]);
  }
  return out;
}

// Every packing of groups is one of few, and every node small: solve them all.
bool tiny(const Packing& packing, const Shape& s) {
  return packing.slots <= kExactSlots && s.groups <= 6;
}

struct Layer {
  std::vector<int> slot;
  double load = 0, bound = 0;
};

// `published` load: the search goes on below it, so that the result is not the heavier one.
Layer solve_packing(const std::vector<std::vector<int>>& nodes, const double* w, Packing& packing,
                    double target, double published) {
  const double enough = std::max(target, std::min(target * (1 + kClose), published));
  Layer out;
  for (const auto& groups : nodes) {
    const auto local = weights_of(groups, w, packing.per_group);
    const Node node =
        solve_node(local.data(), int(local.size()), packing.slots, packing.gpus, target, enough);
    for (int e : node.slot)
      out.slot.push_back(groups[e / packing.per_group] * packing.per_group + e % packing.per_group);
    out.load = std::max(out.load, node.load);
  }
  return out;
}

void solve_all(Packing& packing, std::vector<int>& node_of, int group, const double* w,
               Layer& best) {
  const Shape& s = packing.shape;
  if (group == s.groups) {
    std::vector<std::vector<int>> nodes(s.nodes);
    for (int k = 0; k < s.groups; ++k) nodes[node_of[k]].push_back(k);
    double worst = 0;
    for (const auto& groups : nodes) worst = std::max(worst, packing.bound(groups));
    if (worst >= best.load) return;
    Layer layer = solve_packing(nodes, w, packing, worst, best.load);
    if (layer.load < best.load) best.slot = layer.slot, best.load = layer.load;
    return;
  }
  bool empty_tried = false;
  for (int n = 0; n < s.nodes; ++n) {
    const int held = int(std::count(node_of.begin(), node_of.begin() + group, n));
    if (held == packing.per_node || (held == 0 && empty_tried)) continue;
    empty_tried |= held == 0;
    node_of[group] = n;
    solve_all(packing, node_of, group + 1, w, best);
  }
}

Layer solve_layer(const float* weight, const Shape& s) {
  std::vector<double> w(weight, weight + s.experts);
  Packing packing(w.data(), s);
  const std::vector<int> base = published(weight, s);
  const double base_load = largest(base, w.data(), s.experts, s.gpus);
  double bound;
  std::vector<float> group(s.groups, 0.f);
  for (int e = 0; e < s.experts; ++e) group[e / packing.per_group] += weight[e];
  packing.start_with(balanced_packing(group, s.nodes));
  if (s.nodes > 1) {
    packing.improve();
    packing.choose(0);
  }
  bound = packing.best;
  if (!packing.complete) {  // not every packing was seen: only what holds for all of them
    double total = 0;
    for (double x : w) total += x;
    std::vector<int> count;
    const double share = min_max_share(w.data(), s.experts, s.slots, packing.gpus, count);
    bound = std::max(total / s.gpus, share);
  }
  Layer out = solve_packing(packing.best_nodes, w.data(), packing, packing.best, base_load);
  if (s.nodes > 1 && tiny(packing, s) && out.load > bound * (1 + 1e-12)) {
    std::vector<int> node_of(s.groups, -1);
    solve_all(packing, node_of, 0, w.data(), out);
  }
  if (out.load > base_load) {  // its own local optimum, from the published placement
    Search search(w.data(), s.experts, s.slots, s.gpus, s.gpus / s.nodes);
    search.slot = base;
    search.index();
    separate(search);
    search.run(bound, 8 * s.slots);
    const bool better = search.largest() <= base_load;  // else moving replicas apart cost too much
    out.slot = better ? search.slot : base;
    out.load = better ? search.largest() : base_load;
  }
  out.bound = bound;
  return out;
}

}  // namespace

// weight [layers, experts] fp32; phy2log [layers, slots]; load, bound [layers]. With `greedy`, that
// of the published placement is written too, and the bound is sharpened, which takes longer.
extern "C" __attribute__((visibility("default"))) void eplb_plan(const float* weight, int layers,
                                                                 int experts, int slots, int groups,
                                                                 int nodes, int gpus,
                                                                 int64_t* phy2log, double* load,
                                                                 double* bound, double* greedy) {
  const Shape shape{experts, slots, groups, nodes, gpus};
  for (int l = 0; l < layers; ++l) {
    const float* w = weight + size_t(l) * experts;
    const Layer layer = solve_layer(w, shape);
    std::copy(layer.slot.begin(), layer.slot.end(), phy2log + size_t(l) * slots);
    load[l] = layer.load;
    bound[l] = layer.bound;
    if (greedy) {
      const std::vector<double> exact(w, w + experts);
      greedy[l] = largest(published(w, shape), exact.data(), experts, gpus);
      if (nodes == 1) bound[l] = sharpen(exact.data(), experts, slots, gpus, bound[l], load[l]);
    }
  }
}

// Improves a placement in place: until `target` (mean / largest load, per layer), with at most
// `max_moves` new (GPU, expert) pairs a layer; -1: as many as help. moves [layers] is written.
extern "C" __attribute__((visibility("default"))) void eplb_improve(
    const float* weight, int layers, int experts, int slots, int nodes, int gpus, double target,
    int max_moves, int64_t* phy2log, double* load, int64_t* moves) {
  for (int l = 0; l < layers; ++l) {
    const std::vector<double> w(weight + size_t(l) * experts, weight + size_t(l + 1) * experts);
    double total = 0;
    for (double x : w) total += x;
    Search search(w.data(), experts, slots, gpus, gpus / nodes);
    int64_t* out = phy2log + size_t(l) * slots;
    std::copy(out, out + slots, search.slot.begin());
    search.index();
    std::vector<uint8_t> origin(size_t(gpus) * experts);
    for (size_t i = 0; i < origin.size(); ++i) origin[i] = search.on[i] > 0;
    search.origin = origin.data();
    search.budget = max_moves;
    search.run(total / gpus / target, 8 * slots);
    std::copy(search.slot.begin(), search.slot.end(), out);
    load[l] = search.largest();
    moves[l] = search.moved;
  }
}

// How an expert's tokens divide among its replicas, layer by layer: share [layers, slots], summing
// to 1 over an expert's replicas; load [layers] the largest of a GPU then.
extern "C" __attribute__((visibility("default"))) void eplb_split(const float* weight, int layers,
                                                                  int experts, int slots, int gpus,
                                                                  const int64_t* phy2log,
                                                                  double* share, double* load) {
  for (int l = 0; l < layers; ++l)
    load[l] = split_layer(weight + size_t(l) * experts, experts, slots, gpus,
                          phy2log + size_t(l) * slots, share + size_t(l) * slots);
}
