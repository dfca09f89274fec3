// round: a whole round in one call: draft by a plan, verify, and report the full model's token after every row.
//
// The C++ twin of the loop in decoding/rounds.py. Whatever does not change from round to round stands in tables that are
// checked once (see decoding/packed.py).
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

// The hidden states that tokens begin with: [V, D], of which one row is read.
struct Embedding {
  enum Kind : int64_t { PLAIN, PACKED, INT8, INT4 } kind;  // PACKED: the rows are the outputs of a packed LM head
  const void *data, *scale;
  int64_t groups;  // of a row that have a scale (INT4)

  template <typename T>
  void row(int64_t token, int64_t d, T* to) const {
    if (kind == PLAIN) return (void)std::memcpy(to, (const T*)data + token * d, d * sizeof(T));
    if (kind == PACKED) {
      constexpr int64_t pair = int64_t(sizeof(float) / sizeof(T));
      const T* output = (const T*)data + token / STRIP * STRIP * d + token % STRIP * pair;
      for (int64_t i = 0; i < d; i += pair, output += STRIP * pair) std::memcpy(to + i, output, 4);
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

// A model and what drafts for it: the op model_table. Pointers stay valid while their owner keeps the tensors.
struct ModelTable {
  static constexpr int64_t TAG = 0x6d6f64656c;  // stands first, to tell this table from others
  int64_t tag;
  const LayerTable *layers, *draft_layers;  // drafts run their own layers through the second: the first, or low-bit ones
  Embedding embedding;
  const void* norm;
  Weight head, draft_head;
  int64_t n_vocab, draft_vocab;
};

// Which number of an exit a rule looks at: drafting.plan.Measure has the same names and values. The first three are
// statistics of the exit, the others compare it with the exit at the candidate before.
enum Measure : int64_t { NONE = -1, TOP1 = 0, MARGIN = 1, ENTROPY = 2, COSINE = 3, REPEATS = 4 };

// drafting.plan.Rule.
struct Rule {
  int64_t measure;
  double threshold;
  explicit operator bool() const { return measure != NONE; }
  bool by_stats() const { return measure >= TOP1 && measure <= ENTROPY; }
  bool holds(const float* stats) const {
    return measure == ENTROPY ? stats[measure] <= threshold : stats[measure] >= threshold;
  }
};

// drafting.adapters.Adapter: corrects a state that exits. rank 0: none.
struct Adapter {
  Weight down, up;
  int64_t rank = 0;
};

// A drafting.plan.DraftPlan without the numbers that change from round to round: the op plan_table. Behind it stand
// its candidate exits, a flag for each sublayer of the model, and the tokens that end a text.
struct PlanTable {
  struct Candidate {
    int64_t depth;
    Adapter adapter;
  };
  static constexpr int64_t TAG = 0x706c616e;
  int64_t tag;
  const ModelTable* model;
  int64_t exact_depth;  // up to which a drafted row is the full model's
  int64_t exit_measure, stop_measure;
  int64_t n_candidates, n_eos;

  Candidate* candidates() const { return (Candidate*)(this + 1); }
  int64_t* skipped() const { return (int64_t*)(candidates() + n_candidates); }  // of attention 2 * layer, of MLP + 1
  int64_t* eos() const { return skipped() + 2 * model->layers->n_layer; }
  bool ends_text(int64_t token) const { return std::find(eos(), eos() + n_eos, token) != eos() + n_eos; }
  static int64_t words(int64_t candidates, int64_t n_layer, int64_t eos) {
    return int64_t(sizeof(PlanTable) + candidates * sizeof(Candidate)) / 8 + 2 * n_layer + eos;
  }
};

// One round: rows climb through the layers, and take along the rows that wait on their way.
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
  const PlanTable& plan;
  const ModelTable& model;
  const LayerTable &table, &draft_table;  // the model's
  Head<T> draft_head, head;
  Draw sampling;              // its position is not looked at
  Rule exit_if, stop_unless;  // exit at a candidate if the first holds; draft on after a token if the second does
  int64_t position;           // of the first row
  Rows rows, draft_rows;      // above plan.exact_depth a copy of a row climbs on in its place, a draft row

  struct Counts {
    // heads: asked while drafting. layers, draft_layers: run for rows, and for draft rows, which left out the skipped
    // ones. resume: the depth at which the last drafted row waits for verification.
    int64_t drafted = 0, heads = 0, layers = 0, draft_layers = 0, skipped_attention = 0, skipped_mlp = 0, resume = 0;
  } counts{};

  void enter(int64_t token) {
    const int64_t row = rows.count++;
    rows.depth[row] = 0;
    model.embedding.row(token, table.d, rows.hidden + row * table.d);
  }
  // Run the last row up to depth `stop`, and with it all rows that wait where it waits. Only draft rows skip sublayers.
  void climb(Rows& which, int64_t stop) {
    const int64_t first = which.first_beside_last(), start = which.depth[first], last = which.count;
    auto skipped = [&](int64_t sublayer) { return &which == &draft_rows && plan.skipped()[sublayer]; };
    LayerRun<T>{&which == &draft_rows ? draft_table : table, which.hidden + first * table.d, last - first,
                position + first}
        .run(start, stop, skipped);
    std::fill(which.depth + first, which.depth + last, stop);
    (&which == &draft_rows ? counts.draft_layers : counts.layers) += stop - start;
    for (int64_t sublayer = 2 * start; sublayer < 2 * stop; sublayer++)
      if (skipped(sublayer)) (sublayer % 2 ? counts.skipped_mlp : counts.skipped_attention)++;
  }
  void climb_draft_row(int64_t stop) {
    for (; draft_rows.count < rows.count; draft_rows.count++) {
      const int64_t row = draft_rows.count;
      std::memcpy(draft_rows.hidden + row * table.d, rows.hidden + row * table.d, table.d * sizeof(T));
      draft_rows.depth[row] = plan.exact_depth;
    }
    climb(draft_rows, stop);
  }
  // A row that exits, corrected by the adapter of its exit.
  const T* adapted(const T* row, const Adapter& adapter) const {
    if (!adapter.rank) return row;
    static thread_local Scratch scratch;
    const int64_t d = table.d, rank = adapter.rank;
    T *result = (T*)scratch.get(2 * d + rank), *added = result + d, *inner = added + d;
    std::memcpy(result, row, d * sizeof(T));
    Linear<T>{row, adapter.down, inner, 1, d, rank, 1, nullptr}.run();
    Linear<T>{inner, adapter.up, added, 1, rank, d, 1, nullptr}.run();
    add_to(result, added, d);
    return result;
  }
  // Write to tokens [count] the token after each of `count` rows, the first of which is row `first`: a sample, or the
  // argmax if the temperature is 0. stats, best: null, or with one row where its statistics and its argmax go.
  void choose(const Head<T>& with, const T* hidden, int64_t first, int64_t count, int64_t* tokens, float* stats,
              int64_t* best = nullptr) const {
    const bool sampled = sampling.temperature > 0;
    int64_t unread;  // the head gives statistics only together with the argmax
    int64_t* argmax = best || !stats ? best : &unread;
    with.run(hidden, count, {sampling.temperature, sampling.seed, position + first + 1},
             {sampled ? argmax : tokens, stats, sampled ? tokens : nullptr});
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
    return !first && product >= exit_if.threshold * std::sqrt(length) * std::sqrt(length_before);
  }

  // Let the last row climb until it exits -> its exit layer. stats [4] are filled if a rule needs them.
  int64_t draft(int64_t* token, float* stats) {
    static thread_local Scratch scratch;
    T* const before = (T*)scratch.get(table.d);
    int64_t repeats = 0, repeated = -1;  // candidates in a row that chose a token
    for (int64_t i = 0; i < plan.n_candidates; i++) {
      const int64_t exit = plan.candidates()[i].depth, row = rows.count - 1, exact = plan.exact_depth;
      if (rows.depth[rows.count - 1] < exact) climb(rows, std::min(exit, exact));
      if (exit > exact) climb_draft_row(exit);
      const bool last = i + 1 == plan.n_candidates;
      const T* state = adapted((exit > exact ? draft_rows : rows).hidden + row * table.d, plan.candidates()[i].adapter);
      const bool by_state = exit_if.measure == COSINE;
      if (by_state && !last && !has_settled(state, before, i == 0)) continue;  // no head is asked
      int64_t best;
      choose(draft_head, state, row, 1, token, stop_unless || (exit_if.by_stats() && !last) ? stats : nullptr,
             exit_if.measure == REPEATS ? &best : nullptr);
      counts.heads++;
      if (last || by_state || (exit_if.by_stats() && exit_if.holds(stats))) return exit;
      if (exit_if.measure != REPEATS) continue;
      repeats = best == repeated ? repeats + 1 : 1;
      repeated = best;
      if (repeats >= exit_if.threshold) return exit;
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
      if ((stop_unless && !stop_unless.holds(stats)) || plan.ends_text(drafted[n - 1])) break;
    }
    for (int64_t i = 0; given && i < n; i++) enter(drafted[i]);
    counts.drafted = n;
    verify(chosen);
  }
};

}  // namespace skipfast
