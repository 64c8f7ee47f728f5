// Which groups of experts share a node.
#pragma once
#include <cmath>
#include <map>
#include <vector>

#include "bound.h"

namespace eplb {

struct Shape {
  int experts, slots, groups, nodes, gpus;
};

// The experts of some groups, as one array.
inline std::vector<double> weights_of(const std::vector<int>& groups, const double* w,
                                      int per_group) {
  std::vector<double> out;
  for (int k : groups) out.insert(out.end(), w + k * per_group, w + (k + 1) * per_group);
  return out;
}

// Chooses which groups share a node: first by bound, and, where that is cheap, by full solution.
struct Packing {
  const double* weight;
  Shape shape;
  int per_node, per_group, slots,
      gpus;  // groups of a node; experts of a group; slots, GPUs of a node
  std::vector<std::vector<int>> nodes, best_nodes;
  double best = INFINITY;
  int64_t steps = 0;
  bool complete = true;
  std::map<std::vector<int>, double> known;
  std::vector<char> taken;
  std::vector<double> group_weight;

  Packing(const double* w, const Shape& s)
      : weight(w),
        shape(s),
        per_node(s.groups / s.nodes),
        per_group(s.experts / s.groups),
        slots(s.slots / s.nodes),
        gpus(s.gpus / s.nodes),
        taken(s.groups, 0),
        group_weight(s.groups, 0.0) {
    for (int e = 0; e < s.experts; ++e) group_weight[e / per_group] += w[e];
  }

  double bound(const std::vector<int>& groups) {
    auto [place, fresh] = known.try_emplace(groups, 0.0);
    if (fresh) {
      const auto w = weights_of(groups, weight, per_group);
      std::vector<int> count;
      const double share = min_max_share(w.data(), int(w.size()), slots, gpus, count);
      place->second = lower_bound(w.data(), int(w.size()), slots, gpus, share);
    }
    return place->second;
  }

  // The first free group opens a node; its company is chosen in rising order.
  void choose(double worst) {
    if (!complete || worst >= best) return;
    const int first = int(std::find(taken.begin(), taken.end(), 0) - taken.begin());
    if (first == shape.groups) {
      best = worst;
      best_nodes = nodes;
      return;
    }
    taken[first] = 1;
    nodes.push_back({first});
    fill(first + 1, worst);
    nodes.pop_back();
    taken[first] = 0;
  }

  void fill(int from, double worst) {
    if (++steps > 20000) complete = false;
    if (!complete) return;
    if (int(nodes.back().size()) == per_node) {
      double total = 0;
      for (int k : nodes.back()) total += group_weight[k];
      if (total / gpus < best) choose(std::max(worst, bound(nodes.back())));
      return;
    }
    for (int k = from; k < shape.groups; ++k) {
      if (taken[k]) continue;
      taken[k] = 1;
      nodes.back().push_back(k);
      fill(k + 1, worst);
      nodes.back().pop_back();
      taken[k] = 0;
    }
  }

  // A packing from outside (group -> node) as the one to beat.
  void start_with(const std::vector<int>& node_of) {
    std::vector<std::vector<int>> given(shape.nodes);
    for (int k = 0; k < shape.groups; ++k) given[node_of[k]].push_back(k);
    double worst = 0;
    for (const auto& groups : given) worst = std::max(worst, bound(groups));
    if (worst < best) best = worst, best_nodes = given;
  }

  // Groups of the worst node change places while that lowers the worst bound.
  void improve() {
    for (int round = 0; round < 200; ++round) {
      int worst = 0;
      for (int n = 1; n < shape.nodes; ++n)
        if (bound(best_nodes[n]) > bound(best_nodes[worst])) worst = n;
      bool better = false;
      for (int n = 0; n < shape.nodes && !better; ++n)
        for (int i = 0; i < per_node && !better && n != worst; ++i)
          for (int j = 0; j < per_node && !better; ++j) {
            auto a = best_nodes[worst], b = best_nodes[n];
            std::swap(a[i], b[j]);
            std::sort(a.begin(), a.end());
            std::sort(b.begin(), b.end());
            if (std::max(bound(a), bound(b)) < bound(best_nodes[worst]) * (1 - 1e-9)) {
              best_nodes[worst] = a;
              best_nodes[n] = b;
              better = true;
            }
          }
      if (!better) break;
    }
    best = 0;
    for (const auto& groups : best_nodes) best = std::max(best, bound(groups));
  }
};

}  // namespace eplb
