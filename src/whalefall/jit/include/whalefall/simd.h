// Vectors of floats at the level the unit is compiled for (WF_ISA: 0 any, 1 avx2, 2 avx512,
// 3 avx512bf16, 4 amx): GCC/Clang vector types, so + - * / & | << < work as on scalars.
//
// A kernel written over this header is one source for all levels. NaN stays NaN everywhere but in
// the fast e4m3 decoders, which read the NaN codes as 480: see `Fp8NanFlag`.
#pragma once
#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__x86_64__)
#pragma GCC diagnostic push  // g++ 12 warns inside its own AVX-512 header
#pragma GCC diagnostic ignored "-Wuninitialized"
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif
#ifndef WF_ISA
#define WF_ISA 0
#endif

namespace wf {
constexpr int kLanes = WF_ISA >= 2 ? 16 : WF_ISA == 1 ? 8 : 4;  // floats in a vector
typedef float vf __attribute__((vector_size(kLanes * 4)));
typedef int32_t vi __attribute__((vector_size(kLanes * 4)));
typedef uint32_t vu __attribute__((vector_size(kLanes * 4)));
typedef float vf_any_alignment __attribute__((vector_size(kLanes * 4), aligned(1), may_alias));
typedef int16_t short_vector __attribute__((vector_size(kLanes * 4)));
typedef uint16_t half_vector __attribute__((vector_size(kLanes * 2)));  // kLanes 16-bit values

inline vf load_bytes(const void* p) { return *static_cast<const vf_any_alignment*>(p); }
inline vf load(const float* p) { return *reinterpret_cast<const vf_any_alignment*>(p); }
inline void store(float* p, vf v) { *reinterpret_cast<vf_any_alignment*>(p) = v; }
inline vf set1(float x) { return vf{} + x; }  // x + 0: -0 becomes +0
inline vf broadcast(const float* p) {
#if WF_ISA >= 2
  return (vf)_mm512_set1_ps(*p);
#elif WF_ISA == 1
  return (vf)_mm256_broadcast_ss(p);
#else
  return vf{*p, *p, *p, *p};
#endif
}
inline vf select(vi mask, vf yes, vf no) { return mask ? yes : no; }
inline vf max(vf a, vf b) { return select(a < b, b, a); }  // a NaN in `a` stays
inline vf min(vf a, vf b) { return select(a > b, b, a); }

// a * b + c: one rounding where the level has FMA, two at `any`.
inline vf fma(vf a, vf b, vf c) {
#if WF_ISA >= 2
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif WF_ISA == 1
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// The sum of all lanes, always in the same order: halves added until one is left.
inline float sum(vf v) {
#if WF_ISA >= 2
  __m256 h = _mm256_add_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
#elif WF_ISA == 1
  __m256 h = (__m256)v;
#endif
#if WF_ISA >= 1
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_shuffle_ps(q, q, 1)));
#else
  return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}

constexpr auto kEachLane = std::make_integer_sequence<int, kLanes>{};
// The lane that `fold` takes: blocks of B lanes; x's sums go to a block's lower half, y's to the
// upper half; `Upper` picks the second term of a sum.
template <int B, int Upper>
constexpr int fold_lane(int lane) {
  int block = lane / B * B, i = lane % B, from_y = i >= B / 2;
  return from_y * kLanes + block + i % (B / 2) + Upper * (B / 2);
}
template <int B, int... L>
inline vf fold(vf x, vf y, std::integer_sequence<int, L...>) {
  return __builtin_shufflevector(x, y, fold_lane<B, 0>(L)...) +
         __builtin_shufflevector(x, y, fold_lane<B, 1>(L)...);
}
// Transposing sum: lane i of the result is the sum of the lanes of v[i].
#if WF_ISA >= 2
// Lane i of the result, of 128 bits, is the sum of the lanes of v[i].
inline vf sum_lanes(const vf* v) {
  auto fold = [](__m512 x, __m512 y) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xDD));
  };
  return (vf)fold(fold((__m512)v[0], (__m512)v[1]), fold((__m512)v[2], (__m512)v[3]));
}
// Within 128-bit lanes first, where shuffles are cheapest: 12 of the 15 folds.
inline vf sums(const vf* v) {
  vf quarter[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    __m512 pair[2];
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      __m512 x = (__m512)v[4 * i + 2 * j], y = (__m512)v[4 * i + 2 * j + 1];
      pair[j] = _mm512_add_ps(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y));
    }
    quarter[i] = (vf)_mm512_add_ps(_mm512_shuffle_ps(pair[0], pair[1], 0x44),
                                   _mm512_shuffle_ps(pair[0], pair[1], 0xEE));
  }
  return sum_lanes(quarter);
}
#else
template <int B = kLanes>
inline vf sums(const vf* v) {
  if constexpr (B == 1) {
    return v[0];
  } else {
    vf half[B / 2];
#pragma GCC unroll 16
    for (int i = 0; i < B / 2; ++i) half[i] = fold<B>(v[i], v[i + B / 2], kEachLane);
    return sums<B / 2>(half);
  }
}
#endif

