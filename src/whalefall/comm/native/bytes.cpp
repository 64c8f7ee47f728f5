// Byte work of the comm room: CRC-32 (zlib's polynomial), CRC-32C, rows, rings, waiting.
//
// CRC: messages are folded 64 bytes at a time by carry-less products, M = hi(M)*x^(d+64) +
// lo(M)*x^d (mod P), then 16 at a time; the last 16 go through the table. Bound: PCLMULQDQ, ~1 per
// 4 bytes. Without the instruction a slicing-by-8 table is used. The choice is made once, at run
// time. Ring: one producer, one consumer, both may be different processes; see Ring below.
#include <errno.h>
#include <linux/futex.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>

#if defined(__x86_64__)
#include <immintrin.h>
#define CRC_X86 1
#endif

namespace {

// Bits are reflected: bit 31 of a 32-bit remainder is x^0.
struct Crc {
  uint32_t poly;
  uint32_t table[8][256];
  uint64_t fold512[2], fold128[2];

  explicit Crc(uint32_t reflected) : poly(reflected) {
    for (uint32_t i = 0; i < 256; i++) {
      uint32_t c = i;
      for (int k = 0; k < 8; k++) c = (c & 1) ? (c >> 1) ^ poly : c >> 1;
      table[0][i] = c;
    }
    for (int s = 1; s < 8; s++)
      for (int i = 0; i < 256; i++)
        table[s][i] = (table[s - 1][i] >> 8) ^ table[0][table[s - 1][i] & 255];
    // A reflected 32 x 64-bit product comes out one bit low, hence the shift by one.
    fold512[0] = static_cast<uint64_t>(power(512 + 32)) << 1;
    fold512[1] = static_cast<uint64_t>(power(512 - 32)) << 1;
    fold128[0] = static_cast<uint64_t>(power(128 + 32)) << 1;
    fold128[1] = static_cast<uint64_t>(power(128 - 32)) << 1;
  }

  // x^n mod P
  uint32_t power(uint64_t n) const {
    uint32_t result = 0x80000000u, square = 0x40000000u;
    for (; n; n >>= 1) {
      if (n & 1) result = product(result, square);
      square = product(square, square);
    }
    return result;
  }

  // a * b mod P
  uint32_t product(uint32_t a, uint32_t b) const {
    uint32_t p = 0;
    for (uint32_t bit = 0x80000000u; bit; bit >>= 1) {
      if (a & bit) p ^= b;
      b = (b & 1) ? (b >> 1) ^ poly : b >> 1;
    }
    return p;
  }

  // Both ends inverted by the caller.
  uint32_t by_table(uint32_t c, const uint8_t* p, size_t n) const {
    for (; n >= 8; n -= 8, p += 8) {
      uint32_t lo, hi;
      memcpy(&lo, p, 4);
      memcpy(&hi, p + 4, 4);
      lo ^= c;
      c = table[7][lo & 255] ^ table[6][(lo >> 8) & 255] ^ table[5][(lo >> 16) & 255] ^
          table[4][lo >> 24] ^ table[3][hi & 255] ^ table[2][(hi >> 8) & 255] ^
          table[1][(hi >> 16) & 255] ^ table[0][hi >> 24];
    }
    for (; n; n--, p++) c = (c >> 8) ^ table[0][(c ^ *p) & 255];
    return c;
  }

#ifdef CRC_X86
  __attribute__((target("pclmul,sse4.1"))) static __m128i fold(__m128i m, __m128i k, __m128i next) {
    __m128i lo = _mm_clmulepi64_si128(m, k, 0x00), hi = _mm_clmulepi64_si128(m, k, 0x11);
    return _mm_xor_si128(_mm_xor_si128(lo, hi), next);
  }

  static __m128i load(const uint8_t* q) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(q));
  }

  __attribute__((target("pclmul,sse4.1"))) uint32_t by_clmul(uint32_t c, const uint8_t* p,
                                                             size_t n) const {
    if (n < 128) return by_table(c, p, n);
    __m128i k512 = _mm_set_epi64x(fold512[1], fold512[0]);
    __m128i k128 = _mm_set_epi64x(fold128[1], fold128[0]);
    __m128i a = _mm_xor_si128(load(p), _mm_cvtsi32_si128(static_cast<int>(c)));
    __m128i b = load(p + 16), d = load(p + 32), e = load(p + 48);
    for (p += 64, n -= 64; n >= 64; p += 64, n -= 64) {
      a = fold(a, k512, load(p));
      b = fold(b, k512, load(p + 16));
      d = fold(d, k512, load(p + 32));
      e = fold(e, k512, load(p + 48));
    }
    a = fold(fold(fold(a, k128, b), k128, d), k128, e);
    for (; n >= 16; p += 16, n -= 16) a = fold(a, k128, load(p));
    uint8_t rest[16];
    _mm_storeu_si128(reinterpret_cast<__m128i*>(rest), a);
    return by_table(by_table(0, rest, 16), p, n);
  }
