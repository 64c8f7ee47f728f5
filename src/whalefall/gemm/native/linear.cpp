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
