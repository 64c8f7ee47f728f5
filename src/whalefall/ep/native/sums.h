// Sums of bf16 or fp32 rows in fp32, in a fixed order, each column held in a register over all
// terms.
#pragma once
#include "wire.h"

namespace wf_ep {

struct Combine {
  const uint8_t* x;  // rows to give back, hidden elements of bf16 or fp32
  int64_t x_stride, hidden, fp32;
  const float* row_weights;    // [rows, K] to be added up too (per rank), or null
  const int64_t* order;        // row of the j-th entry, in order of (source, token, lane); null: j
  const int32_t* order_token;  // [entries] its token
  const int64_t* order_start;  // [R + 1] first entry of each source
  int64_t* cursor;             // [R] next entry of each source
  int64_t top_k, tokens, block, base, experts_per_rank, per_selection, zero_copy;
  // the tokens of this rank
  const uint8_t* in_rank;          // [T, R]
  const int64_t* topk_idx;         // [T, K], per selection
  const float* topk_weights;       // [T, K], per selection; null: rows are not added but put out
  const uint16_t* bias[2];         // [T, hidden] bf16 or null
  void* out;                       // [T, hidden], bf16 or (out_fp32) fp32; or rows [T, K, hidden]
  int64_t out_fp32, big, threads;  // big: write around the caches
  float* out_weights;              // [T, K]
  // other hosts, in order; null where there is one host
  int64_t num_hosts, host;
  const int32_t* host_of;        // [R]
  const uint8_t* const* remote;  // [hosts] its message for this block
  int64_t shared_at;             // x begins there in this rank's shared memory; -1: it is private
};

inline int64_t elem(const Combine& c) { return c.fp32 ? 4 : 2; }

inline float widen(uint16_t b) {
  uint32_t u = static_cast<uint32_t>(b) << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}

inline uint16_t narrow(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  uint32_t rounded = (u + 0x7FFF + (u >> 16 & 1)) >> 16;
  return static_cast<uint16_t>((u & 0x7FFFFFFF) > 0x7F800000 ? (u >> 16 | 0x40) : rounded);
}

// Eight elements at a time; compilers lower these vectors to whatever the level has.
typedef float F8 __attribute__((vector_size(32)));
typedef uint32_t U8 __attribute__((vector_size(32)));
typedef int32_t I8 __attribute__((vector_size(32)));
typedef uint16_t H8 __attribute__((vector_size(16)));

inline F8 load8(const uint8_t* row, int64_t at, bool fp32) {
  F8 out;
  if (fp32) {
    memcpy(&out, row + 4 * at, 32);
    return out;
  }
  H8 half;
  memcpy(&half, row + 2 * at, 16);
  U8 wide = __builtin_convertvector(half, U8) << 16;
  memcpy(&out, &wide, 32);
  return out;
}

inline H8 narrow8(F8 f) {
  U8 u;
  memcpy(&u, &f, 32);
  U8 rounded = (u + 0x7FFF + (u >> 16 & 1)) >> 16;
  I8 nan = (I8)(u & 0x7FFFFFFF) > (I8)(U8{} + 0x7F800000);
  U8 chosen = ((u >> 16 | 0x40) & (U8)nan) | (rounded & (U8)~nan);
  return __builtin_convertvector(chosen, H8);
}

// Two vectors to 16 bf16 (or fp32) at column `at`; kStream writes around the caches.
template <bool kStream>
inline void store16(void* out, int64_t at, F8 low, F8 high, bool fp32) {
  if (fp32) {
    memcpy(static_cast<float*>(out) + at, &low, 32);
    memcpy(static_cast<float*>(out) + at + 8, &high, 32);
    return;
  }
  uint16_t* to = static_cast<uint16_t*>(out) + at;
#if defined(__AVX2__)
  auto rounded = [](F8 f) {
    __m256i u = _mm256_castps_si256((__m256)f);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    __m256i r = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7FFF)), odd);
    __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps((__m256)f, (__m256)f, _CMP_UNORD_Q));
    return _mm256_srli_epi32(_mm256_blendv_epi8(r, quiet, nan), 16);
  };
  __m256i packed = _mm256_packus_epi32(rounded(low), rounded(high));
  packed = _mm256_permute4x64_epi64(packed, 0xD8);
  if (kStream)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), packed);
  else
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), packed);
#else
  H8 halves[2] = {narrow8(low), narrow8(high)};
  memcpy(to, halves, 32);
