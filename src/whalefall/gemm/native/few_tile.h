// The form for few rows of x with AMX: y^T = W . x^T, 16 rows of W by up to 16 rows of x a tile.
//
// A band of 32 rows of W is decoded 128 of K at a time, each 16 rows into four tiles in L1 (8 KB,
// in turn with those before); four tile products are their partial sums, which are stored, scaled
// and added to fp32 sums in L1. The products of a block, two chains of four, take 208 cycles, and
// run while the next block is decoded, which takes twice that. x is made tiles once a call, as
// wide as there are rows: a product takes as long for one row as for 16. Each sum is one chain over
// k within a block, then one over blocks, whatever the rows of x are.
//
// Memory: the rows of a band are read side by side, so that they must be in L2 by then:
// meanwhile the next band is brought there in the order of memory, and at the end of a task what
// its thread reads next. Bound: memory, where decoding keeps up with it.
#pragma once
#include "few.h"
#include "tile_rows.h"

namespace wf::gemm {
#ifdef WF_TILE
namespace few {
constexpr int kParts = kBand / kGroup;

// 16 rows of W from n on, or as many as there are before `end`, maybe none.
template <int kKind>
class BandPart {
 public:
  BandPart(const Weight& w, int64_t n, int64_t end)
      : first_(w.row(n)), cols_(w.cols), rows_(end - n < kGroup ? int(end - n) : kGroup) {
    if (kKind != kFp8 || rows_ <= 0) return;
    scale_ = after_ = w.row_scale(n);
    const int64_t turn = kBlock - (w.first_row + n) % kBlock;  // rows of the first block row
    if (turn < rows_) after_ += w.scale_pitch, turn_ = int(turn);
  }
  int64_t blocks() const { return ceil_div(cols_, kBlock); }

  // Block b of K as four tiles. Each row brings as many bytes as it has there from `next` into L2,
  // and moves it: all of them at once would fill the buffers that loads need too.
  void decode(int64_t b, uint16_t* tiles, Next& next) const {
    if (rows_ <= 0) return;                    // whatever is there: nobody wants the sums
    const RowDecoder<kKind> decode = decode_;  // in registers
    const int64_t k = b * kBlock, pitch = cols_ * kBytes;
    Next ahead = next ? next : first_ + k * kBytes;
    if (next) next += kGroup * kBlock * kBytes;
    if (k + kBlock <= cols_ && rows_ == kGroup) {
      const uint8_t* row = first_ + k * kBytes;
#pragma GCC unroll 4
      for (int r = 0; r < kGroup; ++r, row += pitch, ahead += kBlock * kBytes) {
        for (int i = 0; i < kBlock * kBytes; i += 64) prefetch_l2(ahead + i);
        decode(row, r, tiles);
      }
      return;
    }
    const int64_t width = cols_ - k < kBlock ? cols_ - k : kBlock;
    for (int r = 0; r < kGroup; ++r, ahead += kBlock * kBytes) {
      for (int i = 0; i < kBlock * kBytes; i += 64) prefetch_l2(ahead + i);
      uint8_t edge[kBlock * kBytes] = {};
      if (r < rows_) std::memcpy(edge, first_ + r * pitch + k * kBytes, width * kBytes);
      decode(edge, r, tiles);
    }
  }

  // The scales of the rows in sums [16][width], vector j of them.
  vf scales(int64_t b, int64_t width, int64_t j) const {
    if (kKind != kFp8 || !scale_) return set1(1.0f);
    const vf first = broadcast(scale_ + b);
    if (turn_ == kGroup) return first;
    const int64_t before = turn_ * width - j * kLanes;  // lanes that still are of the first
    const __mmask16 of_after = before >= kLanes ? 0 : before <= 0 ? 0xFFFF : 0xFFFF << before;
    return (vf)_mm512_mask_blend_ps(of_after, (__m512)first, (__m512)broadcast(after_ + b));
  }

 private:
  static constexpr int64_t kBytes = kind_bytes(kKind);
  const uint8_t* first_;
  int64_t cols_;
  int rows_, turn_ = kGroup;  // rows from `turn_` on have the scales `after_`
  const float *scale_ = nullptr, *after_ = nullptr;
  const RowDecoder<kKind> decode_ = {};
};

// The scales of x in sums [16][width], vector j of them.
inline vf x_scales(const TileRows& x, int64_t b, int64_t group, int64_t j) {
  const __m512i count = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __mmask16 used = __mmask16((1u << x.width) - 1);
  const __m512 scales = _mm512_maskz_loadu_ps(used, x.scale(b, group));
  if (x.width == kLanes) return (vf)scales;
  // lane + 16 j modulo the width: exact in fp32
  const __m512i lane = _mm512_add_epi32(count, _mm512_set1_epi32(int(j) * kLanes));
  const __m512 at = _mm512_cvtepi32_ps(lane), width = _mm512_set1_ps(float(x.width));
  const __m512 whole =
      _mm512_roundscale_ps(_mm512_div_ps(_mm512_add_ps(at, _mm512_set1_ps(0.5f)), width), 0x09);
  return (vf)_mm512_permutexvar_ps(_mm512_cvttps_epi32(_mm512_fnmadd_ps(whole, width, at)), scales);
}

// Partial sums of both parts of a band over a block of K, in tiles 0 and 1.
inline void multiply_block(const uint16_t* w, const uint16_t* x, int64_t width) {
  const int64_t pitch = width * 4, next = kGroup * 2 * width;
  zero_tile<0>();
  zero_tile<1>();
#pragma GCC unroll 2
  for (int i = 0; i < kBlockTiles; i += 2, w += 2 * kTileValues, x += 2 * next) {
    load_tile<4>(w, kTileBytes);
    load_tile<2>(x, pitch);
    multiply_tile<0, 4, 2>();
    load_tile<5>(w + kBlockValues, kTileBytes);
    multiply_tile<1, 5, 2>();
    load_tile<6>(w + kTileValues, kTileBytes);
    load_tile<3>(x + next, pitch);
    multiply_tile<0, 6, 3>();
    load_tile<7>(w + kBlockValues + kTileValues, kTileBytes);
    multiply_tile<1, 7, 3>();
  }
}

// sums[parts][16][width] of a band and one group of x.
template <int kKind>
class BandProduct {
 public:
  BandProduct(const Weight& w, int64_t n, int64_t end, const TileRows& x, float* sums)
      : parts_{{w, n, end}, {w, n + kGroup < end ? n + kGroup : n, end < n + kGroup ? n : end}},
        x_(x),
        sums_(sums) {}

