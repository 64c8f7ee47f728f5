// Entry of the cache append.
#include "append.h"

WF_EXPORT void wf_cache_append(const wf::attention::AppendArgs* args) {
  wf::attention::append(*args);
}
