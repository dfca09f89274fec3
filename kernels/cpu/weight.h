// weight: the layouts of packed weights, and the expansion of quantised ones for the micro-kernels.
//
// Quantised values are small integers, exact in bf16 and fp32. So a piece of a weight is expanded to the plain packed
// form and multiplied by the same instructions as a plain weight. Scales multiply fp32 sums: the scale of an int8 row
// the whole sum, the scale of an int4 group the sum over that group, group after group. Activations are never rounded.
#pragma once
#include "vec.h"

namespace skipfast {

constexpr int STRIP = 16;  // outputs that lie together in memory, as in kernels/linear.py: a cache line for each k
constexpr int BLOCK = 32;  // outputs computed together: two strips
constexpr int PREFETCH_BYTES = 4096;  // distance ahead in the weight: into the next page, where hardware stops

// Loops over the rows of a tile must be unrolled early, else their sums live in memory, which takes twice as long.
#define UNROLL _Pragma("GCC unroll 16")

inline void prefetch_ahead(const void* p) { prefetch((const char*)p + PREFETCH_BYTES); }

enum class Format : int64_t { PLAIN, INT8, INT4 };

// A packed weight of n outputs (output features) and k features of the input (see kernels/linear.py):
//   PLAIN  bf16 [N/16, K/2, 16, 2] or fp32 [N/16, K, 16]
//   INT8   [N/32, K + 4, 32] bytes: for each block of 32 outputs the features, then 32 fp32 scales
//   INT4   [N/32, K/group, 64 + 16 group] bytes: for each group of a block 32 bf16 scales, then its features, 8 of a
//          strip in 64 bytes: of output c, feature 2 j + h is in nibble j of 16-bit word 2 c + h, as value + 8
// Scales lie among the values, so that a block is one run of memory.
struct Weight {
  const void* data;
  Format format;
  int64_t group;  // features that share a scale (INT4)

  static constexpr int64_t GROUP_HEAD = BLOCK * int64_t(sizeof(bf16)), INT8_TAIL = BLOCK * int64_t(sizeof(float));
  int64_t group_bytes() const { return GROUP_HEAD + group * BLOCK / 2; }
  const int8_t* int8_block(int64_t block, int64_t k) const {
    return (const int8_t*)data + block * (k * BLOCK + INT8_TAIL);
  }
  const uint8_t* int4_group(int64_t block, int64_t k, int64_t first) const {  // the group of feature `first`
    return (const uint8_t*)data + (block * k + first) / group * group_bytes();
  }
};

template <typename T>
inline void store_features(T* to, Vec first, Vec second);
template <>
inline void store_features(float* to, Vec first, Vec second) { store(to, first), store(to + STRIP, second); }
template <>
inline void store_features(bf16* to, Vec first, Vec second) {  // a line of pairs; both are exact in bf16
  const Bits pairs = bits_of(first) >> 16 | bits_of(second);
  std::memcpy(to, &pairs, sizeof(pairs));
}

// Expand k features of an INT8 block to to[strip][k * 16]; k is even.
template <typename T>
inline void expand_int8(const int8_t* from, int64_t k, T* to) {
  for (int64_t i = 0; i < k; i += 2, from += 2 * BLOCK, to += 2 * STRIP) {
    prefetch_ahead(from);
    UNROLL
    for (int v = 0; v < 2; v++)
      store_features(to + v * k * STRIP, load(from + v * STRIP), load(from + BLOCK + v * STRIP));
  }
}

// Expand the 8 features in 64 bytes of an INT4 strip.
template <typename T>
inline void expand_nibbles(const uint8_t* from, T* to) {
  Bits word;
  std::memcpy(&word, from, sizeof(word));
  UNROLL
  for (int j = 0; j < 4; j++) {
    const Vec first = sub(to_floats(word >> (4 * j) & 15), splat(8.0f));
    const Vec second = sub(to_floats(word >> (4 * j + 16) & 15), splat(8.0f));
    store_features(to + 2 * j * STRIP, first, second);
  }
}
#if defined(SKIPFAST_AVX512)
template <>
inline void expand_nibbles(const uint8_t* from, bf16* to) {  // the table holds 16 values twice: 5 bits choose from it
  alignas(64) static constexpr uint16_t VALUES[32] = {
      0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0,
      0x40e0, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0,
      0x40c0, 0x40e0};
  const __m512i values = _mm512_load_si512(VALUES), word = _mm512_loadu_si512(from);
  UNROLL
  for (int j = 0; j < 4; j++)
    _mm512_storeu_si512(to + 2 * j * STRIP, _mm512_permutexvar_epi16(_mm512_srli_epi16(word, 4 * j), values));
}
#endif

// Expand k features of an INT4 block, whole groups, to to[strip][k * 16].
template <typename T>
inline void expand_int4(const uint8_t* from, int64_t k, int64_t group, T* to) {
  for (int64_t g = 0; g < k; g += group) {
    prefetch_ahead(from), from += Weight::GROUP_HEAD;
    for (int64_t i = 0; i < group; i += 8, from += 4 * BLOCK, to += 8 * STRIP) {
      prefetch_ahead(from), prefetch_ahead(from + 2 * BLOCK);
      UNROLL
      for (int v = 0; v < 2; v++) expand_nibbles(from + v * 2 * BLOCK, to + v * k * STRIP);
    }
  }
}

}  // namespace skipfast
