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

// -inf and +inf both say that a part has no keys (its weight is 0), NaN stays NaN.
inline bool lonely(float lse) { return std::isinf(lse); }

inline void merge_row(const MergeArgs& args, int64_t row) {
  float top = -std::numeric_limits<float>::infinity();
  for (int64_t p = 0; p < args.parts; ++p) {
    const float lse = args.lse[p * args.rows + row];
    if (!lonely(lse) && !(lse <= top)) top = lse;
  }
  double sum = 0;
  for (int64_t p = 0; p < args.parts; ++p) {
    const float lse = args.lse[p * args.rows + row];
    if (!lonely(lse)) sum += std::exp(double(lse) - top);
  }
  args.merged_lse[row] = sum == 0 ? args.lonely_lse : float(top + std::log(sum));
  static thread_local std::vector<float> weights;
  weights.clear();
  for (int64_t p = 0; p < args.parts; ++p)
    weights.push_back(float(std::exp(double(args.lse[p * args.rows + row]) - top) / sum));
  for (int64_t i = 0; i < args.width; i += kStep) {
    const int64_t count = std::min<int64_t>(kStep, args.width - i);
    vf a{}, b{};
    for (int64_t p = 0; p < args.parts; ++p) {
      const float lse = args.lse[p * args.rows + row];
      if (lonely(lse)) continue;
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
