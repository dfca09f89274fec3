// attention: causal and grouped-query, over a static cache addressed by position.
#pragma once
#include "linear.h"
#include "rows.h"

namespace skipfast {

// Slots are cut at fixed absolute positions: segments of 512, and chunks of 64 inside them. Inside a segment a row's
// softmax runs online from chunk to chunk; segments are then merged in order. Every row is computed with the same cuts.
// So segments on several threads (long contexts, few rows) give the same bits as segments one after the other.
//
// The key cache is laid out like a packed linear weight whose outputs are the slots: [G, S/16, E/2, 16, 2] in bf16 and
// [G, S/16, E, 16] in fp32. Scores are then queries times a weight, and nothing is transposed while decoding.
constexpr int64_t CHUNK = 64;
constexpr int64_t SEGMENT = 512;
constexpr int64_t MAX_QUERIES = 32;               // queries (row, head) of one kv head that share a task
constexpr int64_t ATTENTION_MACS_PER_THREAD = 256 << 10;
#if defined(SKIPFAST_AVX512)
constexpr int VALUE_QUERIES = 4, VALUE_VECS = 4;  // register tile of probabilities times values
#else
constexpr int VALUE_QUERIES = 2, VALUE_VECS = 2;
#endif

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
  constexpr int V = M == 1 ? 4 : VALUE_VECS;
  if (begin >= end) return;
  int64_t d = 0;
  for (; d + V * LANES <= e; d += V * LANES)
    add_values_tile<T, M, V>(probs, values + d, e, begin, end, out + d, stride, LANES);
  for (; d + LANES <= e; d += LANES)
    add_values_tile<T, M, 1>(probs, values + d, e, begin, end, out + d, stride, LANES);
  if (d < e) add_values_tile<T, M, 1>(probs, values + d, e, begin, end, out + d, stride, int(e - d));
}

template <typename T>
struct Attention {
  const T *q, *k, *v;
  T *k_cache, *v_cache, *out;  // slots is a multiple of BLOCK
  const int64_t* positions;
  int64_t q_stride, k_stride, v_stride;  // elements between rows
  int64_t rows, heads, groups, e, slots;
  int64_t queries, tile, tiles;          // queries per kv head, per task; tasks per kv head

  int64_t per_group() const { return heads / groups; }
  int64_t e_vec() const { return (e + LANES - 1) / LANES * LANES; }
  int64_t state_size() const { return e_vec() + LANES; }  // unnormalised output, then maximum, then sum

  const T* key_strip(int64_t g, int64_t slot) const { return k_cache + (g * slots + slot / STRIP * STRIP) * e; }
  const T* values(int64_t g, int64_t slot) const { return v_cache + (g * slots + slot) * e; }

  void write_cache(int64_t g) const {
    for (int64_t t = 0; t < rows; t++) {
      const int64_t slot = positions[t];
      if (slot < 0) continue;  // a padding row
      const T *key = k + t * k_stride + g * e, *value = v + t * v_stride + g * e;
      auto* column = (uint32_t*)key_strip(g, slot) + slot % STRIP;  // a 32-bit word: one fp32 or a pair of bf16
      for (int64_t word = 0; word < e * int64_t(sizeof(T)) / 4; word++)
        std::memcpy(column + word * STRIP, (const char*)key + 4 * word, 4);
      std::memcpy((T*)values(g, slot), value, e * sizeof(T));
    }
  }

  int64_t context(int64_t query) const { return positions[query / per_group()] + 1; }  // 0 of a padding row
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
      to += height * interleaved_features<T>(e) / PER_WORD<T>;
    }
  }

  // Continue the softmax of a query over n slots of a chunk: update its state; scores become probabilities in place.
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

  // Compute the states of queries first..last over one segment of slots, from scratch.
  void segment(int64_t g, int64_t first, int64_t last, int64_t index, float* states) const {
    static thread_local Scratch query_scratch, score_scratch;
    const int64_t count = last - first, row_tile = tile_height(count, tile_limit<T>());
    auto* words = (Word<T>*)query_scratch.get(count * interleaved_features<T>(e));
    float* scores = score_scratch.get(count * CHUNK);
    gather_queries(g, first, last, row_tile, words);
    for (int64_t i = 0; i < count; i++) {
      std::fill_n(states + i * state_size(), state_size(), 0.0f);
      states[i * state_size() + e_vec()] = -std::numeric_limits<float>::infinity();
    }
    const int64_t end = std::min(longest(first, last), (index + 1) * SEGMENT);
    for (int64_t begin = index * SEGMENT; begin < end; begin += CHUNK) {
      const int64_t used = std::min(CHUNK, end - begin);
      for (int64_t i = 0; i < count; i += row_tile) {
        const int64_t height = std::min(row_tile, count - i);
        for (int64_t b = 0; b < used; b += BLOCK)
          tile_of<T>(height).multiply(key_strip(g, begin + b), e * STRIP,
                                      words + i * interleaved_features<T>(e) / PER_WORD<T>, e,
                                      scores + i * CHUNK + b, CHUNK, true);
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
        const T* from = values(g, begin);
        add_values<T, VALUE_QUERIES>(scores + i * CHUNK, from, e, 0, together, states + i * state_size(),
                                     state_size());
        for (int64_t j = 0; j < some; j++)
          add_values<T, 1>(scores + (i + j) * CHUNK, from, e, together, n[j], states + (i + j) * state_size(),
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
    const Vec sum = splat(context(query) ? state[e_vec() + 1] : 1.0f);
    for (int64_t d = 0; d < e; d += LANES) {
      Vec value = div(load(state + d), sum);
      if (d + LANES <= e) store(to + d, value); else store(to + d, value, int(e - d));
    }
  }

  // Do all segments of a task, one after the other.
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

  // The same with a task for each segment, for long contexts and few queries.
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
    TileScope scope;
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

}  // namespace skipfast
