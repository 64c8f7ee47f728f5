// Entries of paged MLA for a row format (WF_ROW: Fp32Row, Fp16Row, or Bf16Row, DotRow and TileRow,
// which read FP8 too) and a group size (WF_GROUP: 1, 2, 4 or 8 rows, by the query heads of a kv
// head; 16 of TileRow).
#include "mla_decode.h"

WF_EXPORT void wf_paged_attention(const wf::attention::PagedArgs* args) {
  wf::attention::paged_attention<wf::attention::WF_ROW, WF_GROUP>(*args);
}
WF_EXPORT int32_t wf_decode(wf::attention::DecodeArgs* args) {
  return wf::attention::decode<wf::attention::WF_ROW, WF_GROUP>(*args);
}
