// O += P V: the second half of attention over a tile. One chain per output, over the keys in order;
// with bf16 dots over pairs of keys (2p, 2p + 1), whose rows are unpacked into pairs of elements.
#pragma once
#include "scores.h"

namespace wf::attention {
// What P is kept as: [key][S] floats, or [key / 2][S] pairs of bf16.
template <class Row>
using Weights = std::conditional_t<kDots<Row>, int32_t, float>;

// Puts the weights of 2 * kLanes / R keys, i = t * R + r on, where `s` has their scores.
template <class Row, int R>
struct KeepWeights {
  void operator()(float* s, int i, vf a, vf b) const {
    store(s + i, a);
    store(s + i + kLanes, b);
  }
};
#ifdef WF_DOT
template <int R>
struct KeepWeights<DotRow, R> {
  __m512i order;
  KeepWeights() {
    alignas(64) int16_t from[2 * kLanes];
    for (int i = 0; i < kLanes; ++i)
      for (int upper = 0; upper < 2; ++upper)
        from[2 * i + upper] = int16_t((i / R * 2 + upper) * R + i % R);
    order = _mm512_load_si512(from);
  }
  void operator()(float* s, int i, vf a, vf b) const {
    _mm512_storeu_si512(s + i / 2, _mm512_permutexvar_epi16(order, to_halves(a, b)));
  }
};
#endif

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

#ifdef WF_DOT
// One pair of keys; `second` null: there is only the first.
template <int R, int Steps>
inline void weigh_pair(const uint16_t* first, const uint16_t* second, const int32_t* p,
                       vf (*sum)[2][R]) {
  halves low[Steps], high[Steps];
#pragma GCC unroll 16
  for (int i = 0; i < Steps; ++i) {
    halves a = load_halves(first + i * kStep);
    halves b = second ? load_halves(second + i * kStep) : halves{};
    low[i] = _mm512_unpacklo_epi16(a, b);
    high[i] = _mm512_unpackhi_epi16(a, b);
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const halves weight = broadcast_pair(p + r);
#pragma GCC unroll 16
    for (int i = 0; i < Steps; ++i) {
      sum[i][0][r] = dot(sum[i][0][r], low[i], weight);
      sum[i][1][r] = dot(sum[i][1][r], high[i], weight);
    }
  }
}

// As the above, for keys from an even one on.
template <class Row, int R, int S, int Steps>
__attribute__((noinline)) void weigh_columns(Rows value, int64_t column, const int32_t* p,
                                             int begin, int end, const Fetch& fetch, float* o) {
  vf sum[Steps][2][R];
#pragma GCC unroll 16
  for (int i = 0; i < Steps * 2 * R; ++i)
    sum[i / (2 * R)][i / R % 2][i % R] = load(o + (i / R * S + i % R) * kLanes);
  [[maybe_unused]] Fetch cursor = R < 4 ? fetch : Fetch{};
  [[maybe_unused]] const int64_t each = R < 4 ? fetch.each((end - begin) / 2) : 0;
  auto pair = [&](int t) __attribute__((always_inline)) {
    weigh_pair<R, Steps>(row_at<Row>(value, t) + column, row_at<Row>(value, t + 1) + column,
                         p + t / 2 * S, sum);
  };
  int t = begin;
  if (fetch.count)
    for (int64_t at = 0; t + 2 <= end && at < fetch.bytes; t += 2, at += R < 4 ? 0 : 64) {
      if constexpr (R < 4)
        cursor.lines(each);
      else
        fetch.line_of_each(at);
      pair(t);
    }
  for (; t + 2 <= end; t += 2) pair(t);
  if (t < end) weigh_pair<R, Steps>(row_at<Row>(value, t) + column, nullptr, p + t / 2 * S, sum);
#pragma GCC unroll 16
  for (int i = 0; i < Steps * 2 * R; ++i)
    store(o + (i / R * S + i % R) * kLanes, sum[i / (2 * R)][i / R % 2][i % R]);
}

#endif

// Three vectors of columns for R rows: with Odd 0 a step's two and the first of the next; with
// Odd 1 a step's second and both of the next. Registers as in `score_keys`.
template <class Row, int R, int Odd>
__attribute__((noinline)) void weigh_three(Rows value, int64_t column, const float* p, int begin,
                                           int end, const Fetch& fetch, float* o) {
  vf sum[3][R];
#pragma GCC unroll 16
  for (int i = 0; i < 3 * R; ++i) sum[i / R][i % R] = load(o + i * kLanes);
  value += begin, p += begin * R;
  auto add_key = [&] __attribute__((always_inline)) {
    const auto* v = row_at<Row>(value++, 0) + column;
    const vf first = Row::first(v + Odd * kStep);  // any is what `second` wants
    const vf x[3] = {Odd ? Row::second(v, first) : first, Odd ? first : Row::second(v, first),
                     Odd ? Row::second(v + kStep, first) : Row::first(v + kStep)};
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r, ++p) {
      const vf weight = broadcast(p);
#pragma GCC unroll 16
      for (int i = 0; i < 3; ++i) sum[i][r] = fma(x[i], weight, sum[i][r]);
    }
  };
  int left = end - begin;
  if (fetch.count)
    for (int64_t at = 0; left > 0 && at < fetch.bytes; at += 64) {
      fetch.line_of_few(at);
#pragma GCC unroll 1
      for (int i = 0; i < 2 && left > 0; ++i, --left) add_key();
    }
#pragma GCC unroll 2
  for (; left > 0; --left) add_key();
#pragma GCC unroll 16
  for (int i = 0; i < 3 * R; ++i) store(o + i * kLanes, sum[i / R][i % R]);
}

template <class Row, int R>
constexpr int kWide = (kDots<Row> ? 8 : 4) / R;  // steps of columns in one call of `weigh_columns`

// The columns of steps `step` … `end_step` - 1; o: of the first of them.
template <class Row, int R, int S>
inline void weigh(Rows value, int64_t step, int64_t end_step, const Weights<Row>* p, int begin,
                  int end, Share& share, float* o) {
  constexpr int kAtOnce = kWide<Row, R>;
  for (; step + kAtOnce <= end_step; step += kAtOnce, o += kAtOnce * 2 * S * kLanes)
    weigh_columns<Row, R, S, kAtOnce>(value, step * kStep, p, begin, end, share.next(), o);
  if constexpr (kAtOnce > 1)
    for (; step < end_step; ++step, o += 2 * S * kLanes)
      weigh_columns<Row, R, S, 1>(value, step * kStep, p, begin, end, {}, o);
}
// The same by threes of vectors, for R rows of a group of R.
template <class Row, int R>
inline void weigh_by_threes(Rows value, int64_t step, int64_t end_step, const Weights<Row>* p,
                            int begin, int end, Share& share, float* o) {
  for (; step + 3 <= end_step; step += 3, o += 6 * R * kLanes) {
    weigh_three<Row, R, 0>(value, step * kStep, p, begin, end, share.next(), o);
    weigh_three<Row, R, 1>(value, (step + 1) * kStep, p, begin, end, share.next(),
                           o + 3 * R * kLanes);
  }
  weigh<Row, R, R>(value, step, end_step, p, begin, end, share, o);
}
}  // namespace wf::attention
