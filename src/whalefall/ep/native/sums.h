// Sums of bf16 or fp32 rows in fp32, in a fixed order, a cache line of the result at a time, held
// in registers over all terms. Bound: memory. So each row of a token has a load instruction of its
// own (the number of terms is a template parameter), which the hardware's prefetcher follows: with
// one loop over the terms it loses the streams, and the sum of two rows takes three times as long.
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
  int64_t most;                  // tokens of a rank
  int64_t serial, call;          // of the dispatch; how many collectives this rank called before
  int64_t log_format;            // bf16 rows travel as LogFMT-10 (per selection)
  int64_t keep_own;              // this rank's own rows are staged too: x may change meanwhile
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

// As wide as the level's registers. GCC 12 lowers conversions between 16 and 32 bits badly, so they
// are intrinsics where the level has them.
#if defined(__AVX512F__) && defined(__AVX512BW__)
#define WF_EP_512 1
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif
constexpr int kColumns = 32;  // of a step: a cache line of bf16
constexpr int kWide = kColumns / kLanes;
typedef float FV __attribute__((vector_size(4 * kLanes)));
typedef uint32_t UV __attribute__((vector_size(4 * kLanes)));
typedef int32_t IV __attribute__((vector_size(4 * kLanes)));
typedef uint16_t HV __attribute__((vector_size(2 * kLanes)));

inline FV load(const uint8_t* row, int64_t at, bool fp32) {
  FV out;
  if (fp32) {
    memcpy(&out, row + 4 * at, sizeof out);
    return out;
  }
  const uint8_t* from = row + 2 * at;
#if defined(WF_EP_512)
  auto half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return (FV)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
#elif defined(__AVX2__)
  auto half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return (FV)_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16);
#else
  HV half;
  memcpy(&half, from, sizeof half);
  return (FV)(__builtin_convertvector(half, UV) << 16);
#endif
}

// Each to the nearest bf16, which stands in the upper halves.
inline UV rounded(FV f) {
  UV u = (UV)f, near = u + 0x7FFF + (u >> 16 & 1);
#if defined(WF_EP_512)
  __mmask16 nan = _mm512_cmp_ps_mask((__m512)f, (__m512)f, _CMP_UNORD_Q);
  return (UV)_mm512_mask_or_epi32((__m512i)near, nan, (__m512i)u, _mm512_set1_epi32(0x400000));
#else
  UV nan = (UV)((IV)(u & 0x7FFFFFFF) > (IV)(UV{} + 0x7F800000));
  return ((u | 0x400000) & nan) | (near & ~nan);
#endif
}

