// q_latent[t, l] = sum_n q[t, n] * W[n, l]: a head's query taken into the latent space.
//
// W is the key part of a head's rows of kv_b, as it lies in the checkpoint (rows may start anywhere
// in a scale block: scales go by the global row). For many tokens it is decoded once into a [N][L]
// panel of fp32 (256 KiB at 128 x 512: L2), over which tiles of kRows tokens x kVectors vectors
// run. Each output is one chain over n, so its bits do not depend on how many tokens there are.
#pragma once
#include <cstring>
#include "../../gemm/native/operands.h"

namespace wf::model {
using gemm::Scratch;
using gemm::Weight;

constexpr int kAbsorbRows = WF_ISA >= 2 ? 12 : 6;
constexpr int kFewTokens = 4;

// 2 * kLanes weights of row n from column l on, scaled.
template <int kKind>
inline void decode_step(const Weight& w, int64_t n, int64_t l, vf& low, vf& high) {
  constexpr int kStep = 2 * kLanes;
  constexpr int64_t kBytes = gemm::kind_bytes(kKind);
  const uint8_t* from = w.row(n) + l * kBytes;
  uint8_t tail[kStep * kBytes];
  if (l + kStep > w.cols) {
    std::memset(tail, 0, sizeof tail);
    std::memcpy(tail, from, (w.cols - l) * kBytes);
    from = tail;
  }
  if constexpr (kKind == gemm::kFp8) {
    // blocks of 128 are whole steps: one scale a step
    fp8_decode(from, low, high);
    vf s = set1(w.row_scale(n)[l / gemm::kBlock] * kFp8Scale);
    low = low * s;
    high = high * s;
  } else if constexpr (kKind == gemm::kBf16) {
    uint16_t halves[kStep];
    std::memcpy(halves, from, sizeof halves);
    low = load_bf16(halves);
    high = load_bf16(halves + kLanes);
  } else {
    low = load(reinterpret_cast<const float*>(from));
    high = load(reinterpret_cast<const float*>(from) + kLanes);
  }
}

template <int kKind>
inline void decode_panel(const Weight& w, int64_t pitch, float* panel) {
  for (int64_t n = 0; n < w.rows; ++n)
    for (int64_t l = 0; l < w.cols; l += 2 * kLanes) {
      vf low, high;
      decode_step<kKind>(w, n, l, low, high);
      store(panel + n * pitch + l, low);
      store(panel + n * pitch + l + kLanes, high);
    }
}

// kVectors vectors of weights at p, scaled by s (FP8 only).
template <int kKind, int kVectors>
inline void decode_vectors(const uint8_t* p, float s, vf* row) {
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; v += 2) {
    const uint8_t* from = p + v * kLanes * gemm::kind_bytes(kKind);
    gemm::decode<kKind>(from, row[v], row[v + 1]);
    if (kKind == gemm::kFp8) row[v] = row[v] * set1(s), row[v + 1] = row[v + 1] * set1(s);
  }
}

// Few tokens: W is used as it is decoded. The sums of kVectors vectors of columns, which share a
// scale, and M tokens stay in registers over all rows; meanwhile `next`, as long as W, is brought
// into L2.
template <int kKind, int M, int kVectors, bool kTail = false>
__attribute__((noinline)) void absorb_columns(const Weight& w, const float* const* q, int64_t l,
                                              const uint8_t* next, float* const* out) {
  constexpr int64_t kBytes = gemm::kind_bytes(kKind), kWide = kVectors * kLanes * kBytes;
  const float* const scales = kKind == gemm::kFp8 ? w.scale + l / gemm::kBlock : nullptr;
  const uint8_t* p = w.row(0) + l * kBytes;
  if (!next) next = p;  // already there
  next += w.rows * l * kBytes;
  vf sums[M][kVectors] = {};
  for (int64_t n = 0; n < w.rows;) {
    const uint64_t block = uint64_t(w.first_row + n) / gemm::kBlock;
    const float s = scales ? scales[block * w.scale_pitch] * kFp8Scale : 1.0f;
    const int64_t stop = (block + 1) * gemm::kBlock - w.first_row;
    for (; n < w.rows && n < stop; ++n, p += w.cols * kBytes, next += kWide) {
      vf row[kVectors];
      if constexpr (kTail)
        decode_step<kKind>(w, n, l, row[0], row[1]);
      else
        decode_vectors<kKind, kVectors>(p, s, row);
      for (int64_t line = 0; line < kWide; line += 64) prefetch_l2(next + line);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        const vf x = broadcast(q[m] + n);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sums[m][v] = fma(x, row[v], sums[m][v]);
      }
    }
  }
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < kVectors; ++v) store(out[m] + l + v * kLanes, sums[m][v]);
}

