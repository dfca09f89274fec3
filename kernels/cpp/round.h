// round: a whole greedy round of a static plan in one call: draft, verify, and every token the full model would choose.
#pragma once
#include "exit_head.h"
#include "layers.h"

namespace skipfast {

// Tokens, and statistics unless null, of rows of hidden states: final norm, then the fused head.
template <typename T>
void exit_rows(const T* hidden, const T* norm, const T* head, int64_t rows, int64_t d, int64_t n_vocab, float eps,
               int64_t* tokens, float* stats) {
  static thread_local Scratch scratch;
  T* normed = (T*)scratch.get(rows * d);
  rms_norm_rows(hidden, norm, normed, rows, d, eps);
  ExitHead<T>{{normed, head, nullptr, rows, d, n_vocab, 1, nullptr}, stats != nullptr, nullptr}.run(tokens, stats);
}

template <typename T>
struct StaticRound {
  const LayerTable& table;
  const T *embedding, *norm, *head;
  bool packed_embedding;  // rows of the table are columns of a packed weight
  int64_t n_vocab, exit_layer;
  T* hidden;  // [drafts + 1, d]

  void embed(int64_t token, T* to) const {
    const int64_t d = table.d, pair = int64_t(sizeof(float) / sizeof(T));
    if (!packed_embedding) return (void)std::memcpy(to, embedding + token * d, d * sizeof(T));
    const T* column = embedding + token / STRIP * STRIP * d + token % STRIP * pair;
    for (int64_t i = 0; i < d; i += pair, column += STRIP * pair) std::memcpy(to + i, column, 4);
  }
  void layers(int64_t first_row, int64_t rows, int64_t position, int64_t start, int64_t stop) const {
    LayerRun<T>{table, hidden + first_row * table.d, rows, position}.run(start, stop, [](int64_t) { return false; });
  }
  void choose(int64_t first_row, int64_t rows, int64_t* tokens) const {
    exit_rows(hidden + first_row * table.d, norm, head, rows, table.d, n_vocab, float(table.eps), tokens, nullptr);
  }

  // token stands at `position`. drafted [drafts], chosen [drafts + 1]: the full model's token after each row.
  void run(int64_t token, int64_t position, int64_t drafts, int64_t* drafted, int64_t* chosen) const {
    const int64_t resume = drafts ? exit_layer : 0;
    for (int64_t i = 0; i <= drafts; i++) {
      embed(i ? drafted[i - 1] : token, hidden + i * table.d);
      layers(i, 1, position + i, 0, resume);
      if (i < drafts) choose(i, 1, drafted + i);
    }
    layers(0, drafts + 1, position, resume, table.n_layer);
    choose(0, drafts + 1, chosen);
  }
};

}  // namespace skipfast
