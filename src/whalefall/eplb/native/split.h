// How an expert's tokens divide among its replicas so that the largest GPU load is as small as the
// placement allows: each expert in turn levels its GPUs; the sum of squares falls to its minimum,
// whose loads are the most even there are. What a GPU gets of an expert counts, not how many of
// the expert's slots it has: two slots on one GPU are one place.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace eplb {

// An expert on one GPU: how many slots it has there, and the part of its tokens that they get.
struct Place {
  int gpu, slots;
  double part;
};

// Levels the GPUs of one expert, none of them named twice; how much moved.
inline double level(double weight, std::vector<Place>& own, std::vector<double>& total) {
  for (const Place& p : own) total[p.gpu] -= weight * p.part;
  std::sort(own.begin(), own.end(),
            [&](const Place& a, const Place& b) { return total[a.gpu] < total[b.gpu]; });
  double water = 0, sum = weight, change = 0;
  for (size_t k = 0; k < own.size(); ++k) {
    sum += total[own[k].gpu];
    water = sum / double(k + 1);
    if (k + 1 == own.size() || total[own[k + 1].gpu] >= water) break;
  }
  double given = 0;
  std::vector<double> now(own.size());
  for (size_t k = 0; k < own.size(); ++k)
    given += now[k] = std::max(0.0, (water - total[own[k].gpu]) / weight);
  if (!(given > 0)) given = now[0] = 1;  // a weight below the rounding of the loads beside it
  for (size_t k = 0; k < own.size(); ++k) {
    const double part = now[k] / given;
    change = std::max(change, std::abs(part - own[k].part) * weight);
    own[k].part = part;
    total[own[k].gpu] += weight * part;
  }
  return change;
}

// Where each expert is; its slots share alike.
inline std::vector<std::vector<Place>> places_of(int experts, int slots, int per_gpu,
                                                 const int64_t* slot) {
  std::vector<std::vector<Place>> places(experts);
  std::vector<int> count(experts, 0);
  for (int s = 0; s < slots; ++s) {
    std::vector<Place>& own = places[slot[s]];
    ++count[slot[s]];
    if (own.empty() || own.back().gpu != s / per_gpu) own.push_back({s / per_gpu, 0, 0.0});
    ++own.back().slots;
  }
  for (int e = 0; e < experts; ++e)
    for (Place& p : places[e]) p.part = double(p.slots) / count[e];
  return places;
}

inline std::vector<double> totals(const float* w, int gpus,
                                  const std::vector<std::vector<Place>>& places) {
  std::vector<double> total(gpus, 0.0);
  for (size_t e = 0; e < places.size(); ++e)
    for (const Place& p : places[e]) total[p.gpu] += w[e] * p.part;
  return total;
}

inline double most(const std::vector<double>& total) {
  return *std::max_element(total.begin(), total.end());
}

// part [slots] sums to 1 over an expert's replicas; the largest load.
inline double split_layer(const float* w, int experts, int slots, int gpus, const int64_t* slot,
                          double* part) {
  const int per_gpu = slots / gpus;
  std::vector<std::vector<Place>> places = places_of(experts, slots, per_gpu, slot);
  std::vector<double> total = totals(w, gpus, places);
  for (int sweep = 0; sweep < 500; ++sweep) {
    double change = 0;
    for (int e = 0; e < experts; ++e)
      if (places[e].size() > 1 && w[e] > 0)
        change = std::max(change, level(w[e], places[e], total));
    if (change <= most(total) * 1e-9) break;
  }
  std::vector<double> of_gpu(size_t(gpus) * experts);
  for (int e = 0; e < experts; ++e)
    for (const Place& p : places[e]) of_gpu[size_t(p.gpu) * experts + e] = p.part / p.slots;
  for (int s = 0; s < slots; ++s) part[s] = of_gpu[size_t(s / per_gpu) * experts + slot[s]];
  return most(totals(w, gpus, places));  // anew: the sweeps' rounding adds up
}

}  // namespace eplb
