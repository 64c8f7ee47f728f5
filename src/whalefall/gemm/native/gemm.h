// D_s[m,n] = C_s[m,n] + sum_b (A_s[m,b] . B_s[n,b]) * (sa[m/ga,b] * sb[n/gb,b])   for segments s
// DeepGEMM's products: both operands quantised, any layout; b is 32 or 128 columns of K, exact
// products, fp32 sums within b, then scaled and added in fp32 (the two-level accumulation).
//
// A becomes rows of fp32, or of bf16, once (a wave of up to 128 MB at a time); B is packed panel by
// panel as many.h describes. A dense product is one segment; grouped products are one for each
// group or run of rows, so that groups of any size share the threads evenly.
#pragma once
#include "many.h"

namespace wf::gemm {
enum Packing : int32_t { kWhole = 0, kPairsAlongK = 1, kPairsAlongRows = 2 };

// How one operand of all segments lies in memory: codes [rows, K], strides in elements (in bytes
// along a packed axis of FP4: two codes a byte, the even one in the low half).
struct Layout {
  int64_t row_stride, k_stride;
  int64_t scale_row_stride, scale_k_stride;
  int64_t scale_rows, scale_k;  // rows and columns of K that share a scale
  int32_t kind;                 // kBf16 (no scales) or kFp8 (also what FP4 is widened to)
  int32_t packing;
};

struct Segment {
  const uint8_t* a;
  const float* a_scale;
  const uint8_t* b;
  const float* b_scale;
  uint8_t* d;
  const uint8_t* c;  // null: nothing to add
  int64_t m, k;
};

struct Product {
  const Segment* segments;
  int64_t num_segments;
  int64_t n;
  int64_t d_pitch, c_pitch;  // elements
  Layout a, b;
  int32_t d_kind;  // kF32 or kBf16, c's too
  int32_t length;  // K of a partial sum: 32 or 128
};

// One operand of one segment as many.h packs it.
struct Operand {
  const uint8_t* data;
  const float* scales;
  const Layout& layout;
  int64_t num_rows, num_cols;

  int64_t rows() const { return num_rows; }
  int64_t cols() const { return num_cols; }
  bool in_place() const { return layout.k_stride == 1 && layout.packing == kWhole; }
  const uint8_t* at(int64_t n, int64_t k) const {
    return data + (n * layout.row_stride + k * layout.k_stride) * kind_bytes(layout.kind);
  }
  // Of row n, for blocks of `length` columns of K: 32 or 128, as `scale_k` is.
  many::ScaleRow scale_row(int64_t n, int64_t length) const {
    if (!scales) return {nullptr, 0, 0};
    return {scales + n / layout.scale_rows * layout.scale_row_stride, layout.scale_k_stride,
            layout.scale_k > length ? 2 : 0};
  }
  void copy(int64_t n, int64_t k, int64_t width, uint8_t* to) const {
    if (layout.packing != kWhole) return widen(n, k, width, to);
    if (in_place()) {
      std::memcpy(to, at(n, k), width * kind_bytes(layout.kind));
    } else if (layout.kind == kBf16) {
      for (int64_t i = 0; i < width; ++i) std::memcpy(to + 2 * i, at(n, k + i), 2);
    } else {
      for (int64_t i = 0; i < width; ++i) to[i] = *at(n, k + i);
    }
  }

 private:
  // Every value of E2M1 is one of E4M3.
  void widen(int64_t n, int64_t k, int64_t width, uint8_t* to) const {
    static const uint8_t kE4m3[16] = {0x00, 0x30, 0x38, 0x3C, 0x40, 0x44, 0x48, 0x4C,
                                      0x80, 0xB0, 0xB8, 0xBC, 0xC0, 0xC4, 0xC8, 0xCC};
    bool along_k = layout.packing == kPairsAlongK;
    for (int64_t i = 0; i < width; ++i) {
      int64_t at_k = k + i, row = along_k ? n : n / 2, column = along_k ? at_k / 2 : at_k;
      uint8_t pair = data[row * layout.row_stride + column * layout.k_stride];
      bool high = ((along_k ? at_k : n) & 1) != 0;
      to[i] = kE4m3[high ? pair >> 4 : pair & 15];
    }
  }
};

template <int kLength>
struct ScaledOperand : Operand {
  many::ScaleRow scales(int64_t n) const { return scale_row(n, kLength); }
};

// One block of K of a row of A, as the kernels want it.
inline void widen_block(const uint8_t* codes, int kind, float* to) {
  for (int i = 0; i < kBlock; ++i) {
    uint16_t half = 0;  // only of halves: codes end 128 bytes earlier
    if (kind == kBf16) std::memcpy(&half, codes + 2 * i, 2);
    to[i] = kind == kBf16 ? bf16_to_float(half) : fp8_table()[codes[i]];
  }
}
inline void widen_block(const uint8_t* codes, int kind, uint16_t* to) {
  if (kind == kBf16) {
    std::memcpy(to, codes, 2 * kBlock);
    return;
  }
#if defined(WF_DOT) || defined(WF_TILE)
  const Fp8Decoder decode;
  for (int i = 0; i < kBlock; i += 64) {
    halves a, b;
    decode(load_halves(codes + i), a, b);
    undeal_halves(a, b, to + i);
  }
#endif
}

class Gemm {
 public:
  void run(const Product& product);