#endif
}

// The rows of one token: pointers in the order in which they are added.
struct Terms {
  const uint8_t* row[256];
  float weight[256];
  int32_t host[256];
  int n = 0;
};

// Ask for columns [at, at + 64) of the rows of the token after this one: rows lie in different
// pages, across which the hardware looks ahead badly.
inline void look_ahead(const Terms* next, int64_t at, int64_t bytes_each) {
  if (!next) return;
  for (int j = 0; j < next->n; j++)
    for (int64_t line = 0; line < 64 * bytes_each; line += 64)
      __builtin_prefetch(next->row[j] + at * bytes_each + line);
}

// out[t] = bias + terms, columns [at, at + 8 * kWide), each held in a register over all terms.
template <int kWide, bool kWeighted, bool kFp32, bool kByHost, bool kStream>
inline void add_columns(const Combine& c, const Terms& terms, int64_t t, int64_t at) {
  F8 acc[kWide], part[kWide];
  int64_t base = t * c.hidden + at;
#pragma GCC unroll 8
  for (int v = 0; v < kWide; v++) acc[v] = part[v] = F8{} + 0.0f;
  for (const uint16_t* bias : c.bias) {
    if (!bias) continue;
#pragma GCC unroll 8
    for (int v = 0; v < kWide; v++)
      acc[v] += load8(reinterpret_cast<const uint8_t*>(bias), base + 8 * v, false);
  }
  for (int j = 0; j < terms.n; j++) {
    const uint8_t* row = terms.row[j];
    if (!kByHost) {
#pragma GCC unroll 8
      for (int v = 0; v < kWide; v++) {
        F8 value = load8(row, at + 8 * v, kFp32);
        acc[v] += kWeighted ? value * terms.weight[j] : value;
      }
      continue;
    }
    bool first = j == 0 || terms.host[j - 1] != terms.host[j];
    bool last = j + 1 == terms.n || terms.host[j + 1] != terms.host[j];
#pragma GCC unroll 8
    for (int v = 0; v < kWide; v++) {
      F8 value = load8(row, at + 8 * v, kFp32);
      part[v] = first ? value + 0.0f : part[v] + value;
      if (!last) continue;  // each host's sum is rounded as it would be on the wire
      H8 rounded = narrow8(part[v]);
      acc[v] += kFp32 ? part[v] : load8(reinterpret_cast<const uint8_t*>(&rounded), 0, false);
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < kWide; v += 2)
    store16<kStream>(c.out, base + 8 * v, acc[v], acc[v + 1], c.out_fp32);
}

#if defined(__AVX512F__) && defined(__AVX512BW__)
// The same for bf16 rows of one host to bf16, 16 elements at a time: columns [at, at + 64).
template <bool kWeighted, bool kStream>
inline void add_columns512(const Combine& c, const Terms& terms, int64_t t, int64_t at) {
  auto load = [](const void* from) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(from)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  };
  int64_t base = t * c.hidden + at;
  __m512 acc[4];
#pragma GCC unroll 4
  for (int v = 0; v < 4; v++) acc[v] = _mm512_setzero_ps();
  for (const uint16_t* bias : c.bias) {
    if (!bias) continue;
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++) acc[v] = _mm512_add_ps(acc[v], load(bias + base + 16 * v));
  }
  for (int j = 0; j < terms.n; j++) {
    auto* row = reinterpret_cast<const uint16_t*>(terms.row[j]) + at;
    __m512 weight = _mm512_set1_ps(terms.weight[j]);
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++) {
      __m512 value = load(row + 16 * v);
      acc[v] = _mm512_add_ps(acc[v], kWeighted ? _mm512_mul_ps(value, weight) : value);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < 4; v++) {
    __m512i u = _mm512_castps_si512(acc[v]);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i r = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7FFF)), odd);
    __mmask16 nan = _mm512_cmp_ps_mask(acc[v], acc[v], _CMP_UNORD_Q);
    r = _mm512_mask_or_epi32(r, nan, u, _mm512_set1_epi32(0x400000));
    __m256i half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16));
    auto* to = reinterpret_cast<__m256i*>(static_cast<uint16_t*>(c.out) + base + 16 * v);
    kStream ? _mm256_stream_si256(to, half) : _mm256_storeu_si256(to, half);
  }
}
#endif

