// Entry of the merge by log-sum-exp.
#include "merge.h"

WF_EXPORT void wf_merge(const wf::attention::MergeArgs* args) {
  wf::parallel_for(args->rows, [&](int64_t row, int) { wf::attention::merge_row(*args, row); });
}
