// CPU ops of skipfast: linear, rms_norm, attention and swiglu whose rows do not depend on the rows beside them.
//
// The rule that makes speculative decoding exact here: the arithmetic of one output element is one fixed sequence of
// operations, the same for every number of rows, every number of threads and every cache length. Tiling may choose only
// WHICH elements are computed together, never the order in which one element sums. Partial sums that travel through
// memory stay fp32, so spilling them is exact too. The build switches floating-point contraction off: what fuses, fuses
// by name.
//
// How a call gets here: kernels/linear.py etc. -> torch.ops.skipfast_cpu.* -> the functions at the end of this file.
// Written against torch's stable ABI (2.10), whose headers compile in seconds; threads come from torch's own pool, so
// that torch.set_num_threads governs them and no second OpenMP runtime is loaded.
//
// Shapes: K in features, N out features, T rows, H query heads, G kv heads, E head dim, S cache slots.
#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 10) << 48))
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <utility>
#include <type_traits>
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

using torch::stable::Tensor;

struct bf16 {
  uint16_t bits;
};

inline float widen(float value) { return value; }
inline float widen(bf16 value) {
  uint32_t bits = uint32_t(value.bits) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
template <typename T>
inline T narrow(float value);
template <>
inline float narrow<float>(float value) { return value; }
template <>
inline bf16 narrow<bf16>(float value) {  // to nearest even
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fc0};
  return {uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16)};
}

// ---------------------------------------------------------------------------------------------------------------------
// Vec: 16 floats on AVX-512, on AVX2 (two halves) and on anything else (a loop the compiler vectorises).
// ---------------------------------------------------------------------------------------------------------------------
constexpr int LANES = 16;

#if defined(__AVX512F__) && defined(__AVX512BW__)
#define SKIPFAST_AVX512
struct Vec {
  __m512 v;
};
inline __mmask16 lane_mask(int n) { return __mmask16((1u << n) - 1); }
inline Vec splat(float value) { return {_mm512_set1_ps(value)}; }
inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec load(const float* p, int n) { return {_mm512_maskz_loadu_ps(lane_mask(n), p)}; }
inline Vec load(const bf16* p) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16))};
}
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline void store(bf16* p, Vec a) {
#if defined(__AVX512BF16__)
  __m256bh packed = _mm512_cvtneps_pbh(a.v);
  std::memcpy(p, &packed, 32);
#else
  __m512i bits = _mm512_castps_si512(a.v), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
  __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_mask_set1_epi32(rounded, nan, 0x7fc0)));
#endif
}
inline Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec sub(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec div(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }  // a NaN in b survives
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec nearest(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Vec times_power_of_2(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }
inline __m256 low_half(Vec a) { return _mm512_castps512_ps256(a.v); }
inline __m256 high_half(Vec a) { return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a.v), 1)); }
// Pairs of bf16 as they lie in memory, first element in the low half.
inline void load_pairs(const bf16* p, Vec& first, Vec& second) {
  __m512i pairs = _mm512_loadu_si512(p);
  first = {_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16))};
  second = {_mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(int(0xffff0000u))))};
}
#elif defined(__AVX2__) && defined(__FMA__)
#define SKIPFAST_AVX2
struct Vec {
  __m256 lo, hi;
};
inline Vec splat(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
inline Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline __m256 widen8(const bf16* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
inline Vec load(const bf16* p) { return {widen8(p), widen8(p + 8)}; }
inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a.lo), _mm256_storeu_ps(p + 8, a.hi); }
inline __m256i round8(__m256 a) {
  __m256i bits = _mm256_castps_si256(a), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
  __m256 nan = _mm256_cmp_ps(a, a, _CMP_UNORD_Q);
  return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), _mm256_castps_si256(nan));
}
inline void store(bf16* p, Vec a) {
  __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(round8(a.lo), round8(a.hi)), 0xd8);
  _mm256_storeu_si256((__m256i*)p, packed);
}
inline __m256 low_half(Vec a) { return a.lo; }
inline __m256 high_half(Vec a) { return a.hi; }
#define BOTH(op) {op(a.lo, b.lo), op(a.hi, b.hi)}
inline Vec add(Vec a, Vec b) { return BOTH(_mm256_add_ps); }
inline Vec sub(Vec a, Vec b) { return BOTH(_mm256_sub_ps); }
inline Vec mul(Vec a, Vec b) { return BOTH(_mm256_mul_ps); }
inline Vec div(Vec a, Vec b) { return BOTH(_mm256_div_ps); }
inline Vec min(Vec a, Vec b) { return BOTH(_mm256_min_ps); }
inline Vec max(Vec a, Vec b) { return BOTH(_mm256_max_ps); }
#undef BOTH
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)}; }
inline Vec nearest(Vec a) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.lo, mode), _mm256_round_ps(a.hi, mode)};
}
inline __m256 exponent8(__m256 n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
inline Vec times_power_of_2(Vec a, Vec n) { return mul(a, {exponent8(n.lo), exponent8(n.hi)}); }
inline void load_pairs(const bf16* p, Vec& first, Vec& second) {
  const __m256i upper = _mm256_set1_epi32(int(0xffff0000u));
  __m256i a = _mm256_loadu_si256((const __m256i*)p), b = _mm256_loadu_si256((const __m256i*)(p + 16));
  first = {_mm256_castsi256_ps(_mm256_slli_epi32(a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(b, 16))};
  second = {_mm256_castsi256_ps(_mm256_and_si256(a, upper)), _mm256_castsi256_ps(_mm256_and_si256(b, upper))};
}
#else
struct Vec {
  float v[LANES];
};
#define EACH(expression)                                       \
  Vec out;                                                     \
  for (int i = 0; i < LANES; i++) out.v[i] = (expression);     \
  return out;
inline Vec splat(float value) { EACH(value) }
inline Vec load(const float* p) { EACH(p[i]) }
inline Vec load(const bf16* p) { EACH(widen(p[i])) }
inline void store(float* p, Vec a) { std::memcpy(p, a.v, sizeof(a.v)); }
inline void store(bf16* p, Vec a) {
  for (int i = 0; i < LANES; i++) p[i] = narrow<bf16>(a.v[i]);
}
inline Vec add(Vec a, Vec b) { EACH(a.v[i] + b.v[i]) }
inline Vec sub(Vec a, Vec b) { EACH(a.v[i] - b.v[i]) }
inline Vec mul(Vec a, Vec b) { EACH(a.v[i] * b.v[i]) }
inline Vec div(Vec a, Vec b) { EACH(a.v[i] / b.v[i]) }
inline Vec min(Vec a, Vec b) { EACH(a.v[i] < b.v[i] ? a.v[i] : b.v[i]) }
inline Vec max(Vec a, Vec b) { EACH(a.v[i] > b.v[i] ? a.v[i] : b.v[i]) }
#if defined(__FP_FAST_FMAF)
inline Vec fma(Vec a, Vec b, Vec c) { EACH(__builtin_fmaf(a.v[i], b.v[i], c.v[i])) }
#else  // no fused instruction: two roundings, everywhere alike (contraction is off)
inline Vec fma(Vec a, Vec b, Vec c) { EACH(a.v[i] * b.v[i] + c.v[i]) }
#endif
inline Vec nearest(Vec a) { EACH((a.v[i] + 12582912.0f) - 12582912.0f) }
inline Vec times_power_of_2(Vec a, Vec n) {
  Vec power;
  for (int i = 0; i < LANES; i++) {
    uint32_t bits = uint32_t(int32_t(n.v[i]) + 127) << 23;
    std::memcpy(&power.v[i], &bits, 4);
  }
  return mul(a, power);
}
inline void load_pairs(const bf16* p, Vec& first, Vec& second) {
  for (int i = 0; i < LANES; i++) first.v[i] = widen(p[2 * i]), second.v[i] = widen(p[2 * i + 1]);
}
#undef EACH
#endif

#if !defined(SKIPFAST_AVX512)
inline Vec load(const float* p, int n) {
  float full[LANES] = {};
  std::memcpy(full, p, n * sizeof(float));
  return load(full);
}
#endif
inline Vec load(const bf16* p, int n) {
  bf16 full[LANES] = {};
  std::memcpy(full, p, n * sizeof(bf16));
  return load(full);
}
template <typename T>
inline void store(T* p, Vec a, int n) {
  T full[LANES];
  store(full, a);
  std::memcpy(p, full, n * sizeof(T));
}
// Sum or maximum of the lanes, always halved in the same tree: 8 + 8, 4 + 4, 2 + 2, 1 + 1.
#if defined(SKIPFAST_AVX512) || defined(SKIPFAST_AVX2)
#define HALVE(op4, op1)                                                           \
  __m128 quarter = op4(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)); \
  quarter = op4(quarter, _mm_movehl_ps(quarter, quarter));                        \
  return _mm_cvtss_f32(op1(quarter, _mm_movehdup_ps(quarter)));
inline float sum_lanes(Vec a) {
  __m256 half = _mm256_add_ps(low_half(a), high_half(a));
  HALVE(_mm_add_ps, _mm_add_ss)
}
inline float max_lanes(Vec a) {
  __m256 half = _mm256_max_ps(low_half(a), high_half(a));
  HALVE(_mm_max_ps, _mm_max_ss)
}
#undef HALVE
#else
inline float sum_lanes(Vec a) {
  for (int half = LANES / 2; half; half /= 2)
    for (int i = 0; i < half; i++) a.v[i] += a.v[i + half];
  return a.v[0];
}
inline float max_lanes(Vec a) {
  for (int half = LANES / 2; half; half /= 2)
    for (int i = 0; i < half; i++) a.v[i] = a.v[i] > a.v[i + half] ? a.v[i] : a.v[i + half];
  return a.v[0];
}
#endif

// exp to about 1e-7 relative on [-87.3, 88.3], clamped outside (so exp(-inf) is 1e-38: callers mask what must be zero).
inline Vec exp(Vec x) {
  x = min(splat(88.3f), max(splat(-87.3f), x));
  Vec n = nearest(mul(x, splat(1.44269504f)));
  Vec r = fma(n, splat(-0.693359375f), x);   // ln 2 in two parts, the first exact
  r = fma(n, splat(2.12194440e-4f), r);
  Vec p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = add(fma(p, mul(r, r), r), splat(1.0f));
  return times_power_of_2(p, n);
}
inline float exp_scalar(float x) {
  float v[LANES];
  store(v, exp(splat(x)));
  return v[0];
}

inline void prefetch(const void* p) {
#if defined(__GNUC__)
  __builtin_prefetch(p, 0, 3);
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// Threads
// ---------------------------------------------------------------------------------------------------------------------
// Threads worth waking for an amount of work; waking costs a few microseconds. Never changes a bit of the result.
inline int64_t threads_for(int64_t work, int64_t work_per_thread) {
  if (work < 2 * work_per_thread) return 1;
  return std::min<int64_t>(torch::stable::get_num_threads(), work / work_per_thread);
}

// Call task(i) for i in [0, tasks) on `threads` threads, handed out one by one: a thread that the system takes away for
// a moment does not hold up the others' share.
template <typename F>
inline void for_each_task(int64_t tasks, int64_t threads, const F& task) {
  threads = std::min(threads, tasks);
  if (threads <= 1) {
    for (int64_t i = 0; i < tasks; i++) task(i);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) task(i);
  });
}

