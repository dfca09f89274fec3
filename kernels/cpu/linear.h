// linear: multiply rows by a packed weight. Every element of the result is one sum in order of k, however it is tiled.
#pragma once
#include <array>
#include <utility>

#include "amx.h"
#include "stream.h"
#include "threads.h"
#include "weight.h"

namespace skipfast {

// What a micro-kernel reads of x: pairs of bf16 if there is an instruction that multiplies them, else fp32.
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

// Most rows of a tile, and most rows with which a tile takes all 32 outputs at once: as many as registers hold sums of.
constexpr int AMX_TILE = 16, AMX_FEATURES = 32;
#if defined(SKIPFAST_AVX512)
constexpr int VECTOR_TILE = 12;  // 24 of 32 registers
template <typename T>
constexpr int WIDE_TILE = VECTOR_TILE;
#else
constexpr int VECTOR_TILE = 6;  // 12 of 16
template <typename T>
constexpr int WIDE_TILE = 3;
#endif
constexpr int MAX_TILE = AMX_TILE;  // of any micro-kernel: what buffers must hold
template <typename T>
inline bool use_amx() { return std::is_same_v<T, bf16> && have_amx(); }
template <typename T>
inline int64_t tile_limit() { return use_amx<T>() ? AMX_TILE : VECTOR_TILE; }

// The rows of a tile of x are interleaved. For vector instructions, word i of all rows lies side by side, because rows
// a power of two apart would compete for cache sets. For AMX, 32 features of all rows do, and zeros round k up.
template <typename T>
inline int64_t interleaved_features(int64_t k) {
  return use_amx<T>() ? (k + AMX_FEATURES - 1) / AMX_FEATURES * AMX_FEATURES : k;
}
// Write row m of a tile of `height` rows. k is even for bf16.
template <typename T>
inline void interleave_row(const T* row, int64_t k, int64_t m, int64_t height, Word<T>* tile) {
  if constexpr (PER_WORD<T> == 1) {
    for (int64_t i = 0; i < k; i++) tile[i * height + m] = widen(row[i]);
  } else if (use_amx<T>()) {
    for (int64_t i = 0; i < k; i += AMX_FEATURES) {
      T* to = (T*)tile + i * height + m * AMX_FEATURES;
      const int64_t n = std::min<int64_t>(AMX_FEATURES, k - i);
      std::memcpy(to, row + i, n * sizeof(T));
      std::memset(to + n, 0, (AMX_FEATURES - n) * sizeof(T));
    }
  } else {
    for (int64_t i = 0; i < k / 2; i++) std::memcpy(tile + i * height + m, row + 2 * i, 4);
  }
}

// The sums of M rows and V strips.
template <int M, int V>
struct Sums {
  Vec sum[M][V];
  void read(const float* acc, int64_t stride, bool first) {
    UNROLL
    for (int m = 0; m < M; m++) {
      UNROLL
      for (int v = 0; v < V; v++) sum[m][v] = first ? splat(0.0f) : load(acc + m * stride + v * LANES);
    }
  }
  void write(float* acc, int64_t stride) const {
    UNROLL
    for (int m = 0; m < M; m++) {
      UNROLL
      for (int v = 0; v < V; v++) store(acc + m * stride + v * LANES, sum[m][v]);
    }
  }
  void add_product(int m, const Vec (&w)[V], Vec value) {
    UNROLL
    for (int v = 0; v < V; v++) sum[m][v] = fma(w[v], value, sum[m][v]);
  }
};

// acc[m][0..16 V) (+)= row m of x, over k features, * V strips of w, which lie `apart` elements apart. `first`: start
// from zero instead of adding. k is even for bf16.
template <int M, int V>
void multiply_strips(const float* w, int64_t apart, const float* x, int64_t k, float* acc, int64_t stride, bool first) {
  Sums<M, V> sums;
  sums.read(acc, stride, first);
  for (int64_t i = 0; i < k; i++, w += STRIP) {
    Vec weight[V];
    UNROLL
    for (int v = 0; v < V; v++) weight[v] = load(w + v * apart), prefetch_ahead(w + v * apart);
    UNROLL
    for (int m = 0; m < M; m++) sums.add_product(m, weight, splat(x[i * M + m]));
  }
  sums.write(acc, stride);
}

#if defined(SKIPFAST_BF16_DOT)
template <int M, int V>
void multiply_strips(const bf16* w, int64_t apart, const uint32_t* x, int64_t k, float* acc, int64_t stride,
                     bool first) {
  Sums<M, V> sums;
  sums.read(acc, stride, first);
  for (int64_t i = 0; i < k; i += 2, w += 2 * STRIP) {
    __m512bh weight[V];
    UNROLL
    for (int v = 0; v < V; v++)
      weight[v] = (__m512bh)_mm512_loadu_si512(w + v * apart), prefetch_ahead(w + v * apart);
    UNROLL
    for (int m = 0; m < M; m++) {
      __m512bh value = (__m512bh)_mm512_set1_epi32(int(x[i / 2 * M + m]));
      UNROLL
      for (int v = 0; v < V; v++) sums.sum[m][v].v = _mm512_dpbf16_ps(sums.sum[m][v].v, weight[v], value);
    }
  }
  sums.write(acc, stride);
}
#else
template <int M, int V>
void multiply_strips(const bf16* w, int64_t apart, const float* x, int64_t k, float* acc, int64_t stride, bool first) {
  Sums<M, V> sums;
  sums.read(acc, stride, first);
  for (int64_t i = 0; i < k; i += 2, w += 2 * STRIP) {
    UNROLL
    for (int v = 0; v < V; v++) {  // strip by strip, so that few registers hold weights
      const Vec first_weight = load_first_of_pairs(w + v * apart);
      prefetch_ahead(w + v * apart);
      UNROLL
      for (int m = 0; m < M; m++) sums.sum[m][v] = fma(first_weight, splat(x[i * M + m]), sums.sum[m][v]);
      const Vec second_weight = load_second_of_pairs(w + v * apart);
      UNROLL
      for (int m = 0; m < M; m++) sums.sum[m][v] = fma(second_weight, splat(x[(i + 1) * M + m]), sums.sum[m][v]);
    }
  }
  sums.write(acc, stride);
}
#endif

// acc[m][0..32) (+)= row m of x * one block, strip after strip if registers cannot hold the sums of both.
template <typename T, int M>
void multiply_tile(const T* w, int64_t apart, const Word<T>* x, int64_t k, float* acc, int64_t stride, bool first) {
  if constexpr (M <= WIDE_TILE<T>) {
    multiply_strips<M, 2>(w, apart, x, k, acc, stride, first);
  } else {
    multiply_strips<M, 1>(w, apart, x, k, acc, stride, first);
    multiply_strips<M, 1>(w + apart, apart, x, k, acc + STRIP, stride, first);
  }
}

#if defined(SKIPFAST_AMX)
template <int M>
void multiply_amx(const bf16* w, int64_t apart, const uint32_t* x, int64_t k, float* acc, int64_t stride, bool first) {
  auto memory_barrier = [] { __asm__ volatile("" ::: "memory"); };  // compilers do not see what tiles load and store
  TileScope::shape(M);
  memory_barrier();
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
  } else {
    _tile_loadd(0, acc, stride * 4);
    _tile_loadd(1, acc + LANES, stride * 4);
  }
  auto step = [&](const bf16* strip0, const bf16* strip1) {
    _tile_loadd(4, x, 64);
    _tile_loadd(6, strip0, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, strip1, 64);
    _tile_dpbf16ps(1, 4, 7);
  };
  int64_t i = 0;
  for (; i + AMX_FEATURES <= k; i += AMX_FEATURES, w += AMX_FEATURES * STRIP, x += M * AMX_FEATURES / 2) {
    step(w, w + apart);
  }
  if (i < k) {
    alignas(64) bf16 strips[2][AMX_FEATURES * STRIP] = {};
    for (int v = 0; v < 2; v++) std::memcpy(strips[v], w + v * apart, (k - i) * STRIP * sizeof(bf16));
    memory_barrier();
    step(strips[0], strips[1]);
  }
  _tile_stored(0, acc, stride * 4);
  _tile_stored(1, acc + LANES, stride * 4);
  memory_barrier();
}
#endif

