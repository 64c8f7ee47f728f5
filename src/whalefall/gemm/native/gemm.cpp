// The entries of DeepGEMM's products; see gemm.h and grouped.h.
#include "grouped.h"

static wf::gemm::Gemm& own() {
  static thread_local wf::gemm::Gemm gemm;
  return gemm;
}

WF_EXPORT void wf_gemm(const wf::gemm::Product* product) { own().run(*product); }

// Returns 1, and writes nothing, where `whose` names no group or rows that there are not.
WF_EXPORT int32_t wf_gemm_grouped(const wf::gemm::Grouped* call) {
  static thread_local wf::gemm::GroupedRows grouped;
  return !grouped.run(*call, own());
}