// Grow-only scratch, one per thread and use; 64-byte aligned, contents undefined.
struct Scratch {
  std::unique_ptr<float[]> memory;
  int64_t size = 0;
  float* get(int64_t floats) {
    if (size < floats + LANES) {
      memory.reset();
      memory.reset(new float[floats + LANES]);
      size = floats + LANES;
    }
    return (float*)((uintptr_t(memory.get()) + 63) & ~uintptr_t(63));
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// The micro-kernel: M rows times one block of 32 columns, sums in order of k
// ---------------------------------------------------------------------------------------------------------------------
constexpr int BLOCK = 32;           // columns per packed block, as in kernels/linear.py
constexpr int PREFETCH_BYTES = 4096;  // distance ahead in the weight stream: the next page, at which hardware stops

#if defined(SKIPFAST_AVX512)
constexpr int MAX_TILE = 12;  // rows per tile: 24 accumulators of 32 registers
#else
constexpr int MAX_TILE = 3;   // 12 accumulators of 16 registers
#endif

// What the micro-kernel reads for x: pairs of bf16 where the dot-product instruction exists, else fp32. A tile of M
// rows lies interleaved, word i of all rows side by side: rows a power of two apart would fight for cache sets.
#if defined(SKIPFAST_AVX512) && defined(__AVX512BF16__)
#define SKIPFAST_BF16_DOT
constexpr bool BF16_DOT = true;
#else
constexpr bool BF16_DOT = false;
#endif
template <typename T>
using Word = std::conditional_t<BF16_DOT && std::is_same_v<T, bf16>, uint32_t, float>;
template <typename T>
constexpr int64_t PER_WORD = BF16_DOT && std::is_same_v<T, bf16> ? 2 : 1;

// Write row m of a tile of `height` rows as interleaved words; an odd last bf16 gets a zero beside it.
template <typename T>
inline void interleave_row(const T* row, int64_t k, int64_t m, int64_t height, Word<T>* tile) {
  if constexpr (PER_WORD<T> == 1) {
    for (int64_t i = 0; i < k; i++) tile[i * height + m] = widen(row[i]);
  } else {
    for (int64_t i = 0; i < k / 2; i++) std::memcpy(tile + i * height + m, row + 2 * i, 4);
    if (k & 1) tile[k / 2 * height + m] = row[k - 1].bits;
  }
}

// Loops over the rows of a tile must be unrolled early, else the accumulators live in memory (a factor of two).
#define UNROLL _Pragma("GCC unroll 16")
template <int M>
inline void read_tile(Vec (&left)[M], Vec (&right)[M], const float* acc, int64_t stride, bool first) {
  UNROLL
  for (int m = 0; m < M; m++) {
    left[m] = first ? splat(0.0f) : load(acc + m * stride);
    right[m] = first ? splat(0.0f) : load(acc + m * stride + LANES);
  }
}
template <int M>
inline void write_tile(const Vec (&left)[M], const Vec (&right)[M], float* acc, int64_t stride) {
  UNROLL
  for (int m = 0; m < M; m++) store(acc + m * stride, left[m]), store(acc + m * stride + LANES, right[m]);
}

// acc[m][0..32) (+)= row m of x over k features * w, one packed block; `first` starts from zero. k is even for bf16.
template <int M>
void multiply_tile(const float* w, const float* x, int64_t k, float* acc, int64_t acc_stride, bool first) {
  Vec sum_left[M], sum_right[M];
  read_tile<M>(sum_left, sum_right, acc, acc_stride, first);
  for (int64_t i = 0; i < k; i++) {
    const float* row = w + i * BLOCK;
    Vec left = load(row), right = load(row + LANES);
    prefetch((const char*)row + PREFETCH_BYTES), prefetch((const char*)row + PREFETCH_BYTES + 64);
    UNROLL
    for (int m = 0; m < M; m++) {
      Vec value = splat(x[i * M + m]);
      sum_left[m] = fma(left, value, sum_left[m]), sum_right[m] = fma(right, value, sum_right[m]);
    }
  }
  write_tile<M>(sum_left, sum_right, acc, acc_stride);
}

#if defined(SKIPFAST_BF16_DOT)
template <int M>
void multiply_tile(const bf16* w, const uint32_t* x, int64_t k, float* acc, int64_t acc_stride, bool first) {
  Vec sum_left[M], sum_right[M];
  read_tile<M>(sum_left, sum_right, acc, acc_stride, first);
  for (int64_t i = 0; i < k; i += 2) {
    const bf16* row = w + i * BLOCK;
    __m512bh left = (__m512bh)_mm512_loadu_si512(row), right = (__m512bh)_mm512_loadu_si512(row + BLOCK);
    prefetch((const char*)row + PREFETCH_BYTES), prefetch((const char*)row + PREFETCH_BYTES + 64);
    UNROLL
    for (int m = 0; m < M; m++) {
      __m512bh value = (__m512bh)_mm512_set1_epi32(int(x[i / 2 * M + m]));
      sum_left[m].v = _mm512_dpbf16_ps(sum_left[m].v, left, value);
      sum_right[m].v = _mm512_dpbf16_ps(sum_right[m].v, right, value);
    }
  }
  write_tile<M>(sum_left, sum_right, acc, acc_stride);
}
#else
template <int M>
void multiply_tile(const bf16* w, const float* x, int64_t k, float* acc, int64_t acc_stride, bool first) {
  Vec sum_left[M], sum_right[M];
  read_tile<M>(sum_left, sum_right, acc, acc_stride, first);
  for (int64_t i = 0; i < k; i += 2) {
    const bf16* row = w + i * BLOCK;
    Vec left, right, left_next, right_next;
    load_pairs(row, left, left_next), load_pairs(row + BLOCK, right, right_next);
    prefetch((const char*)row + PREFETCH_BYTES), prefetch((const char*)row + PREFETCH_BYTES + 64);
    UNROLL
    for (int m = 0; m < M; m++) {
      Vec value = splat(x[i * M + m]), next = splat(x[(i + 1) * M + m]);
      sum_left[m] = fma(left_next, next, fma(left, value, sum_left[m]));
      sum_right[m] = fma(right_next, next, fma(right, value, sum_right[m]));
    }
  }
  write_tile<M>(sum_left, sum_right, acc, acc_stride);
}
#endif

template <typename T>
using Tile = void (*)(const T*, const Word<T>*, int64_t, float*, int64_t, bool);
template <typename T, size_t... M>
constexpr std::array<Tile<T>, sizeof...(M)> tile_table(std::index_sequence<M...>) {
  return {static_cast<Tile<T>>(multiply_tile<int(M) + 1>)...};
}
// The micro-kernel for a number of rows in 1..MAX_TILE.
template <typename T>
inline Tile<T> tile_of(int64_t rows) {
  static constexpr auto table = tile_table<T>(std::make_index_sequence<MAX_TILE>{});
  return table[rows - 1];
}
// Rows per tile so that tiles are of nearly equal height: 13 rows are 7 + 6, not 12 + 1.
inline int64_t even_tile(int64_t rows, int64_t limit) {
  int64_t tiles = (rows + limit - 1) / limit;
  return (rows + tiles - 1) / tiles;
}

// ---------------------------------------------------------------------------------------------------------------------
// linear
// ---------------------------------------------------------------------------------------------------------------------
constexpr int64_t GROUP = 4;            // column blocks that share a pass over x when there are many rows
constexpr int64_t PANEL_TILES = 8;      // row tiles whose partial sums are held at once
constexpr int64_t CHUNK_BYTES = 1024;   // of k per pass: 4 blocks of weight stay in the second-level cache
constexpr int64_t LINEAR_BYTES_PER_THREAD = 256 << 10;

template <typename T>
inline void store_block(const float* acc, T* y, int64_t columns) {
  if (columns >= BLOCK) return store(y, load(acc)), store(y + LANES, load(acc + LANES));
  store(y, load(acc), int(std::min<int64_t>(columns, LANES)));
  if (columns > LANES) store(y + LANES, load(acc + LANES), int(columns - LANES));
}

template <typename T>
struct Linear {
  const T *x, *w;
  T* y;
  int64_t rows, k, n;
  int64_t tile;          // rows per tile
  const Word<T>* words;  // x, tile after tile, each interleaved

  int64_t blocks() const { return (n + BLOCK - 1) / BLOCK; }

  // Few rows: one tile, the weight block streams past once.
  void few_rows(int64_t block) const {
    float acc[MAX_TILE * BLOCK];
    tile_of<T>(rows)(w + block * k * BLOCK, words, k, acc, BLOCK, true);
    for (int64_t m = 0; m < rows; m++) store_block(acc + m * BLOCK, y + m * n + block * BLOCK, n - block * BLOCK);
  }

  // Many rows: a group of blocks, k in chunks, so that weight and x are reused from the near caches. Same sums.
  void many_rows(int64_t group) const {
    static thread_local Scratch scratch;
    const int64_t first_block = group * GROUP, last_block = std::min(first_block + GROUP, blocks());
    const int64_t chunk = CHUNK_BYTES / int64_t(sizeof(T)), stride = GROUP * BLOCK;
    const int64_t panel = tile * PANEL_TILES;
    float* acc = scratch.get(panel * stride);
    for (int64_t top = 0; top < rows; top += panel) {
      const int64_t bottom = std::min(top + panel, rows);
      for (int64_t k0 = 0; k0 < k; k0 += chunk)
        for (int64_t r = top; r < bottom; r += tile) {
          const int64_t height = std::min(tile, bottom - r);
          for (int64_t b = first_block; b < last_block; b++)
            tile_of<T>(height)(w + (b * k + k0) * BLOCK, words + (r * k + k0 * height) / PER_WORD<T>,
                               std::min(chunk, k - k0),
                               acc + (r - top) * stride + (b - first_block) * BLOCK, stride, k0 == 0);
        }
      for (int64_t r = top; r < bottom; r++)
        for (int64_t b = first_block; b < last_block; b++)
          store_block(acc + (r - top) * stride + (b - first_block) * BLOCK, y + r * n + b * BLOCK, n - b * BLOCK);
    }
  }

  void interleave(int64_t threads) {
    static thread_local Scratch scratch;
    if constexpr (std::is_same_v<T, float> || BF16_DOT)
      if (rows == 1 && uintptr_t(x) % 4 == 0) {  // already a tile of height one
        words = (const Word<T>*)x;
        return;
      }
    auto* to = (Word<T>*)scratch.get(rows * k / PER_WORD<T>);
    for_each_task((rows + tile - 1) / tile, threads, [&](int64_t i) {
      const int64_t top = i * tile, height = std::min(tile, rows - top);
      for (int64_t m = 0; m < height; m++)
        interleave_row(x + (top + m) * k, k, m, height, to + top * k / PER_WORD<T>);
    });
    words = to;
  }

  void run() {
    if (!rows || !n) return;
    const int64_t bytes = blocks() * BLOCK * k * int64_t(sizeof(T));
    const bool few = rows <= MAX_TILE;
    const int64_t threads = threads_for(few ? bytes : bytes * (rows / 4), LINEAR_BYTES_PER_THREAD);
    tile = even_tile(rows, MAX_TILE);
    interleave(few ? 1 : threads);
    if (few)
      for_each_task(blocks(), threads, [&](int64_t block) { few_rows(block); });
    else
      for_each_task((blocks() + GROUP - 1) / GROUP, threads, [&](int64_t group) { many_rows(group); });
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// rms_norm and swiglu
// ---------------------------------------------------------------------------------------------------------------------
constexpr int64_t ELEMENTS_PER_THREAD = 32 << 10;

template <typename T>
void rms_norm_row(const T* x, const T* weight, T* y, int64_t d, float eps) {
  Vec sums[4] = {splat(0.0f), splat(0.0f), splat(0.0f), splat(0.0f)};
  int64_t i = 0;
  for (int which = 0; i < d; i += LANES, which = (which + 1) & 3) {
    Vec v = i + LANES <= d ? load(x + i) : load(x + i, int(d - i));
    sums[which] = fma(v, v, sums[which]);
  }
  const float squares = sum_lanes(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
  const Vec scale = splat(1.0f / std::sqrt(squares / float(d) + eps));
  for (i = 0; i < d; i += LANES) {
    const int lanes = int(std::min<int64_t>(LANES, d - i));
    T rounded[LANES];
    if (lanes == LANES) {
      store(rounded, mul(load(x + i), scale));
      store(y + i, mul(load(rounded), load(weight + i)));
    } else {
      store(rounded, mul(load(x + i, lanes), scale));
      store(y + i, mul(load(rounded), load(weight + i, lanes)), lanes);
    }
  }
}

template <typename T>
inline Vec silu_times(Vec gate, Vec up) {
  T rounded[LANES];
  store(rounded, div(gate, add(splat(1.0f), exp(sub(splat(0.0f), gate)))));
  return mul(load(rounded), up);
}

template <typename T>
void swiglu_row(const T* gate, T* y, int64_t f) {
  const T* up = gate + f;
  int64_t i = 0;
  for (; i + LANES <= f; i += LANES) store(y + i, silu_times<T>(load(gate + i), load(up + i)));
  const int rest = int(f - i);
  if (rest) store(y + i, silu_times<T>(load(gate + i, rest), load(up + i, rest)), rest);
}

// ---------------------------------------------------------------------------------------------------------------------
// attention
// ---------------------------------------------------------------------------------------------------------------------
// Slots are cut at fixed absolute positions: chunks of 64 inside segments of 512. Inside a segment a row's softmax runs
// online from chunk to chunk; segments are then merged in order. Both cuts are part of the arithmetic of every row, so
// computing segments on several threads (long contexts, few rows) gives the same bits as computing them one by one.
constexpr int64_t CHUNK = 64;
constexpr int64_t SEGMENT = 512;
constexpr int64_t MAX_QUERIES = 32;               // queries (row, head) of one kv head that share a task
constexpr int64_t ATTENTION_MACS_PER_THREAD = 256 << 10;
#if defined(SKIPFAST_AVX512)
constexpr int VALUE_QUERIES = 4, VALUE_VECS = 4;  // register tile of probabilities times values
#else
constexpr int VALUE_QUERIES = 2, VALUE_VECS = 2;
#endif

#if defined(SKIPFAST_AVX512)
// out[c][0..16) = in[0..16)[c] for c < columns; words beyond rows are zero.
inline void transpose_words(const uint32_t* in, int64_t in_stride, int rows, int columns, uint32_t* out) {
  __m512i a[16], b[16];
  const __mmask16 mask = lane_mask(columns);
  for (int i = 0; i < 16; i++)
    a[i] = i < rows ? _mm512_maskz_loadu_epi32(mask, in + i * in_stride) : _mm512_setzero_si512();
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; j++) {  // a[i + c] = columns c, c + 4, c + 8, c + 12 of rows i..i + 3
      a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
      a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
    }
  for (int c = 0; c < 4; c++) {
    __m512i low01 = _mm512_shuffle_i32x4(a[c], a[c + 4], 0x88), high01 = _mm512_shuffle_i32x4(a[c], a[c + 4], 0xdd);
    __m512i low23 = _mm512_shuffle_i32x4(a[c + 8], a[c + 12], 0x88);
    __m512i high23 = _mm512_shuffle_i32x4(a[c + 8], a[c + 12], 0xdd);
    b[c] = _mm512_shuffle_i32x4(low01, low23, 0x88);
    b[c + 8] = _mm512_shuffle_i32x4(low01, low23, 0xdd);
    b[c + 4] = _mm512_shuffle_i32x4(high01, high23, 0x88);
    b[c + 12] = _mm512_shuffle_i32x4(high01, high23, 0xdd);
  }
  for (int c = 0; c < columns; c++) _mm512_storeu_si512(out + c * BLOCK, b[c]);
}
#endif

// Lay `slots` (<= 64) keys [slot][E] out as two packed blocks, the layout of a linear weight with one column per slot.
template <typename T>
void pack_keys(const T* keys, int64_t slots, int64_t e, int64_t e_padded, T* packed) {
  constexpr int64_t PER = 4 / sizeof(T);  // a 32-bit word is a pair of bf16 or one fp32
  const int64_t words = e_padded / PER;
  uint32_t* out = (uint32_t*)packed;
  for (int64_t block = 0; block * BLOCK < slots; block++, out += words * BLOCK) {
    const T* first = keys + block * BLOCK * e;
    const int64_t rows = std::min<int64_t>(BLOCK, slots - block * BLOCK);
#if defined(SKIPFAST_AVX512)
    if (e % PER == 0) {
      for (int64_t c = 0; c < words; c += 16)
        for (int64_t r = 0; r < BLOCK; r += 16)
          transpose_words((const uint32_t*)(first + r * e) + c, e / PER, int(std::min<int64_t>(16, rows - r)),
                          int(std::min<int64_t>(16, words - c)), out + c * BLOCK + r);
      continue;
    }
#endif
    T* block_out = (T*)out;
    for (int64_t c = 0; c < words; c++)
      for (int64_t r = 0; r < BLOCK; r++)
        for (int64_t i = 0; i < PER; i++) {
          const int64_t column = c * PER + i;
          block_out[(c * BLOCK + r) * PER + i] = r < rows && column < e ? first[r * e + column] : T{};
        }
  }
}

// out[m][0..16 V) += sum over slots of probs[m][slot] * values[slot], in order of slot. `lanes` < 16 only with V = 1.
template <typename T, int M, int V>
inline void add_values_tile(const float* probs, const T* values, int64_t e, int64_t begin, int64_t end, float* out,
                            int64_t out_stride, int lanes) {
  Vec sum[M][V], value[V];
  UNROLL
  for (int m = 0; m < M; m++) {
    UNROLL
    for (int i = 0; i < V; i++) sum[m][i] = load(out + m * out_stride + i * LANES);
  }
  for (int64_t slot = begin; slot < end; slot++) {
    UNROLL
    for (int i = 0; i < V; i++)
      value[i] = lanes == LANES ? load(values + slot * e + i * LANES) : load(values + slot * e, lanes);
    UNROLL
    for (int m = 0; m < M; m++) {
      Vec p = splat(probs[m * CHUNK + slot]);
      UNROLL
      for (int i = 0; i < V; i++) sum[m][i] = fma(p, value[i], sum[m][i]);
    }
  }
  UNROLL
  for (int m = 0; m < M; m++) {
    UNROLL
    for (int i = 0; i < V; i++) store(out + m * out_stride + i * LANES, sum[m][i]);
  }
}

template <typename T, int M>
void add_values(const float* probs, const T* values, int64_t e, int64_t begin, int64_t end, float* out,
                int64_t stride) {
  if (begin >= end) return;
  int64_t d = 0;
  for (; d + VALUE_VECS * LANES <= e; d += VALUE_VECS * LANES)
    add_values_tile<T, M, VALUE_VECS>(probs, values + d, e, begin, end, out + d, stride, LANES);
  for (; d + LANES <= e; d += LANES)
    add_values_tile<T, M, 1>(probs, values + d, e, begin, end, out + d, stride, LANES);
  if (d < e) add_values_tile<T, M, 1>(probs, values + d, e, begin, end, out + d, stride, int(e - d));
}

template <typename T>
struct Attention {
  const T *q, *k, *v;
  T *k_cache, *v_cache, *out;
  const int64_t* positions;
  int64_t q_stride, k_stride, v_stride;  // elements between rows
  int64_t rows, heads, groups, e, slots;
  int64_t queries, tile, tiles;          // queries per kv head, per task; tasks per kv head

  int64_t per_group() const { return heads / groups; }
  int64_t e_even() const { return e + (e & 1); }
  int64_t e_vec() const { return (e + LANES - 1) / LANES * LANES; }
  int64_t state_size() const { return e_vec() + LANES; }  // unnormalised output, then maximum, then sum

  void write_cache(int64_t g) const {
    for (int64_t t = 0; t < rows; t++) {
      const int64_t to = (g * slots + positions[t]) * e;
      std::memcpy(k_cache + to, k + t * k_stride + g * e, e * sizeof(T));
      std::memcpy(v_cache + to, v + t * v_stride + g * e, e * sizeof(T));
    }
  }

  int64_t context(int64_t query) const { return positions[query / per_group()] + 1; }
  int64_t longest(int64_t first, int64_t last) const {
    int64_t most = 0;
    for (int64_t i = first; i < last; i++) most = std::max(most, context(i));
    return most;
  }

  // Queries first..last of kv head g as interleaved tiles for the micro-kernel.
  void gather_queries(int64_t g, int64_t first, int64_t last, int64_t row_tile, Word<T>* to) const {
    for (int64_t top = first; top < last; top += row_tile) {
      const int64_t height = std::min(row_tile, last - top);
      for (int64_t i = top; i < top + height; i++) {
        const int64_t head = g * per_group() + i % per_group();
        interleave_row(q + i / per_group() * q_stride + head * e, e, i - top, height, to);
      }
      if (PER_WORD<T> == 1 && (e & 1)) std::fill_n(to + e * height, height, Word<T>(0));
      to += height * e_even() / PER_WORD<T>;
    }
  }

  // Softmax of one query over n slots of a chunk, on top of its state: scores become probabilities in place.
  void softmax_chunk(float* scores, int64_t n, float* state) const {
    const Vec scale = splat(1.0f / std::sqrt(float(e)));
    const int64_t end = (n + LANES - 1) / LANES * LANES;  // lanes n..end count as minus infinity
    float &peak = state[e_vec()], &sum = state[e_vec() + 1];
    for (int64_t i = n; i < end; i++) scores[i] = -std::numeric_limits<float>::infinity();
    Vec top = splat(-std::numeric_limits<float>::infinity()), total = splat(0.0f);
    for (int64_t i = 0; i < end; i += LANES) {
      Vec s = mul(load(scores + i), scale);
      store(scores + i, s);
      top = max(top, s);
    }
    const float new_peak = std::max(peak, max_lanes(top));
    for (int64_t i = 0; i < end; i += LANES) {
      Vec p = exp(sub(load(scores + i), splat(new_peak)));
      if (i + LANES > n) {
        store(scores + i, p);
        p = load(scores + i, int(n - i));
      }
      store(scores + i, p);
      total = add(total, p);
    }
    if (new_peak != peak) {
      const float shrink = exp_scalar(peak - new_peak);
      for (int64_t d = 0; d < e_vec(); d += LANES) store(state + d, mul(load(state + d), splat(shrink)));
      sum *= shrink;
    }
    sum += sum_lanes(total);
    peak = new_peak;
  }

  // States of queries first..last over one segment of slots, from scratch.
  void segment(int64_t g, int64_t first, int64_t last, int64_t index, float* states) const {
    static thread_local Scratch query_scratch, key_scratch, score_scratch;
    const int64_t count = last - first, row_tile = even_tile(count, MAX_TILE);
    auto* words = (Word<T>*)query_scratch.get(count * e_even());
    T* keys = (T*)key_scratch.get(CHUNK * e_even());
    float* scores = score_scratch.get(count * CHUNK);
    gather_queries(g, first, last, row_tile, words);
    for (int64_t i = 0; i < count; i++) {
      std::fill_n(states + i * state_size(), state_size(), 0.0f);
      states[i * state_size() + e_vec()] = -std::numeric_limits<float>::infinity();
    }
    const int64_t end = std::min(longest(first, last), (index + 1) * SEGMENT);
    for (int64_t begin = index * SEGMENT; begin < end; begin += CHUNK) {
      const int64_t used = std::min(CHUNK, end - begin), at = (g * slots + begin) * e;
      pack_keys(k_cache + at, used, e, e_even(), keys);
      for (int64_t i = 0; i < count; i += row_tile) {
        const int64_t height = std::min(row_tile, count - i);
        for (int64_t b = 0; b * BLOCK < used; b++)
          tile_of<T>(height)(keys + b * BLOCK * e_even(), words + i * e_even() / PER_WORD<T>, e_even(),
                             scores + i * CHUNK + b * BLOCK, CHUNK, true);
      }
      for (int64_t i = 0; i < count; i += VALUE_QUERIES) {
        const int64_t some = std::min<int64_t>(VALUE_QUERIES, count - i);
        int64_t n[VALUE_QUERIES], together = CHUNK;
        for (int64_t j = 0; j < some; j++) {
          n[j] = std::max<int64_t>(0, std::min(CHUNK, context(first + i + j) - begin));
          together = std::min(together, n[j]);
          if (n[j]) softmax_chunk(scores + (i + j) * CHUNK, n[j], states + (i + j) * state_size());
        }
        if (some < VALUE_QUERIES) together = 0;
        add_values<T, VALUE_QUERIES>(scores + i * CHUNK, v_cache + at, e, 0, together, states + i * state_size(),
                                     state_size());
        for (int64_t j = 0; j < some; j++)
          add_values<T, 1>(scores + (i + j) * CHUNK, v_cache + at, e, together, n[j], states + (i + j) * state_size(),
                           state_size());
      }
    }
  }

  // Merge the state of the next segment into a running state.
  void merge(float* state, const float* next) const {
    const int64_t d0 = e_vec();
    const float peak = std::max(state[d0], next[d0]);
    const float keep = exp_scalar(state[d0] - peak), take = exp_scalar(next[d0] - peak);
    for (int64_t d = 0; d < d0; d += LANES)
      store(state + d, fma(load(state + d), splat(keep), mul(load(next + d), splat(take))));
    state[d0 + 1] = state[d0 + 1] * keep + next[d0 + 1] * take;
    state[d0] = peak;
  }

  void finish(int64_t g, int64_t query, const float* state) const {
    T* to = out + ((query / per_group()) * heads + g * per_group() + query % per_group()) * e;
    const Vec sum = splat(state[e_vec() + 1]);
    for (int64_t d = 0; d < e; d += LANES) {
      Vec value = div(load(state + d), sum);
      if (d + LANES <= e) store(to + d, value); else store(to + d, value, int(e - d));
    }
  }

  // All segments of one task, one after the other.
  void task(int64_t index) const {
    static thread_local Scratch scratch;
    const int64_t g = index / tiles, first = index % tiles * tile, last = std::min(first + tile, queries);
    if (first >= last) return;
    float* states = scratch.get(2 * (last - first) * state_size());
    float* next = states + (last - first) * state_size();
    segment(g, first, last, 0, states);
    const int64_t segments = (longest(first, last) + SEGMENT - 1) / SEGMENT;
    for (int64_t s = 1; s < segments; s++) {
      segment(g, first, last, s, next);
      for (int64_t i = first; i < last; i++)
        if (context(i) > s * SEGMENT) merge(states + (i - first) * state_size(), next + (i - first) * state_size());
    }
    for (int64_t i = first; i < last; i++) finish(g, i, states + (i - first) * state_size());
  }

  // The same with a task per segment, for long contexts and few queries.
  void run_split(int64_t segments, int64_t threads) const {
    static thread_local Scratch scratch;
    float* states = scratch.get(groups * segments * queries * state_size());
    auto state_of = [&](int64_t g, int64_t s, int64_t i) {
      return states + ((g * segments + s) * queries + i) * state_size();
    };
    for_each_task(groups * tiles * segments, threads, [&](int64_t index) {
      const int64_t s = index % segments, g = index / segments / tiles, first = index / segments % tiles * tile;
      const int64_t last = std::min(first + tile, queries);
      if (first < last) segment(g, first, last, s, state_of(g, s, first));
    });
    for_each_task(groups, threads, [&](int64_t g) {
      for (int64_t i = 0; i < queries; i++) {
        for (int64_t s = 1; s * SEGMENT < context(i); s++) merge(state_of(g, 0, i), state_of(g, s, i));
        finish(g, i, state_of(g, 0, i));
      }
    });
  }

  void run() {
    if (!rows) return;
    queries = rows * per_group();
    const int64_t most = longest(0, queries), segments = (most + SEGMENT - 1) / SEGMENT;
    const int64_t threads = threads_for(rows * heads * most * e, ATTENTION_MACS_PER_THREAD);
    tiles = (queries + MAX_QUERIES - 1) / MAX_QUERIES;
    const bool split = segments > 1 && groups * tiles < 2 * threads && queries <= 4 * MAX_QUERIES;
    if (!split && groups * tiles < threads) tiles = std::min(queries, (threads + groups - 1) / groups);
    tile = (queries + tiles - 1) / tiles;
    for_each_task(groups, rows * groups * e > ELEMENTS_PER_THREAD ? threads : 1, [&](int64_t g) { write_cache(g); });
    if (split && threads > 1)
      run_split(segments, threads);
    else
      for_each_task(groups * tiles, threads, [&](int64_t index) { task(index); });
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// The ops: check, allocate, dispatch on dtype
// ---------------------------------------------------------------------------------------------------------------------
inline int32_t dtype_of(const Tensor& tensor) {
  int32_t dtype;
  aoti_torch_get_dtype(tensor.get(), &dtype);
  return dtype;
}
inline bool is_bf16(const Tensor& tensor) { return dtype_of(tensor) == aoti_torch_dtype_bfloat16(); }

inline void check_dtype(const char* op, const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(is_bf16(tensor) || dtype_of(tensor) == aoti_torch_dtype_float32(), op, ": ", name,
                  " must be bfloat16 or float32");
}
inline void check_same_dtype(const char* op, const char* name, const Tensor& tensor, const Tensor& first) {
  STD_TORCH_CHECK(dtype_of(tensor) == dtype_of(first), op, ": ", name, " must have the dtype of the first argument");
}
inline void check_contiguous(const char* op, const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_contiguous(), op, ": ", name, " must be contiguous");
}

// A new contiguous tensor like x, with another last dimension.
Tensor new_result(const Tensor& x, int64_t last_size) {
  const int64_t dims = x.dim();
  const auto old_sizes = x.sizes();
  int64_t sizes[16], strides[16];
  STD_TORCH_CHECK(dims <= 16, "at most 16 dimensions are supported, got ", dims);
  for (int64_t i = dims - 1, stride = 1; i >= 0; i--) {
    sizes[i] = i == dims - 1 ? last_size : old_sizes[i];
    strides[i] = stride;
    stride *= std::max<int64_t>(sizes[i], 1);
  }
  AtenTensorHandle handle;
  const int32_t cpu = aoti_torch_device_type_cpu();
  const auto code = aoti_torch_empty_strided(dims, sizes, strides, dtype_of(x), cpu, 0, &handle);
  STD_TORCH_CHECK(code == 0, "cannot allocate the result");
  return Tensor(handle);
}

template <typename T>
inline T* data(const Tensor& tensor) { return (T*)tensor.data_ptr(); }

template <typename T>
void linear_as(const Tensor& x, const Tensor& packed, const Tensor& y, int64_t rows, int64_t k, int64_t n) {
  Linear<T>{(const T*)x.data_ptr(), (const T*)packed.data_ptr(), (T*)y.data_ptr(), rows, k, n, 1, nullptr}.run();
}

Tensor linear(Tensor x, Tensor packed, int64_t out_features) {
  const bool pairs = is_bf16(x);
  check_dtype("linear", "x", x);
  check_same_dtype("linear", "packed", packed, x);
  check_contiguous("linear", "x", x);
  check_contiguous("linear", "packed", packed);
  STD_TORCH_CHECK(x.dim() >= 1, "linear: x must have at least one dimension");
  const int64_t k = x.size(x.dim() - 1);
  STD_TORCH_CHECK(packed.dim() == (pairs ? 4 : 3) && packed.size(2) == BLOCK && (!pairs || packed.size(3) == 2),
                  "linear: packed must be [N/32, K/2, 32, 2] (bfloat16) or [N/32, K, 32] (float32); see linear.pack");
  const int64_t packed_k = packed.size(1) * (pairs ? 2 : 1), padded = packed.size(0) * BLOCK;
  STD_TORCH_CHECK(packed_k == k, "linear: x has ", k, " features, the weight takes ", packed_k);
  STD_TORCH_CHECK(out_features <= padded && out_features > padded - BLOCK, "linear: out_features must be in ",
                  padded - BLOCK + 1, "..", padded, " for this weight, got ", out_features);
  Tensor y = new_result(x, out_features);
  const int64_t rows = k ? x.numel() / k : 0;
  if (pairs) linear_as<bf16>(x, packed, y, rows, k, out_features);
  else linear_as<float>(x, packed, y, rows, k, out_features);
  return y;
}

template <typename T>
void rms_norm_rows(const T* from, const T* scale, T* to, int64_t rows, int64_t d, float eps) {
  const int64_t threads = threads_for(rows * d, ELEMENTS_PER_THREAD);
  constexpr int64_t step = 8;  // rows per task
  for_each_task((rows + step - 1) / step, threads, [&](int64_t i) {
    for (int64_t r = i * step; r < std::min(rows, (i + 1) * step); r++)
      rms_norm_row(from + r * d, scale, to + r * d, d, eps);
  });
}

Tensor rms_norm(Tensor x, Tensor weight, double eps) {
  check_dtype("rms_norm", "x", x);
  check_same_dtype("rms_norm", "weight", weight, x);
  check_contiguous("rms_norm", "x", x);
  check_contiguous("rms_norm", "weight", weight);
  STD_TORCH_CHECK(x.dim() >= 1 && weight.dim() == 1, "rms_norm: x must be [..., D] and weight [D]");
  const int64_t d = x.size(x.dim() - 1);
  STD_TORCH_CHECK(weight.size(0) == d, "rms_norm: x has ", d, " features, the weight ", weight.size(0));
  Tensor y = new_result(x, d);
  if (!x.numel()) return y;
  const int64_t rows = x.numel() / d;
  if (is_bf16(x)) rms_norm_rows(data<bf16>(x), data<bf16>(weight), data<bf16>(y), rows, d, float(eps));
  else rms_norm_rows(data<float>(x), data<float>(weight), data<float>(y), rows, d, float(eps));
  return y;
}

template <typename T>
void swiglu_rows(const T* from, T* to, int64_t rows, int64_t f) {
  const int64_t threads = threads_for(rows * f, ELEMENTS_PER_THREAD);
  for_each_task(rows, threads, [&](int64_t r) { swiglu_row(from + r * 2 * f, to + r * f, f); });
}

Tensor swiglu(Tensor gate_up) {
  check_dtype("swiglu", "gate_up", gate_up);
  check_contiguous("swiglu", "gate_up", gate_up);
  STD_TORCH_CHECK(gate_up.dim() >= 1 && gate_up.size(gate_up.dim() - 1) % 2 == 0,
                  "swiglu: gate_up must be [..., 2F], gate first");
  const int64_t f = gate_up.size(gate_up.dim() - 1) / 2;
  Tensor y = new_result(gate_up, f);
  if (!y.numel()) return y;
  const int64_t rows = y.numel() / f;
  if (is_bf16(gate_up)) swiglu_rows(data<bf16>(gate_up), data<bf16>(y), rows, f);
  else swiglu_rows(data<float>(gate_up), data<float>(y), rows, f);
  return y;
}

void check_positions(const char* op, const Tensor& positions, int64_t slots) {
  STD_TORCH_CHECK(dtype_of(positions) == aoti_torch_dtype_int64(), op, ": positions must be int64");
  check_contiguous(op, "positions", positions);
  for (int64_t t = 0; t < positions.numel(); t++)
    STD_TORCH_CHECK(data<int64_t>(positions)[t] >= 0 && data<int64_t>(positions)[t] < slots, op,
                    ": positions must be in 0..", slots - 1, ", got ", data<int64_t>(positions)[t]);
}

template <typename T>
void attention_as(const Tensor& q, const Tensor& k, const Tensor& v, Tensor& k_cache, Tensor& v_cache,
                  const Tensor& positions, const Tensor& y) {
  Attention<T> op{};
  op.q = (const T*)q.data_ptr(), op.k = (const T*)k.data_ptr(), op.v = (const T*)v.data_ptr();
  op.k_cache = (T*)k_cache.data_ptr(), op.v_cache = (T*)v_cache.data_ptr(), op.out = (T*)y.data_ptr();
  op.positions = (const int64_t*)positions.data_ptr();
  op.q_stride = q.stride(0), op.k_stride = k.stride(0), op.v_stride = v.stride(0);
  op.rows = q.size(0), op.heads = q.size(1), op.groups = k.size(1), op.e = q.size(2), op.slots = k_cache.size(1);
  op.run();
}

Tensor attention(Tensor q, Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor positions) {
  check_dtype("attention", "q", q);
  check_same_dtype("attention", "k", k, q), check_same_dtype("attention", "v", v, q);
  check_same_dtype("attention", "k_cache", k_cache, q), check_same_dtype("attention", "v_cache", v_cache, q);
  check_contiguous("attention", "k_cache", k_cache), check_contiguous("attention", "v_cache", v_cache);
  STD_TORCH_CHECK(q.dim() == 3 && k.dim() == 3 && v.dim() == 3 && k_cache.dim() == 3 && v_cache.dim() == 3,
                  "attention: q must be [T, H, E], k and v [T, G, E], the caches [G, S, E]");
  const int64_t rows = q.size(0), heads = q.size(1), e = q.size(2), groups = k.size(1), slots = k_cache.size(1);
  STD_TORCH_CHECK(groups > 0 && heads % groups == 0, "attention: ", heads, " query heads cannot share ", groups,
                  " kv heads");
  for (const Tensor* one : {&k, &v})
    STD_TORCH_CHECK(one->size(0) == rows && one->size(1) == groups && one->size(2) == e,
                    "attention: k and v must be [", rows, ", ", groups, ", ", e, "] like q");
  for (const Tensor* one : {&k_cache, &v_cache})
    STD_TORCH_CHECK(one->size(0) == groups && one->size(1) == slots && one->size(2) == e,
                    "attention: both caches must be [", groups, ", S, ", e, "]");
  for (const Tensor* one : {&q, &k, &v})
    STD_TORCH_CHECK(rows == 0 || e == 0 || (one->stride(2) == 1 && (one->size(1) == 1 || one->stride(1) == e)),
                    "attention: heads and features of q, k and v must be contiguous within a row");
  STD_TORCH_CHECK(positions.dim() == 1 && positions.size(0) == rows, "attention: positions must be [", rows, "]");
  check_positions("attention", positions, slots);
  Tensor y = new_result(q, e);
  if (!y.numel()) return y;
  if (is_bf16(q)) attention_as<bf16>(q, k, v, k_cache, v_cache, positions, y);
  else attention_as<float>(q, k, v, k_cache, v_cache, positions, y);
  return y;
}

// ---------------------------------------------------------------------------------------------------------------------
// block: a whole transformer layer in one call, the same operations in the same order as one by one (model.Block)
// ---------------------------------------------------------------------------------------------------------------------

// Rotate `heads` vectors of size e in place, halves paired: x * cos + (-second, first) * sin in fp32, no fusing.
template <typename T>
void rope_row(T* x, const float* cos, const float* sin, int64_t heads, int64_t e) {
  const int64_t half = e / 2;
  for (int64_t h = 0; h < heads; h++, x += e)
    for (int64_t i = 0; i < half; i += LANES) {
      const int n = int(std::min<int64_t>(LANES, half - i));
      Vec first = load(x + i, n), second = load(x + half + i, n);
      Vec minus = sub(splat(0.0f), second);
      store(x + i, add(mul(first, load(cos + i, n)), mul(minus, load(sin + i, n))), n);
      store(x + half + i, add(mul(second, load(cos + half + i, n)), mul(first, load(sin + half + i, n))), n);
    }
}

template <typename T>
void add_to(T* x, const T* y, int64_t n) {
  for (int64_t i = 0; i < n; i += LANES) {
    const int lanes = int(std::min<int64_t>(LANES, n - i));
    store(x + i, add(load(x + i, lanes), load(y + i, lanes)), lanes);
  }
}

template <typename T>
struct Block {
  T* hidden;  // [rows, d], changed in place
  const float *cos, *sin;
  const T *attention_norm, *wqkv, *wo, *mlp_norm, *w13, *w2;
  Attention<T> attention;  // shapes and caches
  int64_t d, f;
  float eps;

  static T* scratch(int which, int64_t elements) {
    static thread_local Scratch all[5];
    return (T*)all[which].get(elements * int64_t(sizeof(T)) / int64_t(sizeof(float)) + 1);
  }
  void multiply(const T* x, const T* w, T* y, int64_t k, int64_t n) const {
    Linear<T>{x, w, y, attention.rows, k, n, 1, nullptr}.run();
  }

  void run_attention() {
    Attention<T>& a = attention;
    const int64_t width = (a.heads + 2 * a.groups) * a.e;
    T *normed = scratch(0, a.rows * d), *qkv = scratch(1, a.rows * width), *mixed = scratch(2, a.rows * a.heads * a.e);
    rms_norm_rows(hidden, attention_norm, normed, a.rows, d, eps);
    multiply(normed, wqkv, qkv, d, width);
    for (int64_t t = 0; t < a.rows; t++)
      rope_row(qkv + t * width, cos + t * a.e, sin + t * a.e, a.heads + a.groups, a.e);
    a.q = qkv, a.k = qkv + a.heads * a.e, a.v = a.k + a.groups * a.e, a.out = mixed;
    a.q_stride = a.k_stride = a.v_stride = width;
    a.run();
    multiply(mixed, wo, normed, a.heads * a.e, d);
    add_to(hidden, normed, a.rows * d);
  }
  void run_mlp() {
    const int64_t rows = attention.rows;
    T *normed = scratch(0, rows * d), *gate_up = scratch(3, rows * 2 * f), *active = scratch(4, rows * f);
    rms_norm_rows(hidden, mlp_norm, normed, rows, d, eps);
    multiply(normed, w13, gate_up, d, 2 * f);
    swiglu_rows(gate_up, active, rows, f);
    multiply(active, w2, normed, f, d);
    add_to(hidden, normed, rows * d);
  }
};

inline int64_t packed_columns(const Tensor& packed) { return packed.size(0) * BLOCK; }
inline int64_t packed_features(const Tensor& packed) { return packed.size(1) * (packed.dim() == 4 ? 2 : 1); }

Tensor block(Tensor hidden, Tensor cos, Tensor sin, Tensor positions, Tensor attention_norm, Tensor wqkv, Tensor wo,
             Tensor mlp_norm, Tensor w13, Tensor w2, Tensor k_cache, Tensor v_cache, int64_t heads, double eps,
             bool run_attention, bool run_mlp) {
  check_dtype("block", "hidden", hidden);
  STD_TORCH_CHECK(hidden.dim() == 2 && k_cache.dim() == 3, "block: hidden must be [T, D], the caches [G, S, E]");
  const int64_t rows = hidden.size(0), d = hidden.size(1), e = k_cache.size(2), groups = k_cache.size(0);
  const int64_t f = packed_features(w2);
  for (const Tensor* one : {&hidden, &cos, &sin, &attention_norm, &wqkv, &wo, &mlp_norm, &w13, &w2, &k_cache, &v_cache})
    check_contiguous("block", "every tensor", *one);
  for (const Tensor* one : {&attention_norm, &wqkv, &wo, &mlp_norm, &w13, &w2, &k_cache, &v_cache})
    check_same_dtype("block", "every weight and cache", *one, hidden);
  for (const Tensor* one : {&cos, &sin})
    STD_TORCH_CHECK(dtype_of(*one) == aoti_torch_dtype_float32() && one->numel() == rows * e,
                    "block: cos and sin must be float32 [T, 1, E]");
  auto takes = [](const Tensor& w, int64_t features, int64_t columns) {
    return packed_features(w) == features && columns <= packed_columns(w) && columns > packed_columns(w) - BLOCK;
  };
  STD_TORCH_CHECK(e % 2 == 0 && heads % groups == 0 && takes(wqkv, d, (heads + 2 * groups) * e) &&
                      takes(wo, heads * e, d) && takes(w13, d, 2 * f) && takes(w2, f, d) &&
                      attention_norm.numel() == d && mlp_norm.numel() == d,
                  "block: the weights do not fit hidden [T, ", d, "], ", heads, " heads of ", e);
  STD_TORCH_CHECK(positions.numel() == rows, "block: positions must be [", rows, "]");
  check_positions("block", positions, k_cache.size(1));
  Tensor out = new_result(hidden, d);
  auto run = [&](auto zero) {
    using T = decltype(zero);
    std::memcpy(out.data_ptr(), hidden.data_ptr(), rows * d * sizeof(T));
    Block<T> op{data<T>(out), data<float>(cos), data<float>(sin), data<T>(attention_norm), data<T>(wqkv), data<T>(wo),
                data<T>(mlp_norm), data<T>(w13), data<T>(w2), {}, d, f, float(eps)};
    op.attention.k_cache = data<T>(k_cache), op.attention.v_cache = data<T>(v_cache);
    op.attention.positions = data<int64_t>(positions);
    op.attention.rows = rows, op.attention.heads = heads, op.attention.groups = groups, op.attention.e = e;
    op.attention.slots = k_cache.size(1);
    if (run_attention) op.run_attention();
    if (run_mlp) op.run_mlp();
  };
  if (is_bf16(hidden)) run(bf16{}); else run(0.0f);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(skipfast_cpu, m) {
  m.def("linear(Tensor x, Tensor packed, int out_features) -> Tensor");
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def("swiglu(Tensor gate_up) -> Tensor");
  m.def("attention(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor positions) -> Tensor");
  m.def("block(Tensor hidden, Tensor cos, Tensor sin, Tensor positions, Tensor attention_norm, Tensor wqkv, Tensor wo, "
        "Tensor mlp_norm, Tensor w13, Tensor w2, Tensor(a!) k_cache, Tensor(b!) v_cache, int heads, float eps, "
        "bool run_attention, bool run_mlp) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(skipfast_cpu, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("swiglu", TORCH_BOX(&swiglu));
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("block", TORCH_BOX(&block));
}
