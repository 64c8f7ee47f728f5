// Local search on one layer (or one node of it): the heaviest GPU is relieved until it cannot be.
//
// Slot s of GPU s / p holds one replica; a replica of expert e carries w[e] / count[e]. Two moves:
//   swap     two replicas change places;
//   replace  an expert with several replicas gives one slot to another expert.
// A move is taken only if every GPU it touches ends below the load that the heaviest had, so
// (largest load, GPUs that carry it) falls with each step and the search ends. No move
// puts a second replica of an expert on a GPU. With an origin, the number of (GPU, expert) pairs
// that are new stays within a budget, and gains are weighed by their cost.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

namespace eplb {

// Comparisons of loads after which a search ends where it is: about a second. Only thousands of
// slots take so many; the count is the same on every machine.
constexpr int64_t kWork = int64_t(1) << 29;

struct Search {
  int num_experts, num_slots, num_gpus, per_gpu;
  int domain;  // GPUs of one node, between which replicas may move
  const double* weight;
  std::vector<int> slot, count, on;  // on[g * num_experts + e]: replicas of e on GPU g
  std::vector<double> load;
  std::vector<std::vector<int>> gpus;  // of each expert's replicas
  const uint8_t* origin = nullptr;     // [gpu, expert]: was there before
  int moved = 0, budget = -1;
  int64_t work = 0, round = 0;  // comparisons made; which slot experts are tried for
  std::vector<int64_t> tried;   // [experts] the round in which each was

  Search(const double* w, int experts, int slots, int n_gpus, int domain_gpus)
      : num_experts(experts),
        num_slots(slots),
        num_gpus(n_gpus),
        per_gpu(slots / n_gpus),
        domain(domain_gpus),
        weight(w),
        slot(slots, -1),
        count(experts, 0),
        on(size_t(n_gpus) * experts, 0),
        load(n_gpus, 0.0),
        gpus(experts),
        tried(experts, 0) {}

  double share(int e) const { return weight[e] / count[e]; }
  int& held(int g, int e) { return on[size_t(g) * num_experts + e]; }

  void clear() {
    std::fill(slot.begin(), slot.end(), -1);
    std::fill(on.begin(), on.end(), 0);
    std::fill(load.begin(), load.end(), 0.0);
  }

  // Fills every table from `slot`.
  void index() {
    std::fill(count.begin(), count.end(), 0);
    std::fill(on.begin(), on.end(), 0);
    for (auto& list : gpus) list.clear();
    for (int s = 0; s < num_slots; ++s) {
      ++count[slot[s]];
      ++held(s / per_gpu, slot[s]);
      gpus[slot[s]].push_back(s / per_gpu);
    }
    measure();
  }

  // Loads are summed anew, so that rounding does not pile up over many moves.
  void measure() {
    std::fill(load.begin(), load.end(), 0.0);
    for (int s = 0; s < num_slots; ++s) load[s / per_gpu] += share(slot[s]);
  }

  double largest() const { return *std::max_element(load.begin(), load.end()); }

  struct Move {
    double value = 0, gain = 0;  // largest load among the touched GPUs; gain per unit of cost
    int from = -1, to = -1;      // swap: two slots. replace: to = the slot, from = -1
    int expert = -1, cost = 0;
  };

  int is_new(int g, int e) const { return origin && !origin[size_t(g) * num_experts + e]; }

  void consider(Move& best, Move move, double heaviest) const {
    const double gain = heaviest - move.value;
    if (gain <= heaviest * 1e-9 || (budget >= 0 && moved + move.cost > budget)) return;
    move.gain = origin ? gain / std::max(move.cost, 1) : gain;
    if (move.gain > best.gain) best = move;
  }

