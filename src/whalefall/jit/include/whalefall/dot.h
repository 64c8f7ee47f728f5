// bf16 dot products (vdpbf16ps) and what feeds them, where the level has the instruction and the
// machine's is faster than FMA (WF_DOT; jit/machine.py measures it). Units ask `kDot`.
//
// A product of two bf16 is exact in fp32; a pair of products is added to fp32 sums in one
// instruction. Subnormals count as zero; the last bits may differ between vendors.
#pragma once
#include "whalefall/simd.h"

namespace wf {
#ifdef WF_DOT
constexpr bool kDot = true;
#else
constexpr bool kDot = false;
#endif

#if defined(WF_DOT) || defined(WF_TILE)
typedef __m512i halves;  // 32 bf16

inline halves load_halves(const void* p) { return _mm512_loadu_si512(p); }
inline vf dot(vf sum, halves a, halves b) {
  return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
// Zero in a register of its own. g++ would copy one zero into all sums of a tile; the CPU drops a
// register's xor with itself before it costs anything (8 rows of x from memory: a tenth faster).
inline vf fresh_zero() {
  __m512 zero;
  asm volatile("vpxord %0, %0, %0" : "=v"(zero));
  return (vf)zero;
}
// p[0], p[1] for all 16 pairs.
inline halves broadcast_pair(const void* p) {
  int32_t pair;
  std::memcpy(&pair, p, 4);
  return _mm512_set1_epi32(pair);
}
// 32 floats to nearest even, in order.
inline halves to_halves(vf low, vf high) {
  return (halves)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
}

// The bf16 of all 128 magnitudes of e4m3, low and high bytes apart. Exact, NaN included.
struct Fp8Halves {
  alignas(64) uint8_t low[128], high[128];
  Fp8Halves() {
    for (int code = 0; code < 128; ++code) {
      uint16_t bits = float_to_bf16(fp8_table()[code]);
      low[code] = uint8_t(bits);
      high[code] = uint8_t(bits >> 8);
    }
  }
};

// Decodes 64 codes: `a` holds codes 16j … 16j+7 in its 128-bit lane j, `b` codes 16j+8 … 16j+15.
struct Fp8Decoder {
  __m512i low0, low1, high0, high1;
  Fp8Decoder() {
    static const Fp8Halves table;
    low0 = _mm512_load_si512(table.low), low1 = _mm512_load_si512(table.low + 64);
    high0 = _mm512_load_si512(table.high), high1 = _mm512_load_si512(table.high + 64);
  }
  void operator()(__m512i codes, halves& a, halves& b) const {
    const __m512i sign = _mm512_set1_epi8(char(0x80));
    __m512i low = _mm512_permutex2var_epi8(low0, codes, low1);
    __m512i high = _mm512_permutex2var_epi8(high0, codes, high1);
    high = _mm512_ternarylogic_epi32(high, codes, sign, 0xF8);  // high | (codes & sign)
    a = _mm512_unpacklo_epi8(low, high);
    b = _mm512_unpackhi_epi8(low, high);
  }
};
// 64 bf16 of x in the order in which Fp8Decoder delivers weights.
inline void deal_halves(halves first, halves second, halves& a, halves& b) {
  a = _mm512_shuffle_i64x2(first, second, 0x88);
  b = _mm512_shuffle_i64x2(first, second, 0xDD);
}
// The way back.
inline void undeal_halves(halves a, halves b, void* to) {
  const __m512i low = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
  const __m512i high = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  _mm512_storeu_si512(to, _mm512_permutex2var_epi64(a, low, b));
  _mm512_storeu_si512(static_cast<char*>(to) + 64, _mm512_permutex2var_epi64(a, high, b));
}
#endif
}  // namespace wf
