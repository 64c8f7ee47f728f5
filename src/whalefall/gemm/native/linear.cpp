// The entries that Python and other units call by address; see linear.h and experts.h.
#include "experts.h"

using namespace wf::gemm;

struct LinearCall {
  Weight weight;
  Input x;
  Output y;
  int64_t count;
  int32_t form;
  int32_t activations;
};

struct ExpertsCall {
  const Expert* experts;
  int64_t num_experts;
  Selections selected;
  Input x;
  Output rows;
  int32_t form;
  int32_t activations;
  Shared shared;
};

WF_EXPORT void wf_linear(const LinearCall* call) {
  static thread_local Prepared prepared;
  const Weight& w = call->weight;
  Rows x = prepared.rows(call->x, call->count, w, call->form, call->activations);
  linear(w, x, call->count, call->y, call->form);
}

WF_EXPORT void wf_experts(const ExpertsCall* call) {
  static thread_local FusedExperts fused;
  fused.run(call->experts, call->num_experts, call->selected, call->shared, call->x, call->rows,
            call->form, call->activations);
}

// `count` rows of x, `cols` wide, quantised as kE4m3 does and packed.
WF_EXPORT void wf_pack(const Input* x, int64_t count, int64_t cols, uint8_t* to) {
  static thread_local Scratch scratch;
  const int64_t padded = round_up(cols, kBlock), blocks = padded / kBlock;
  float* own = scratch.get<float>(wf::num_threads() * (padded + blocks));
  wf::parallel_for(count, [&](int64_t m, int thread) {
    float *row = own + thread * (padded + blocks), *scales = row + padded;
    detail::row_to_float(*x, m, cols, row, padded);
    detail::quantize_row(row, padded, scales);
    detail::pack_row(row, scales, padded, to + m * detail::packed_bytes(padded));
  });
}