  void try_swaps(Move& best, int g, double heaviest) {
    const int begin = g / domain * domain;
    for (int a = g * per_gpu; a < (g + 1) * per_gpu; ++a) {
      const int x = slot[a];
      const double share_x = share(x);
      for (int h = begin; h < begin + domain; ++h) {
        if (h == g || held(h, x)) continue;
        work += per_gpu;
        for (int b = h * per_gpu; b < (h + 1) * per_gpu; ++b) {
          const int y = slot[b];
          const double less = share_x - share(y);
          const double value = std::max(load[g] - less, load[h] + less);
          if (value >= heaviest || held(g, y)) continue;
          Move move{value, 0, a, b, -1, 0};
          if (origin) move.cost = is_new(h, x) + is_new(g, y) - is_new(g, x) - is_new(h, y);
          consider(best, move, heaviest);
        }
      }
    }
  }

  // Slot b, now expert x, becomes expert y: the largest load among all GPUs of x and of y. A start
  // may hold an expert several times on one GPU: each of them changes.
  double after_replace(int b, int y) {
    const int h = b / per_gpu, x = slot[b];
    work += int64_t(gpus[x].size() + gpus[y].size());
    const double rise = weight[x] / (count[x] - 1) - share(x);
    const double now_y = weight[y] / (count[y] + 1), fall = share(y) - now_y;
    double value = load[h] - share(x) + now_y;
    for (int k : gpus[x])
      if (k != h) value = std::max(value, load[k] + rise * held(k, x) - fall * held(k, y));
    for (int k : gpus[y])
      if (!held(k, x)) value = std::max(value, load[k] - fall * held(k, y));
    return value;
  }

  void try_replace(Move& best, int b, int y, double heaviest) {
    const int h = b / per_gpu, x = slot[b];
    if (x == y || held(h, y) || count[x] < 2 || held(h, x) > 1) return;
    const double value = after_replace(b, y);
    if (value >= heaviest) return;
    const int cost = is_new(h, y) - is_new(h, x);
    consider(best, Move{value, 0, -1, b, y, cost}, heaviest);
  }

  void try_replacements(Move& best, int g, double heaviest) {
    const int begin = g / domain * domain * per_gpu, end = begin + domain * per_gpu;
    for (int b = begin; b < end && work < kWork; ++b) {
      if (count[slot[b]] < 2) continue;
      work += b / per_gpu == g ? end - begin : per_gpu;
      if (b / per_gpu != g) {  // a further replica elsewhere for one of the experts of g
        for (int a = g * per_gpu; a < (g + 1) * per_gpu; ++a)
          try_replace(best, b, slot[a], heaviest);
        continue;
      }
      ++round;
      for (int c = begin; c < end && work < kWork; ++c) {  // a slot of g for a lighter expert
        const int y = slot[c];
        if (c / per_gpu == g || tried[y] == round) continue;
        tried[y] = round;
        try_replace(best, b, y, heaviest);
      }
    }
  }

  void put(int s, int e) {
    const int g = s / per_gpu, old = slot[s];
    moved += is_new(g, e) - is_new(g, old);
    --held(g, old);
    ++held(g, e);
    auto& places = gpus[old];
    places.erase(std::find(places.begin(), places.end(), g));
    gpus[e].push_back(g);
    --count[old];
    ++count[e];
    slot[s] = e;
  }

  void apply(const Move& move) {
    if (move.from >= 0) {
      const int x = slot[move.from], y = slot[move.to];
      put(move.from, y);
      put(move.to, x);
    } else {
      put(move.to, move.expert);
    }
    measure();
  }

  // Until the largest load is at most `target`, or no move helps.
  void run(double target, int max_steps) {
    for (int step = 0; step < max_steps && work < kWork; ++step) {
      work += num_slots + int64_t(domain) * per_gpu * per_gpu;  // looked at, if not compared
      const int g = int(std::max_element(load.begin(), load.end()) - load.begin());
      const double heaviest = load[g];
      if (heaviest <= target) return;
      Move best;
      try_swaps(best, g, heaviest);
      // replacements cost more to examine: only where a swap does not get all the way
      if (origin || best.gain == 0 || best.value > target) try_replacements(best, g, heaviest);
      if (best.gain == 0) return;
      apply(best);
    }
  }
};

}  // namespace eplb