// The micro-kernel for M rows: sums over k features of one block, its strips `apart` elements apart.
template <typename T, int M, bool AMX>
inline void multiply_block(const T* w, int64_t apart, const Word<T>* x, int64_t k, float* acc, int64_t stride,
                           bool first) {
#if defined(SKIPFAST_AMX)
  if constexpr (AMX) return multiply_amx<M>(w, apart, x, k, acc, stride, first);
#endif
  if constexpr (!AMX) multiply_tile<T, M>(w, apart, x, k, acc, stride, first);
}

// The same with a scale for every `group` features; the scales stand first in each group. k is a multiple of `group`.
template <typename T, int M, bool AMX>
void multiply_groups(const T* w, int64_t apart, const Word<T>* x, int64_t k, float* acc, int64_t stride, bool first,
                     int64_t group, const uint8_t* scales) {
  alignas(64) float part[M * BLOCK];
  const int64_t bytes = Weight{nullptr, Format::INT4, group}.group_bytes();
  for (int64_t i = 0; i < k; i += group, w += group * STRIP, x += group * M / PER_WORD<T>, scales += bytes) {
    multiply_block<T, M, AMX>(w, apart, x, group, part, BLOCK, true);
    UNROLL
    for (int v = 0; v < 2; v++) {
      const Vec scale = load((const bf16*)scales + v * LANES);
      UNROLL
      for (int m = 0; m < M; m++) {
        float* sum = acc + m * stride + v * LANES;
        store(sum, fma(load(part + m * BLOCK + v * LANES), scale, first && !i ? splat(0.0f) : load(sum)));
      }
    }
  }
}