inline void prefetch_l1(const void* p) { __builtin_prefetch(p, 0, 3); }
inline void prefetch_l2(const void* p) { __builtin_prefetch(p, 0, 2); }
inline void prefetch_once(const void* p) { __builtin_prefetch(p, 0, 0); }  // into L1, not to stay

// ---- bfloat16: the upper half of a float
inline float bf16_to_float(uint16_t b) {
  uint32_t u = uint32_t(b) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline uint16_t float_to_bf16(float f) {  // to nearest even; NaN stays (a quiet) NaN
  uint32_t u;
  std::memcpy(&u, &f, 4);
  if ((u & 0x7fffffff) > 0x7f800000) return uint16_t((u >> 16) | 0x40);
  return uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
inline vf load_bf16(const void* p) {
#if WF_ISA >= 2
  __m512i w = _mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
  return (vf)_mm512_slli_epi32(w, 16);
#elif WF_ISA == 1
  __m256i w = _mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)));
  return (vf)_mm256_slli_epi32(w, 16);
#else
  half_vector h;
  std::memcpy(&h, p, sizeof h);
  return (vf)(__builtin_convertvector(h, vu) << 16);
#endif
}
inline void store_bf16(uint16_t* p, vf v) {
  vu u = (vu)v;
  vu rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  vu quiet = (u >> 16) | 0x40;
  half_vector h = __builtin_convertvector((v != v) ? quiet : rounded, half_vector);
  std::memcpy(p, &h, sizeof h);
}
inline vf round_to_bf16(vf v) {
  vu u = (vu)v;
  vu rounded = (u + 0x7fff + ((u >> 16) & 1)) & 0xffff0000u;
  return (v != v) ? v : (vf)rounded;
}

// ---- e4m3 (float8_e4m3fn)
// Two decoders. `fp8_decode` keeps the order of the codes, for packing. `fp8_decode_words` is the
// cheapest there is, 9 operations for 4 * kLanes codes, in an order of its own, for streaming.
constexpr float kFp8Scale = WF_ISA >= 1 ? 256.0f : 1.0f;  // `fp8_decode` yields value / kFp8Scale

struct Fp8Table {  // the value of all 256 codes, NaN included
  float value[256];
  Fp8Table() {
    for (int code = 0; code < 256; ++code) {
      int exponent = (code >> 3) & 15, mantissa = code & 7;
      float v = exponent ? float(8 + mantissa) : float(mantissa);  // units of 2^(e-10)
      for (int e = exponent ? exponent : 1; e < 10; ++e) v *= 0.5f;
      for (int e = 10; e < exponent; ++e) v *= 2.0f;
      if ((code & 127) == 127) v = __builtin_nanf("");
      value[code] = code & 128 ? -v : v;
    }
  }
};
inline const float* fp8_table() {
  static const Fp8Table table;
  return table.value;
}

// Remembers whether a NaN code passed by; a kernel then redoes its work with an `_exact` decoder.
// Twice a code, as a byte, is 0xFE for the two NaN codes and less for all others.
struct Fp8NanFlag {
#if WF_ISA >= 1
  __m256i most = _mm256_setzero_si256();
  void see32(const uint8_t* p) {
    __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    most = _mm256_max_epu8(most, _mm256_add_epi8(v, v));
  }
  bool seen() const {
    return _mm256_movemask_epi8(_mm256_cmpeq_epi8(most, _mm256_set1_epi8(char(0xFE)))) != 0;
  }
#else
  typedef uint8_t bytes __attribute__((vector_size(16)));
  bytes most = {};
  void see16(const uint8_t* p) {
    bytes v;
    std::memcpy(&v, p, 16);
    v += v;
    most = v > most ? v : most;
  }
  void see32(const uint8_t* p) { see16(p), see16(p + 16); }
  bool seen() const {
    for (int i = 0; i < 16; ++i)
      if (most[i] == 0xFE) return true;
    return false;
  }
#endif
};

