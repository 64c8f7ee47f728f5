// One forward step over all layers: see step.py. Products, experts, gate and attention are the
// entries of their rooms' own units, called by address; here is what lies between them.
//
// MLA runs in absorbed form for both phases: q is taken into the latent space (absorb.h), attends
// over the pages, and each head's latent result is projected to its values. Prompts go through
// attention kSlice tokens at a time, which bounds the workspace.
#include "absorb.h"
#include "norms.h"
#include "step.h"
#include "whalefall/pool.h"

namespace wf::model {
namespace {
constexpr int64_t kPage = 64;
constexpr int64_t kSlice = 256;  // tokens of one attention call

class Step {
 public:
  Step(const Model& model, const Batch& batch) : m_(model), b_(batch) {}

  // 0, or -1 - layer where the gate met a NaN.
  int64_t run() {
    carve();
    embed();
    for (int64_t i = 0; i < m_.num_layers; ++i) {
      project(m_.layers[i], i);
      attend(m_.layers[i], i);
      if (!mlp(m_.layers[i])) return -1 - i;
    }
    logits();
    return 0;
  }

  // One piece of the step: 0, or -1 - layer where the gate met a NaN.
  int64_t run(PartCall& call) {
    carve();
    const int64_t i = call.layer;
    const Layer& layer = m_.layers[i];
    call.normed = normed_, call.index = index_, call.weight = weight_;
    switch (call.part) {
      case kEmbed:
        embed();
        break;
      case kAttention0:
        project(layer, i);
        break;
      case kAttention1:
        attend(layer, i);
        norm(x_, layer.post_norm, m_.hidden, m_.eps, normed_);
        if (layer.experts && !route(layer)) return -1 - i;
        break;
      case kShared:
        if (layer.dense) run_experts(nullptr, layer.dense);
        break;
      case kFinish:
        for_tokens([&](int64_t t) { finish(layer, t, call.routed); });
        break;
      default:
        logits();
    }
    return 0;
  }

  int64_t workspace() {
    float* none = nullptr;
    return place(none);
  }

 private:
  template <class Body>
  void for_tokens(Body&& body) const {
    constexpr int64_t kTokens = 8;
    parallel_for(gemm::ceil_div(b_.count, kTokens), [&](int64_t task, int) {
      for (int64_t t = task * kTokens; t < (task + 1) * kTokens && t < b_.count; ++t) body(t);
    });
  }

  void embed() const {
    for_tokens([&](int64_t t) {
      from_table(m_.embed.row(b_.tokens[t]), m_.embed.kind == gemm::kBf16, m_.hidden,
                 x_ + t * m_.hidden);
    });
    if (m_.mtp) join_hidden(*m_.mtp);
  }

  // Workspace of this batch: the caller's, or memory that stays for the next one.
  void carve() {
    static thread_local Scratch memory;
    float* start = b_.workspace;
    if (!start) start = memory.get<float>(workspace());
    place(start);
    for (int64_t t = 0; t < b_.count; ++t) keys_[t] = b_.positions[t] + 1;
  }

  // Lays the arrays out from `start` on; the floats they take.
  int64_t place(float* start) {
    const int64_t T = b_.count, slice = T < kSlice ? T : kSlice, K = m_.gate.top_k;
    const int64_t q_width = m_.heads * (m_.nope + m_.rope), wide = m_.latent + m_.rope;
    const int64_t sizes[] = {T * m_.hidden,
                             T * m_.hidden,
                             T * m_.hidden,
                             T * m_.q_lora,
                             T * q_width,
                             T * wide,
                             slice * m_.heads * wide,
                             slice * m_.heads * m_.latent,
                             T * m_.heads * m_.value,
                             T * m_.num_experts,
                             T * K,
                             T * K * 2,
                             T * K,
                             T * K * m_.hidden / (m_.bf16_rows ? 2 : 1) + 1,
                             b_.num_logit_rows * m_.hidden,
                             T,
                             m_.mtp ? T * 2 * m_.hidden : 0};
    float** places[] = {&x_,
                        &normed_,
                        &out_,
                        &q_a_,
                        &q_,
                        &kv_,
                        &q_full_,
                        &o_latent_,
                        &value_,
                        &gate_,
                        &weight_,
                        reinterpret_cast<float**>(&index_),
                        reinterpret_cast<float**>(&chosen_),
                        &rows_,
                        &last_,
                        reinterpret_cast<float**>(&keys_),
                        &both_};
    int64_t total = 0;
    for (int i = 0; i < int(sizeof sizes / sizeof *sizes); ++i) {
      *places[i] = start ? start + total : nullptr;
      total += gemm::round_up(sizes[i], 32);
    }
    return total;
  }