 private:
  struct Piece {  // rows [first, first + count) of a segment; `at`: where A's rows are in the wave
    int64_t segment, first, count, at;
  };
  void prepare(const Product& p, const Piece& piece, int64_t row);
  void prepare_tiles(const Product& p, const Piece& piece, int64_t g);
  TileRows tiles(const Piece& piece) const;
  template <int kKind, int kLength>
  void multiply(const Product& p, const Piece& piece, int64_t n, int64_t end);
  void wave(const Product& p, const Piece* pieces, int64_t count, int64_t rows);

  Scratch values_, scales_, pieces_;
  float *a_ = nullptr, *a_scale_ = nullptr;  // A as fp32, its scales
  uint16_t* halves_ = nullptr;               // or A as bf16: rows for the dot, or tiles
  int64_t pitch_ = 0, blocks_ = 0;
};

// One block of K of row m of a segment's A, zeros behind its end.
template <class Value>
void widen_row(const Operand& a, int64_t m, int64_t k, Value* to) {
  uint8_t copy[2 * kBlock];
  const int64_t left = a.cols() - k, width = left < kBlock ? left : kBlock;
  if (width == kBlock && a.in_place()) return widen_block(a.at(m, k), a.layout.kind, to);
  if (width < kBlock) std::memset(copy, 0, sizeof copy);
  a.copy(m, k, width, copy);
  widen_block(copy, a.layout.kind, to);
}

inline void Gemm::prepare(const Product& p, const Piece& piece, int64_t row) {
  const Segment& s = p.segments[piece.segment];
  Operand a{s.a, s.a_scale, p.a, s.m, s.k};
  const int64_t m = piece.first + row, at = piece.at + row;
  for (int64_t k = 0; k < s.k; k += kBlock) {
    if (kDot)
      widen_row(a, m, k, halves_ + at * pitch_ + k);
    else
      widen_row(a, m, k, a_ + at * pitch_ + k);
  }
  const many::ScaleRow scale = a.scale_row(m, p.length);
  for (int64_t b = 0; b < ceil_div(s.k, p.length); ++b) a_scale_[at * blocks_ + b] = scale[b];
  for (int64_t b = ceil_div(s.k, p.length); b < round_up(s.k, kBlock) / p.length; ++b)
    a_scale_[at * blocks_ + b] = 0;
}

template <int kKind, int kLength>
void Gemm::multiply(const Product& p, const Piece& piece, int64_t n, int64_t end) {
  const Segment& s = p.segments[piece.segment];
  ScaledOperand<kLength> b{{s.b, s.b_scale, p.b, p.n, s.k}};
  const int64_t size = kind_bytes(p.d_kind), first = piece.at, last = first + piece.count;
  auto emit = [&](int64_t m, const float* sums) {
    const int64_t row = piece.first + m - first;
    uint8_t* d = s.d + (row * p.d_pitch + n) * size;
    const uint8_t* c = s.c ? s.c + (row * p.c_pitch + n) * size : nullptr;
    write_row(p.d_kind, d, sums, end - n, nullptr, c);
  };
#ifdef WF_TILE
  many::multiply_tiles<kKind, kLength>(b, n, end, tiles(piece), first, last, nullptr, emit);
#else
  Rows a{a_, pitch_, nullptr, a_scale_, blocks_, nullptr, halves_};
  many::multiply<kKind, kLength>(b, n, end, a, first, last, nullptr, emit);
#endif
}

// A's rows of a piece, where they are tiles.
inline TileRows Gemm::tiles(const Piece& piece) const {
  return {halves_ + piece.at * pitch_, a_scale_ + piece.at * blocks_, ceil_div(piece.count, 16),
          piece.at};
}

// Group g of a piece, with zeros for rows that are not there.
inline void Gemm::prepare_tiles(const Product& p, const Piece& piece, int64_t g) {
#ifdef WF_TILE
  const Segment& s = p.segments[piece.segment];
  const Operand a{s.a, s.a_scale, p.a, s.m, s.k};
  const TileRows made = tiles(piece);
  const int64_t left = piece.count - g * kGroup, count = left < kGroup ? left : kGroup;
  const bool deal = p.b.kind == kFp8 && p.length == kBlock;
  alignas(64) uint16_t block[kGroup][kBlock] = {};
  many::RowBlock<kFp8> codes;
  const uint16_t* row[kGroup];
  for (int r = 0; r < kGroup; ++r) row[r] = block[r];
  for (int64_t k = 0; k < s.k; k += kBlock) {
    auto* out = const_cast<uint16_t*>(made.block(k / kBlock, g));
    if (deal && p.a.kind == kFp8) {  // rows behind the piece's are real ones, or zeros
      codes.find(a, piece.first + g * kGroup, k, kBlock);
      pack_codes(codes.row, out);
      continue;
    }
    for (int64_t r = 0; r < count; ++r) widen_row(a, piece.first + g * kGroup + r, k, block[r]);
    pack_block(row, deal, kGroup, out);
  }
  for (int64_t r = 0; r < kGroup; ++r) {
    const many::ScaleRow scale =
        a.scale_row(piece.first + g * kGroup + (r < count ? r : 0), p.length);
    for (int64_t b = 0; b < round_up(s.k, kBlock) / p.length; ++b)
      const_cast<float*>(made.scale(b, g))[r] =
          r < count && b < ceil_div(s.k, p.length) ? scale[b] : 0.0f;
  }
#else
  (void)p, (void)piece, (void)g;
#endif
}

inline void Gemm::wave(const Product& p, const Piece* pieces, int64_t count, int64_t rows) {
  void* values = values_.get<float>(rows * pitch_);
  if (kHalves)
    halves_ = static_cast<uint16_t*>(values);
  else
    a_ = static_cast<float*>(values);
  a_scale_ = scales_.get<float>(rows * blocks_ + 1);
  constexpr int64_t kParts = many::kChunkRows / 16;  // of a piece
  parallel_for(count * kParts, [&](int64_t task, int) {
    const Piece& piece = pieces[task / kParts];
    const int64_t first = task % kParts * 16, last = first + 16;
    if (kTile && first < piece.count) return prepare_tiles(p, piece, first / 16);
    for (int64_t row = first; row < last && row < piece.count; ++row) prepare(p, piece, row);
  });
  const int64_t columns = many::columns(kTile), across = ceil_div(p.n, columns);
  parallel_for(count * across, [&](int64_t task, int) {
    int64_t n = task % across * columns;
    int64_t end = n + columns < p.n ? n + columns : p.n;
    const Piece& piece = pieces[task / across];
    if (p.b.kind == kBf16)
      multiply<kBf16, kBlock>(p, piece, n, end);
    else if (p.length == kBlock)
      multiply<kFp8, kBlock>(p, piece, n, end);
    else
      multiply<kFp8, 32>(p, piece, n, end);
  });
}

inline void Gemm::run(const Product& p) {
  int64_t depth = 0, total = 0;
  for (int64_t s = 0; s < p.num_segments; ++s) {
    if (p.segments[s].k > depth) depth = p.segments[s].k;
    total += ceil_div(p.segments[s].m, many::kChunkRows);
  }
  // rows must not share cache sets, so not a power of two; tiles lie one after the other
  pitch_ = round_up(depth, kBlock) + (kTile ? 0 : kDot ? 32 : 16);
  blocks_ = round_up(depth, kBlock) / p.length;
  int64_t most = (int64_t(128) << 20) / (pitch_ * 4 + 1);
  Piece* pieces = pieces_.get<Piece>(total + 1);
  int64_t count = 0, rows = 0;
  for (int64_t s = 0; s < p.num_segments; ++s)
    for (int64_t m = 0; m < p.segments[s].m; m += many::kChunkRows) {
      int64_t left = p.segments[s].m - m;
      int64_t take = left < many::kChunkRows ? left : many::kChunkRows;
      if (count > 0 && rows + take > most) {
        wave(p, pieces, count, rows);
        count = rows = 0;
      }
      pieces[count++] = Piece{s, m, take, rows};
      rows += kTile ? round_up(take, 16) : take;
    }
  if (count > 0) wave(p, pieces, count, rows);
}
}  // namespace wf::gemm
