// Which groups of experts share a node.
#pragma once
#include <cmath>
#include <map>
#include <numeric>
#include <vector>

#include "bound.h"
#include "hottest.h"

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

constexpr int kPackingSteps = 20000;  // nodes tried in one search

// Chooses which groups share a node: first by bound, and, where that is cheap, by full solution.
struct Packing {
  const double* weight;
  Shape shape;
  int per_node, per_group, slots,
      gpus;  // groups of a node; experts of a group; slots, GPUs of a node
  std::vector<std::vector<int>> nodes, best_nodes;
  double best = INFINITY, floor = 0;  // the lowest worst bound; it cannot fall below `floor`
  int64_t steps = 0, all_steps = 0;   // of this search; of all so far
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

  // What no packing can beat: the mean, and each group's node with the lightest company there is,
  // as experts and as groups.
  double least() const {
    const double total = std::accumulate(group_weight.begin(), group_weight.end(), 0.0);
    double low = total / shape.gpus;
    std::vector<int> order(shape.experts), heavier(shape.groups), count;
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int a, int b) { return weight[a] < weight[b]; });
    std::iota(heavier.begin(), heavier.end(), 0);
    std::stable_sort(heavier.begin(), heavier.end(),
                     [&](int a, int b) { return group_weight[a] < group_weight[b]; });
    for (int k = 0; k < shape.groups; ++k) {
      std::vector<double> w = weights_of({k}, weight, per_group);
      for (size_t i = 0; int(w.size()) < per_node * per_group; ++i)
        if (order[i] / per_group != k) w.push_back(weight[order[i]]);
      const double share = min_max_share(w.data(), int(w.size()), slots, gpus, count);
      low = std::max(low, lower_bound(w.data(), int(w.size()), slots, gpus, share));
      double sum = group_weight[k];
      for (int i = 0, taken = 1; taken < per_node; ++i)
        if (heavier[i] != k) sum += group_weight[heavier[i]], ++taken;
      low = std::max(low, sum / gpus);
    }
    return low;
  }

  // Whether a largest load of `limit` is refuted for the node of these groups; remembered then.
  bool refutes(const std::vector<int>& groups, double limit) {
    if (bound(groups) >= limit) return true;
    const auto w = weights_of(groups, weight, per_group);
    if (!Hottest(w.data(), int(w.size()), slots, gpus).refuted(limit)) return false;
    known[groups] = limit;
    return true;
  }

  // The first free group opens a node; its company is chosen in rising order.
  void choose(double worst) {
    if (!complete || worst >= best || best <= floor * (1 + 1e-12)) return;
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

  // The packing of the lowest worst bound below `below`, to `best_nodes`; none: empty.
  void seek(double below) {
    best = below * (1 - 1e-12);
    best_nodes.clear();
    nodes.clear();
    std::fill(taken.begin(), taken.end(), 0);
    steps = 0;
    complete = true;
    choose(0);
  }

  void fill(int from, double worst) {
    if (++steps > kPackingSteps) complete = false;
    ++all_steps;
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