template <typename T>
struct Tile {
  void (*multiply)(const T*, int64_t, const Word<T>*, int64_t, float*, int64_t, bool);
  void (*multiply_groups)(const T*, int64_t, const Word<T>*, int64_t, float*, int64_t, bool, int64_t, const uint8_t*);
};
template <typename T, bool AMX, size_t... M>
constexpr std::array<Tile<T>, sizeof...(M)> tile_table(std::index_sequence<M...>) {
  return {Tile<T>{multiply_block<T, int(M) + 1, AMX>, multiply_groups<T, int(M) + 1, AMX>}...};
}
// Return the micro-kernels for a number of rows in 1..tile_limit.
template <typename T>
inline const Tile<T>& tile_of(int64_t rows) {
#if defined(SKIPFAST_AMX)
  if constexpr (std::is_same_v<T, bf16>) {
    static constexpr auto amx = tile_table<T, true>(std::make_index_sequence<AMX_TILE>{});
    if (have_amx()) return amx[rows - 1];
  }
#endif
  static constexpr auto table = tile_table<T, false>(std::make_index_sequence<VECTOR_TILE>{});
  return table[rows - 1];
}
// Return the rows per tile. With many registers tiles of equal height are best: 13 rows are 7 + 6, not 12 + 1. With few
// registers 4 rows take as long as 6, because there are too few independent sums: 8 rows are 6 + 2.
inline int64_t tile_height(int64_t rows, int64_t limit) {
  if (limit < 12) return std::min(rows, limit);
  int64_t tiles = (rows + limit - 1) / limit;
  return (rows + tiles - 1) / tiles;
}

constexpr int64_t GROUP = 4;           // blocks of outputs that share a pass over x if there are many rows
constexpr int64_t PANEL_TILES = 8;     // row tiles whose partial sums are held at once
constexpr int64_t CHUNK_BYTES = 1024;  // of a row of x per pass: so 4 blocks of weight stay in the second-level cache
constexpr int64_t EXPANDED = 128;      // features of a quantised block expanded at once for few rows: whole groups
constexpr int64_t LINEAR_BYTES_PER_THREAD = 256 << 10;