#endif

  uint32_t run(uint32_t value, const void* data, size_t n, int table_only) const {
    const uint8_t* p = static_cast<const uint8_t*>(data);
#ifdef CRC_X86
    static const bool fast = __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1");
    if (fast && !table_only) return ~by_clmul(~value, p, n);
#endif
    return ~by_table(~value, p, n);
  }
};

const Crc& zlib_crc() {
  static const Crc crc(0xEDB88320u);
  return crc;
}

const Crc& castagnoli_crc() {
  static const Crc crc(0x82F63B78u);
  return crc;
}

int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000LL + t.tv_nsec;
}

// Sleep while *word == seen, at most until `deadline` (monotonic ns; < 0: for ever).
void futex_wait(std::atomic<uint32_t>* word, uint32_t seen, int64_t deadline) {
  timespec t, *limit = nullptr;
  if (deadline >= 0) {
    int64_t left = deadline - now_ns();
    if (left <= 0) return;
    t = {static_cast<time_t>(left / 1000000000LL), static_cast<long>(left % 1000000000LL)};
    limit = &t;
  }
  syscall(SYS_futex, word, FUTEX_WAIT, seen, limit, nullptr, 0);
}

void futex_wake(std::atomic<uint32_t>* word) {
  syscall(SYS_futex, word, FUTEX_WAKE, INT32_MAX, nullptr, nullptr, 0);
}

// Bytes in flight lie between tail and head (both only grow); each side sleeps on the other's bell.
// A message is a 8-byte length and the bytes, padded to 8, so that a length never wraps.
struct Ring {
  std::atomic<uint64_t> head;  // written by the producer
  std::atomic<uint32_t> head_bell, producer_sleeps;
  char pad0[48];
  std::atomic<uint64_t> tail;  // written by the consumer
  std::atomic<uint32_t> tail_bell, consumer_sleeps;
  char pad1[48];
  uint64_t capacity;
  char pad2[56];
  uint8_t data[];
};

constexpr int kSpins = 200;

void pause_cpu() {
#ifdef CRC_X86
  _mm_pause();
#endif
}

void ring_copy_in(Ring* r, uint64_t at, const void* from, uint64_t n) {
  uint64_t i = at % r->capacity, first = n < r->capacity - i ? n : r->capacity - i;
  memcpy(r->data + i, from, first);
  memcpy(r->data, static_cast<const uint8_t*>(from) + first, n - first);
}

void ring_copy_out(Ring* r, uint64_t at, void* to, uint64_t n) {
  uint64_t i = at % r->capacity, first = n < r->capacity - i ? n : r->capacity - i;
  memcpy(to, r->data + i, first);
  memcpy(static_cast<uint8_t*>(to) + first, r->data, n - first);
}

// Wait until ready() holds: spin a little, then sleep on `bell`. False at the deadline.
template <class Ready>
bool ring_wait(Ready ready, std::atomic<uint32_t>* bell, std::atomic<uint32_t>* sleeps,
               int64_t deadline) {
  for (int i = 0; i < kSpins; i++) {
    if (ready()) return true;
    pause_cpu();
  }
  for (;;) {
    uint32_t seen = bell->load();
    sleeps->store(1);
    if (ready()) break;
    if (deadline >= 0 && now_ns() >= deadline) {
      sleeps->store(0);
      return false;
    }
    futex_wait(bell, seen, deadline);
  }
  sleeps->store(0);
  return true;
}

void ring_bell(std::atomic<uint32_t>* bell, std::atomic<uint32_t>* sleeps) {
  if (!sleeps->load()) return;
  bell->fetch_add(1);
  futex_wake(bell);
}

int64_t deadline_of(int64_t timeout_ns) { return timeout_ns < 0 ? -1 : now_ns() + timeout_ns; }

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

uint32_t wf_crc32(uint32_t value, const void* data, size_t n, int table_only) {
  return zlib_crc().run(value, data, n, table_only);
}

uint32_t wf_crc32c(uint32_t value, const void* data, size_t n, int table_only) {
  return castagnoli_crc().run(value, data, n, table_only);
}

// CRC-32C of each `block` bytes (the last block may be short) into out.
void wf_crc32c_blocks(const void* data, size_t n, size_t block, uint32_t* out) {
  const uint8_t* p = static_cast<const uint8_t*>(data);
  for (size_t at = 0; at < n; at += block)
    *out++ = castagnoli_crc().run(0, p + at, n - at < block ? n - at : block, 0);
}