// The same for the last columns, which fill no vector.
inline void add_rest(const Combine& c, const Terms& terms, int64_t t, int64_t at, bool by_host) {
  auto value = [](const uint8_t* row, int64_t i, bool fp32) {
    float f;
    memcpy(&f, row + 4 * i, fp32 ? 4 : 0);
    return fp32 ? f : widen(reinterpret_cast<const uint16_t*>(row)[i]);
  };
  for (int64_t i = at; i < c.hidden; i++) {
    float acc = 0, part = 0;
    for (const uint16_t* bias : c.bias)
      if (bias) acc += widen(bias[t * c.hidden + i]);
    for (int j = 0; j < terms.n; j++) {
      float row = value(terms.row[j], i, c.fp32);
      if (!by_host) {
        acc += c.per_selection ? terms.weight[j] * row : row;
        continue;
      }
      part += row;
      if (j + 1 < terms.n && terms.host[j + 1] == terms.host[j]) continue;
      acc += c.fp32 ? part : widen(narrow(part));
      part = 0;
    }
    if (c.out_fp32)
      static_cast<float*>(c.out)[t * c.hidden + i] = acc;
    else
      static_cast<uint16_t*>(c.out)[t * c.hidden + i] = narrow(acc);
  }
}

template <bool kWeighted, bool kFp32, bool kByHost>
inline void add_row(const Combine& c, const Terms& terms, int64_t t, const Terms* next) {
  int64_t at = 0;
#if defined(__AVX512F__) && defined(__AVX512BW__)
  if (!kFp32 && !kByHost && !c.out_fp32) {
    bool past = c.big && reinterpret_cast<uintptr_t>(c.out) % 32 == 0 && c.hidden % 16 == 0;
    for (; at + 64 <= c.hidden; at += 64) {
      look_ahead(next, at, 2);
      past ? add_columns512<kWeighted, true>(c, terms, t, at)
           : add_columns512<kWeighted, false>(c, terms, t, at);
    }
  }
#endif
  bool aligned = reinterpret_cast<uintptr_t>(c.out) % 32 == 0 && c.hidden % 16 == 0;
  if (c.big && aligned && !c.out_fp32)
    for (; at + 64 <= c.hidden; at += 64) {
      look_ahead(next, at, kFp32 ? 4 : 2);
      add_columns<8, kWeighted, kFp32, kByHost, true>(c, terms, t, at);
    }
  for (; at + 64 <= c.hidden; at += 64) {
    look_ahead(next, at, kFp32 ? 4 : 2);
    add_columns<8, kWeighted, kFp32, kByHost, false>(c, terms, t, at);
  }
  for (; at + 16 <= c.hidden; at += 16)
    add_columns<2, kWeighted, kFp32, kByHost, false>(c, terms, t, at);
  if (at < c.hidden) add_rest(c, terms, t, at, kByHost);
}

inline void add_terms(const Combine& c, const Terms& terms, int64_t t,
                      const Terms* next = nullptr) {
  if (c.per_selection)
    c.fp32 ? add_row<true, true, false>(c, terms, t, next)
           : add_row<true, false, false>(c, terms, t, next);
  else if (terms.n == 1 && !c.bias[0] && !c.bias[1] && c.fp32 == c.out_fp32)
    copy_row(static_cast<uint8_t*>(c.out) + t * c.hidden * elem(c), terms.row[0],
             c.hidden * elem(c), c.big);
  else if (c.num_hosts > 1)
    c.fp32 ? add_row<false, true, true>(c, terms, t, next)
           : add_row<false, false, true>(c, terms, t, next);
  else
    c.fp32 ? add_row<false, true, false>(c, terms, t, next)
           : add_row<false, false, false>(c, terms, t, next);
}

}  // namespace wf_ep
