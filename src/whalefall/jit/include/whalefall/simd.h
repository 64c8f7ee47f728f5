// Vectors of floats at the level the unit is compiled for (WF_ISA: 0 any, 1 avx2, 2 avx512,
// 3 avx512bf16, 4 amx): GCC/Clang vector types, so + - * / & | << < work as on scalars.
//
// A kernel written over this header is one source for all levels. No function here depends on the
// rounding or denormal mode, and NaN stays NaN in every conversion but `fp8_decode`, which reads
// the NaN codes as +-480/256 where a level has no table: see `Fp8NanFlag`.
#pragma once
#include <cstdint>
#include <cstring>
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
typedef float vf_any_alignment __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint16_t half_vector __attribute__((vector_size(kLanes * 2)));  // kLanes 16-bit values

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

inline void prefetch_l1(const void* p) { __builtin_prefetch(p, 0, 3); }
inline void prefetch_l2(const void* p) { __builtin_prefetch(p, 0, 2); }

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
inline vf load_bf16(const uint16_t* p) {
#if WF_ISA >= 2
  __m512i w = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return (vf)_mm512_slli_epi32(w, 16);
#elif WF_ISA == 1
  __m256i w = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return (vf)_mm256_slli_epi32(w, 16);
#else
  vu w = {p[0], p[1], p[2], p[3]};
  return (vf)(w << 16);
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
// The level's decoder yields value * 2^-8 where it goes over fp16, value at `any`; a kernel folds
// kFp8Scale into its block scale (exact: a power of two).
constexpr float kFp8Scale = WF_ISA >= 1 ? 256.0f : 1.0f;

struct Fp8Table {  // value / kFp8Scale of all 256 codes, NaN included
  float value[256];
  Fp8Table() {
    for (int code = 0; code < 256; ++code) {
      int exponent = (code >> 3) & 15, mantissa = code & 7;
      float v = exponent ? float(8 + mantissa) : float(mantissa);  // units of 2^(e-10)
      for (int e = exponent ? exponent : 1; e < 10; ++e) v *= 0.5f;
      for (int e = 10; e < exponent; ++e) v *= 2.0f;
      if ((code & 127) == 127) v = __builtin_nanf("");
      value[code] = (code & 128 ? -v : v) / kFp8Scale;
    }
  }
};
inline const float* fp8_table() {
  static const Fp8Table table;
  return table.value;
}

// Remembers whether a NaN code passed by; a kernel then redoes its work with `fp8_decode_exact`.
struct Fp8NanFlag {
#if WF_ISA >= 2
  __m512i most = _mm512_setzero_si512();
  void see32(const uint8_t* p) {
    __m512i v = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    v = _mm512_maskz_mov_epi8(0xffffffff, v);
    most = _mm512_max_epu8(most, _mm512_add_epi8(v, v));
  }
  bool seen() const { return _mm512_cmpeq_epi8_mask(most, _mm512_set1_epi8(char(0xFE))) != 0; }
#elif WF_ISA == 1
  __m256i most = _mm256_setzero_si256();
  void see32(const uint8_t* p) {
    __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    most = _mm256_max_epu8(most, _mm256_add_epi8(v, v));
  }
  bool seen() const {
    return _mm256_movemask_epi8(_mm256_cmpeq_epi8(most, _mm256_set1_epi8(char(0xFE)))) != 0;
  }
#else
  void see32(const uint8_t*) {}
  bool seen() const { return false; }  // the table knows NaN
#endif
};

// 2 * kLanes codes at p -> two vectors of value / kFp8Scale, in order; NaN codes read 480.
// e4m3's bits moved to fp16's places mean value * 2^-8, subnormals included.
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
inline void fp8_decode_exact(const uint8_t* p, vf& low, vf& high) {  // NaN codes give NaN
  const float* t = fp8_table();
  float v[2 * kLanes];
  for (int i = 0; i < 2 * kLanes; ++i) v[i] = t[p[i]];
  low = load(v);
  high = load(v + kLanes);
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
