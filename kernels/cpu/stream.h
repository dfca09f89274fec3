// stream: multiply a few rows by quantised blocks without AMX tiles, but with the bits that tiles give.
//
// A tile's operands must be written to memory, and its product must be waited for. For few rows that takes longer than
// the weights take to arrive. The tile instruction is documented as a fixed sequence of fused multiply-adds in fp32: of
// 32 features the even and the odd ones are summed apart, in order; both sums are then added to the result. Denormal
// numbers count as zero. Here that sequence runs on values that never leave the registers.
#pragma once
#include "amx.h"
#include "weight.h"

namespace skipfast {

constexpr int64_t STREAMS = 4;  // blocks that are read side by side: one run of memory is not fetched fast enough
inline int64_t stream_rows_limit(Format format) { return format == Format::INT8 ? 4 : format == Format::INT4 ? 2 : 0; }

#if defined(SKIPFAST_AMX)
// While it exists, vector instructions read and write zero for denormal numbers, as tiles always do.
class FlushDenormals {
 public:
  explicit FlushDenormals(bool wanted) : before(_mm_getcsr()) {
    if (wanted) _mm_setcsr(before | 0x8040);
  }
  ~FlushDenormals() { _mm_setcsr(before); }
  FlushDenormals(const FlushDenormals&) = delete;

 private:
  const unsigned before;
};

// Sums of M rows and two strips over up to 32 features, in the order of one tile product.
template <int M>
struct TileSums {
  Vec even[M][2], odd[M][2];

  TileSums() {
    UNROLL
    for (int m = 0; m < M; m++) even[m][0] = even[m][1] = odd[m][0] = odd[m][1] = splat(0.0f);
  }
  // x: points at a feature of the first of M rows, which are `k` apart.
  static void add_product(Vec (&to)[M][2], int v, Vec weight, const float* x, int64_t k) {
    UNROLL
    for (int m = 0; m < M; m++) to[m][v] = fma(weight, splat(x[m * k]), to[m][v]);
  }
  Vec add_to(Vec sum, int m, int v) const { return add(sum, add(even[m][v], odd[m][v])); }
};

// acc[m][0..32) (+)= row m of x, rows `k` apart, times up to 32 features of an INT8 block.
template <int M>
void stream_int8(const int8_t* from, int64_t features, const float* x, int64_t k, float* acc, int64_t stride,
                 bool first) {
  TileSums<M> sums;
  for (int64_t i = 0; i < features; i += 2, from += 2 * BLOCK) {
    prefetch_ahead(from);
    UNROLL
    for (int v = 0; v < 2; v++) {
      sums.add_product(sums.even, v, load(from + v * STRIP), x + i, k);
      sums.add_product(sums.odd, v, load(from + BLOCK + v * STRIP), x + i + 1, k);
    }
  }
  UNROLL
  for (int m = 0; m < M; m++) {
    UNROLL
    for (int v = 0; v < 2; v++) {
      float* sum = acc + m * stride + v * LANES;
      store(sum, sums.add_to(first ? splat(0.0f) : load(sum), m, v));
    }
  }
}

// The same for a group of an INT4 block.
template <int M>
void stream_int4(const uint8_t* from, int64_t group, const float* x, int64_t k, float* acc, int64_t stride,
                 bool first) {
  alignas(64) static constexpr float VALUES[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
  const __m512 values = _mm512_load_ps(VALUES);
  const bf16* scales = (const bf16*)from;
  prefetch_ahead(from), from += Weight::GROUP_HEAD;
  Vec part[M][2];
  UNROLL
  for (int m = 0; m < M; m++) part[m][0] = part[m][1] = splat(0.0f);
  for (int64_t i = 0; i < group;) {
    TileSums<M> sums;
    for (int step = 0; step < 4; step++, i += 8, from += 4 * BLOCK) {
      prefetch_ahead(from), prefetch_ahead(from + 2 * BLOCK);
      UNROLL
      for (int v = 0; v < 2; v++) {
        const __m512i word = _mm512_loadu_si512(from + v * 2 * BLOCK);
        UNROLL
        for (int j = 0; j < 4; j++) {  // the look-up reads only the low 4 bits
          const Vec even{_mm512_permutexvar_ps(_mm512_srli_epi32(word, 4 * j), values)};
          const Vec odd{_mm512_permutexvar_ps(_mm512_srli_epi32(word, 4 * j + 16), values)};
          sums.add_product(sums.even, v, even, x + i + 2 * j, k);
          sums.add_product(sums.odd, v, odd, x + i + 2 * j + 1, k);
        }
      }
    }
    UNROLL
    for (int m = 0; m < M; m++)
      part[m][0] = sums.add_to(part[m][0], m, 0), part[m][1] = sums.add_to(part[m][1], m, 1);
  }
  UNROLL
  for (int v = 0; v < 2; v++) {
    const Vec scale = load(scales + v * LANES);
    UNROLL
    for (int m = 0; m < M; m++) {
      float* sum = acc + m * stride + v * LANES;
      store(sum, fma(part[m][v], scale, first ? splat(0.0f) : load(sum)));
    }
  }
}

template <int M>
void stream_rows(const Weight& w, int64_t first, int64_t last, int64_t k, const float* x, float* acc, int64_t stride) {
  const bool int8 = w.format == Format::INT8;
  const int64_t step = int8 ? 32 : w.group;
  for (int64_t i = 0; i < k; i += step)
    for (int64_t b = first; b < last; b++) {
      float* sums = acc + (b - first) * BLOCK;
      if (int8) stream_int8<M>(w.int8_block(b, k) + i * BLOCK, std::min(step, k - i), x + i, k, sums, stride, !i);
      else stream_int4<M>(w.int4_group(b, k, i), step, x + i, k, sums, stride, !i);
    }
}
// acc[row][32 (block - first)..) = x [rows, k] times blocks first..last-1; rows in 1..4.
inline void stream_blocks(const Weight& w, int64_t first, int64_t last, int64_t k, const float* x, int64_t rows,
                          float* acc, int64_t stride) {
  switch (rows) {
    case 1: return stream_rows<1>(w, first, last, k, x, acc, stride);
    case 2: return stream_rows<2>(w, first, last, k, x, acc, stride);
    case 3: return stream_rows<3>(w, first, last, k, x, acc, stride);
    default: return stream_rows<4>(w, first, last, k, x, acc, stride);
  }
}
#else
struct FlushDenormals {
  explicit FlushDenormals(bool) {}
};
inline void stream_blocks(const Weight&, int64_t, int64_t, int64_t, const float*, int64_t, float*, int64_t) {}
#endif

}  // namespace skipfast
