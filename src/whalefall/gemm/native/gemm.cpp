// The entry of DeepGEMM's products; see gemm.h.
#include "gemm.h"

WF_EXPORT void wf_gemm(const wf::gemm::Product* product) {
  static thread_local wf::gemm::Gemm gemm;
  gemm.run(*product);
}
