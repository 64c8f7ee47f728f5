// Stored rows: a paged cache, and the tiles whose rows must be rewritten before use.
#pragma once
#include "block.h"
#include "fp8_rows.h"

namespace wf::attention {
// Rows of a paged cache; strides in bytes. One page of `page` rows may serve as a plain array.
struct Cache {
  const char* data = nullptr;
  int64_t block_stride = 0, row_stride = 0, head_stride = 0;
  int64_t blocks = 0, page = 0;

  const char* row(int64_t block, int64_t offset, int64_t kv_head) const {
    return data + block * block_stride + offset * row_stride + kv_head * head_stride;
  }
};

// Copies a tile's rows to scratch where they cannot be read in place: FP8, or a width that is no
// multiple of a step (its end is filled with zeros). `latent`: values are the first columns of the
// keys' rows. Addresses do not tell: two arrays may start at one place and go on differently.
template <class Row>
class Expander {
  using Element = typename Row::Element;

 public:
  Expander(int64_t k_width, int64_t v_width, bool fp8, bool latent)
      : k_width_(k_width), v_width_(v_width), fp8_(fp8), latent_(latent) {}
  bool needed() const { return fp8_ || k_width_ % kStep || v_width_ % kStep; }
  int64_t k_bytes() const { return fp8_ ? kFp8RowBytes : k_width_ * int64_t(sizeof(Element)); }
  int64_t v_bytes() const { return v_width_ * int64_t(sizeof(Element)); }

  template <int Keys>
  void operator()(KeyRows<Keys>& tile) const {
    if (!needed()) return;
    static thread_local Arena arena;
    const int64_t k_pitch = pitch(k_width_), v_pitch = latent_ ? 0 : pitch(v_width_);
    float* base = arena.floats((Keys * (k_pitch + v_pitch) * int64_t(sizeof(Element)) + 3) / 4);
    Element* k = reinterpret_cast<Element*>(base);
    Element* v = k + Keys * k_pitch;
    for (int t = 0; t < tile.n; ++t, k += k_pitch, v += v_pitch) {
      copy(tile.k[t], k_width_, k);
      if (!latent_) copy(tile.v[t], v_width_, v);
      tile.k[t] = k;
      tile.v[t] = latent_ ? k : v;
    }
    for (int t = tile.n; t < Keys + kPadding; ++t)
      tile.k[t] = tile.k[tile.n - 1], tile.v[t] = tile.v[tile.n - 1];
  }

 private:
  static int64_t pitch(int64_t width) { return ceil_div(width, kStep) * kStep; }
  void copy(const void* row, int64_t width, Element* to) const {
    if constexpr (std::is_same_v<Row, Bf16Row> || kDots<Row> || kTiles<Row>)
      if (fp8_) return expand_fp8_row(static_cast<const uint8_t*>(row), to);
    std::memcpy(to, row, size_t(width) * sizeof(Element));
    std::memset(to + width, 0, size_t(pitch(width) - width) * sizeof(Element));
  }

  const int64_t k_width_, v_width_;
  const bool fp8_, latent_;
};
}  // namespace wf::attention