// The upper halves of two vectors, beside each other.
inline UV pack(UV low, UV high) {
#if defined(WF_EP_512)
  alignas(64) static constexpr uint16_t kOdd[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                                    23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43,
                                                    45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  return (UV)_mm512_permutex2var_epi16((__m512i)low, _mm512_load_si512(kOdd), (__m512i)high);
#elif defined(__AVX2__)
  auto packed = _mm256_packus_epi32((__m256i)(low >> 16), (__m256i)(high >> 16));
  return (UV)_mm256_permute4x64_epi64(packed, 0xD8);
#else
  HV halves[2] = {__builtin_convertvector(low >> 16, HV), __builtin_convertvector(high >> 16, HV)};
  UV out;
  memcpy(&out, halves, sizeof out);
  return out;
#endif
}

// `past`: around the caches, to an aligned place.
inline void put_vector(uint8_t* to, UV value, bool past) {
#if defined(WF_EP_512)
  if (past) return _mm512_stream_si512(reinterpret_cast<__m512i*>(to), (__m512i)value);
#elif defined(__AVX2__)
  if (past) return _mm256_stream_si256(reinterpret_cast<__m256i*>(to), (__m256i)value);
#else
  (void)past;
#endif
  memcpy(to, &value, sizeof value);
}

// The rows of one token: pointers in the order in which they are added.
struct Terms {
  const uint8_t* row[256];
  const float* row_weights[256];  // [K] of the row, where they are added up too
  float weight[256];
  int32_t host[256];
  int n = 0;
};

// Where a token's sum begins and goes; in locals, which no store can change, so that a step is
// short and many cache lines are on their way at a time.
struct Target {
  const uint8_t* bias[2];
  uint8_t* out;
  bool fp32, past;  // past: around the caches
};

inline Target target_of(const Combine& c, int64_t t, bool past) {
  auto bias = [&](int i) {
    return c.bias[i] ? reinterpret_cast<const uint8_t*>(c.bias[i] + t * c.hidden) : nullptr;
  };
  bool fp32 = c.out_fp32 != 0;
  auto* out = static_cast<uint8_t*>(c.out) + t * c.hidden * (fp32 ? 4 : 2);
  return {{bias(0), bias(1)}, out, fp32, past};
}

inline void start(const Target& to, int64_t at, FV* acc) {
#pragma GCC unroll 4
  for (int v = 0; v < kWide; v++) acc[v] = FV{} + 0.0f;
  for (const uint8_t* bias : to.bias) {
    if (!bias) continue;
#pragma GCC unroll 4
    for (int v = 0; v < kWide; v++) acc[v] += load(bias, at + kLanes * v, false);
  }
}

inline void store(const Target& to, int64_t at, const FV* acc) {
  uint8_t* out = to.out + at * (to.fp32 ? 4 : 2);
#pragma GCC unroll 4
  for (int v = 0; v < kWide; v += 2) {
    if (to.fp32) {
      put_vector(out + 4 * kLanes * v, (UV)acc[v], to.past);
      put_vector(out + 4 * kLanes * (v + 1), (UV)acc[v + 1], to.past);
    } else {
      put_vector(out + 2 * kLanes * v, pack(rounded(acc[v]), rounded(acc[v + 1])), to.past);
    }
  }
}

// out[t] = bias + kTerms terms (0: any number); returns the columns done. What lies kAhead further
// on is asked for, mostly the row's next page, across which the hardware does not look, or the next
// token's row; each line is needed once, so it need not push others out of the caches.
template <int kTerms, bool kWeighted, bool kFp32>
inline int64_t add_row(const Combine& c, const Terms& terms, int64_t t, bool past) {
  constexpr int kRows = kTerms ? kTerms : 256, kElem = kFp32 ? 4 : 2, kAhead = 4096;
  int n = kTerms ? kTerms : terms.n;
  const uint8_t* row[kRows];
  float weight[kRows];
  for (int j = 0; j < n; j++) {
    row[j] = terms.row[j];
    weight[j] = terms.weight[j];
  }
  const Target to = target_of(c, t, past);
  int64_t at = 0, end = c.hidden / kColumns * kColumns;
  for (; at < end; at += kColumns) {
    FV acc[kWide];
    start(to, at, acc);
#pragma GCC unroll 8
    for (int j = 0; j < n; j++) {
      for (int line = 0; line < kColumns * kElem; line += 64)
        __builtin_prefetch(row[j] + at * kElem + line + kAhead, 0, 0);
#pragma GCC unroll 4
      for (int v = 0; v < kWide; v++) {
        FV value = load(row[j], at + kLanes * v, kFp32);
        acc[v] += kWeighted ? value * weight[j] : value;
      }
    }
    store(to, at, acc);
  }
  return at;
}

// The same where ranks are on several hosts: each host's sum is rounded as it is on the wire.
template <bool kFp32>
inline int64_t add_row_by_host(const Combine& c, const Terms& terms, int64_t t, bool past) {
  const Target to = target_of(c, t, past);
  int64_t at = 0;
  for (; at + kColumns <= c.hidden; at += kColumns) {
    FV acc[kWide], part[kWide];
    start(to, at, acc);
    for (int j = 0; j < terms.n; j++) {
      bool first = j == 0 || terms.host[j - 1] != terms.host[j];
      bool last = j + 1 == terms.n || terms.host[j + 1] != terms.host[j];
      for (int v = 0; v < kWide; v++) {
        FV value = load(terms.row[j], at + kLanes * v, kFp32);
        part[v] = first ? value + 0.0f : part[v] + value;
        if (!last) continue;
        acc[v] += kFp32 ? part[v] : (FV)(rounded(part[v]) & 0xFFFF0000);
      }
    }
    store(to, at, acc);
  }
  return at;
}

// The same for the last columns, which fill no step.
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

template <bool kWeighted, bool kFp32>
inline int64_t add_any(const Combine& c, const Terms& terms, int64_t t, bool past) {
  switch (terms.n) {
    case 1:
      return add_row<1, kWeighted, kFp32>(c, terms, t, past);
    case 2:
      return add_row<2, kWeighted, kFp32>(c, terms, t, past);
    case 3:
      return add_row<3, kWeighted, kFp32>(c, terms, t, past);
    case 4:
      return add_row<4, kWeighted, kFp32>(c, terms, t, past);
    case 5:
      return add_row<5, kWeighted, kFp32>(c, terms, t, past);
    case 6:
      return add_row<6, kWeighted, kFp32>(c, terms, t, past);
    case 7:
      return add_row<7, kWeighted, kFp32>(c, terms, t, past);
    case 8:
      return add_row<8, kWeighted, kFp32>(c, terms, t, past);
    default:
      return add_row<0, kWeighted, kFp32>(c, terms, t, past);
  }
}

// Add up the rows of token t.
inline void add_terms(const Combine& c, const Terms& terms, int64_t t) {
  int64_t out_bytes = c.hidden * (c.out_fp32 ? 4 : 2);
  if (!c.per_selection && terms.n == 1 && !c.bias[0] && !c.bias[1] && c.fp32 == c.out_fp32)
    return copy_row(static_cast<uint8_t*>(c.out) + t * out_bytes, terms.row[0], out_bytes, c.big);
  bool past = c.big && reinterpret_cast<uintptr_t>(c.out) % 64 == 0 && out_bytes % 64 == 0;
  bool by_host = !c.per_selection && c.num_hosts > 1;
  int64_t done;
  if (by_host)
    done = c.fp32 ? add_row_by_host<true>(c, terms, t, past)
                  : add_row_by_host<false>(c, terms, t, past);
  else if (c.per_selection)
    done =
        c.fp32 ? add_any<true, true>(c, terms, t, past) : add_any<true, false>(c, terms, t, past);
  else
    done =
        c.fp32 ? add_any<false, true>(c, terms, t, past) : add_any<false, false>(c, terms, t, past);
  if (done < c.hidden) add_rest(c, terms, t, done, by_host);
}

}  // namespace wf_ep
