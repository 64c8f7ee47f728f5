// q_latent[t, l] = sum_n q[t, n] * W[n, l]: a head's query taken into the latent space.
//
// W is the key part of a head's rows of kv_b, as it lies in the checkpoint (rows may start anywhere
// in a scale block: scales go by the global row). It is decoded once a call into a [N][L] panel of
// fp32 (256 KiB at 128 x 512: L2), then tiles of kRows tokens x kVectors vectors of l run over n.
// Each output is one chain over n, so its bits do not depend on how many tokens there are.
#pragma once
#include <cstring>
#include "../../gemm/native/operands.h"

namespace wf::model {
using gemm::Scratch;
using gemm::Weight;

constexpr int kAbsorbRows = WF_ISA >= 2 ? 12 : 6;

template <int kKind>
inline void decode_row(const Weight& w, int64_t n, float* to) {
  constexpr int kStep = 2 * kLanes;
  constexpr int64_t kBytes = gemm::kind_bytes(kKind);
  const uint8_t* row = w.row(n);
  const float* scale = kKind == gemm::kFp8 ? w.row_scale(n) : nullptr;
  for (int64_t l = 0; l < w.cols; l += kStep) {
    uint8_t tail[kStep * kBytes] = {};
    const uint8_t* from = row + l * kBytes;
    if (l + kStep > w.cols) {
      std::memcpy(tail, from, (w.cols - l) * kBytes);
      from = tail;
    }
    vf low, high;
    if constexpr (kKind == gemm::kFp8) {
      // blocks of 128 are whole steps: one scale a step
      fp8_decode(from, low, high);
      vf s = set1(scale[l / gemm::kBlock] * kFp8Scale);
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
    store(to + l, low);
    store(to + l + kLanes, high);
  }
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

// q: [count] rows of w.rows floats, out: rows of w.cols floats, padded to a step (a row's end is
// written before the next row begins, so padding may overlap what comes after in the same row).
inline void absorb(const Weight& w, const float* q, int64_t q_pitch, int64_t count, float* out,
                   int64_t out_pitch) {
  static thread_local Scratch memory;
  const int64_t pitch = gemm::round_up(w.cols, 2 * kLanes);
  float* panel = memory.get<float>(w.rows * pitch + kAbsorbRows * pitch);
  float* results = panel + w.rows * pitch;
  for (int64_t n = 0; n < w.rows; ++n) {
    if (w.kind == gemm::kFp8)
      decode_row<gemm::kFp8>(w, n, panel + n * pitch);
    else if (w.kind == gemm::kBf16)
      decode_row<gemm::kBf16>(w, n, panel + n * pitch);
    else
      decode_row<gemm::kF32>(w, n, panel + n * pitch);
  }
  for (int64_t t = 0; t < count; t += kAbsorbRows) {
    const int64_t rows = count - t < kAbsorbRows ? count - t : kAbsorbRows;
    const float* from[kAbsorbRows];
    float* to[kAbsorbRows];
    for (int64_t r = 0; r < kAbsorbRows; ++r) {
      from[r] = q + (t + (r < rows ? r : rows - 1)) * q_pitch;
      to[r] = results + r * pitch;
    }
    for (int64_t l = 0; l < pitch; l += 2 * kLanes) {
      if (rows == 1)
        absorb_tile<1, 2>(panel, pitch, w.rows, from, to, l);
      else
        absorb_tile<kAbsorbRows, 2>(panel, pitch, w.rows, from, to, l);
    }
    for (int64_t r = 0; r < rows; ++r)
      std::memcpy(out + (t + r) * out_pitch, to[r], w.cols * sizeof(float));
  }
}
}  // namespace wf::model
