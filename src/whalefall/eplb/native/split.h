// How an expert's tokens divide among its replicas so that the largest GPU load is as small as the
// placement allows: each expert in turn levels its GPUs; the sum of squares falls to its minimum,
// whose loads are the most even there are.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace eplb {

// Levels the GPUs of one expert, whose slots are `own`; how much moved.
inline double level(double weight, std::vector<int>& own, int per_gpu, std::vector<double>& total,
                    double* part) {
  for (int s : own) total[s / per_gpu] -= weight * part[s];
  std::sort(own.begin(), own.end(),
            [&](int a, int b) { return total[a / per_gpu] < total[b / per_gpu]; });
  double water = 0, sum = weight, change = 0;
  for (size_t k = 0; k < own.size(); ++k) {
    sum += total[own[k] / per_gpu];
    water = sum / double(k + 1);
    if (k + 1 == own.size() || total[own[k + 1] / per_gpu] >= water) break;
  }
  double given = 0;
  for (int s : own) {
    const double now = std::max(0.0, (water - total[s / per_gpu]) / weight);
    change = std::max(change, std::abs(now - part[s]) * weight);
    part[s] = now;
    given += now;
  }
  for (int s : own) {  // a GPU that holds the expert twice must not be levelled twice
    part[s] /= given;
    total[s / per_gpu] += weight * part[s];
  }
  return change;
}

// part [slots] sums to 1 over an expert's replicas; the largest load.
inline double split_layer(const float* w, int experts, int slots, int gpus, const int64_t* slot,
                          double* part) {
  const int per_gpu = slots / gpus;
  std::vector<std::vector<int>> places(experts);
  for (int s = 0; s < slots; ++s) places[slot[s]].push_back(s);
  std::vector<double> total(gpus, 0.0);
  for (int s = 0; s < slots; ++s) {
    part[s] = 1.0 / double(places[slot[s]].size());
    total[s / per_gpu] += w[slot[s]] * part[s];
  }
  for (int sweep = 0; sweep < 500; ++sweep) {
    double change = 0;
    for (int e = 0; e < experts; ++e)
      if (places[e].size() > 1 && w[e] > 0)
        change = std::max(change, level(w[e], places[e], per_gpu, total, part));
    if (change <= *std::max_element(total.begin(), total.end()) * 1e-9) break;
  }
  return *std::max_element(total.begin(), total.end());
}

}  // namespace eplb