// 2 * kLanes codes at p -> two vectors of value / kFp8Scale, in order. Over fp16 where there is
// F16C (e4m3's bits moved to fp16's places mean value * 2^-8, subnormals included); NaN reads 480.
inline void fp8_decode(const uint8_t* p, vf& low, vf& high) {
#if WF_ISA >= 2
  __m512i w = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  w = _mm512_and_si512(_mm512_slli_epi16(w, 7), _mm512_set1_epi16(short(0xBF80)));
  low = (vf)_mm512_cvtph_ps(_mm512_castsi512_si256(w));
  high = (vf)_mm512_cvtph_ps(_mm512_extracti64x4_epi64(w, 1));
#elif WF_ISA == 1
  __m256i w = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  w = _mm256_and_si256(_mm256_slli_epi16(w, 7), _mm256_set1_epi16(short(0xBF80)));
  low = (vf)_mm256_cvtph_ps(_mm256_castsi256_si128(w));
  high = (vf)_mm256_cvtph_ps(_mm256_extracti128_si256(w, 1));
#else
  const float* t = fp8_table();
  low = vf{t[p[0]], t[p[1]], t[p[2]], t[p[3]]};
  high = vf{t[p[4]], t[p[5]], t[p[6]], t[p[7]]};
#endif
}
// NaN codes give NaN.
__attribute__((noinline)) inline void fp8_decode_exact(const uint8_t* p, vf& low, vf& high) {
  const float* t = fp8_table();
  float v[2 * kLanes];
  for (int i = 0; i < 2 * kLanes; ++i) v[i] = t[p[i]] / kFp8Scale;
  low = load(v);
  high = load(v + kLanes);
}

// 4 * kLanes codes at p -> out[j][i] = value(p[4 * i + 3 - j]) * kFp8Tiny; NaN reads 480.
//
// e4m3's bits moved to fp32's places mean value * 2^-120: exact, but subnormal e4m3 become
// subnormal fp32. FMA takes those at full speed on some CPUs (Zen) and traps to microcode on
// others; WF_SLOW_DENORMALS is defined there (jit/machine.py measures it), and the codes are made
// true values: with the exponent's bias added, a normal code reads y, a subnormal one 2y - 2^-6,
// and that is always the smaller of the two.
#ifdef WF_SLOW_DENORMALS
constexpr float kFp8Tiny = 1.0f;
#else
constexpr float kFp8Tiny = 0x1p-120f;
#endif
inline vf fp8_bits_to_float(vi moved) {
#ifdef WF_SLOW_DENORMALS
  vf y = (vf)((moved & 0x07F00000) + 0x3C000000);
  vf z = (y + y) - set1(0x1p-6f);
  return (vf)((vi)(y < z ? y : z) | (moved & (vi{} + int32_t(0x80000000))));
#else
  return (vf)(moved & (vi{} + int32_t(0x87F00000)));
#endif
}
// Two codes are moved at once, in halves of 16 bits, and the lower one then to the upper half.
inline void fp8_decode_words(vi codes, vf* out) {
  const vi odd = (vi)((short_vector)codes >> 4), even = (vi)(((short_vector)codes << 8) >> 4);
  out[0] = fp8_bits_to_float(odd);
  out[1] = fp8_bits_to_float(even);
  out[2] = fp8_bits_to_float(odd << 16);
  out[3] = fp8_bits_to_float(even << 16);
}
inline void fp8_decode_words(const uint8_t* p, vf* out) {
  fp8_decode_words((vi)load_bytes(p), out);
}
// NaN codes give NaN.
__attribute__((noinline)) inline void fp8_decode_words_exact(const uint8_t* p, vf* out) {
  const float* t = fp8_table();
  for (int j = 0; j < 4; ++j)
    for (int i = 0; i < kLanes; ++i) out[j][i] = t[p[4 * i + 3 - j]] * kFp8Tiny;
}

// ---- exp: relative error about 2e-7; 0 below -87.3, inf above 88.7, NaN stays
inline vf exp(vf x) {
  const vf top = set1(88.72283f), bottom = set1(-87.33654f);
  vf y = min(max(x, bottom), top);
  const vf magic = set1(12582912.0f);  // adding it rounds to an integer
  vf n = (y * set1(1.44269504f) + magic) - magic;
  vf r = fma(n, set1(-0.693145752f), y);
  r = fma(n, set1(-1.42860677e-6f), r);
  vf p = set1(1.0f / 720);
  p = fma(p, r, set1(1.0f / 120));
  p = fma(p, r, set1(1.0f / 24));
  p = fma(p, r, set1(1.0f / 6));
  p = fma(p, r, set1(0.5f));
  p = fma(p, r, set1(1.0f));
  p = fma(p, r, set1(1.0f));
  vi half = __builtin_convertvector(n, vi) >> 1;  // 2^n in two steps: n may be 128
  vi rest = __builtin_convertvector(n, vi) - half;
  vf e = p * (vf)((half + 127) << 23) * (vf)((rest + 127) << 23);
  e = select(x < bottom, vf{}, e);
  e = select(x > top, set1(__builtin_inff()), e);
  return select(x != x, x, e);
}
}  // namespace wf
