// Entry of dense attention over sequences end to end; WF_ROW is the format of K and V.
#include "mha.h"

struct VarlenCall {
  wf::attention::VarlenArgs args;
  int64_t q_tokens, k_tokens;
};

// Whether sequences start at 0, never fall, and end within the tokens: rows are read by them.
static bool are_starts(const int32_t* starts, int64_t sequences, int64_t tokens) {
  if (starts[0] != 0 || starts[sequences] > tokens) return false;
  for (int64_t s = 0; s < sequences; ++s)
    if (starts[s + 1] < starts[s]) return false;
  return true;
}

// Returns 1, and writes nothing, where starts are none.
WF_EXPORT int32_t wf_varlen_attention(const VarlenCall* call) {
  const wf::attention::VarlenArgs& args = call->args;
  if (!are_starts(args.q_starts, args.sequences, call->q_tokens) ||
      !are_starts(args.k_starts, args.sequences, call->k_tokens))
    return 1;
  wf::attention::varlen_attention<wf::attention::WF_ROW>(args, call->q_tokens);
  return 0;
}
