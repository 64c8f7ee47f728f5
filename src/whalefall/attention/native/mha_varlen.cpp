// Entry of dense attention over sequences end to end; WF_ROW is the format of K and V.
#include "mha.h"

WF_EXPORT void wf_varlen_attention(const wf::attention::VarlenArgs* args) {
  wf::attention::varlen_attention<wf::attention::WF_ROW>(*args);
}
