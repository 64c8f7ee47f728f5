// One tile of up to 64 keys for a group of R query rows: scores, online softmax, weighted values.
//
//   s[t,r] = q_r . k_t * scale * log2(e)     p = 2^(s - m)     O_r = O_r * 2^(m_old - m) + p V
//
// Rows of K and V are reached by pointer, so that pages, gathered indices and plain arrays are one
// kernel. Registers: R * T accumulators of scores (avx2: 4 rows x 2 keys), then R * 2 of O. The
// tile's stored rows (72 KiB for 64 x 576 bf16) stay in L2 over all groups of a block, a group's q
// and O (18 KiB) in L1. Bound: FMA ports from 4 rows on, memory below.
//
// A row's bits depend on its own q, keys and length only, never on the rows beside it: each score
// is one chain of multiply-adds and one fixed sum, each output one chain over the keys in order.
#pragma once
#include <algorithm>
#include "rows.h"

namespace wf::attention {
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int kTile = 64;
constexpr int kPadding = 16;                       // pointers behind a tile's last, all valid
constexpr int kScores = kLanes == 4 ? 8 : kLanes;  // accumulators of `scores`

// Stored rows, by address.
using Rows = const void* const*;
template <class Row>
inline const typename Row::Element* row_at(Rows rows, int64_t t) {
  return static_cast<const typename Row::Element*>(rows[t]);
}

// Rows to bring into L2 during one call of a kernel: a line at a time in the order of memory, as
// DRAM likes best, and spread over the call, since lines asked for in a burst wait for each other.
struct Fetch {
  Rows rows = nullptr;
  int count = 0;      // of rows
  int64_t bytes = 0;  // of a row
  int64_t offset = 0;

  // The lines due at one of `beats` moments of a call.
  int64_t each(int64_t beats) const {
    return beats ? ceil_div(count * ceil_div(bytes, 64), beats) : 0;
  }
  void lines(int64_t due) {
    for (; due > 0 && count > 0; --due) {
      prefetch_l2(static_cast<const char*>(*rows) + offset);
      offset += 64;
      if (offset >= bytes) offset = 0, ++rows, --count;
    }
  }
  // The same for one row, without the bookkeeping: what kernels bound by arithmetic can afford.
  void line_of_each(int64_t at) const {
    for (int i = 0; i < count; ++i) prefetch_l2(static_cast<const char*>(rows[i]) + at);
  }
};

template <class Row, int R>
inline void score_step(const typename Row::Element* const* k, int64_t step, const float* q,
                       vf* sum) {
  constexpr int T = kScores / R;
  vf a[T], b[T];
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) Row::load2(k[t] + step * kStep, a[t], b[t]);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) sum[t * R + r] = fma(a[t], load(q + r * kLanes), sum[t * R + r]);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t)
      sum[t * R + r] = fma(b[t], load(q + (R + r) * kLanes), sum[t * R + r]);
}

// Scores of kScores / R keys with R rows: s[t * R + r]. q is packed [step][half][R][kLanes].
template <class Row, int R>
__attribute__((noinline)) void scores(Rows key, const float* q, int64_t steps, float scale,
                                      const Fetch& fetch, float* s) {
  constexpr int T = kScores / R, kFloats = 2 * R * kLanes;
  constexpr int64_t kBytes = kStep * sizeof(typename Row::Element);
  constexpr int64_t kBeat = kBytes < 64 ? 64 / kBytes : 1;  // steps that use up a line
  const typename Row::Element* k[T];
  vf sum[T * R];
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) k[t] = row_at<Row>(key, t);
#pragma GCC unroll 16
  for (int i = 0; i < T * R; ++i) sum[i] = vf{};
  int64_t step = 0;
  [[maybe_unused]] Fetch cursor = R < 4 ? fetch : Fetch{};
  [[maybe_unused]] const int64_t each = R < 4 ? fetch.each(steps / kBeat) : 0;
  if (fetch.count)
    for (; step + kBeat <= steps; step += kBeat, q += kBeat * kFloats) {
      if constexpr (R < 4)
        cursor.lines(each);
      else
        fetch.line_of_each(step * kBytes);
#pragma GCC unroll 4
      for (int i = 0; i < kBeat; ++i) score_step<Row, R>(k, step + i, q + i * kFloats, sum);
    }
  for (; step < steps; ++step, q += kFloats) score_step<Row, R>(k, step, q, sum);
