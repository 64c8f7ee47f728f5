// The experts of a step: rows[t, j] = W2_e . (silu(W1_e . x_t) * (W3_e . x_t)),  e = topk_idx[t, j]
//
// Selections are sorted by expert (stable, so by token within one). Gate and up of all experts,
// the shared one among them, are one phase, down of all is another: one barrier between them. Each
// selection's row goes to its own place: adding rows up, in top-k order, is the caller's
// (`sum_selections`), so that it happens once, in one place.
#pragma once
#include "phase.h"

namespace wf::gemm {
struct Expert {
  Weight w1, w3, w2;  // gate [I, H], up [I, H], down [H, I]
};

struct Selections {
  const int32_t* expert;  // [tokens, topk], index into `experts`; negative: none, its row is zero
  int64_t tokens, topk;
};

// An expert of all tokens, or a dense MLP; its weights are of the routed experts' kind.
struct Shared {
  const Expert* expert;  // null: there is none
  Output rows;           // [tokens, H]
};

class FusedExperts {
 public:
  // rows: [tokens * topk, H], kF32 or kBf16; rows.factor, if any, holds one factor a selection.
  void run(const Expert* experts, int64_t num_experts, const Selections& selected,
           const Shared& shared, const Input& x, const Output& rows, int form,
           int activations = kKeep);

 private:
  void sort(int64_t num_experts, const Selections& selected);
  Prepared x_, shared_x_, hidden_, shared_hidden_;
  Scratch order_, tokens_, starts_, active_, middle_, shared_middle_;
  Phase up_, down_;
  std::vector<RowSet> sets_;  // the selections of each active expert
  int64_t num_active_ = 0;    // experts that were chosen
};

inline void FusedExperts::sort(int64_t num_experts, const Selections& selected) {
  int64_t total = num_experts ? selected.tokens * selected.topk : 0;
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
                              const Selections& selected, const Shared& shared, const Input& x,
                              const Output& rows, int form, int activations) {
  const int64_t T = selected.tokens, total = num_experts ? T * selected.topk : 0;
  if (T == 0 || (total == 0 && !shared.expert)) return;
  const Expert& first = total ? experts[0] : *shared.expert;
  const int64_t hidden = first.w1.cols, width = total ? first.w1.rows : 0;
  sort(total ? num_experts : 0, selected);
  const int64_t* start = starts_.get<int64_t>(0);
  const int32_t* order = order_.get<int32_t>(0);
  const int32_t* active = active_.get<int32_t>(0);
  for (int64_t i = 0; i < total; ++i)
    if (selected.expert[i] < 0)
      std::memset(static_cast<char*>(rows.data) + i * rows.pitch * kind_bytes(rows.kind), 0,
                  hidden * kind_bytes(rows.kind));

  Rows selections = x_.untiled(x, T, first.w1, form, activations), tokens = selections;
  selections.index = tokens_.get<int32_t>(0);
  sets_.clear();
  for (int64_t i = 0; i < num_active_; ++i)
    sets_.push_back({start[active[i]], start[active[i] + 1], {}});
  x_.tile(selections, first.w1, form, sets_.data(), num_active_);
  if (shared.expert) {
    RowSet all{0, T, {}};
    shared_x_.tile(tokens, shared.expert->w1, form, &all, 1);
    tokens.tiles = all.tiles;
  }
  const Input middle{middle_.get<float>(total * width), width, kF32, 0};
  const int64_t shared_width = shared.expert ? shared.expert->w1.rows : 0;
  const Input shared_middle{shared_middle_.get<float>(T * shared_width), shared_width, kF32, 0};
  auto output = [](const Input& to) {
    return Output{const_cast<void*>(to.data), to.pitch, nullptr, nullptr, kF32, 0};
  };
  Output to = rows;
  to.index = order;
  up_.clear(form), down_.clear(form);
  if (shared.expert) {
    up_.add({&shared.expert->w1, &shared.expert->w3, tokens, 0, T, output(shared_middle)});
    down_.add({&shared.expert->w2, nullptr, {}, 0, T, shared.rows});
  }
  for (int64_t i = 0; i < num_active_; ++i) {
    const Expert& e = experts[active[i]];
    const int64_t from = sets_[i].first, end = sets_[i].last;
    selections.tiles = sets_[i].tiles;
    up_.add({&e.w1, &e.w3, selections, from, end, output(middle)});
    down_.add({&e.w2, nullptr, {}, from, end, to});
  }
  up_.cut(), down_.cut();
  up_.run(&down_);
  // between the products as before them: bf16 stays bf16
  const int between = x.kind == kBf16 && activations == kKeep ? int(kHalf) : activations;
  if (shared.expert)
    down_.job(0).x = shared_hidden_.rows(shared_middle, T, shared.expert->w2, form, between);
  if (num_active_) {
    Rows inner = hidden_.untiled(middle, start[num_experts], first.w2, form, between);
    hidden_.tile(inner, first.w2, form, sets_.data(), num_active_);
    for (int64_t i = 0; i < num_active_; ++i) {
      inner.tiles = sets_[i].tiles;
      down_.job(i + (shared.expert ? 1 : 0)).x = inner;
    }
  }
  down_.run(nullptr);
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
