// A block: up to a few dozen query rows that read the same keys, in groups of R rows.
//
// Keys are taken in runs of whole tiles; each run starts from nothing, and its result is merged by
// log-sum-exp with those before it, in order. A row's run length follows from its own number of
// keys alone (`run_tiles`). So a run can be computed on any thread, alone or after another, and
// the bits are the same.
#pragma once
#include <cmath>
#include "arena.h"
#include "in_order.h"
#include "tile_attend.h"

namespace wf::attention {
// Tiles of a run: 8 (512 keys; 4 panels), doubled as often as keeps a row's runs at 16 or fewer.
template <class Row>
inline int64_t run_tiles(int64_t keys) {
  int64_t tiles = kTiles<Row> ? 4 * kPanel / kTile : 8;
  while (keys > tiles * kTile * 16) tiles *= 2;
  return tiles;
}

// One query row: where it is read and written (in elements), and how many keys it sees.
struct Query {
  int64_t q = 0, out = 0, lse = 0;
  int64_t keys = 0;
  int head = 0;
  bool wanted = false;  // false: fills up a group of R
};

// A group's result over some keys: O unnormalised in [step][half][R][kLanes], then its softmax.
template <int R>
struct Partial {
  float* o;
  static int64_t floats(int64_t v_steps) { return v_steps * 2 * R * kLanes + 3 * kLanes; }
  Softmax softmax(int64_t v_steps) const {
    const float* end = o + v_steps * 2 * R * kLanes;
    return {load(end), load(end + kLanes), load(end + 2 * kLanes)};
  }
  void set(int64_t v_steps, const Softmax& state) {
    float* end = o + v_steps * 2 * R * kLanes;
    store(end, state.max);
    store(end + kLanes, state.point);
    store(end + 2 * kLanes, state.sum);
  }
  // `o` may stay as it is where the first tile of keys overwrites it.
  void clear(int64_t v_steps, bool o_too) {
    if (o_too) std::memset(o, 0, size_t(v_steps * 2 * R * kLanes) * sizeof(float));
    set(v_steps, Softmax{});
  }
  // Adds a later run's result to this one's.
  void merge(int64_t v_steps, const Partial& later) {
    Softmax mine = softmax(v_steps), other = later.softmax(v_steps);
    vf point = max(mine.point, other.point), origin = origin_of(point);
    vf a = power_of_two(mine.point - origin), b = power_of_two(other.point - origin);
    vf row_a[R], row_b[R];
    for (int r = 0; r < R; ++r) row_a[r] = set1(a[r]), row_b[r] = set1(b[r]);
    for (int64_t i = 0, at = 0; i < v_steps * 2; ++i)
      for (int r = 0; r < R; ++r, at += kLanes)
        store(o + at, fma(load(o + at), row_a[r], load(later.o + at) * row_b[r]));
    set(v_steps, {max(mine.max, other.max), point, fma(mine.sum, a, other.sum * b)});
  }
};

// q of R rows in the order of `scores`: [step][half][R][kLanes], zero behind `width`; for dots one
// vector of bf16 a row instead of two halves.
template <class Row, int R>
inline void pack_queries(const void* q, Type type, const Query* rows, int64_t width,
                         float* packed) {
#ifdef WF_TILE
  if constexpr (kTiles<Row>) {
    int64_t at[R];
    for (int r = 0; r < R; ++r) at[r] = rows[r].q;
    return pack_tiles(q, type, at, width, packed);
  }
#endif
  for (int64_t i = 0; i < width; i += kStep, packed += R * kQueryFloats<Row>)
    for (int r = 0; r < R; ++r) pack_step<Row, R>(q, type, rows[r].q + i, width - i, r, packed);
}

// What the results are stored as, and how a row's end is reached.
struct Output {
  void* out;
  Type type;
  float* lse;         // may be null; natural log
  float* max_logits;  // may be null; placed as lse
  const float* sink;  // may be null; [heads], natural units
  float lonely_lse;   // of a row without keys
};

template <class Row, int R>
inline void finish(const Partial<R>& partial, const Query* rows, int64_t width, const Output& to) {
  constexpr double kLn2 = 0.69314718055994530942;
  const int64_t v_steps = ceil_div(width, kStep);
  Softmax state = partial.softmax(v_steps);
  for (int r = 0; r < R; ++r) {
    if (!rows[r].wanted) continue;
    double sum = state.sum[r];
    // A row without weight (no keys, or all at -inf) gives 0; NaN stays NaN in `out`.
    double lse =
        sum > 0 ? state.point[r] * kLn2 + std::log(sum) : (sum == 0 ? to.lonely_lse : kInf);
    double factor = sum == 0 ? 0.0 : 1.0 / sum;
    if (to.sink && sum > 0) factor /= 1.0 + std::exp(double(to.sink[rows[r].head]) - lse);
    if (to.lse) to.lse[rows[r].lse] = float(lse);
    if (to.max_logits) to.max_logits[rows[r].lse] = float(state.max[r] * kLn2);
    vf scale = set1(float(factor));
    const float* o = partial.o + r * kLanes;
    for (int64_t i = 0; i < width; i += kStep, o += 2 * R * kLanes) {
      vf a = load(o) * scale, b = load(o + R * kLanes) * scale;
      if (sum == 0) a = b = vf{};
      write_step<Row>(to.out, to.type, rows[r].out + i, width - i, a, b);
    }
  }
}
}  // namespace wf::attention
