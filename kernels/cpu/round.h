// round: a whole round in one call: draft as a plan says, verify, and every token the full model would choose.
#pragma once
#include "exit_head.h"
#include "layers.h"
#include "rows.h"

namespace skipfast {

// The end of a model: final norm, then the fused head over the first n_vocab tokens.
template <typename T>
struct Head {
  const T* norm;
  Weight weight;
  int64_t d, n_vocab;
  float eps;

  void run(const T* hidden, int64_t rows, const Draw& draw, const Answers& answers) const {
    static thread_local Scratch scratch;
    T* normed = (T*)scratch.get(rows * d);
    rms_norm_rows(hidden, norm, normed, rows, d, eps);
    ExitHead<T>{{normed, weight, nullptr, rows, d, n_vocab, 1, nullptr}, draw, answers, nullptr}.run();
  }
};

// Where the hidden states of tokens begin: [V, D], of which one row is read.
template <typename T>
struct Embedding {
  enum Kind { PLAIN, PACKED, INT8, INT4 } kind;  // PACKED: rows are columns of a packed LM head
  const void *data, *scale;
  int64_t groups;  // of a row that have a scale (INT4)

  void row(int64_t token, int64_t d, T* to) const {
    if (kind == PLAIN) return (void)std::memcpy(to, (const T*)data + token * d, d * sizeof(T));
    if (kind == PACKED) {
      constexpr int64_t pair = int64_t(sizeof(float) / sizeof(T));
      const T* column = (const T*)data + token / STRIP * STRIP * d + token % STRIP * pair;
      for (int64_t i = 0; i < d; i += pair, column += STRIP * pair) std::memcpy(to + i, column, 4);
      return;
    }
    const int64_t group = kind == INT8 ? d : d / groups, half = group / 2;
    for (int64_t i = 0; i < d; i++) {  // see kernels/formats.py
      const int64_t j = i % group;
      if (kind == INT8) {
        to[i] = narrow<T>(float(((const int8_t*)data)[token * d + i]) * ((const float*)scale)[token]);
        continue;
      }
      const uint8_t byte = ((const uint8_t*)data)[token * d / 2 + i / group * half + j % half];
      const float value = float(j < half ? byte & 15 : byte >> 4) - 8;
      to[i] = narrow<T>(value * widen(((const bf16*)scale)[token * groups + i / group]));
    }
  }
};

// adapters.Adapter: what corrects a state that leaves at an exit. rank 0: none.
struct Adapter {
  Weight down, up;
  int64_t rank = 0;
};

// plan.Rule: what an exit must be like. The first three measures are statistics of the exit, the others compare it with
// the candidate before.
struct Rule {
  enum Measure : int64_t { NONE = -1, TOP1, MARGIN, ENTROPY, COSINE, REPEATS };
  int64_t measure;
  double threshold;
  explicit operator bool() const { return measure != NONE; }
  bool by_stats() const { return measure >= TOP1 && measure <= ENTROPY; }
  bool holds(const float* stats) const {
    return measure == ENTROPY ? stats[measure] <= threshold : stats[measure] >= threshold;
  }
};

// The C++ twin of rounds.Drafter: rows climb through the layers; whoever goes deeper takes those waiting there along.
template <typename T>
struct Round {
  // Rows at consecutive positions, each waiting at a depth; later ones never deeper than earlier ones.
  struct Rows {
    T* hidden;       // [drafts + 1, d]
    int64_t* depth;  // [drafts + 1]
    int64_t count = 0;
    int64_t first_beside_last() const {
      int64_t first = count - 1;
      while (first > 0 && depth[first - 1] == depth[count - 1]) first--;
      return first;
    }
  };
  const LayerTable &table, &draft_table;  // the model's, and what copies climb through: its own or low-bit layers
  const Embedding<T>& embedding;
  Head<T> draft_head, head;
  Draw sampling;  // its position is not looked at
  const std::vector<int64_t>& exits;  // candidates, ascending
  const std::vector<Adapter>& adapters;  // of the exits, or none at all
  Rule leave, stay;                   // at a candidate; after a token
  const std::vector<int64_t>& skips;  // 2 * layer for its attention, 2 * layer + 1 for its MLP
  int64_t own;                        // depth up to which a drafted row is the full model's
  int64_t position;                   // of the first row
  Rows rows, copies;                  // the rows; copies of them on their way above `own`

  struct Counts {
    // draft_layers: of copies, from which the sublayers left out are missing
    int64_t drafted = 0, heads = 0, layers = 0, draft_layers = 0, skipped_attention = 0, skipped_mlp = 0, resume = 0;
  } counts{};