#pragma GCC unroll 16
  for (int i = 0; i < T * R; i += kLanes) store(s + i, sums(sum + i) * scale);
}

template <class Row, int R, int S, int Steps>
inline void weigh_step(const typename Row::Element* v, const float* p, vf (*sum)[2][R]) {
#pragma GCC unroll 16
  for (int i = 0; i < Steps; ++i) {
    vf a, b;
    Row::load2(v + i * kStep, a, b);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      vf weight = broadcast(p + r);
      sum[i][0][r] = fma(a, weight, sum[i][0][r]);
      sum[i][1][r] = fma(b, weight, sum[i][1][r]);
    }
  }
}

// O += P V for R rows of a group of S, `Steps` steps of columns at a time: one chain per output.
template <class Row, int R, int S, int Steps>
__attribute__((noinline)) void weigh_columns(Rows value, int64_t column, const float* p, int begin,
                                             int end, const Fetch& fetch, float* o) {
  vf sum[Steps][2][R];
#pragma GCC unroll 16
  for (int i = 0; i < Steps * 2 * R; ++i)
    sum[i / (2 * R)][i / R % 2][i % R] = load(o + (i / R * S + i % R) * kLanes);
  int t = begin;
  [[maybe_unused]] Fetch cursor = R < 4 ? fetch : Fetch{};
  [[maybe_unused]] const int64_t each = R < 4 ? fetch.each((end - begin) / 2) : 0;
  if (fetch.count)
    for (int64_t at = 0; t + 2 <= end && at < fetch.bytes; t += 2, at += R < 4 ? 0 : 64) {
      if constexpr (R < 4)
        cursor.lines(each);
      else
        fetch.line_of_each(at);
      weigh_step<Row, R, S, Steps>(row_at<Row>(value, t) + column, p + t * S, sum);
      weigh_step<Row, R, S, Steps>(row_at<Row>(value, t + 1) + column, p + (t + 1) * S, sum);
    }
  for (; t < end; ++t) weigh_step<Row, R, S, Steps>(row_at<Row>(value, t) + column, p + t * S, sum);
#pragma GCC unroll 16
  for (int i = 0; i < Steps * 2 * R; ++i)
    store(o + (i / R * S + i % R) * kLanes, sum[i / (2 * R)][i / R % 2][i % R]);
}
// Rows shared out over the calls of a kernel.
class Share {
 public:
  Share() = default;
  Share(Rows rows, int64_t count, int64_t bytes, int64_t calls)
      : rows_(rows), left_(int(count)), bytes_(bytes) {
    each_ = calls ? int(ceil_div(count, calls)) : 0;
  }
  Fetch next() {
    const int count = std::min(each_, left_);
    left_ -= count;
    rows_ += count;
    return {rows_ - count, count, bytes_};
  }

 private:
  Rows rows_ = nullptr;
  int left_ = 0, each_ = 0;
  int64_t bytes_ = 0;
};

template <int R>
constexpr int kWide = 4 / R;  // steps of columns in one call of `weigh_columns`

template <class Row, int R, int S>
inline void weigh(Rows value, int64_t steps, const float* p, int begin, int end, Share share,
                  float* o) {
  int64_t step = 0;
  for (; step + kWide<R> <= steps; step += kWide<R>, o += kWide<R> * 2 * S * kLanes)
    weigh_columns<Row, R, S, kWide<R>>(value, step * kStep, p, begin, end, share.next(), o);
  if constexpr (kWide<R> > 1)
    for (; step < steps; ++step, o += 2 * S * kLanes)
      weigh_columns<Row, R, S, 1>(value, step * kStep, p, begin, end, {}, o);
}

// Maximum (in units of log2) and sum of exponentials; lane l belongs to row l % R.
struct Softmax {
  vf max = set1(-kInf), sum = vf{};
};

// The reference point of the exponentials: the maximum, but 0 while no key was seen.
inline vf reference_point(vf m) { return select(m == -kInf, vf{}, m); }