template <typename T>
inline void store_block(const float* acc, T* y, int64_t outputs) {
  if (outputs >= BLOCK) return store(y, load(acc)), store(y + LANES, load(acc + LANES));
  store(y, load(acc), int(std::min<int64_t>(outputs, LANES)));
  if (outputs > LANES) store(y + LANES, load(acc + LANES), int(outputs - LANES));
}

template <typename T>
struct Linear {
  const T* x;
  Weight w;
  T* y;
  int64_t rows, k, n;
  int64_t tile;          // rows per tile
  const Word<T>* words;  // x, tile after tile, each interleaved

  int64_t blocks() const { return (n + BLOCK - 1) / BLOCK; }
  // Return the tile of `height` rows that starts at row r, from feature k0 on.
  const Word<T>* words_at(int64_t r, int64_t height, int64_t k0 = 0) const {
    return words + (r * interleaved_features<T>(k) + k0 * height) / PER_WORD<T>;
  }

  // Features of a block as micro-kernels read them: its strips lie `apart` elements apart.
  struct Piece {
    int64_t block, first, features;
    const T* w;
    int64_t apart;
  };
  // Return a piece of a block. room: [features * BLOCK], for one that must be expanded.
  Piece piece(int64_t block, int64_t first, int64_t features, T* room) const {
    if (w.format == Format::PLAIN)
      return {block, first, features, (const T*)w.data + block * k * BLOCK + first * STRIP, k * STRIP};
    if (w.format == Format::INT8) expand_int8(w.int8_block(block, k) + first * BLOCK, features, room);
    else expand_int4(w.int4_group(block, k, first), features, w.group, room);
    return {block, first, features, room, features * STRIP};
  }
  // acc (+)= `height` rows from row r on * a piece. The pieces of a block must come in order.
  void multiply(const Piece& p, int64_t r, int64_t height, float* acc, int64_t stride) const {
    const Tile<T>& kernels = tile_of<T>(height);
    const Word<T>* rows_of_x = words_at(r, height, p.first);
    if (w.format != Format::INT4)
      return kernels.multiply(p.w, p.apart, rows_of_x, p.features, acc, stride, p.first == 0);
    kernels.multiply_groups(p.w, p.apart, rows_of_x, p.features, acc, stride, p.first == 0, w.group,
                            w.int4_group(p.block, k, p.first));
  }
  // Multiply the sums of a row by the scales that int8 outputs have.
  void finish(float* acc, int64_t block) const {
    if (w.format != Format::INT8) return;
    const float* scales = (const float*)(w.int8_block(block, k) + k * BLOCK);
    for (int v = 0; v < BLOCK; v += LANES) store(acc + v, mul(load(acc + v), load(scales + v)));
  }

  bool streams() const { return use_amx<T>() && rows <= stream_rows_limit(w.format); }

  // acc[m][32 (block - first)..) = a tile of rows * blocks first..last-1, each of which is read once.
  void whole_blocks(int64_t first, int64_t last, int64_t r, int64_t height, float* acc, int64_t stride) const {
    const FlushDenormals scope(w.format != Format::PLAIN);
    if (streams()) stream_blocks(w, first, last, k, (const float*)words, height, acc, stride);
    alignas(64) T room[EXPANDED * BLOCK];
    const int64_t step = w.format == Format::PLAIN ? k : EXPANDED;
    for (int64_t i = 0; i < k && !streams(); i += step)
      for (int64_t b = first; b < last; b++)
        multiply(piece(b, i, std::min(step, k - i), room), r, height, acc + (b - first) * BLOCK, stride);
    for (int64_t b = first; b < last; b++)
      for (int64_t m = 0; m < height; m++) finish(acc + m * stride + (b - first) * BLOCK, b);
  }
  // Blocks of a task for few rows.
  int64_t blocks_per_task() const { return w.format == Format::PLAIN ? 1 : STREAMS; }