// 16 sums and what is decoded, or 8: registers for both.
constexpr int kColumnVectors = WF_ISA >= 2 ? 8 : 4;

template <int kKind, int M = 1>
void absorb_few(const Weight& w, const float* const* q, int64_t count, const uint8_t* next,
                float* const* out) {
  if constexpr (M < kFewTokens)
    if (count > M) return absorb_few<kKind, M + 1>(w, q, count, next, out);
  constexpr int kVectors = M > 2 ? kColumnVectors / 2 : kColumnVectors;
  int64_t l = 0;
  for (; l + kVectors * kLanes <= w.cols; l += kVectors * kLanes)
    absorb_columns<kKind, M, kVectors>(w, q, l, next, out);
  for (; l < w.cols; l += 2 * kLanes) absorb_columns<kKind, M, 2, true>(w, q, l, nullptr, out);
}

template <int kRows, int kVectors>
inline void absorb_tile(const float* panel, int64_t pitch, int64_t depth, const float* const* q,
                        float* const* out, int64_t l) {
  vf sums[kRows][kVectors] = {};
  for (int64_t n = 0; n < depth; ++n) {
    const float* row = panel + n * pitch + l;
    vf w[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) w[v] = load(row + v * kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      vf x = broadcast(q[r] + n);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sums[r][v] = fma(x, w[v], sums[r][v]);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) store(out[r] + l + v * kLanes, sums[r][v]);
}

template <int kKind>
inline void absorb_kind(const Weight& w, const float* q, int64_t q_pitch, int64_t count,
                        const uint8_t* next, float* out, int64_t out_pitch) {
  static thread_local Scratch memory;
  const int64_t pitch = gemm::round_up(w.cols, 2 * kLanes);
  float* panel = memory.get<float>(w.rows * pitch + kAbsorbRows * pitch);
  float* sums = panel + w.rows * pitch;
  if (count > kFewTokens) decode_panel<kKind>(w, pitch, panel);
  for (int64_t t = 0; t < count; t += kAbsorbRows) {
    const int64_t rows = count - t < kAbsorbRows ? count - t : kAbsorbRows;
    const float* from[kAbsorbRows];
    float* to[kAbsorbRows];
    for (int64_t r = 0; r < kAbsorbRows; ++r) {
      from[r] = q + (t + (r < rows ? r : rows - 1)) * q_pitch;
      to[r] = sums + r * pitch;
    }
    if (count <= kFewTokens)
      absorb_few<kKind>(w, from, rows, next, to);
    else
      for (int64_t l = 0; l < pitch; l += 2 * kLanes)
        absorb_tile<kAbsorbRows, 2>(panel, pitch, w.rows, from, to, l);
    for (int64_t r = 0; r < rows; ++r)
      std::memcpy(out + (t + r) * out_pitch, to[r], w.cols * sizeof(float));
  }
}

// q: [count] rows of w.rows floats; out: [count] rows of w.cols floats; `next`: the weights, as
// many, that this thread will want next, or null.
inline void absorb(const Weight& w, const float* q, int64_t q_pitch, int64_t count,
                   const uint8_t* next, float* out, int64_t out_pitch) {
  if (w.kind == gemm::kFp8)
    absorb_kind<gemm::kFp8>(w, q, q_pitch, count, next, out, out_pitch);
  else if (w.kind == gemm::kBf16)
    absorb_kind<gemm::kBf16>(w, q, q_pitch, count, next, out, out_pitch);
  else
    absorb_kind<gemm::kF32>(w, q, q_pitch, count, next, out, out_pitch);
}
}  // namespace wf::model