// s[t * R + r], t < tokens, becomes the weights; returns the factor for what was summed before.
template <int R>
inline vf soften(float* s, int tokens, Softmax& state) {
  vf best = state.max;
  const int end = tokens * R;
  for (int i = 0; i < end; i += kLanes) best = max(best, load(s + i));
  best = across<R>(best, [](vf a, vf b) { return max(a, b); });
  vf point = reference_point(best);
  vf total{};
  for (int i = 0; i < end; i += kLanes) {
    vf p = exp2_of_negative(load(s + i) - point);
    store(s + i, p);
    total += p;
  }
  total = across<R>(total, [](vf a, vf b) { return a + b; });
  vf before = exp2_of_negative(state.max - point);
  state.sum = state.sum * before + total;
  state.max = best;
  return before;
}

// o = o * factor[r] for each row r of R.
template <int R>
inline void rescale(float* o, int64_t steps, vf factor) {
  vf row[R];
  for (int r = 0; r < R; ++r) row[r] = set1(factor[r]);
  for (int64_t i = 0; i < steps * 2; ++i)
    for (int r = 0; r < R; ++r, o += kLanes) store(o, load(o) * row[r]);
}
inline bool all_one(vf factor) {
  vi equal = factor == 1.0f;
  int32_t lanes[kLanes];
  std::memcpy(lanes, &equal, sizeof lanes);
  int32_t all = -1;
  for (int32_t lane : lanes) all &= lane;
  return all != 0;
}

// Where a tile's rows are. Behind the last of n, the last is repeated.
struct Tile {
  const void* k[kTile + kPadding];
  const void* v[kTile + kPadding];
  int n = 0;
};

// The tile after the one at hand, and which group of how many is at work: each of the first few
// brings its share of the next tile's rows into L2, half during its scores, half during its
// weights.
struct Ahead {
  const Tile* next = nullptr;  // null: nothing to bring
  int64_t k_bytes = 0, v_bytes = 0, group = 0, groups = 1;

  Share during_scores(int64_t calls) const {
    if (!next || group >= groups) return {};
    return {next->k + first(), same() ? half() - first() : end() - first(), k_bytes, calls};
  }
  Share during_weights(int64_t calls) const {
    if (!next || group >= groups) return {};
    if (same()) return {next->k + half(), end() - half(), k_bytes, calls};
    return {next->v + first(), end() - first(), v_bytes, calls};
  }

 private:
  bool same() const { return next->k[0] == next->v[0]; }
  int64_t first() const { return next->n * group / groups; }
  int64_t end() const { return next->n * (group + 1) / groups; }
  int64_t half() const { return (first() + end()) / 2; }
};

// Adds a tile to a group: row r sees its first seen[r] keys. `k_steps`, `v_steps`: row widths.
template <class Row, int R>
inline void attend(const Tile& tile, const Ahead& ahead, const int* seen, const float* q,
                   int64_t k_steps, int64_t v_steps, float scale_log2, float* o, Softmax& state) {
  constexpr int T = kScores / R;
  alignas(64) float s[(kTile + kPadding) * R];
  int most = seen[0], least = seen[0];
  for (int r = 1; r < R; ++r) {
    most = seen[r] > most ? seen[r] : most;
    least = seen[r] < least ? seen[r] : least;
  }
  Share share = ahead.during_scores(ceil_div(most, T));
  for (int t = 0; t < most; t += T)
    scores<Row, R>(tile.k + t, q, k_steps, scale_log2, share.next(), s + t * R);
  int tokens = (most + T - 1) / T * T;
  for (int t = least; t < tokens; ++t)
    for (int r = 0; r < R; ++r)
      if (t >= seen[r]) s[t * R + r] = -kInf;
  vf factor = soften<R>(s, tokens, state);
  if (!all_one(factor)) rescale<R>(o, v_steps, factor);
  weigh<Row, R, R>(tile.v, v_steps, s, 0, least, ahead.during_weights(v_steps / kWide<R>), o);
  if (most > least)
    for (int r = 0; r < R; ++r)
      if (seen[r] > least)
        weigh<Row, 1, R>(tile.v, v_steps, s + r, least, seen[r], {}, o + r * kLanes);
}
}  // namespace wf::attention
