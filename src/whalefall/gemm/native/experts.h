// The experts of a step: rows[t, j] = W2_e . (silu(W1_e . x_t) * (W3_e . x_t)),  e = topk_idx[t, j]
//
// Selections are sorted by expert (stable, so by token within one); gate and up of a chunk of
// intermediate rows are one task, silu and the product happen while both lie in L1; down is a
// second phase. One barrier between them. Each selection's row goes to its own place: adding rows
// up, in top-k order, is the caller's (`sum_selections`), so that it happens once, in one place.
#pragma once
#include "linear.h"

namespace wf::gemm {
struct Expert {
  Weight w1, w3, w2;  // gate [I, H], up [I, H], down [H, I]
};

struct Selections {
  const int32_t* expert;  // [tokens, topk], index into `experts`; negative: none, its row is zero
  int64_t tokens, topk;
};

class FusedExperts {
 public:
  // rows: [tokens * topk, H], kF32 or kBf16; rows.factor, if any, holds one factor a selection.
  void run(const Expert* experts, int64_t num_experts, const Selections& selected, const Input& x,
           const Output& rows, int form, int activations = kKeep);

 private:
  void sort(int64_t num_experts, const Selections& selected);
  Prepared x_, hidden_;
  Scratch order_, tokens_, starts_, active_, middle_;
  int64_t num_active_ = 0;  // experts that were chosen
};

namespace detail {
// h = silu(g) * u
inline void silu_mul(const float* g, const float* u, float* h, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    vf v = load(g + i);
    store(h + i, v / (set1(1.0f) + exp(-v)) * load(u + i));
  }
  if (i == count) return;
  float a[kLanes] = {}, b[kLanes] = {}, c[kLanes];
  std::memcpy(a, g + i, (count - i) * 4);
  std::memcpy(b, u + i, (count - i) * 4);
  vf v = load(a);
  store(c, v / (set1(1.0f) + exp(-v)) * load(b));
  std::memcpy(h + i, c, (count - i) * 4);
}

// One part of one expert's product: rows [n, end) of w for the selections [first, last).
inline void multiply(const Weight& w, int64_t n, int64_t end, const Rows& x, int64_t first,
                     int64_t last, const Output& out, int form, Next next = nullptr) {
  if (form == kMany) return multiply_many(w, n, end, x, first, last, out);
  Rows part = x;
  Output to = out;
  if (part.index)
    part.index += first;
  else if (part.halves)
    part.halves += first * part.pitch;
  else
    part.data += first * part.pitch;
  if (!part.index && part.scale) part.scale += first * part.scale_pitch;
  if (!part.index && part.unlift) part.unlift += first;
  if (to.index)
    to.index += first;
  else
    to.data = static_cast<float*>(to.data) + first * to.pitch;
  multiply_few(w, n, end, part, last - first, to, next);
}
}  // namespace detail

inline void FusedExperts::sort(int64_t num_experts, const Selections& selected) {
  int64_t total = selected.tokens * selected.topk;
  int64_t* start = starts_.get<int64_t>(num_experts + 2);
  int32_t* order = order_.get<int32_t>(total + 1);
  int32_t* token = tokens_.get<int32_t>(total + 1);
  std::memset(start, 0, (num_experts + 2) * 8);
  for (int64_t i = 0; i < total; ++i)
    if (selected.expert[i] >= 0) ++start[selected.expert[i] + 2];
  for (int64_t e = 0; e <= num_experts; ++e) start[e + 1] += start[e];
  int32_t* active = active_.get<int32_t>(num_experts + 1);
  num_active_ = 0;
  for (int64_t e = 0; e < num_experts; ++e)
    if (start[e + 2] > start[e + 1]) active[num_active_++] = int32_t(e);
  for (int64_t i = 0; i < total; ++i) {
    if (selected.expert[i] < 0) continue;
    int64_t at = start[selected.expert[i] + 1]++;
    order[at] = int32_t(i);
    token[at] = int32_t(i / selected.topk);
  }
}

