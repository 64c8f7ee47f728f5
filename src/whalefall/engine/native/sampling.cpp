// One token out of one row of logits, many rows at once (definition: sampling.py, `sample_row`).
//
//   x = logits with penalties, bias and bans;  p = exp((x - max x) / temperature)
//   drop p < min_p; keep the top_k greatest; keep the fewest whose sum reaches top_p of what is
//   left token = the first one, in order of ids, at which the running sum exceeds uniform * sum
//
// Sums are in double and in order of ids, so nothing depends on other rows or on threads.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "whalefall/pool.h"
#include "whalefall/simd.h"

namespace {
struct Row {
  const float* logits;  // [vocab]
  int64_t vocab;
  const int32_t* seen;    // tokens of the prompt and the answer, each once
  const int32_t* counts;  // how often the answer has each; 0: only the prompt has it
  int64_t num_seen;
  const int32_t* biased;
  const float* bias;
  int64_t num_biased;
  const int32_t* banned;
  int64_t num_banned;
  const uint8_t*
      allowed;  // [ceil(vocab / 8)], a bit a token, lowest first; null: all may be chosen
  double temperature, top_p, min_p, uniform;
  float repetition, frequency, presence;
  int32_t top_k;
  int32_t num_top;  // likeliest tokens to report; -1: not even the chosen one's logprob
  int32_t token;    // from here on: results
  float logprob;
  int32_t rank;  // 1: the likeliest
  int32_t* top_tokens;
  float* top_logprobs;
};

struct Candidate {
  double p;
  int32_t token;
};
inline bool likelier(const Candidate& a, const Candidate& b) {
  return a.p > b.p || (a.p == b.p && a.token < b.token);
}

// exp(x) for x <= 0, within 1 ulp of double; 0 below -700. Plain arithmetic: the compiler
// vectorises the loop around it.
inline double exp_of_negative(double x) {
  constexpr double kMagic = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer
  double y = x < -700.0 ? -700.0 : x;
  double shifted = y * 1.4426950408889634 + kMagic;
  double n = shifted - kMagic;
  double r = y - n * 0.693147180369123816490 - n * 1.90821492927058770002e-10;
  double e = 1.0 / 6227020800;
  e = e * r + 1.0 / 479001600;
  e = e * r + 1.0 / 39916800;
  e = e * r + 1.0 / 3628800;
  e = e * r + 1.0 / 362880;
  e = e * r + 1.0 / 40320;
  e = e * r + 1.0 / 5040;
  e = e * r + 1.0 / 720;
  e = e * r + 1.0 / 120;
  e = e * r + 1.0 / 24;
  e = e * r + 1.0 / 6;
  e = e * r + 0.5;
  e = e * r + 1.0;
  e = e * r + 1.0;
  uint64_t bits;
  std::memcpy(&bits, &shifted, 8);
  bits = (bits + 1023) << 52;  // the low bits of `shifted` hold n
  double power;
  std::memcpy(&power, &bits, 8);
  return x < -700.0 ? 0.0 : e * power;
}

// The first of the greatest; NaN is never greater.
int32_t argmax(const float* x, int64_t n) {
  using wf::kLanes;
  constexpr int kChains = 4, kStep = kChains * kLanes;
  if (x[0] != x[0]) return 0;
  wf::vf most[kChains];
  for (wf::vf& each : most) each = wf::set1(x[0]);
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep)
    for (int j = 0; j < kChains; ++j) {
      const wf::vf v = wf::load(x + i + j * kLanes);
      most[j] = wf::select(v > most[j], v, most[j]);
    }
  float best = x[0];
  for (const wf::vf& each : most)
    for (int lane = 0; lane < kLanes; ++lane) best = each[lane] > best ? each[lane] : best;
  for (; i < n; ++i) best = x[i] > best ? x[i] : best;
  for (i = 0; !(x[i] == best); ++i) continue;
  return int32_t(i);
}

// p[i] = exp((x[i] - top) / temperature)
void exponentials(const float* x, int64_t n, double top, double inverse, double* p) {
  for (int64_t i = 0; i < n; ++i) p[i] = exp_of_negative((double(x[i]) - top) * inverse);
}

// The log-probability of every token is x[i] - this.
double log_sum_exp(const float* x, int64_t n, double* scratch) {
  double top = x[argmax(x, n)], sum = 0;
  exponentials(x, n, top, 1.0, scratch);
  for (int64_t i = 0; i < n; ++i) sum += scratch[i];
  return top + std::log(sum);
}

