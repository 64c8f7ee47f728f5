// What a forward step works on: the model as pointers into the mapped checkpoint, and a batch.
// Python fills these structs through ctypes (native_step.py mirrors them).
#pragma once
#include <cstdint>
#include "../../attention/native/append.h"
#include "../../attention/native/mla.h"
#include "../../gemm/native/operands.h"

namespace wf::model {
using gemm::Weight;

// Of gemm/native/experts.h and linear.cpp, whose entries are called by address.
struct Expert {
  Weight w1, w3, w2;
};
struct LinearCall {
  Weight weight;
  gemm::Input x;
  gemm::Output y;
  int64_t count;
  int32_t form, activations;
};
struct ExpertsCall {
  const Expert* experts;
  int64_t num_experts;
  const int32_t* chosen;
  int64_t tokens, topk;
  gemm::Input x;
  gemm::Output rows;
  int32_t form, activations;
  const Expert* shared;  // null: none
  gemm::Output shared_rows;
};
// Of ep/native/routing.cpp.
struct GateCall {
  const float* logits;
  const float* bias;
  int64_t* index;
  float* weight;
  int64_t tokens, experts, top_k, groups, top_groups;
  int32_t softmax, normalize;
  float scale;
};

struct Layer {
  const float* input_norm;
  const float* post_norm;
  Weight q_a;  // no rows: queries are projected directly, by q_b
  const float* q_a_norm;
  Weight q_b, kv_a;
  const float* kv_a_norm;
  const Weight* k_up;  // [heads], [nope, latent] parts of kv_b
  const Weight* v_up;  // [heads], [value, latent] parts of kv_b
  Weight o;
  const Expert* experts;  // routed; null: a dense layer
  const Expert* dense;    // the dense MLP, or the shared expert; may be null beside experts
  Weight gate;
  const float* gate_bias;
  int64_t* load;  // [num_experts], how often each was chosen
};

// What stands before an MTP layer: x = eh_proj [enorm(embedding), hnorm(hidden)].
struct Mtp {
  const float* enorm;
  const float* hnorm;
  Weight eh_proj;
};

struct Model {
  const Layer* layers;
  int64_t num_layers, hidden, heads, nope, rope, value, latent, q_lora, num_experts;
  Weight embed, head;
  const float* norm;
  const float* rope_table;  // [positions, rope / 2, 2]
  const Mtp* mtp;           // null: the main model
  GateCall gate;            // the rules; pointers and counts are filled in for each layer
  float eps, latent_eps, softmax_scale;
  int32_t activations;  // gemm's: kKeep ("fp32"), kE4m3 ("w8a8") or kHalf ("w8a16")
  int32_t bf16_rows;    // routed experts' rows are rounded to bf16
  void (*linear)(const LinearCall*);
  void (*experts)(const ExpertsCall*);
  int64_t (*route)(const GateCall*);
  void (*attention)(const attention::PagedArgs*);
};

struct Batch {
  const int32_t* tokens;
  const int32_t* positions;
  const int32_t* const* tables;  // [tokens]: each token's block table
  int64_t count;
  const int32_t* logit_rows;
  int64_t num_logit_rows;
  void* kv;  // [layers, blocks, 64, latent + rope], or of 656 bytes
  int64_t kv_layer_bytes, kv_blocks;
  attention::Type kv_type;  // fp8: rows of 656 bytes
  int32_t form;             // gemm's: kFew for generated tokens, kMany for prompts
  float* logits;
  // [tokens, hidden]: in: the main model's (for mtp only); out: the final norm's; null: not wanted
  float* hidden;
  float* workspace;  // of wf_step_workspace floats, kept between the parts of a step; null: our own
};

// A step in pieces, for whoever sends tokens to other ranks between them.
enum Part : int32_t { kEmbed, kAttention0, kAttention1, kShared, kFinish, kLogits };

// What a piece takes and shows.
struct PartCall {
  int32_t part, unused;
  int64_t layer;
  const float* routed;   // kFinish: [tokens, hidden], the sums of the routed experts' rows
  const float* normed;   // out, after kAttention1: [tokens, hidden], what the experts take
  const int64_t* index;  // out: [tokens, top_k] chosen experts
  const float* weight;   // out: [tokens, top_k] their weights
};
}  // namespace wf::model