inline void FusedExperts::run(const Expert* experts, int64_t num_experts,
                              const Selections& selected, const Input& x, const Output& rows,
                              int form, int activations) {
  if (num_experts == 0 || selected.tokens * selected.topk == 0) return;
  int64_t width = experts[0].w1.rows, hidden = experts[0].w1.cols;
  sort(num_experts, selected);
  const int64_t* start = starts_.get<int64_t>(0);
  const int32_t* order = order_.get<int32_t>(0);
  const int32_t* active = active_.get<int32_t>(0);
  Rows tokens = x_.rows(x, selected.tokens, experts[0].w1, form, activations);
  tokens.index = tokens_.get<int32_t>(0);
  float* middle = middle_.get<float>(selected.tokens * selected.topk * width);

  for (int64_t i = 0; i < selected.tokens * selected.topk; ++i)
    if (selected.expert[i] < 0)
      std::memset(static_cast<char*>(rows.data) + i * rows.pitch * kind_bytes(rows.kind), 0,
                  hidden * kind_bytes(rows.kind));

  // W rows of a task of gate and up, and of one of down; selections that share a pass of the
  // former.
  const int64_t chunk = form == kFew ? 128 : 64, down_chunk = form == kFew ? 256 : 64;
  const int64_t step = form == kFew ? few::kRowsOfX : 64;
  constexpr int64_t kMost = 4096;  // chunk * step
  static_assert(128 * few::kRowsOfX <= kMost && 64 <= many::kColumns && 64 <= many::kChunkRows);
  int64_t across = ceil_div(width, chunk), down = ceil_div(hidden, down_chunk);
  // The weights that a thread reads first after a task: threads take tasks in turns, near enough.
  auto after_gate = [&](int64_t task) -> Next {
    const int64_t next = task + num_threads(), rest = next - num_active_ * across;
    if (rest < 0) return experts[active[next / across]].w1.row(next % across * chunk);
    return rest < num_active_ * down ? experts[active[rest / down]].w2.row(rest % down * down_chunk)
                                     : nullptr;
  };
  auto after_down = [&](int64_t task) -> Next {
    const int64_t next = task + num_threads();
    return next < num_active_ * down ? experts[active[next / down]].w2.row(next % down * down_chunk)
                                     : nullptr;
  };
  parallel_for(num_active_ * across, [&](int64_t task, int) {
    int64_t e = active[task / across], n = task % across * chunk;
    int64_t end = n + chunk < width ? n + chunk : width;
    float gate[kMost], up[kMost];
    for (int64_t first = start[e]; first < start[e + 1]; first += step) {
      int64_t last = first + step < start[e + 1] ? first + step : start[e + 1];
      Output g{gate - first * chunk - n, chunk, nullptr, nullptr, kF32, 0};
      Output u{up - first * chunk - n, chunk, nullptr, nullptr, kF32, 0};
      detail::multiply(experts[e].w1, n, end, tokens, first, last, g, form, experts[e].w3.row(n));
      detail::multiply(experts[e].w3, n, end, tokens, first, last, u, form, after_gate(task));
      for (int64_t i = first; i < last; ++i)
        detail::silu_mul(gate + (i - first) * chunk, up + (i - first) * chunk,
                         middle + i * width + n, end - n);
    }
  });
  Input h{middle, width, kF32, 0};
  // between the products as before them: bf16 stays bf16
  int between = x.kind == kBf16 && activations == kKeep ? int(kHalf) : activations;
  Rows inner = hidden_.rows(h, start[num_experts], experts[0].w2, form, between);
  Output to = rows;
  to.index = order;
  parallel_for(num_active_ * down, [&](int64_t task, int) {
    int64_t e = active[task / down], n = task % down * down_chunk;
    int64_t end = n + down_chunk < hidden ? n + down_chunk : hidden;
    for (int64_t first = start[e]; first < start[e + 1]; first += many::kChunkRows) {
      int64_t last = first + many::kChunkRows;
      last = last < start[e + 1] ? last : start[e + 1];
      detail::multiply(experts[e].w2, n, end, inner, first, last, to, form, after_down(task));
    }
  });
}

// y[t] (+)= rows[t, 0] * weight[t, 0] + rows[t, 1] * weight[t, 1] + …, in that order, in fp32.
inline void sum_selections(const Input& rows, const float* weight, int64_t tokens, int64_t topk,
                           int64_t hidden, bool add, float* y, int64_t pitch) {
  parallel_for(tokens, [&](int64_t t, int) {
    float* to = y + t * pitch;
    if (!add) std::memset(to, 0, hidden * 4);
    for (int64_t j = 0; j < topk; ++j) {
      float f = weight ? weight[t * topk + j] : 1.0f;
      for (int64_t k = 0; k < hidden; ++k) {
        int64_t at = (t * topk + j) * rows.pitch + k;
        float v = rows.kind == kBf16 ? bf16_to_float(static_cast<const uint16_t*>(rows.data)[at])
                                     : static_cast<const float*>(rows.data)[at];
        to[k] += f * v;
      }
    }
  });
}
}  // namespace wf::gemm