  void linear(const Weight& w, const float* x, int64_t pitch, int64_t count, float* y,
              int64_t y_pitch, int form) const {
    LinearCall call{w,
                    {x, pitch, gemm::kF32, 0},
                    {y, y_pitch, nullptr, nullptr, gemm::kF32, 0},
                    count,
                    form,
                    activations(w)};
    m_.linear(&call);
  }
  // Only FP8 weights take E4M3 activations; the others' products stay as exact as bf16 is.
  int32_t activations(const Weight& w) const {
    if (m_.activations == gemm::kE4m3 && w.kind != gemm::kFp8) return gemm::kKeep;
    return m_.activations;
  }
  void linear(const Weight& w, const float* x, float* y) const {
    linear(w, x, w.cols, b_.count, y, w.rows, b_.form);
  }
  void norm(const float* x, const float* weight, int64_t n, float eps, float* y) const {
    for_tokens([&](int64_t t) { rms_norm(x + t * n, weight, n, eps, y + t * n); });
  }

  // Queries, and the tokens' latents in their pages.
  void project(const Layer& layer, int64_t index) const {
    norm(x_, layer.input_norm, m_.hidden, m_.eps, normed_);
    if (layer.q_a.rows) {
      linear(layer.q_a, normed_, q_a_);
      norm(q_a_, layer.q_a_norm, m_.q_lora, m_.latent_eps, q_a_);
      linear(layer.q_b, q_a_, q_);
    } else {
      linear(layer.q_b, normed_, q_);
    }
    linear(layer.kv_a, normed_, kv_);
    for_tokens([&](int64_t t) { append(layer, t, pages(index)); });
  }
  char* pages(int64_t index) const { return static_cast<char*>(b_.kv) + index * b_.kv_layer_bytes; }

  // Core attention, and what comes after it up to the residual.
  void attend(const Layer& layer, int64_t index) const {
    for (int64_t t = 0; t < b_.count; t += kSlice)
      core(layer, t, b_.count - t < kSlice ? b_.count - t : kSlice, pages(index));
    linear(layer.o, value_, out_);
    for_tokens([&](int64_t t) { add(out_ + t * m_.hidden, m_.hidden, x_ + t * m_.hidden); });
  }

  // x = eh_proj [enorm(x), hnorm(hidden)]: the embedding comes first.
  void join_hidden(const Mtp& mtp) const {
    const int64_t n = m_.hidden;
    for_tokens([&](int64_t t) {
      rms_norm(x_ + t * n, mtp.enorm, n, m_.eps, both_ + 2 * t * n);
      rms_norm(b_.hidden + t * n, mtp.hnorm, n, m_.eps, both_ + (2 * t + 1) * n);
    });
    linear(mtp.eh_proj, both_, x_);
  }

  int64_t row_bytes() const {
    if (b_.kv_type == attention::Type::fp8) return attention::kFp8RowBytes;
    return (m_.latent + m_.rope) * attention::bytes_of(b_.kv_type);
  }

  // Norms a token's latent, rotates its rope key, and writes both to its page.
  void append(const Layer& layer, int64_t t, char* pages) const {
    float* kv = kv_ + t * (m_.latent + m_.rope);
    rms_norm(kv, layer.kv_a_norm, m_.latent, m_.latent_eps, kv);
    rotate(kv + m_.latent, angles(t), m_.rope, kv + m_.latent);
    const int64_t position = b_.positions[t];
    char* page = pages + b_.tables[t][position / kPage] * kPage * row_bytes();
    char* row = page + position % kPage * row_bytes();
    if (b_.kv_type == attention::Type::fp8) {
      attention::AppendArgs args{};
      args.latent = kv, args.rope = kv + m_.latent, args.type = attention::Type::fp32;
      attention::append_fp8(args, 0, row);
    } else {
      to_cache(kv, m_.latent + m_.rope, b_.kv_type == attention::Type::bf16, row);
    }
  }
  const float* angles(int64_t t) const { return m_.rope_table + b_.positions[t] * m_.rope; }

