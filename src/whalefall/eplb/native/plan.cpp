// Expert placement, layer by layer.
//   groups -> nodes    every packing (branch and bound), judged by the bound of its worst node
//   inside a node      replica counts, heaviest first to the lightest GPU, then local search
// The published greedy placement is computed too; the result is never heavier than it.
// Bound: one node's search is O(slots^2) per step; a layer of 288 slots takes tens of microseconds.
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include "bound.h"
#include "exact.h"
#include "greedy.h"
#include "search.h"

namespace {
using namespace eplb;

constexpr double kClose = 2e-3;  // this close to the bound, a search stops
constexpr double kFar = 1.003;   // this far from it, other replica counts are tried
constexpr double kKick = 1.05;   // farther than this, other packings of the same counts cannot help
constexpr int kCountSteps = 8;

struct Shape {
  int experts, slots, groups, nodes, gpus;
};

struct Node {
  std::vector<int> slot;  // local expert of each slot, GPU by GPU
  double load = 0;
};

double largest(const std::vector<int>& slot, const double* w, int experts, int gpus) {
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
void spread(Search& search, const std::vector<int>& count) {
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
  std::vector<int> fill(search.num_gpus, 0);
  for (int e : item) {
    int best = -1;
    bool best_apart = false;
    for (int g = 0; g < search.num_gpus; ++g) {
      if (fill[g] == search.per_gpu) continue;
      const bool apart = search.held(g, e) == 0;
      if (best < 0 || apart > best_apart ||
          (apart == best_apart && search.load[g] < search.load[best]))
        best = g, best_apart = apart;
    }
    search.slot[best * search.per_gpu + fill[best]++] = e;
    search.load[best] += share[e];
    ++search.held(best, e);
  }
  search.index();
}

// Two replicas of one expert on a GPU: one changes place with the replica that makes the larger of
// the two loads smallest.
void separate(Search& search) {
  for (int a = 0; a < search.num_slots; ++a) {
    const int g = a / search.per_gpu, x = search.slot[a];
    if (search.held(g, x) < 2) continue;
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
void kick(Search& search, std::mt19937& random, double target, int rounds) {
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

// Replica counts that keep every share at or below `limit`, the spare slots given to the largest
// shares, or (dilute) to the lightest experts, which makes company for the heavy ones. Empty: too
// few slots.
std::vector<int> counts_for(const double* w, int experts, int slots, int cap, double limit,
                            bool dilute) {
  std::vector<int> count(experts);
  int left = slots;
  for (int e = 0; e < experts; ++e) {
    count[e] = std::min<double>(cap, std::max(1.0, std::ceil(w[e] / limit * (1 - 1e-12))));
    left -= count[e];
  }
  if (left < 0) return {};
  for (; left > 0; --left) {
    int best = -1;
    for (int e = 0; e < experts; ++e) {
      if (count[e] >= cap) continue;
      const double share = w[e] / count[e];
      if (best < 0 || (dilute ? share < w[best] / count[best] : share > w[best] / count[best]))
        best = e;
    }
    ++count[best];
  }
  return count;
}

// Fewer replicas of the hottest experts leave GPUs free of them: other counts, each searched.
void other_counts(Search& search, Node& best, int cap, double share, double enough) {
  const double ceiling = std::max(best.load, share * 1.0001);
  std::vector<std::vector<int>> seen;
  for (int step = 0; step <= kCountSteps && best.load > enough; ++step)
    for (bool dilute : {false, true}) {
      const double limit = share * std::pow(ceiling / share, double(step) / kCountSteps);
      const auto count = counts_for(search.weight, search.num_experts, search.num_slots, cap,
                                    limit * (1 + 1e-9), dilute);
      if (count.empty() || std::find(seen.begin(), seen.end(), count) != seen.end()) continue;
      seen.push_back(count);
      search.clear();
      spread(search, count);
      separate(search);
      search.run(enough, 4 * search.num_slots);
      if (search.largest() < best.load) best = {search.slot, search.largest()};
    }
}

Node solve_node(const double* w, int experts, int slots, int gpus, double target, double enough) {
  const int cap = std::max(gpus, (slots + experts - 1) / experts);
  std::vector<int> count;
  const double share = min_max_share(w, experts, slots, cap, count);
  Search search(w, experts, slots, gpus, gpus);
  spread(search, count);
  separate(search);
  search.run(enough, 8 * slots);
  Node node{search.slot, search.largest()};
  if (node.load > target * kFar && slots / gpus > 1) other_counts(search, node, cap, share, enough);
  if (node.load > enough && node.load < target * kKick && slots > kExactSlots && slots / gpus > 2) {
    search.slot = node.slot;
    search.index();
    std::mt19937 random(1);
    kick(search, random, enough, 24);
    if (search.largest() < node.load) node = {search.slot, search.largest()};
  }
  if (node.load > target * (1 + 1e-12) && slots <= kExactSlots) {
    Exact exact(w, experts, slots, gpus, node.load);
    if (!exact.found.empty()) node = {exact.found, exact.best};
  }
  return node;
}

// The experts of some groups, as one array.
std::vector<double> weights_of(const std::vector<int>& groups, const double* w, int per_group) {
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

// How an expert's tokens divide among its replicas so that the largest GPU load is as small as the
// placement allows: each expert in turn levels its GPUs; the sum of squares falls to its minimum,
// whose loads are the most even there are. share [layers, slots] sums to 1 over an expert's
// replicas.
extern "C" __attribute__((visibility("default"))) void eplb_split(const float* weight, int layers,
                                                                  int experts, int slots, int gpus,
                                                                  const int64_t* phy2log,
                                                                  double* share, double* load) {
  const int per_gpu = slots / gpus;
  for (int l = 0; l < layers; ++l) {
    const float* w = weight + size_t(l) * experts;
    const int64_t* slot = phy2log + size_t(l) * slots;
    double* part = share + size_t(l) * slots;
    std::vector<std::vector<int>> places(experts);
    for (int s = 0; s < slots; ++s) places[slot[s]].push_back(s);
    std::vector<double> total(gpus, 0.0);
    for (int s = 0; s < slots; ++s) {
      part[s] = 1.0 / places[slot[s]].size();
      total[s / per_gpu] += w[slot[s]] * part[s];
    }
    for (int sweep = 0; sweep < 500; ++sweep) {
      double change = 0;
      for (int e = 0; e < experts; ++e) {
        auto& own = places[e];
        if (own.size() < 2 || w[e] <= 0) continue;
        for (int s : own) total[s / per_gpu] -= w[e] * part[s];
        std::sort(own.begin(), own.end(),
                  [&](int a, int b) { return total[a / per_gpu] < total[b / per_gpu]; });
        double level = 0, sum = w[e];
        for (size_t k = 0; k < own.size(); ++k) {
          sum += total[own[k] / per_gpu];
          level = sum / double(k + 1);
          if (k + 1 == own.size() || total[own[k + 1] / per_gpu] >= level) break;
        }
        for (int s : own) {
          const double now = std::max(0.0, (level - total[s / per_gpu]) / w[e]);
          change = std::max(change, std::abs(now - part[s]) * w[e]);
          part[s] = now;
        }
        // a GPU that holds the expert twice must not be levelled twice
        double given = 0;
        for (int s : own) given += part[s];
        for (int s : own) {
          part[s] /= given;
          total[s / per_gpu] += w[e] * part[s];
        }
      }
      const double most = *std::max_element(total.begin(), total.end());
      if (change <= most * 1e-9) break;
    }
    load[l] = *std::max_element(total.begin(), total.end());
  }
}
