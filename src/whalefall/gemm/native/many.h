// y[m,n] = sum_b (x[m,b] . W[n,b]) * s[n/128,b] * sx[m,b]       b: 128 columns of K
// The form for many rows of x (prompts, GEMM): W is decoded once for hundreds of rows.
//
// A panel of kColumns rows of W x kDepth of K is decoded, transposed to [k][n] and lies in L2; x
// passes by in tiles of kTileRows rows, kDepth of K in L1; a kTileRows x 2-vector tile of partial
// sums stays in registers over 128 of K, is scaled and added to y's fp32 sums. Each y[m,n] is one
// chain over k within a block, then one chain over blocks: its bits do not depend on M, on tiles
// or on threads. Path: with fp32 multiply-adds (many_fma.h) or bf16 dots (many_dot.h).
#pragma once
#include "many_dot.h"
#include "many_fma.h"
#include "many_tile.h"

namespace wf::gemm {
namespace many {
// Panels of kTileColumns rows of W, one after another, and their scales [blocks][kTileColumns],
// a block being kLength of K.
template <class Path, int kKind, int kLength, class Source>
void pack(const Source& w, int64_t n, int64_t end, int64_t k, int64_t depth, const uint8_t* next,
          typename Path::Value* panels, float* scales) {
  int64_t padded = round_up(depth, kBlock), blocks = padded / kLength;
  int64_t real_blocks = ceil_div(depth, kLength);
  for (int64_t c = n; c < end; c += kTileColumns) {
    const uint8_t* then = c + kTileColumns < end ? w.at(c + kTileColumns, k) : next;
    for (int half = 0; half < 2; ++half)
      Path::template pack<kKind>(w, c + half * kLanes, k, depth, then ? then - w.at(c, k) : 0, half,
                                 panels);
    for (int i = 0; i < kTileColumns; ++i) {
      const bool real = c + i < w.rows();
      const ScaleRow row = w.scales(real ? c + i : n);
      for (int64_t b = 0; b < blocks; ++b) {
        float s = real && b < real_blocks ? row[k / kLength + b] : 0.0f;
        scales[b * kTileColumns + i] = s * Path::template unit<kKind>();
      }
    }
    panels += Path::panel_values(padded);
    scales += blocks * kTileColumns;
  }
}

template <class Path, int kLength, int M = kTileRows>
void tile_of(int rows, const typename Path::Value* const* x, const float* const* sx, int64_t blocks,
             const typename Path::Value* panel, const float* scale, float* sums, int64_t pitch) {
  if constexpr (M > 1)
    if (rows < M)
      return tile_of<Path, kLength, M - 1>(rows, x, sx, blocks, panel, scale, sums, pitch);
  Path::template tile<M, kLength>(x, sx, blocks, panel, scale, sums, pitch);
}

// sums[m][.] += `rows` rows of x times all panels, `columns` rows of W: a panel at a time, or,
// where x is spread, a block of K at a time.
template <class Path, int kLength>
void tiles_of(int rows, const typename Path::Value* const* x, const float* const* sx,
              int64_t blocks, int64_t columns, const typename Path::Value* panels,
              const float* scales, float* sums) {
  const int64_t panel = Path::panel_values(blocks * kLength);
  auto multiply = [&](const typename Path::Value* const* x, const float* const* sx, int64_t first,
                      int64_t count) {
    for (int64_t c = 0; c < columns; c += kTileColumns)
      tile_of<Path, kLength>(
          rows, x, sx, count,
          panels + c / kTileColumns * panel + Path::panel_values(first * kLength),
          scales + c * blocks + first * kTileColumns, sums + c, kColumns);
  };
  if constexpr (!Path::kSpread) {
    multiply(x, sx, 0, blocks);
  } else {
    alignas(64) float spread_x[kBlock * kTileRows * kLanes];
    for (int64_t b = 0; b < blocks; ++b) {
      const float *row[kTileRows], *row_scale[kTileRows];
      for (int m = 0; m < rows; ++m) {
        row[m] = x[m] + b * kLength;
        row_scale[m] = sx[m] ? sx[m] + b : nullptr;
      }
      spread(row, rows, kLength, spread_x);
      row[0] = spread_x;
      multiply(row, row_scale, b, 1);
    }
  }
}

// The thread's own panels, scales and sums.
struct Workspace {
  float *panels, *scales, *sums;
  Workspace() {
    static thread_local Scratch memory;
    constexpr int64_t kPanels = kColumns * kDepth, kScales = kColumns * kDepth / 32;
    panels = memory.get<float>(kPanels + kScales + int64_t(kChunkRows) * kColumns);
    scales = panels + kPanels;
    sums = scales + kScales;
  }
};

// sums[m - first][n' - n] of the rows [first, last) of x and [n, end) of W, which are at most
// kChunkRows and kColumns; returns them, kColumns apart, until the thread's next product. `next`:
// the weights that the thread packs next, or null.
template <class Path, int kKind, int kLength, class Source>
const float* multiply_on(const Source& w, int64_t n, int64_t end, const Rows& x, int64_t first,
                         int64_t last, const uint8_t* next) {
  using Value = typename Path::Value;
  Workspace space;
  Value* panels = reinterpret_cast<Value*>(space.panels);
  std::memset(space.sums, 0, (last - first) * kColumns * sizeof(float));
  for (int64_t k = 0; k < w.cols(); k += kDepth) {
    int64_t depth = w.cols() - k < kDepth ? w.cols() - k : kDepth;
    int64_t padded = round_up(depth, kBlock), blocks = padded / kLength;
    pack<Path, kKind, kLength>(w, n, end, k, depth,
                               k + depth < w.cols() ? w.at(n, k + depth) : next, panels,
                               space.scales);
    const int64_t tiles = ceil_div(last - first, kTileRows);  // of nearly equal height
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t m = first + (last - first) * tile / tiles;
      const int rows = int(first + (last - first) * (tile + 1) / tiles - m);
      const Value* row[kTileRows];
      const float* row_scale[kTileRows];
      for (int i = 0; i < rows; ++i) {
        row[i] = Path::row(x, m + i) + k;
        row_scale[i] = x.row_scale(m + i);
        if (row_scale[i]) row_scale[i] += k / kLength;
      }
      tiles_of<Path, kLength>(rows, row, row_scale, blocks, end - n, panels, space.scales,
                              space.sums + (m - first) * kColumns);
    }
  }
  return space.sums;
}

// emit(m, y[m, n..end)) for the rows [first, last) of x.
template <int kKind, int kLength, class Source, class Emit>
void multiply(const Source& w, int64_t n, int64_t end, const Rows& x, int64_t first, int64_t last,
              const uint8_t* next, Emit&& emit) {
#ifdef WF_TILE
  if constexpr (kKind != kF32)
    if (x.tiles.values)
      return multiply_tiles<kKind, kLength>(w, n, end, x.tiles, first, last, next, emit);
#endif
  const float* sums = nullptr;
#ifdef WF_DOT
  if constexpr (kKind != kF32)
    if (x.halves) sums = multiply_on<DotPath, kKind, kLength>(w, n, end, x, first, last, next);
#endif
  if (!sums) sums = multiply_on<FmaPath, kKind, kLength>(w, n, end, x, first, last, next);
  for (int64_t m = first; m < last; ++m) emit(m, sums + (m - first) * kColumns);
}
}  // namespace many

// y[first..last, n..end): `end - n` at most `many::columns`, `last - first` at most kChunkRows.
inline void multiply_many(const Weight& w, int64_t n, int64_t end, const Rows& x, int64_t first,
                          int64_t last, const Output& out, const uint8_t* next = nullptr) {
  const many::WeightSource source{w};
  auto emit = [&](int64_t m, const float* values) { out.put(m, n, values, end - n); };
  if (w.kind == kFp8)
    many::multiply<kFp8, kBlock>(source, n, end, x, first, last, next, emit);
  else if (w.kind == kBf16)
    many::multiply<kBf16, kBlock>(source, n, end, x, first, last, next, emit);
  else
    many::multiply<kF32, kBlock>(source, n, end, x, first, last, next, emit);
}
}  // namespace wf::gemm
