// A lower bound by the hottest expert: with c replicas of it, c GPUs have little room left.
#pragma once
#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

namespace eplb {

// Replicas that make the share of an expert at most `room`.
inline double needed(double w, double room) {
  return std::max(1.0, std::ceil(w / room * (1 - 1e-12)));
}

// Can a largest load of `limit` be refuted, for each number c of GPUs that hold the hottest expert?
// Those c have room limit - hottest / c each, the other ("free") GPUs all of theirs. Either
//   room    the other experts do not fit: free GPUs take whole experts, per_gpu of them each; or
//   slots   an expert outside the free GPUs needs replicas small enough for that room, one that is
//           wholly in them only a slot. Those that save most fill the free GPUs, parts allowed.
struct Hottest {
  int slots, gpus, per_gpu;
  std::vector<double> weight;  // falling
  std::vector<double> sum;     // of the first k of the others
  std::vector<std::pair<double, double>> saving;

  Hottest(const double* w, int experts, int n_slots, int n_gpus)
      : slots(n_slots), gpus(n_gpus), per_gpu(n_slots / n_gpus), weight(w, w + experts) {
    std::sort(weight.begin(), weight.end(), std::greater<double>());
    sum.assign(experts, 0.0);
    for (int k = 1; k < experts; ++k) sum[k] = sum[k - 1] + weight[k];
  }

  bool lacks_room(int c, double limit) const {
    const int free = gpus - c, others = int(weight.size()) - 1;
    const double inside = std::min(free * limit, sum[std::min(others, free * per_gpu)]);
    return weight[0] + sum[others] - inside > c * limit * (1 + 1e-9);
  }

  bool lacks_slots(int c, double limit) {
    const double room = limit - weight[0] / c;
    if (room <= limit * 1e-9) return false;  // left to `lacks_room`
    const int free = gpus - c;
    double need = c + double(weight.size()) - 1;
    saving.clear();
    for (size_t e = 1; e < weight.size() && weight[e] > room; ++e) {
      const double more = needed(weight[e], room) - 1;
      need += more;
      saving.push_back({more / weight[e], weight[e]});
    }
    if (need <= slots) return false;
    double by_place = 0;  // falling weights save less and less
    for (size_t k = 0; k < saving.size() && int(k) < free * per_gpu; ++k)
      by_place += saving[k].first * saving[k].second;
    std::sort(saving.begin(), saving.end(), std::greater<>());
    double by_room = 0, left = free * limit;
    for (const auto& [each, w] : saving) {
      by_room += each * std::min(left, w);
      left -= std::min(left, w);
    }
    return need - std::min(by_place, by_room) > slots + 1e-6;
  }

  bool refuted(double limit) {
    double most = slots;  // replicas that the others leave to the hottest expert
    for (size_t e = 1; e < weight.size(); ++e) most -= needed(weight[e], limit);
    if (most < 1) return true;
    if (2 * weight[0] <= limit * most) return false;  // a GPU may hold it twice
    const int least = int(std::min<double>(gpus + 1, needed(weight[0], limit)));
    for (int c = least; c <= gpus && c <= most; ++c)
      if (!lacks_room(c, limit) && !lacks_slots(c, limit)) return false;
    return true;
  }
};

}  // namespace eplb
