// Panels of W for the many form: what can be packed, how they are cut, and the fp32 ones.
#pragma once
#include "operands.h"

namespace wf::gemm::many {
constexpr int kTileRows = WF_ISA >= 2 ? 12 : 6;  // 12 or 24 sums + 2 of W + 1 of x
constexpr int kTileColumns = 2 * kLanes;
// W rows and K of a panel set, in L2. Where x is spread (many_fma.h), that is paid for once a set.
constexpr int kColumns = WF_ISA == 0 ? 256 : WF_ISA == 1 ? 64 : 128;
constexpr int kDepth = WF_ISA == 0 ? 256 : 1024;
constexpr int kChunkRows = 512;  // rows of x that share a decoded panel

// Rows of kLanes vectors become columns.
inline void transpose(vf* v) {
#if WF_ISA == 1
  __m256 t[8], u[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps((__m256)v[i], (__m256)v[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps((__m256)v[i], (__m256)v[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    u[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xEE);
    u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
  }
  for (int i = 0; i < 4; ++i) {
    v[i] = (vf)_mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
    v[i + 4] = (vf)_mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
  }
#elif WF_ISA >= 2
  // log2(16) rounds of zipping row i with row i + 8
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high =
      _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  for (int round = 0; round < 4; ++round) {
    __m512 t[16];
    for (int i = 0; i < 8; ++i) {
      t[2 * i] = _mm512_permutex2var_ps((__m512)v[i], low, (__m512)v[i + 8]);
      t[2 * i + 1] = _mm512_permutex2var_ps((__m512)v[i], high, (__m512)v[i + 8]);
    }
    for (int i = 0; i < 16; ++i) v[i] = (vf)t[i];
  }
#else
  const vf a = __builtin_shufflevector(v[0], v[1], 0, 4, 1, 5);
  const vf b = __builtin_shufflevector(v[0], v[1], 2, 6, 3, 7);
  const vf c = __builtin_shufflevector(v[2], v[3], 0, 4, 1, 5);
  const vf d = __builtin_shufflevector(v[2], v[3], 2, 6, 3, 7);
  v[0] = __builtin_shufflevector(a, c, 0, 1, 4, 5);
  v[1] = __builtin_shufflevector(a, c, 2, 3, 6, 7);
  v[2] = __builtin_shufflevector(b, d, 0, 1, 4, 5);
  v[3] = __builtin_shufflevector(b, d, 2, 3, 6, 7);
#endif
}

// The scales of a row along K; none: 1.
struct ScaleRow {
  const float* first;
  int64_t stride;
  int shift;  // 2^shift blocks share one
  float operator[](int64_t block) const { return first ? first[(block >> shift) * stride] : 1.0f; }
};

// What can be packed: rows of codes somewhere, with scales. `Weight` through this; gemm.h has more.
struct WeightSource {
  const Weight& w;
  int64_t rows() const { return w.rows; }
  int64_t cols() const { return w.cols; }
  bool in_place() const { return true; }  // codes of a row lie side by side, as `decode` reads them
  const uint8_t* at(int64_t n, int64_t k) const { return w.row(n) + k * kind_bytes(w.kind); }
  void copy(int64_t n, int64_t k, int64_t width, uint8_t* to) const {
    std::memcpy(to, at(n, k), width * kind_bytes(w.kind));
  }
  ScaleRow scales(int64_t n) const { return {w.kind == kFp8 ? w.row_scale(n) : nullptr, 1, 0}; }
};

// kLanes rows of W over one block of K: where they lie, or a copy of them padded with zeros. Brings
// the rows of the panel that is packed next, `next` bytes on, into L2: 16 streams are too many for
// the hardware.
template <int kKind>
struct RowBlock {
  static constexpr int64_t kBytes = kind_bytes(kKind);
  const uint8_t* row[kLanes];
  alignas(64) uint8_t edge[kLanes][kBlock * kBytes];

  template <class Source>
  void find(const Source& w, int64_t n, int64_t k, int64_t next) {
    const int64_t rows = w.rows() - n < kLanes ? w.rows() - n : kLanes;
    const int64_t width = w.cols() - k < kBlock ? w.cols() - k : kBlock;
    const bool inside = w.in_place() && rows == kLanes && width == kBlock;
    for (int r = 0; r < kLanes; ++r) {
      if (inside) {
        row[r] = w.at(n + r, k);
        for (int64_t line = 0; line < kBytes * kBlock; line += 64)
          prefetch_l2(row[r] + next + line);
        continue;
      }
      row[r] = edge[r];
      std::memset(edge[r], 0, sizeof edge[r]);
      if (r < rows) w.copy(n + r, k, width, edge[r]);
    }
  }
};

// sums[m][.] += acc[m][.] * scale * sx[m], two vectors of columns; sx[m] may be null: 1.
template <int M>
__attribute__((always_inline)) inline void add_tile(const vf (&acc)[M][2], const float* scale,
                                                    const float* const* sx, int64_t block,
                                                    float* sums, int64_t pitch) {
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      vf s = load(scale + j * kLanes);
      if (sx[m]) s = s * set1(sx[m][block]);
      float* out = sums + m * pitch + j * kLanes;
      store(out, fma(acc[m][j], s, load(out)));
    }
}
}  // namespace wf::gemm::many
