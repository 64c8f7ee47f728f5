// Scores, [key][16 rows], become weights in bf16 as the first operand of AMX's
// product with the values wants them: for each 32 keys a tile [row][key].
//
// A vector is one key's scores with 16 rows, so that maxima and sums need no lanes combined. The
// transposition chooses an order of its own for the pairs of keys in a tile (`pair_place`), which
// saves a fifth of its shuffles; values are paired in the same order.
#pragma once
#include "tile_scores.h"

namespace wf::attention {
#ifdef WF_TILE
constexpr int kStepKeys = kTileHalves;  // of a product with values

// Where keys 2 p and 2 p + 1 of 32 stand in a row of weights, in pairs.
constexpr int pair_place(int p) { return (p & 8) | (p & 1) << 2 | (p & 7) >> 1; }

// Row r sees the keys before seen[r]: -inf behind them. s: scores of `keys` keys from `first` on,
// of which all rows see `common`.
inline void hide_keys(float* s, int common, int keys, const int* seen, int first) {
  const vi count = (vi)_mm512_loadu_si512(seen) - first;
  for (int t = std::max(common, 0); t < keys; ++t)
    store(s + t * kLanes, select(count > t, load(s + t * kLanes), set1(-kInf)));
}

// Four keys' weights in bf16 pairs: lanes 0, 1 (keys 0 and 1) and 2, 3 (keys 2 and 3) of `low` hold
// rows 0 … 3, 8 … 11, those of `high` the others.
inline void pair_weights(const vf* e, __m512i& low, __m512i& high) {
  const halves a = to_halves(e[0], e[2]), b = to_halves(e[1], e[3]);
  low = _mm512_unpacklo_epi16(a, b);
  high = _mm512_unpackhi_epi16(a, b);
}
// Four such quarters: 16 keys of rows i and i + 8 in to[i].
inline void gather_rows(const __m512i* part, __m512i* to) {
  const __m512i a = _mm512_unpacklo_epi32(part[0], part[1]);
  const __m512i b = _mm512_unpackhi_epi32(part[0], part[1]);
  const __m512i c = _mm512_unpacklo_epi32(part[2], part[3]);
  const __m512i d = _mm512_unpackhi_epi32(part[2], part[3]);
  to[0] = _mm512_unpacklo_epi64(a, c), to[1] = _mm512_unpackhi_epi64(a, c);
  to[2] = _mm512_unpacklo_epi64(b, d), to[3] = _mm512_unpackhi_epi64(b, d);
}

// The weights of the keys before, [32 keys][row][key], for a point that has moved.
inline void rescale_weights(char* p, const char* end, vf factor) {
  for (; p < end; p += kTileSize)
    for (int r = 0; r < kTileRows; ++r) {
      if (factor[r] == 1.0f) continue;
      char* row = p + r * kTileBytes;
      const vf low = load_bf16(row) * factor[r], high = load_bf16(row + 32) * factor[r];
      _mm512_store_si512(row, to_halves(low, high));
    }
}

// Softens a group's scores of up to 64 keys, a multiple of 32, four keys a call, so that vectors
// can work while tiles multiply. scale > 0.
class Softener {
 public:
  static constexpr int kAtOnce = 4;

  Softener() = default;
  // Moves the point if it must, and with it the weights first … p - 1 of keys before these, which
  // the new weights follow. `factor`: that of all sums before, is multiplied.
  Softener(const float* s, int keys, float scale, char* first, char* p, Softmax& state, vf& factor)
      : unit_(set1(scale)),
        total_(vf{}),
        state_(&state),
        from_(s),
        end_(s + keys * kLanes),
        to_(p) {
    __m512 top[4];
    for (__m512& t : top) t = _mm512_set1_ps(-kInf);
    for (const float* at = s; at < end_; at += 4 * kLanes)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i)  // NaN has no say
        top[i] = _mm512_max_ps((__m512)(load(at + i * kLanes) * unit_), top[i]);
    const vf best = (vf)_mm512_max_ps(_mm512_max_ps(top[0], top[1]), _mm512_max_ps(top[2], top[3]));
    state.max = max(best, state.max);
    if (_mm512_cmp_ps_mask((__m512)state.max, (__m512)(state.point + kSlack), _CMP_GT_OQ)) {
      const vf before = state.point;
      state.point = select(state.max > before + kSlack, state.max, before);
      const vf moved = power_of_two(before - origin_of(state.point));
      state.sum = state.sum * moved;
      factor = factor * moved;
      rescale_weights(first, p, moved);
    }
    origin_ = origin_of(state.point);
  }

  bool more() const { return from_ < end_; }
  inline void operator()() {
    vf e[kAtOnce], total = total_;
#pragma GCC unroll 4
    for (int i = 0; i < kAtOnce; ++i)
      // rounded before the point is subtracted, as the point was: of huge scores, the rest of one
      // rounding is a power of two of its own
      e[i] = power_of_two(load(from_ + i * kLanes) * unit_ - origin_);
#pragma GCC unroll 4
    for (int i = 0; i < kAtOnce; ++i) total += e[i];
    total_ = total;
    from_ += kAtOnce * kLanes;
    pair_weights(e, low_[quarter_], high_[quarter_]);
    if (++quarter_ == 4) gather();
  }
  void finish() {
    while (more()) (*this)();
    if (state_) state_->sum += total_;
    state_ = nullptr;
  }

 private:
  // 16 keys are there; with 32 a tile is.
  void gather() {
    quarter_ = 0;
    if (half_ == 0) {
      gather_rows(low_, rows_), gather_rows(high_, rows_ + 4);
      half_ = 1;
      return;
    }
    half_ = 0;
    __m512i rows[8];
    gather_rows(low_, rows), gather_rows(high_, rows + 4);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      _mm512_store_si512(to_ + i * kTileBytes, _mm512_shuffle_i32x4(rows_[i], rows[i], 0x88));
      _mm512_store_si512(to_ + (i + 8) * kTileBytes, _mm512_shuffle_i32x4(rows_[i], rows[i], 0xDD));
    }
    to_ += kTileSize;
  }

  __m512i low_[4], high_[4], rows_[8];
  vf unit_, total_, origin_;
  Softmax* state_ = nullptr;
  const float *from_ = nullptr, *end_ = nullptr;
  char* to_ = nullptr;
  int quarter_ = 0, half_ = 0;
};
#endif
}  // namespace wf::attention
