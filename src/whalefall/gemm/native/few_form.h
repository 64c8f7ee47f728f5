// The form for few rows of x: by tiles or dots of bf16, or by fp32 multiply-adds.
#pragma once
#include "few_dot.h"
#include "few_tile.h"
#include "many.h"

namespace wf::gemm {
// Tiles give the same bits in both forms, and the other one is faster from here on.
constexpr int64_t kMostOfTiles = 16;

// y[:, n..end) for the rows [n, end) of W; `next` is what the thread will read after them.
inline void multiply_few(const Weight& w, int64_t n, int64_t end, const Rows& x, int64_t count,
                         const Output& out, Next next = nullptr) {
  if (x.tiles.values && count > kMostOfTiles) {
    for (const int64_t columns = many::columns(true); n < end; n += columns)
      for (int64_t m = 0; m < count; m += many::kChunkRows)
        multiply_many(w, n, n + columns < end ? n + columns : end, x, m,
                      m + many::kChunkRows < count ? m + many::kChunkRows : count, out, next);
  } else if (x.tiles.values) {
    multiply_few_tile(w, n, end, x.tiles, count, out, next);
  } else if (x.halves) {
    multiply_few_dot(w, n, end, x, count, out, next);
  } else if (w.kind == kFp8) {
    few::rows_of<kFp8>(w, n, end, x, count, out);
  } else if (w.kind == kBf16) {
    few::rows_of<kBf16>(w, n, end, x, count, out);
  } else {
    few::rows_of<kF32>(w, n, end, x, count, out);
  }
}
}  // namespace wf::gemm
