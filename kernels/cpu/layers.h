// layers: a run of transformer layers in one call, with the operations of model.Block in the same order.
#pragma once
#include "attention.h"
#include "rows.h"

namespace skipfast {

// The arguments of every layer, gathered once (see decoding/packed.py), so that a call carries one tensor instead of
// eight for each layer. Pointers stay valid while their owner keeps the tensors.
struct LayerTable {
  struct Layer {
    const void* attention_norm;
    Weight wqkv, wo;
    const void* mlp_norm;
    Weight w13, w2;
    void *k_cache, *v_cache;
  };
  int64_t bf16, n_layer, d, f, heads, groups, e, slots;
  double eps;
  const float *cos, *sin;  // [slots, E] each
  const Layer* layers() const { return reinterpret_cast<const Layer*>(this + 1); }
  static int64_t words(int64_t n_layer) { return int64_t(sizeof(LayerTable) + n_layer * sizeof(Layer)) / 8; }
};

template <typename T>
struct LayerRun {
  const LayerTable& table;
  T* hidden;  // [rows, d], changed in place
  int64_t rows, position;

  static T* scratch(int which, int64_t elements) {
    static thread_local Scratch all[5];
    return (T*)all[which].get(elements * int64_t(sizeof(T)) / int64_t(sizeof(float)) + 1);
  }
  void multiply(const T* x, const Weight& w, T* y, int64_t k, int64_t n) const {
    Linear<T>{x, w, y, rows, k, n, 1, nullptr}.run();
  }

  void run_attention(const LayerTable::Layer& layer, const int64_t* positions) const {
    const int64_t d = table.d, e = table.e, mixed_width = table.heads * e, width = mixed_width + 2 * table.groups * e;
    T *normed = scratch(0, rows * d), *qkv = scratch(1, rows * width), *mixed = scratch(2, rows * mixed_width);
    rms_norm_rows(hidden, (const T*)layer.attention_norm, normed, rows, d, float(table.eps));
    multiply(normed, layer.wqkv, qkv, d, width);
    for_each_task(rows, threads_for(rows * width, ELEMENTS_PER_THREAD), [&](int64_t t) {
      rope_row(qkv + t * width, table.cos + positions[t] * e, table.sin + positions[t] * e,
               table.heads + table.groups, e);
    });
    Attention<T> a{};
    a.q = qkv, a.k = qkv + mixed_width, a.v = a.k + table.groups * e, a.out = mixed;
    a.q_stride = a.k_stride = a.v_stride = width;
    a.k_cache = (T*)layer.k_cache, a.v_cache = (T*)layer.v_cache, a.positions = positions;
    a.rows = rows, a.heads = table.heads, a.groups = table.groups, a.e = e, a.slots = table.slots;
    a.run();
    multiply(mixed, layer.wo, normed, mixed_width, d);
    add_to(hidden, normed, rows * d);
  }

  void run_mlp(const LayerTable::Layer& layer) const {
    const int64_t d = table.d, f = table.f;
    T *normed = scratch(0, rows * d), *gate_up = scratch(3, rows * 2 * f), *active = scratch(4, rows * f);
    rms_norm_rows(hidden, (const T*)layer.mlp_norm, normed, rows, d, float(table.eps));
    multiply(normed, layer.w13, gate_up, d, 2 * f);
    swiglu_rows(gate_up, active, rows, f);
    multiply(active, layer.w2, normed, f, d);
    add_to(hidden, normed, rows * d);
  }

  // Run layers start..stop-1. skips(2 * layer): its attention is left out; skips(2 * layer + 1): its MLP is.
  template <typename F>
  void run(int64_t start, int64_t stop, const F& skips) const {
    static thread_local Scratch scratch_positions;
    auto* positions = (int64_t*)scratch_positions.get(2 * rows);
    for (int64_t t = 0; t < rows; t++) positions[t] = position + t;
    for (int64_t i = start; i < stop; i++) {
      if (!skips(2 * i)) run_attention(table.layers()[i], positions);
      if (!skips(2 * i + 1)) run_mlp(table.layers()[i]);
    }
  }
};

}  // namespace skipfast