  // `tiles`: room for two blocks. Brings into L2 what lies at `next`, as much as it decodes; null:
  // nothing.
  __attribute__((noinline)) void run(int64_t group, uint16_t* tiles, Next next) {
    const int64_t blocks = parts_[0].blocks();
    auto at = [&](int64_t b) { return tiles + b % 2 * kParts * kBlockValues; };
    for (int64_t j = 0; j < kParts * x_.width; ++j) store(sums_ + j * kLanes, vf{});
    if (blocks > 0) decode(0, at(0), next);
    for (int64_t b = 0; b < blocks; ++b) {
      multiply_block(at(b), x_.block(b, group), x_.width);
      if (b + 1 < blocks) decode(b + 1, at(b + 1), next);
      float* partial = partial_ + b % 2 * kParts * kSums;
      store_tile<0>(partial, x_.width * 4);
      store_tile<1>(partial + kSums, x_.width * 4);
      if (b > 0) add(group, b - 1);
    }
    if (blocks > 0) add(group, blocks - 1);
  }

 private:
  static constexpr int64_t kSums = kGroup * kLanes;
  void decode(int64_t b, uint16_t* tiles, Next& next) const {
    for (int i = 0; i < kParts; ++i) parts_[i].decode(b, tiles + i * kBlockValues, next);
  }
  // The partial sums of block b, scaled.
  void add(int64_t group, int64_t b) {
    const float* partial = partial_ + b % 2 * kParts * kSums;
    float* sum = sums_;
    for (int i = 0; i < kParts; ++i, partial += kSums)
      for (int64_t j = 0; j < x_.width; ++j, sum += kLanes) {
        vf s = parts_[i].scales(b, x_.width, j);
        if (x_.scales) s = s * x_scales(x_, b, group, j);
        store(sum, fma(load(partial + j * kLanes), s, load(sum)));
      }
  }

  const BandPart<kKind> parts_[kParts];
  const TileRows& x_;
  float* sums_;
  alignas(64) float partial_[2 * kParts * kSums];  // of two blocks in turn
};

// Tiles of `width` rows of x and of sums, and whole ones of W.
constexpr TileShapes shapes_of(int64_t width) {
  TileShapes shapes;
  for (int i = 0; i < 4; ++i) shapes.bytes[i] = uint16_t(4 * width);
  return shapes;
}

template <int kKind>
void tile_rows_of(const Weight& w, int64_t n, int64_t end, const TileRows& x, int64_t count,
                  const Output& y, Next next) {
  alignas(64) uint16_t tiles[2 * kParts * kBlockValues];
  alignas(64) float sums[kBand * kLanes];
  const Tiles shapes(shapes_of(x.width));
  const __m512i place =
      _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                         _mm512_set1_epi32(int(x.width)));
  for (; n < end; n += kBand) {
    const int64_t stop = n + kBand < end ? n + kBand : end;
    BandProduct<kKind> product(w, n, stop, x, sums);
    product.run(x.group_of(0), tiles, stop < end ? w.row(stop) : next);
    for (int64_t m = 0; m < count; ++m) {
      float values[kBand];
      for (int i = 0; i < kParts; ++i) {
        const float* from = sums + i * kGroup * x.width + m;
        store(values + i * kGroup, (vf)_mm512_i32gather_ps(place, from, 4));
      }
      y.put(m, n, values, stop - n);
    }
  }
}
}  // namespace few

// At most 16 rows of x, one group.
inline void multiply_few_tile(const Weight& w, int64_t n, int64_t end, const TileRows& x,
                              int64_t count, const Output& y, Next next) {
  if (count == 0) return;
  if (w.kind == kFp8)
    few::tile_rows_of<kFp8>(w, n, end, x, count, y, next);
  else
    few::tile_rows_of<kBf16>(w, n, end, x, count, y, next);
}
#else
inline void multiply_few_tile(const Weight&, int64_t, int64_t, const TileRows&, int64_t,
                              const Output&, Next) {
  __builtin_trap();
}
#endif
}  // namespace wf::gemm
