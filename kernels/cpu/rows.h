// rows: arithmetic between the matrix products, row by row: rms_norm, swiglu, rotary embedding, addition.
#pragma once
#include "threads.h"

namespace skipfast {

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

// Rotate `heads` vectors of size e in place, halves paired: x * cos + (-second, first) * sin in fp32, without fusing.
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
void rms_norm_rows(const T* from, const T* scale, T* to, int64_t rows, int64_t d, float eps) {
  const int64_t threads = threads_for(rows * d, ELEMENTS_PER_THREAD);
  constexpr int64_t step = 8;  // rows per task
  for_each_task((rows + step - 1) / step, threads, [&](int64_t i) {
    for (int64_t r = i * step; r < std::min(rows, (i + 1) * step); r++)
      rms_norm_row(from + r * d, scale, to + r * d, d, eps);
  });
}

template <typename T>
void swiglu_rows(const T* from, T* to, int64_t rows, int64_t f) {
  const int64_t threads = threads_for(rows * f, ELEMENTS_PER_THREAD);
  for_each_task(rows, threads, [&](int64_t r) { swiglu_row(from + r * 2 * f, to + r * f, f); });
}

}  // namespace skipfast
