// Puts attention over several parts of the keys together by log-sum-exp, part after part.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>
#include "rows.h"
#include "whalefall/pool.h"

namespace wf::attention {
// Contiguous: out [parts][rows][width], lse [parts][rows]; merged [rows][width], merged_lse [rows].
struct MergeArgs {
  const void* out;
  const float* lse;
  void* merged;
  float* merged_lse;
  int64_t parts, rows, width;
  float lonely_lse;
  Type type;  // of out and merged
};

// A part without keys has lse -inf or +inf and out 0: its weight is 0. A part whose sum is NaN has
// lse +inf too, and NaN in `out`, so a part of infinite lse counts where its `out` says so.
inline bool lonely(const MergeArgs& args, int64_t part, int64_t row) {
  const float lse = args.lse[part * args.rows + row];
  if (!std::isinf(lse)) return false;
  const int64_t begin = (part * args.rows + row) * args.width;
  for (int64_t i = 0; i < args.width; i += kStep) {
    vf x, y;
    read_plain(args.out, args.type, begin + i, std::min<int64_t>(kStep, args.width - i), x, y);
    for (int lane = 0; lane < kLanes; ++lane)
      if (std::isnan(x[lane]) || std::isnan(y[lane])) return false;
  }
  return true;
}

// A NaN, in lse or with an infinite one in `out`, makes the row NaN and its lse what a sum of NaN
// has everywhere: +inf.
inline void merge_row(const MergeArgs& args, int64_t row) {
  constexpr float kInfinite = std::numeric_limits<float>::infinity();
  static thread_local std::vector<float> weights;  // at first lse, -inf of a part without keys
  weights.clear();
  float top = -kInfinite;
  bool broken = false;
  for (int64_t p = 0; p < args.parts; ++p) {
    const float lse = args.lse[p * args.rows + row];
    const bool none = lonely(args, p, row);
    weights.push_back(none ? -kInfinite : lse);
    broken = broken || (!none && !std::isfinite(lse));
    top = std::max(top, weights.back());
  }
  double sum = 0;
  if (!broken && top != -kInfinite)
    for (float lse : weights) sum += std::exp(double(lse) - top);
  args.merged_lse[row] = broken     ? kInfinite
                         : sum == 0 ? args.lonely_lse
                                    : float(top + std::log(sum));
  for (float& weight : weights) weight = sum == 0 ? 0 : float(std::exp(double(weight) - top) / sum);
  const vf start = set1(broken ? std::numeric_limits<float>::quiet_NaN() : 0.0f);
  for (int64_t i = 0; i < args.width; i += kStep) {
    const int64_t count = std::min<int64_t>(kStep, args.width - i);
    vf a = start, b = start;
    for (int64_t p = 0; p < args.parts; ++p) {
      // without keys; another part whose weight rounds to 0 still brings its NaN along
      if (weights[size_t(p)] == 0 && std::isinf(args.lse[p * args.rows + row])) continue;
      const vf weight = set1(weights[size_t(p)]);
      vf x, y;
      read_plain(args.out, args.type, (p * args.rows + row) * args.width + i, count, x, y);
      a = fma(x, weight, a);
      b = fma(y, weight, b);
    }
    write_step<Fp32Row>(args.merged, args.type, row * args.width + i, count, a, b);
  }
}
}  // namespace wf::attention
