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
#include "rows.h"

namespace wf::attention {
constexpr int kTile = 64;
constexpr int kPadding = 16;                       // pointers behind a tile's last, all valid
constexpr int kScores = kLanes == 4 ? 8 : kLanes;  // accumulators of `scores`

// Stored rows, by address.
using Rows = const void* const*;
template <class Row>
inline const typename Row::Element* row_at(Rows rows, int64_t t) {
  return static_cast<const typename Row::Element*>(rows[t]);
}

// Scores of kScores / R keys with R rows: s[t * R + r]. q is packed [step][half][R][kLanes].
template <class Row, int R>
__attribute__((noinline)) void scores(Rows key, const float* q, int64_t steps, float scale,
                                      float* s) {
  constexpr int T = kScores / R;
  const typename Row::Element* k[T];
  vf sum[T * R];
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) k[t] = row_at<Row>(key, t);
#pragma GCC unroll 16
  for (int i = 0; i < T * R; ++i) sum[i] = vf{};
  for (int64_t step = 0; step < steps; ++step, q += 2 * R * kLanes) {
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
#pragma GCC unroll 16
  for (int i = 0; i < T * R; i += kLanes) store(s + i, sums(sum + i) * scale);
}

// O += P V for R rows of a group of S, `Steps` steps of columns at a time: one chain per output.
template <class Row, int R, int S, int Steps>
__attribute__((noinline)) void weigh_columns(Rows value, int64_t column, const float* p, int begin,
                                             int end, float* o) {
  vf sum[Steps][2][R];
#pragma GCC unroll 16
  for (int i = 0; i < Steps * 2 * R; ++i)
    sum[i / (2 * R)][i / R % 2][i % R] = load(o + (i / R * S + i % R) * kLanes);
  for (int t = begin; t < end; ++t) {
    const typename Row::Element* v = row_at<Row>(value, t) + column;
#pragma GCC unroll 16
    for (int i = 0; i < Steps; ++i) {
      vf a, b;
      Row::load2(v + i * kStep, a, b);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        vf weight = broadcast(p + t * S + r);
        sum[i][0][r] = fma(a, weight, sum[i][0][r]);
        sum[i][1][r] = fma(b, weight, sum[i][1][r]);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < Steps * 2 * R; ++i)
    store(o + (i / R * S + i % R) * kLanes, sum[i / (2 * R)][i / R % 2][i % R]);
}
template <class Row, int R, int S>
inline void weigh(Rows value, int64_t steps, const float* p, int begin, int end, float* o) {
  constexpr int kWide = 4 / R;
  int64_t step = 0;
  for (; step + kWide <= steps; step += kWide)
    weigh_columns<Row, R, S, kWide>(value, step * kStep, p, begin, end, o + step * 2 * S * kLanes);
  for (; step < steps; ++step)
    weigh_columns<Row, R, S, 1>(value, step * kStep, p, begin, end, o + step * 2 * S * kLanes);
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

// Where a tile's rows are. Behind the last, the last is repeated (kPadding times).
struct Tile {
  const void* k[kTile + kPadding];
  const void* v[kTile + kPadding];
  int n = 0;
};

// The tile after this one, to be fetched into L2 meanwhile, and how much of each row there is.
struct Ahead {
  const Tile* tile = nullptr;
  int64_t k_bytes = 0, v_bytes = 0;

  void fetch(int begin, int end) const {
    if (!tile) return;
    for (int t = begin; t < end && t < tile->n; ++t) {
      fetch_row(tile->k[t], k_bytes);
      if (tile->v[t] != tile->k[t]) fetch_row(tile->v[t], v_bytes);
    }
  }
  static void fetch_row(const void* row, int64_t bytes) {
    const char* p = static_cast<const char*>(row);
    for (int64_t i = 0; i < bytes; i += 64) prefetch_l2(p + i);
  }
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
  for (int t = 0; t < most; t += T) {
    ahead.fetch(t, t + T);
    scores<Row, R>(tile.k + t, q, k_steps, scale_log2, s + t * R);
  }
  int tokens = (most + T - 1) / T * T;
  for (int t = least; t < tokens; ++t)
    for (int r = 0; r < R; ++r)
      if (t >= seen[r]) s[t * R + r] = -kInf;
  vf factor = soften<R>(s, tokens, state);
  if (!all_one(factor)) rescale<R>(o, v_steps, factor);
  weigh<Row, R, R>(tile.v, v_steps, s, 0, least, o);
  if (most > least)
    for (int r = 0; r < R; ++r)
      if (seen[r] > least) weigh<Row, 1, R>(tile.v, v_steps, s + r, least, seen[r], o + r * kLanes);
}
}  // namespace wf::attention