  // Heads are shared out where each has enough to do.
  template <class Body>
  void for_heads(int64_t work, Body&& body) const {
    if (m_.heads * work < 65536)
      for (int64_t h = 0; h < m_.heads; ++h) body(h);
    else
      parallel_for(m_.heads, [&](int64_t h, int) { body(h); });
  }

  // Core attention of tokens [first, first + count): q_ -> value_.
  void core(const Layer& layer, int64_t first, int64_t count, char* pages) const {
    const int64_t H = m_.heads, head = m_.nope + m_.rope, wide = m_.latent + m_.rope;
    for_heads(count * m_.nope * m_.latent, [&](int64_t h) {
      const float* q = q_ + first * H * head + h * head;
      float* full = q_full_ + h * wide;
      const int64_t later = h + num_threads();  // threads take heads in turns, near enough
      const uint8_t* next = later < H ? layer.k_up[later].row(0) : nullptr;
      absorb(layer.k_up[h], q, H * head, count, next, full, H * wide);
      for (int64_t t = 0; t < count; ++t)
        rotate(q + t * H * head + m_.nope, angles(first + t), m_.rope,
               full + t * H * wide + m_.latent);
    });
    attention::PagedArgs args{};
    args.q = q_full_, args.q_token = H * wide, args.q_head = wide;
    args.out = o_latent_, args.out_token = H * m_.latent, args.out_head = m_.latent;
    args.tables = b_.tables + first, args.keys = keys_ + first;
    args.tokens = count, args.heads = H, args.kv_heads = 1;
    args.width = wide, args.v_width = m_.latent;
    args.cache.data = pages, args.cache.block_stride = kPage * row_bytes();
    args.cache.row_stride = row_bytes(), args.cache.head_stride = 0;
    args.cache.blocks = b_.kv_blocks, args.cache.page = kPage;
    args.scale = m_.softmax_scale;
    args.q_type = args.out_type = attention::Type::fp32;
    args.cache_type = b_.kv_type;
    m_.attention(&args);
    // a call from within a task runs on the task's own thread
    for_heads(count * m_.value * m_.latent, [&](int64_t h) {
      float* to = value_ + first * H * m_.value + h * m_.value;
      LinearCall call{layer.v_up[h],
                      {o_latent_ + h * m_.latent, H * m_.latent, gemm::kF32, 0},
                      {to, H * m_.value, nullptr, nullptr, gemm::kF32, 0},
                      count,
                      b_.form,
                      m_.activations == gemm::kHalf ? gemm::kHalf : gemm::kKeep};
      m_.linear(&call);
    });
  }

  // The routed experts' rows, and the shared expert's (or the dense MLP's) in out_; either may be
  // null.
  void run_experts(const Expert* routed, const Expert* dense) const {
    const Weight& w = (routed ? routed : dense)->w1;
    ExpertsCall call{routed,
                     routed ? m_.num_experts : 0,
                     chosen_,
                     b_.count,
                     m_.gate.top_k,
                     {normed_, m_.hidden, gemm::kF32, 0},
                     output(rows_, m_.bf16_rows),
                     b_.form,
                     activations(w),
                     dense,
                     output(out_, false)};
    m_.experts(&call);
  }
  gemm::Output output(void* rows, bool bf16) const {
    return {rows, m_.hidden, nullptr, nullptr, bf16 ? gemm::kBf16 : gemm::kF32, 0};
  }

  bool mlp(const Layer& layer) const {
    norm(x_, layer.post_norm, m_.hidden, m_.eps, normed_);
    if (layer.experts && !route(layer)) return false;
    const bool alike =
        layer.experts && layer.dense && layer.experts->w1.kind == layer.dense->w1.kind;
    if (alike || !layer.dense) {
      run_experts(layer.experts, layer.dense);
    } else {
      if (layer.experts) run_experts(layer.experts, nullptr);
      run_experts(nullptr, layer.dense);
    }
    for_tokens([&](int64_t t) { combine(layer, t); });
    return true;
  }