  // Few rows: one tile.
  void few_rows(int64_t task) const {
    float acc[MAX_TILE * STREAMS * BLOCK];
    const int64_t first = task * blocks_per_task(), last = std::min(first + blocks_per_task(), blocks());
    constexpr int64_t stride = STREAMS * BLOCK;
    whole_blocks(first, last, 0, rows, acc, stride);
    for (int64_t m = 0; m < rows; m++)
      for (int64_t b = first; b < last; b++)
        store_block(acc + m * stride + (b - first) * BLOCK, y + m * n + b * BLOCK, n - b * BLOCK);
  }

  // Many rows: a group of blocks, with k in chunks, so that weight and x are reused from near caches. Same sums.
  void many_rows(int64_t group) const {
    static thread_local Scratch scratch, scratch_room;
    const FlushDenormals scope(w.format != Format::PLAIN);
    const int64_t first_block = group * GROUP, last_block = std::min(first_block + GROUP, blocks());
    const int64_t chunk = CHUNK_BYTES / int64_t(sizeof(T)), stride = GROUP * BLOCK;
    const int64_t panel = tile * PANEL_TILES;
    float* acc = scratch.get(panel * stride);
    T* room = w.format == Format::PLAIN ? nullptr : (T*)scratch_room.get(chunk * stride);
    Piece pieces[GROUP];
    for (int64_t top = 0; top < rows; top += panel) {
      const int64_t bottom = std::min(top + panel, rows);
      for (int64_t k0 = 0; k0 < k; k0 += chunk) {
        for (int64_t b = first_block; b < last_block; b++)
          pieces[b - first_block] = piece(b, k0, std::min(chunk, k - k0), room + (b - first_block) * chunk * BLOCK);
        for (int64_t r = top; r < bottom; r += tile)
          for (int64_t b = first_block; b < last_block; b++)
            multiply(pieces[b - first_block], r, std::min(tile, bottom - r),
                     acc + (r - top) * stride + (b - first_block) * BLOCK, stride);
      }
      for (int64_t r = top; r < bottom; r++)
        for (int64_t b = first_block; b < last_block; b++) {
          float* sums = acc + (r - top) * stride + (b - first_block) * BLOCK;
          finish(sums, b);
          store_block(sums, y + r * n + b * BLOCK, n - b * BLOCK);
        }
    }
  }

  void interleave(int64_t threads) {
    static thread_local Scratch scratch;
    if (streams()) {
      float* wide = scratch.get(rows * k);
      for (int64_t i = 0; i < rows * k; i++) wide[i] = widen(x[i]);
      words = (const Word<T>*)wide;
      return;
    }
    if constexpr (std::is_same_v<T, float> || BF16_DOT)
      if (rows == 1 && uintptr_t(x) % 4 == 0 && interleaved_features<T>(k) == k) {  // already a tile of height one
        words = (const Word<T>*)x;
        return;
      }
    words = (Word<T>*)scratch.get(rows * interleaved_features<T>(k) / PER_WORD<T>);
    for_each_task((rows + tile - 1) / tile, threads, [&](int64_t i) {
      const int64_t top = i * tile, height = std::min(tile, rows - top);
      for (int64_t m = 0; m < height; m++)
        interleave_row(x + (top + m) * k, k, m, height, const_cast<Word<T>*>(words_at(top, height)));
    });
  }

  void run() {
    if (!rows || !n) return;
    const int64_t bytes = blocks() * BLOCK * k * int64_t(sizeof(T));
    TileScope scope;
    const bool few = rows <= tile_limit<T>();
    const int64_t threads = threads_for(few ? bytes : bytes * (rows / 4), LINEAR_BYTES_PER_THREAD);
    tile = tile_height(rows, tile_limit<T>());
    interleave(few ? 1 : threads);
    if (few)
      for_each_task((blocks() + blocks_per_task() - 1) / blocks_per_task(), threads, [&](int64_t i) { few_rows(i); });
    else
      for_each_task((blocks() + GROUP - 1) / GROUP, threads, [&](int64_t group) { many_rows(group); });
  }
};

}  // namespace skipfast