  void enter(int64_t token) {
    const int64_t row = rows.count++;
    rows.depth[row] = 0;
    embedding.row(token, table.d, rows.hidden + row * table.d);
  }
  // Take the last row and all that wait where it waits to depth `stop`; the rows themselves skip nothing below `own`.
  void climb(Rows& which, int64_t stop) {
    const int64_t first = which.first_beside_last(), start = which.depth[first], last = which.count;
    auto skipped = [&](int64_t sublayer) {
      return &which == &copies && std::find(skips.begin(), skips.end(), sublayer) != skips.end();
    };
    LayerRun<T>{&which == &copies ? draft_table : table, which.hidden + first * table.d, last - first, position + first}
        .run(start, stop, skipped);
    std::fill(which.depth + first, which.depth + last, stop);
    (&which == &copies ? counts.draft_layers : counts.layers) += stop - start;
    for (int64_t sublayer = 2 * start; sublayer < 2 * stop; sublayer++)
      if (skipped(sublayer)) (sublayer % 2 ? counts.skipped_mlp : counts.skipped_attention)++;
  }
  void climb_copy(int64_t stop) {
    for (; copies.count < rows.count; copies.count++) {
      const int64_t row = copies.count;
      std::memcpy(copies.hidden + row * table.d, rows.hidden + row * table.d, table.d * sizeof(T));
      copies.depth[row] = own;
    }
    climb(copies, stop);
  }
  // A row that leaves, as the adapter of its exit corrects it.
  const T* adapted(const T* row, size_t exit) const {
    if (exit >= adapters.size() || !adapters[exit].rank) return row;
    static thread_local Scratch scratch;
    const int64_t d = table.d, rank = adapters[exit].rank;
    T *result = (T*)scratch.get(2 * d + rank), *added = result + d, *inner = added + d;
    std::memcpy(result, row, d * sizeof(T));
    Linear<T>{row, adapters[exit].down, inner, 1, d, rank, 1, nullptr}.run();
    Linear<T>{inner, adapters[exit].up, added, 1, rank, d, 1, nullptr}.run();
    add_to(result, added, d);
    return result;
  }
  // The tokens after `count` rows, the first of which is row `first`; if wanted, of one row the best token (the argmax,
  // which a sample need not be) and the statistics of the exit.
  void choose(const Head<T>& with, const T* hidden, int64_t first, int64_t count, int64_t* tokens, float* stats,
              int64_t* best = nullptr) const {
    const bool sampled = sampling.temperature > 0;
    int64_t unread;  // statistics come with the best token
    int64_t* found = best || !stats ? best : &unread;
    with.run(hidden, count, {sampling.temperature, sampling.seed, position + first + 1},
             {sampled ? found : tokens, stats, sampled ? tokens : nullptr});
    if (best && !sampled) *best = *tokens;
  }
  // Whether a state still points where the one at the candidate before pointed; keeps it in `before` [d].
  bool has_settled(const T* state, T* before, bool first) const {
    double product = 0, length = 0, length_before = 0;
    for (int64_t i = 0; !first && i < table.d; i++) {
      const double a = widen(state[i]), b = widen(before[i]);
      product += a * b, length += a * a, length_before += b * b;
    }
    std::memcpy(before, state, table.d * sizeof(T));
    return !first && product >= leave.threshold * std::sqrt(length) * std::sqrt(length_before);
  }

  // Let the last row climb until it leaves -> its exit layer. stats [4] are filled if a rule needs them.
  int64_t draft(int64_t* token, float* stats) {
    static thread_local Scratch scratch;
    T* const before = (T*)scratch.get(table.d);
    int64_t repeats = 0, repeated = -1;  // candidates in a row that chose a token
    for (size_t i = 0; i < exits.size(); i++) {
      const int64_t exit = exits[i], row = rows.count - 1;
      if (rows.depth[rows.count - 1] < own) climb(rows, std::min(exit, own));
      if (exit > own) climb_copy(exit);
      const bool last = exit == exits.back();
      const T* state = adapted((exit > own ? copies : rows).hidden + row * table.d, i);
      const bool by_state = leave.measure == Rule::COSINE;
      if (by_state && !last && !has_settled(state, before, i == 0)) continue;  // no head is asked
      int64_t best;
      choose(draft_head, state, row, 1, token, stay || (leave.by_stats() && !last) ? stats : nullptr,
             leave.measure == Rule::REPEATS ? &best : nullptr);
      counts.heads++;
      if (last || by_state || (leave.by_stats() && leave.holds(stats))) return exit;
      if (leave.measure != Rule::REPEATS) continue;
      repeats = best == repeated ? repeats + 1 : 1;
      repeated = best;
      if (repeats >= leave.threshold) return exit;
    }
    return 0;
  }
  void verify(int64_t* chosen) {
    while (rows.depth[rows.count - 1] < table.n_layer) {
      const int64_t first = rows.first_beside_last();
      climb(rows, first ? rows.depth[first - 1] : table.n_layer);
    }
    choose(head, rows.hidden, 0, rows.count, chosen, nullptr);
  }

  // Draft up to `drafts` tokens after `token`; or, if `given`, take drafted [drafts] as they are. exit_layers [drafts],
  // chosen [drafts + 1]: the full model's token after each row.
  void run(int64_t token, int64_t drafts, bool given, int64_t* drafted, int64_t* exit_layers, int64_t* chosen) {
    float stats[4];
    int64_t n = given ? drafts : 0;
    enter(token);
    while (n < drafts) {
      exit_layers[n] = draft(drafted + n, stats);
      counts.resume = rows.depth[n];
      enter(drafted[n++]);
      if (stay && !stay.holds(stats)) break;
    }
    for (int64_t i = 0; given && i < n; i++) enter(drafted[i]);
    counts.drafted = n;
    verify(chosen);
  }
};

}  // namespace skipfast
