// S = Q K: the first half of attention over a tile. Each score is one chain of multiply-adds and
// one fixed sum of its lanes.
//
// A CPU's front end is what is short where it is shared with another thread, so registers hold as
// many chains as fit: avx2 4 rows x 3 keys (of its 16, 12 sums, 3 keys, 1 row), 1.8 instructions a
// multiply-add; by 4 x 2 they were 1.9, and eight chains of four cycles wait for each other.
#pragma once
#include "fetch.h"

namespace wf::attention {
template <int R>
constexpr bool kThrees = kLanes == 8 && R == 4;  // keys of scores, vectors of values

template <class Row, int R>
inline void score_step(const typename Row::Element* const* k, int64_t step, const float* q,
                       vf* sum) {
  constexpr int T = kScores / R;
#ifdef WF_DOT
  if constexpr (kDots<Row>) {
    halves key[T];
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) key[t] = load_halves(k[t] + step * kStep);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const halves row = load_halves(q + r * kLanes);
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) sum[t * R + r] = dot(sum[t * R + r], key[t], row);
    }
    return;
  } else {
#endif
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
#ifdef WF_DOT
  }
#endif
}

// The maximum over s, a lane for each of its lanes.
inline vf highest(const float* s, int end, vf best) {
  for (int i = 0; i < end; i += kLanes) best = max(best, load(s + i));
  return best;
}

// Scores of T keys with R rows. Writes R floats more behind those of an odd T.
template <class Row, int R, int T>
__attribute__((noinline)) void score_keys(Rows key, const float* q, int64_t steps, float scale,
                                          const Fetch& fetch, float* s) {
  using Element = typename Row::Element;
  const char* k[T];
  vf sum[T * R];
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) k[t] = static_cast<const char*>(key[t]);
#pragma GCC unroll 16
  for (int i = 0; i < T * R; ++i) sum[i] = vf{};
  auto add = [&](const vf* of_key) __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r, q += kLanes) {
      const vf row = load(q);
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) sum[t * R + r] = fma(of_key[t], row, sum[t * R + r]);
    }
  };
  auto element = [](const char* p) { return reinterpret_cast<const Element*>(p); };
  auto one_step = [&](int64_t at) __attribute__((always_inline)) {
    vf half[T];
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) half[t] = Row::first(element(k[t] + at));
    add(half);
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) half[t] = Row::second(element(k[t] + at), half[t]);
    add(half);
  };
  // by one offset in bytes: g++ else counts up a pointer for each key
  constexpr int64_t kBytes = kStep * sizeof(Element);
  const int64_t end = steps * kBytes;
  if (fetch.count) {
    for (int64_t at = 0; at < end; at += kBytes) {
      fetch.line_of_few(at);
      one_step(at);
    }
  } else {
    for (int64_t at = 0; at < end; at += kBytes) one_step(at);
  }
#pragma GCC unroll 16
  for (int i = 0; i + kLanes <= T * R; i += kLanes) store(s + i, sums(sum + i) * scale);
  if constexpr (T * R % kLanes) {
    vf last[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) last[i] = sum[(T - 1) * R + i % R];
    store(s + (T - 1) * R, sums(last) * scale);
  }
}

// By three keys, and two or four that remain. `tokens` is even.
template <class Row, int R>
inline vf scores_by_threes(Rows key, int tokens, const float* q, int64_t steps, float scale,
                           Share share, float* s) {
  int t = 0;
  for (const int end = tokens - (tokens % 3 == 1 ? 4 : tokens % 3); t < end; t += 3)
    score_keys<Row, R, 3>(key + t, q, steps, scale, share.next(), s + t * R);
  for (; t < tokens; t += 2)
    score_keys<Row, R, 2>(key + t, q, steps, scale, share.next(), s + t * R);
  return highest(s, tokens * R, set1(-kInf));
}

// Scores of `tokens` keys, a multiple of kScores / R, with R rows, so many at a time:
// s[t * R + r]; returns their maximum, a lane for each lane of s. q: see `pack_queries`.
template <class Row, int R>
__attribute__((noinline)) vf scores(Rows key, int tokens, const float* q, int64_t steps,
                                    float scale, Share share, float* s) {
  constexpr int T = kScores / R, kFloats = R * kQueryFloats<Row>;
  constexpr int64_t kBytes = kStep * sizeof(typename Row::Element);
  constexpr int64_t kBeat = kBytes < 64 ? 64 / kBytes : 1;  // steps that use up a line
  vf best = set1(-kInf);
  for (int t = 0; t < tokens; t += T, key += T, s += kScores) {
    const typename Row::Element* k[T];
    vf sum[T * R];
#pragma GCC unroll 16
    for (int i = 0; i < T; ++i) k[i] = row_at<Row>(key, i);
#pragma GCC unroll 16
    for (int i = 0; i < T * R; ++i) sum[i] = vf{};
    const float* row = q;
    int64_t step = 0;
    Fetch fetch = share.next();
    [[maybe_unused]] const int64_t each = R < 4 ? fetch.each(steps / kBeat) : 0;
    if (fetch.count)
      for (; step + kBeat <= steps; step += kBeat, row += kBeat * kFloats) {
        if constexpr (R < 4)
          fetch.lines(each);
        else
          fetch.line_of_each(step * kBytes);
#pragma GCC unroll 4
        for (int i = 0; i < kBeat; ++i) score_step<Row, R>(k, step + i, row + i * kFloats, sum);
      }
    for (; step < steps; ++step, row += kFloats) score_step<Row, R>(k, step, row, sum);
#pragma GCC unroll 16
    for (int i = 0; i < T * R; i += kLanes) store(s + i, sums(sum + i) * scale);
    best = highest(s, kScores, best);
  }
  return best;
}
}  // namespace wf::attention