// The CRC of A ++ B from those of A and of B.
uint32_t wf_crc_combine(int castagnoli, uint32_t a, uint32_t b, uint64_t length_b) {
  const Crc& crc = castagnoli ? castagnoli_crc() : zlib_crc();
  return crc.product(a, crc.power(8 * length_b)) ^ b;
}

// out[i] = source[index[i]] for rows of row_bytes; -1 - i where index[i] is out of range.
int64_t wf_gather_rows(const uint8_t* source, size_t source_stride, size_t source_rows,
                       const int64_t* index, size_t n, size_t row_bytes, uint8_t* out,
                       size_t out_stride) {
  for (size_t i = 0; i < n; i++)
    if (index[i] < 0 || static_cast<size_t>(index[i]) >= source_rows) return -1 - (int64_t)i;
  for (size_t i = 0; i < n; i++) {
    if (i + 2 < n) __builtin_prefetch(source + index[i + 2] * source_stride);
    memcpy(out + i * out_stride, source + index[i] * source_stride, row_bytes);
  }
  return 0;
}

// out[index[i]] = source[i]; -1 - i where index[i] is out of range, before anything is written.
int64_t wf_scatter_rows(const uint8_t* source, size_t source_stride, const int64_t* index, size_t n,
                        size_t row_bytes, uint8_t* out, size_t out_stride, size_t out_rows) {
  for (size_t i = 0; i < n; i++)
    if (index[i] < 0 || static_cast<size_t>(index[i]) >= out_rows) return -1 - (int64_t)i;
  for (size_t i = 0; i < n; i++)
    memcpy(out + index[i] * out_stride, source + i * source_stride, row_bytes);
  return 0;
}

size_t wf_ring_header() { return sizeof(Ring); }

void wf_ring_create(Ring* r, uint64_t capacity) {
  memset(static_cast<void*>(r), 0, sizeof(Ring));
  r->capacity = capacity;
}

// Append one message made of `parts` pieces. 0, or ETIMEDOUT, or EMSGSIZE if it can never fit.
int wf_ring_send(Ring* r, const void* const* pieces, const uint64_t* sizes, int parts,
                 int64_t timeout_ns) {
  uint64_t length = 0;
  for (int i = 0; i < parts; i++) length += sizes[i];
  uint64_t need = 8 + ((length + 7) & ~7ull), head = r->head.load();
  if (need > r->capacity) return EMSGSIZE;
  auto room = [&] { return r->capacity - (head - r->tail.load()) >= need; };
  if (!ring_wait(room, &r->tail_bell, &r->producer_sleeps, deadline_of(timeout_ns)))
    return ETIMEDOUT;
  ring_copy_in(r, head, &length, 8);
  uint64_t at = head + 8;
  for (int i = 0; i < parts; at += sizes[i++]) ring_copy_in(r, at, pieces[i], sizes[i]);
  r->head.store(head + need);
  ring_bell(&r->head_bell, &r->consumer_sleeps);
  return 0;
}

// Length of the next message, or -ETIMEDOUT, or -EBADMSG if the ring holds nonsense.
int64_t wf_ring_next(Ring* r, int64_t timeout_ns) {
  uint64_t tail = r->tail.load(), length;
  auto any = [&] { return r->head.load() != tail; };
  if (!ring_wait(any, &r->head_bell, &r->consumer_sleeps, deadline_of(timeout_ns)))
    return -ETIMEDOUT;
  ring_copy_out(r, tail, &length, 8);
  if (length > r->head.load() - tail - 8) return -EBADMSG;
  return static_cast<int64_t>(length);
}

// Copy the message whose length wf_ring_next gave, and free its place.
void wf_ring_take(Ring* r, void* out, uint64_t length) {
  uint64_t tail = r->tail.load();
  ring_copy_out(r, tail + 8, out, length);
  r->tail.store(tail + 8 + ((length + 7) & ~7ull));
  ring_bell(&r->tail_bell, &r->producer_sleeps);
}

// Wait until *word differs from `seen`: 0, or ETIMEDOUT. For words of shared memory.
int wf_word_wait(std::atomic<uint32_t>* word, uint32_t seen, int64_t timeout_ns) {
  int64_t deadline = deadline_of(timeout_ns);
  for (int i = 0; i < kSpins; i++, pause_cpu())
    if (word->load() != seen) return 0;
  while (word->load() == seen) {
    if (deadline >= 0 && now_ns() >= deadline) return ETIMEDOUT;
    futex_wait(word, seen, deadline);
  }
  return 0;
}

void wf_word_store(std::atomic<uint32_t>* word, uint32_t value) {
  word->store(value);
  futex_wake(word);
}
}
#pragma GCC visibility pop