void adjust(const Row& row, float* x) {
  for (int64_t i = 0; i < row.num_seen; ++i) {
    float& logit = x[row.seen[i]];
    logit = logit > 0 ? logit / row.repetition : logit * row.repetition;
    int32_t count = row.counts[i];
    if (count > 0) logit -= row.frequency * float(count) + row.presence;
  }
  for (int64_t i = 0; i < row.num_biased; ++i) x[row.biased[i]] += row.bias[i];
  for (int64_t i = 0; i < row.num_banned; ++i) x[row.banned[i]] = -INFINITY;
  if (row.allowed)
    for (int64_t i = 0; i < row.vocab; ++i)
      if (!(row.allowed[i >> 3] >> (i & 7) & 1)) x[i] = -INFINITY;
}

// Leave in `kept` the fewest likeliest candidates whose sum reaches `share` of all.
void keep_share(std::vector<Candidate>& kept, double share) {
  double total = 0;
  for (const Candidate& c : kept) total += c.p;
  size_t sorted = 0, want = 64;
  double sum = 0;
  for (;;) {
    want = std::min(want, kept.size());
    std::partial_sort(kept.begin() + sorted, kept.begin() + want, kept.end(), likelier);
    for (; sorted < want; ++sorted) {
      sum += kept[sorted].p;
      if (sum >= share * total) {
        kept.resize(sorted + 1);
        return;
      }
    }
    if (want == kept.size()) return;
    want *= 8;
  }
}

int32_t draw(const Row& row, const float* x, std::vector<double>& p) {
  double top = x[argmax(x, row.vocab)];
  exponentials(x, row.vocab, top, 1.0 / row.temperature, p.data());
  std::vector<Candidate> kept;
  kept.reserve(row.vocab);
  for (int64_t i = 0; i < row.vocab; ++i)
    if (p[i] > 0 && p[i] >= row.min_p) kept.push_back({p[i], int32_t(i)});
  if (row.top_k > 0 && size_t(row.top_k) < kept.size()) {
    std::nth_element(kept.begin(), kept.begin() + row.top_k, kept.end(), likelier);
    kept.resize(row.top_k);
  }
  auto by_token = [](const Candidate& a, const Candidate& b) { return a.token < b.token; };
  if (row.top_p < 1) {
    std::sort(kept.begin(), kept.end(), by_token);
    keep_share(kept, row.top_p);
  }
  std::sort(kept.begin(), kept.end(), by_token);
  double total = 0, sum = 0;
  for (const Candidate& c : kept) total += c.p;
  for (const Candidate& c : kept) {
    sum += c.p;
    if (sum > row.uniform * total) return c.token;
  }
  return kept.back().token;
}

void report(Row& row, std::vector<double>& scratch) {
  const float* x = row.logits;
  double norm = log_sum_exp(x, row.vocab, scratch.data());
  row.logprob = float(x[row.token] - norm);
  row.rank = 1;
  for (int64_t i = 0; i < row.vocab; ++i)
    row.rank += x[i] > x[row.token] || (x[i] == x[row.token] && i < row.token);
  std::vector<Candidate> best(row.vocab);
  if (row.num_top == 0) return;
  for (int64_t i = 0; i < row.vocab; ++i) best[i] = {double(x[i]), int32_t(i)};
  std::partial_sort(best.begin(), best.begin() + row.num_top, best.end(), likelier);
  for (int32_t i = 0; i < row.num_top; ++i) {
    row.top_tokens[i] = best[i].token;
    row.top_logprobs[i] = float(best[i].p - norm);
  }
}

void sample(Row& row) {
  std::vector<float> changed;
  const float* x = row.logits;
  if (row.num_seen || row.num_biased || row.num_banned || row.allowed) {
    changed.assign(x, x + row.vocab);
    adjust(row, changed.data());
    x = changed.data();
  }
  std::vector<double> scratch(row.temperature > 0 || row.num_top >= 0 ? row.vocab : 0);
  row.token = row.temperature > 0 ? draw(row, x, scratch) : argmax(x, row.vocab);
  if (row.num_top >= 0) report(row, scratch);
}
}  // namespace

WF_EXPORT void wf_sample(Row* rows, int64_t count) {
  wf::parallel_for(count, [&](int64_t i, int) { sample(rows[i]); });
}
