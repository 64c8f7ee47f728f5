// Group-limited top-k gating, one row of logits a token (definition: reference.py).
// score = sigmoid or softmax; choice = score + bias; keep the best groups; take the top k of choice
// in them, ties to the lowest index; weight = score / sum (where asked) * scale.
// exp is computed in double and rounded once to float, so scores are right to the last bit of float
// but for about one in 2^28, on every machine; nothing depends on the number of threads.
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <limits>
#include <vector>

#include "whalefall/pool.h"

namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();

struct Gate {
  const float* logits;  // [T, E]
  const float* bias;    // [E] or null
  int64_t* index;       // [T, K]
  float* weight;        // [T, K]
  int64_t tokens, experts, top_k, groups, top_groups;
  int softmax, normalize;
  float scale;
};

// out = exp(x), |x| <= 708, error < 1 ulp of double: 2^n * P(r), r = x - n ln 2, |r| <= ln 2 / 2
inline double exp_double(double x) {
  constexpr double kMagic = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer
  double shifted = x * 1.4426950408889634 + kMagic;
  double n = shifted - kMagic;
  double r = x - n * 0.693147180369123816490 - n * 1.90821492927058770002e-10;
  double p = 1.0 / 6227020800;
  constexpr double kFactorials[] = {1.0 / 479001600,
                                    1.0 / 39916800,
                                    1.0 / 3628800,
                                    1.0 / 362880,
                                    1.0 / 40320,
                                    1.0 / 5040,
                                    1.0 / 720,
                                    1.0 / 120,
                                    1.0 / 24,
                                    1.0 / 6,
                                    0.5,
                                    1.0,
                                    1.0};
  for (double c : kFactorials) p = p * r + c;
  uint64_t bits;
  memcpy(&bits, &shifted, 8);
  bits = (bits + 1023) << 52;  // the low bits of `shifted` hold n
  double power;
  memcpy(&power, &bits, 8);
  return p * power;
}

inline double clamp(double x, double low, double high) {
  return x < low ? low : x > high ? high : x;
}

void sigmoid(const float* x, int64_t n, float* out) {
  // Beyond +-100 the result is 0 or 1 in float anyway (denormals below e^-100 are rounded off).
  for (int64_t i = 0; i < n; i++)
    out[i] =
        static_cast<float>(1.0 / (1.0 + exp_double(clamp(-static_cast<double>(x[i]), -200, 200))));
}

void softmax(const float* x, int64_t n, double* scratch, float* out) {
  double top = x[0], sum = 0;
  for (int64_t i = 1; i < n; i++) top = x[i] > top ? x[i] : top;
  for (int64_t i = 0; i < n; i++) scratch[i] = exp_double(clamp(x[i] - top, -700, 0));
  for (int64_t i = 0; i < n; i++) sum += scratch[i];
  for (int64_t i = 0; i < n; i++) out[i] = static_cast<float>(scratch[i] / sum);
}

// The score of a group: its best choice, or the sum of its two best.
float group_score(const float* choice, int64_t n, int two) {
  float first = kNone, second = kNone;
  for (int64_t i = 0; i < n; i++) {
    float c = choice[i];
    if (c > first) {
      second = first;
      first = c;
    } else if (c > second) {
      second = c;
    }
  }
  return two ? first + (n > 1 ? second : 0.0f) : first;
}

// The `k` greatest of value[0..n), where enabled, ties to the lowest index, into best (sorted).
void insert_best(const float* value, int64_t begin, int64_t end, int64_t k, int64_t* best,
                 int64_t* found) {
  for (int64_t i = begin; i < end; i++) {
    if (*found == k && !(value[i] > value[best[k - 1]])) continue;
    int64_t at = *found < k ? (*found)++ : k - 1;
    for (; at > 0 && value[i] > value[best[at - 1]]; at--) best[at] = best[at - 1];
    best[at] = i;
  }
}

// False if a score is NaN.
bool route_token(const Gate& g, int64_t t, float* score, float* choice, double* scratch) {
  const float* x = g.logits + t * g.experts;
  if (g.softmax)
    softmax(x, g.experts, scratch, score);
  else
    sigmoid(x, g.experts, score);
  bool nan = false;
  for (int64_t e = 0; e < g.experts; e++) {
    choice[e] = g.bias ? score[e] + g.bias[e] : score[e];
    nan |= choice[e] != choice[e] || x[e] != x[e];
  }
  if (nan) return false;
  int64_t* best = g.index + t * g.top_k;
  int64_t found = 0, size = g.experts / g.groups;
  if (g.groups == 1) {
    insert_best(choice, 0, g.experts, g.top_k, best, &found);
  } else {
    float* groups = choice + g.experts;
    int64_t kept[256], count = 0;
    for (int64_t j = 0; j < g.groups; j++)
      groups[j] = group_score(choice + j * size, size, !g.softmax);
    insert_best(groups, 0, g.groups, g.top_groups, kept, &count);
    uint64_t mask[4] = {0, 0, 0, 0};
    for (int64_t j = 0; j < count; j++) mask[kept[j] >> 6] |= 1ull << (kept[j] & 63);
    for (int64_t j = 0; j < g.groups; j++)  // in index order, for the ties
      if (mask[j >> 6] >> (j & 63) & 1)
        insert_best(choice, j * size, (j + 1) * size, g.top_k, best, &found);
  }
  float* weight = g.weight + t * g.top_k;
  float sum = 0;
  for (int64_t k = 0; k < g.top_k; k++) sum += weight[k] = score[best[k]];
  for (int64_t k = 0; k < g.top_k; k++) {
    if (g.normalize) weight[k] = sum > 0 ? weight[k] / sum : 0.0f;
    weight[k] *= g.scale;
  }
  return true;
}

}  // namespace

// 0, or -1 - t where token t has a NaN.
WF_EXPORT int64_t wf_route(const Gate* gate) {
  const Gate& g = *gate;
  constexpr int64_t kBlock = 32;
  int64_t blocks = (g.tokens + kBlock - 1) / kBlock;
  std::vector<int64_t> bad(blocks, 0);
  wf::parallel_for(blocks, [&](int64_t block, int) {
    std::vector<float> score(g.experts), choice(g.experts + g.groups);
    std::vector<double> scratch(g.softmax ? g.experts : 0);
    int64_t end = (block + 1) * kBlock < g.tokens ? (block + 1) * kBlock : g.tokens;
    for (int64_t t = block * kBlock; t < end; t++)
      if (!route_token(g, t, score.data(), choice.data(), scratch.data()) && !bad[block])
        bad[block] = -1 - t;
  });
  for (int64_t status : bad)
    if (status) return status;
  return 0;
}
