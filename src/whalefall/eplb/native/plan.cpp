// Expert placement, layer by layer.
//   groups -> nodes    every packing (branch and bound), judged by the bound of its worst node; if
//                      the plan ends far above the bound, the next ones by what nodes reached
//   inside a node      replica counts, heaviest first to the lightest GPU, then local search
// The published greedy placement is computed too; the result is never heavier than it.
// node.h plans a node, packing.h the groups of nodes, split.h divides tokens between replicas.
#include <cstring>
#include <memory>

#include "greedy.h"
#include "judge.h"
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

struct Layer {
  std::vector<int> slot;
  double load = 0, bound = 0;
};

// Plans of nodes by the groups they hold: each is made once.
struct Plans {
  const double* weight;
  Packing& packing;
  std::map<std::vector<int>, Node> made;
  int64_t work = 0;

  const Node& of(const std::vector<int>& groups, double target, double enough) {
    const auto [place, fresh] = made.try_emplace(groups);
    if (fresh) {
      const auto local = weights_of(groups, weight, packing.per_group);
      place->second =
          solve_node(local.data(), int(local.size()), packing.slots, packing.gpus, target, enough);
      work += place->second.work;
      double& known = packing.known[groups];
      known = std::max(known, place->second.load);
    }
    return place->second;
  }

  // The layer whose nodes hold these groups, all of them planned.
  Layer layer(const std::vector<std::vector<int>>& nodes) {
    Layer out;
    for (const auto& groups : nodes) {
      const Node& node = made.at(groups);
      for (int e : node.slot)
        out.slot.push_back(groups[e / packing.per_group] * packing.per_group +
                           e % packing.per_group);
      out.load = std::max(out.load, node.load);
    }
    return out;
  }
};

// A packing's bound may be out of reach, and another, of a higher one, be placed better: the most
// promising is planned, node by node, until what is known of its nodes is not below `best`; then
// the next, judged by the loads of the nodes planned so far and the bounds of the others.
void try_packings(Plans& plans, double bound, double aim, Layer& best) {
  Packing& packing = plans.packing;
  plans.work = packing.all_steps = 0;
  while (best.load > aim && plans.work < kWork && packing.all_steps < kPackingSteps) {
    packing.seek(best.load);
    if (packing.best_nodes.empty()) return;
    auto nodes = packing.best_nodes;
    std::stable_sort(nodes.begin(), nodes.end(), [&](const auto& a, const auto& b) {
      return packing.bound(a) > packing.bound(b);
    });
    bool lighter = true;
    for (const auto& groups : nodes)
      lighter = lighter && (plans.made.count(groups) || !packing.refutes(groups, best.load));
    for (size_t n = 0; n < nodes.size() && lighter; ++n) {
      const double target = std::max(bound, packing.bound(nodes[n]));
      lighter = plans.of(nodes[n], target, target * (1 + kClose)).load < best.load;
    }
    if (!lighter) continue;
    const double known = best.bound;
    best = plans.layer(packing.best_nodes);
    best.bound = known;
  }
}

Layer solve_layer(const float* weight, const Shape& s) {
  std::vector<double> w(weight, weight + s.experts);
  Packing packing(w.data(), s);
  const std::vector<int> base = published(weight, s);
  const double base_load = largest(base, w.data(), s.experts, s.gpus);
  std::vector<float> group(s.groups, 0.f);
  for (int e = 0; e < s.experts; ++e) group[e / packing.per_group] += weight[e];
  packing.start_with(balanced_packing(group, s.nodes));
  if (s.nodes > 1) {
    packing.improve();
    packing.choose(0);
    if (!packing.complete) packing.floor = packing.least();
  }
  // where not every packing was seen: only what holds for all of them
  const double bound = packing.complete ? packing.best : packing.floor;
  // the search goes on below the published load, so that the result is not the heavier one
  const double enough = std::max(packing.best, std::min(packing.best * (1 + kClose), base_load));
  Plans plans{w.data(), packing, {}};
  const auto first = packing.best_nodes;
  for (const auto& groups : first) plans.of(groups, packing.best, enough);
  Layer out = plans.layer(first);
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
  if (s.nodes > 1) {
    const bool tiny = packing.slots <= kExactSlots;
    try_packings(plans, bound, bound * (tiny ? 1 + 1e-12 : kMissed), out);
  }
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
      if (nodes == 1 || load[l] > bound[l] * (1 + kClose))
        bound[l] = sharpen_layer(exact.data(), shape, bound[l], load[l]);
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
