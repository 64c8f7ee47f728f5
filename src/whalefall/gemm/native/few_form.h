// The form for few rows of x: by tiles or dots of bf16, or by fp32 multiply-adds.
#pragma once
#include "few_dot.h"
#include "few_tile.h"

namespace wf::gemm {
// y[:, n..end) for the rows [n, end) of W; `next` is what the thread will read after them.
inline void multiply_few(const Weight& w, int64_t n, int64_t end, const Rows& x, int64_t count,
                         const Output& out, Next next = nullptr) {
  if (x.tiles.values)
    multiply_few_tile(w, n, end, x.tiles, count, out, next);
  else if (x.halves)
    multiply_few_dot(w, n, end, x, count, out, next);
  else if (w.kind == kFp8)
    few::rows_of<kFp8>(w, n, end, x, count, out);
  else if (w.kind == kBf16)
    few::rows_of<kBf16>(w, n, end, x, count, out);
  else
    few::rows_of<kF32>(w, n, end, x, count, out);
}
}  // namespace wf::gemm
