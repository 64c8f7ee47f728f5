// Entry of sparse MLA for a row format (WF_ROW) and a group size (WF_GROUP), as in mla_paged.cpp.
#include "mla_sparse.h"

WF_EXPORT void wf_sparse_attention(const wf::attention::SparseArgs* args) {
  wf::attention::sparse_attention<wf::attention::WF_ROW, WF_GROUP>(*args);
}
