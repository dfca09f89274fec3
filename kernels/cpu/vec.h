// vec: Vec, 16 floats: on AVX-512 one register, on AVX2 two halves, elsewhere a loop. Bits, 16 integers. bf16 <-> fp32.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace skipfast {

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

constexpr int LANES = 16;

// 16 unsigned integers with the usual operators; the compiler chooses the instructions.
using Bits = uint32_t __attribute__((vector_size(4 * LANES)));
inline Bits counting() { return Bits{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }

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
inline Vec load(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)))};
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
inline Bits greater(Vec a, Vec b) {  // all ones where a > b
  return (Bits)_mm512_maskz_set1_epi32(_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ), -1);
}
inline Vec nearest(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Vec times_power_of_2(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }
inline __m256 low_half(Vec a) { return _mm512_castps512_ps256(a.v); }
inline __m256 high_half(Vec a) { return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a.v), 1)); }
// Pairs of bf16 as they lie in memory, first element in the low half.
inline Vec load_first_of_pairs(const bf16* p) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16))};
}
inline Vec load_second_of_pairs(const bf16* p) {
  return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(int(0xffff0000u))))};
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
inline __m256 widen8(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
inline Vec load(const int8_t* p) { return {widen8(p), widen8(p + 8)}; }
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
inline Bits greater(Vec a, Vec b) {
  const __m256 halves[2] = {_mm256_cmp_ps(a.lo, b.lo, _CMP_GT_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_GT_OQ)};
  Bits out;
  std::memcpy(&out, halves, sizeof(out));
  return out;
}
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)}; }
inline Vec nearest(Vec a) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.lo, mode), _mm256_round_ps(a.hi, mode)};
}
inline __m256 exponent8(__m256 n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
inline Vec times_power_of_2(Vec a, Vec n) { return mul(a, {exponent8(n.lo), exponent8(n.hi)}); }
inline __m256 first8(const bf16* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256((const __m256i*)p), 16));
}
inline __m256 second8(const bf16* p) {
  return _mm256_and_ps(_mm256_loadu_ps((const float*)p), _mm256_castsi256_ps(_mm256_set1_epi32(int(0xffff0000u))));
}
inline Vec load_first_of_pairs(const bf16* p) { return {first8(p), first8(p + 16)}; }
inline Vec load_second_of_pairs(const bf16* p) { return {second8(p), second8(p + 16)}; }
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
inline Vec load(const int8_t* p) { EACH(float(p[i])) }
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
inline Bits greater(Vec a, Vec b) {
  Bits out;
  for (int i = 0; i < LANES; i++) out[i] = a.v[i] > b.v[i] ? ~0u : 0;
  return out;
}
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
inline Vec load_first_of_pairs(const bf16* p) { EACH(widen(p[2 * i])) }
inline Vec load_second_of_pairs(const bf16* p) { EACH(widen(p[2 * i + 1])) }
#undef EACH
#endif

#if !defined(SKIPFAST_AVX512)
inline Vec load(const float* p, int n) {
  if (n == LANES) return load(p);
  float full[LANES] = {};
  std::memcpy(full, p, n * sizeof(float));
  return load(full);
}
#endif
inline Vec load(const bf16* p, int n) {
  if (n == LANES) return load(p);
  bf16 full[LANES] = {};
  std::memcpy(full, p, n * sizeof(bf16));
  return load(full);
}
template <typename T>
inline void store(T* p, Vec a, int n) {
  if (n == LANES) return store(p, a);
  T full[LANES];
  store(full, a);
  std::memcpy(p, full, n * sizeof(T));
}
// Sum or maximum of the lanes, always halved in the same order: 8 + 8, 4 + 4, 2 + 2, 1 + 1.
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

// exp to about 1e-7 relative on [-87.3, 88.3], clamped outside. So exp(-inf) is 1e-38: callers mask what must be zero.
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

inline Bits bits_of(Vec a) {
  Bits out;
  std::memcpy(&out, &a, sizeof(out));
  return out;
}
inline Vec vec_of(Bits a) {
  Vec out;
  std::memcpy(&out, &a, sizeof(out));
  return out;
}
inline Vec to_floats(Bits a) {  // of signed integers
  using Signed = int32_t __attribute__((vector_size(4 * LANES)));
  using Floats = float __attribute__((vector_size(4 * LANES)));
  const Floats floats = __builtin_convertvector((Signed)a, Floats);
  Vec out;
  std::memcpy(&out, &floats, sizeof(out));
  return out;
}

// Find the largest of many floats, which come 16 at a time, and its first place. A NaN is never the largest.
class Largest {
 public:
  void see(Vec some, int64_t first) {
    const Bits larger = greater(some, vec_of(value));
    value = (bits_of(some) & larger) | (value & ~larger);
    place = ((counting() + uint32_t(first)) & larger) | (place & ~larger);
  }
  float get(int64_t& where) const {
    float values[LANES];
    uint32_t places[LANES], lowest = ~0u;
    std::memcpy(values, &value, sizeof(values)), std::memcpy(places, &place, sizeof(places));
    const float largest = max_lanes(vec_of(value));
    for (int i = 0; i < LANES; i++) lowest = std::min(lowest, values[i] == largest ? places[i] : ~0u);
    where = lowest;
    return largest;
  }

 private:
  Bits value = bits_of(splat(-std::numeric_limits<float>::infinity()));  // as bits, else compilers keep it in memory
  Bits place = Bits{};
};

// log of positive normal numbers to about 1e-7 relative, also near 1; undefined for others. Polynomial of Cephes.
inline Vec log(Vec x) {
  constexpr uint32_t ONE = 0x3f800000, ROOT_OF_HALF = 0x3f3504f3;
  const Bits bits = bits_of(x) + (ONE - ROOT_OF_HALF);
  const Vec n = sub(to_floats(bits >> 23), splat(127.0f));
  const Vec r = sub(vec_of((bits & 0x7fffffu) + ROOT_OF_HALF), splat(1.0f));  // in sqrt(1/2) - 1 .. sqrt(2) - 1, exact
  const Vec square = mul(r, r);
  Vec p = splat(7.0376836292e-2f);
  p = fma(p, r, splat(-1.1514610310e-1f));
  p = fma(p, r, splat(1.1676998740e-1f));
  p = fma(p, r, splat(-1.2420140846e-1f));
  p = fma(p, r, splat(1.4249322787e-1f));
  p = fma(p, r, splat(-1.6668057665e-1f));
  p = fma(p, r, splat(2.0000714765e-1f));
  p = fma(p, r, splat(-2.4999993993e-1f));
  p = fma(p, r, splat(3.3333331174e-1f));
  p = mul(p, mul(r, square));
  p = fma(n, splat(-2.12194440e-4f), p);  // ln 2 in two parts, the first exact
  p = fma(square, splat(-0.5f), p);
  return fma(n, splat(0.693359375f), add(r, p));
}

inline void prefetch(const void* p) {
#if defined(__GNUC__)
  __builtin_prefetch(p, 0, 3);
#endif
}

}  // namespace skipfast