  // Always exact: a rounded activation could turn a close choice.
  void route_logits(const Weight& gate) const {
    LinearCall call{gate,
                    {normed_, m_.hidden, gemm::kF32, 0},
                    {gate_, gate.rows, nullptr, nullptr, gemm::kF32, 0},
                    b_.count,
                    b_.form,
                    gemm::kKeep};
    m_.linear(&call);
  }

  bool route(const Layer& layer) const {
    route_logits(layer.gate);
    GateCall gate = m_.gate;
    gate.logits = gate_, gate.bias = layer.gate_bias;
    gate.index = index_, gate.weight = weight_, gate.tokens = b_.count;
    if (m_.route(&gate)) return false;
    for (int64_t i = 0; i < b_.count * gate.top_k; ++i) {
      chosen_[i] = int32_t(index_[i]);
      ++layer.load[index_[i]];
    }
    return true;
  }

  // x += routed rows, in the gate's order, then the shared expert (or the dense MLP).
  void combine(const Layer& layer, int64_t t) const {
    float* x = x_ + t * m_.hidden;
    float* out = out_ + t * m_.hidden;
    if (layer.experts) {
      float* sum = normed_ + t * m_.hidden;
      std::memset(sum, 0, m_.hidden * 4);
      const int64_t K = m_.gate.top_k, bytes = m_.hidden * (m_.bf16_rows ? 2 : 4);
      for (int64_t k = t * K; k < (t + 1) * K; ++k)
        add_scaled(reinterpret_cast<const char*>(rows_) + k * bytes, m_.bf16_rows, weight_[k],
                   m_.hidden, sum);
      if (layer.dense) add(out, m_.hidden, sum);
      out = sum;
    }
    add(out, m_.hidden, x);
  }

  // The same, the routed experts' rows added up already, elsewhere.
  void finish(const Layer& layer, int64_t t, const float* routed) const {
    float* out = out_ + t * m_.hidden;
    if (layer.experts) {
      float* sum = normed_ + t * m_.hidden;
      std::memcpy(sum, routed + t * m_.hidden, m_.hidden * 4);
      if (layer.dense) add(out, m_.hidden, sum);
      out = sum;
    }
    add(out, m_.hidden, x_ + t * m_.hidden);
  }

  // The few form for both phases: few rows are asked for, and all positions give the same bits.
  void logits() const {
    if (b_.hidden) norm(x_, m_.norm, m_.hidden, m_.eps, b_.hidden);
    for (int64_t r = 0; r < b_.num_logit_rows; ++r)
      rms_norm(x_ + b_.logit_rows[r] * m_.hidden, m_.norm, m_.hidden, m_.eps,
               last_ + r * m_.hidden);
    if (b_.num_logit_rows)
      linear(m_.head, last_, m_.hidden, b_.num_logit_rows, b_.logits, m_.head.rows, gemm::kFew);
  }

  const Model& m_;
  const Batch& b_;
  float *x_, *normed_, *out_, *q_a_, *q_, *kv_, *q_full_, *o_latent_, *value_, *gate_, *weight_;
  float *rows_, *last_, *both_;
  int64_t* index_;
  int32_t *chosen_, *keys_;
};
}  // namespace
}  // namespace wf::model

WF_EXPORT int64_t wf_step(const wf::model::Model* model, const wf::model::Batch* batch) {
  return batch->count ? wf::model::Step(*model, *batch).run() : 0;
}

// Floats that `workspace` must have for a batch of so many tokens and rows of logits.
WF_EXPORT int64_t wf_step_workspace(const wf::model::Model* model, const wf::model::Batch* batch) {
  return wf::model::Step(*model, *batch).workspace();
}

WF_EXPORT int64_t wf_step_part(const wf::model::Model* model, const wf::model::Batch* batch,
                               wf::model::PartCall* call) {
  return batch->count ? wf::model::Step(*model, *batch).run(*call) : 0;
}
