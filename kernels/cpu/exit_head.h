// exit_head: LM head, argmax, confidence and a coupled sample in one pass over the weight. Logits never reach memory.
#pragma once
#include "linear.h"
#include "noise.h"

namespace skipfast {

constexpr int64_t RUN = 8;  // blocks whose logits are reduced together; another number would change bits of the sums

// A row's logits reduced over a run of tokens. Runs are merged in order, so that ties go to the lowest token.
struct Partial {
  static constexpr float NONE = -std::numeric_limits<float>::infinity();
  int64_t token = 0, sample = 0;
  float peak = NONE, second = NONE;        // largest and second largest logit
  float sum = 0.0f, weighted = 0.0f;       // over these tokens: exp(z - peak), and exp(z - peak) * (z - peak)
  float noisy = NONE;                      // largest of logit / temperature + noise

  static constexpr float LOWEST = -87.3f;  // below it, exp counts as exp(LOWEST)

  void rescale(float new_peak) {
    const float shift = std::max(peak - new_peak, LOWEST), factor = exp_scalar(shift);
    weighted = factor * (weighted + sum * shift), sum *= factor;
  }
  void merge(Partial next, bool sums) {
    const float new_peak = std::max(peak, next.peak);
    if (sums) {
      rescale(new_peak), next.rescale(new_peak);
      sum += next.sum, weighted += next.weighted;
    }
    second = next.peak > peak ? std::max(peak, next.second) : std::max(second, next.peak);
    if (next.peak > peak) token = next.token;
    if (next.noisy > noisy) noisy = next.noisy, sample = next.sample;
    peak = new_peak;
  }
};

// Where the answers go: tokens [rows]; stats [rows, 4], the top-1 probability, its lead over the second, the entropy in
// nats and the logsumexp; samples [rows]. Null: not wanted. Stats need tokens.
struct Answers {
  int64_t* tokens;
  float* stats;
  int64_t* samples;
};

template <typename T>
struct ExitHead {
  Linear<T> linear;  // x are normalised rows; n may stop short of the weight's outputs (a trimmed vocabulary)
  Draw draw;
  Answers answers;
  Partial* partials;  // [runs][rows]

  int64_t runs() const { return (linear.blocks() + RUN - 1) / RUN; }

  // Reduce z[0..n), a row's logits from token `first` on. z must have room for whole vectors, and is overwritten.
  Partial reduce(float* z, int64_t n, int64_t first, int64_t row) const {
    Partial out;
    const int64_t end = (n + LANES - 1) / LANES * LANES;
    for (int64_t i = n; i < end; i++) z[i] = Partial::NONE;
    if (answers.samples) reduce_noisy(z, end, first, row, out);
    if (!answers.tokens) return out;
    Largest largest;
    for (int64_t i = 0; i < end; i += LANES) largest.see(load(z + i), first + i);
    out.peak = largest.get(out.token);
    if (!answers.stats) return out;
    Vec total = splat(0.0f), weighted = splat(0.0f);
    for (int64_t i = 0; i < end; i += LANES) {
      Vec shift = max(splat(Partial::LOWEST), sub(load(z + i), splat(out.peak))), e = exp(shift);
      if (i + LANES > n) {  // tokens that do not exist add nothing
        float kept[LANES];
        store(kept, e);
        e = load(kept, int(n - i));
      }
      total = add(total, e), weighted = fma(e, shift, weighted);
    }
    out.sum = sum_lanes(total), out.weighted = sum_lanes(weighted);
    z[out.token - first] = Partial::NONE;
    Vec top = load(z);
    for (int64_t i = LANES; i < end; i += LANES) top = max(top, load(z + i));
    out.second = max_lanes(top);
    return out;
  }

  // Find the largest noisy score of z[0..end), whole vectors.
  void reduce_noisy(const float* z, int64_t end, int64_t first, int64_t row, Partial& out) const {
    const Noise noise(draw.seed, draw.position + row);
    const Vec temperature = splat(draw.temperature);
    Largest largest;
    for (int64_t i = 0; i < end; i += LANES)
      largest.see(add(div(load(z + i), temperature), noise.at(first + i)), first + i);
    out.noisy = largest.get(out.sample);
  }

  void run_of_blocks(int64_t run) const {
    static thread_local Scratch scratch;
    const int64_t stride = RUN * BLOCK, first = run * RUN, last = std::min(first + RUN, linear.blocks());
    float* z = scratch.get(linear.rows * stride);
    for (int64_t r = 0; r < linear.rows; r += linear.tile) {
      const int64_t height = std::min(linear.tile, linear.rows - r);
      for (int64_t b = first; b < last; b += STREAMS)
        linear.whole_blocks(b, std::min(b + STREAMS, last), r, height, z + r * stride + (b - first) * BLOCK, stride);
      for (float* to = z + r * stride; to < z + (r + height) * stride; to += stride)
        for (int64_t i = 0; i < (last - first) * BLOCK; i += LANES) {  // round as the plain head does: the same token
          T rounded[LANES];
          store(rounded, load(to + i)), store(to + i, load(rounded));
        }
    }
    const int64_t n = std::min(linear.n, last * BLOCK) - first * BLOCK;
    for (int64_t r = 0; r < linear.rows; r++)
      partials[run * linear.rows + r] = reduce(z + r * stride, n, first * BLOCK, r);
  }

  void run() {
    static thread_local Scratch scratch;
    TileScope scope;
    partials = (Partial*)scratch.get(runs() * linear.rows * int64_t(sizeof(Partial) / sizeof(float)));
    const int64_t bytes = linear.blocks() * BLOCK * linear.k * int64_t(sizeof(T));
    linear.tile = tile_height(linear.rows, tile_limit<T>());
    linear.interleave(1);
    for_each_task(runs(), threads_for(bytes, LINEAR_BYTES_PER_THREAD), [&](int64_t i) { run_of_blocks(i); });
    for (int64_t r = 0; r < linear.rows; r++) {
      Partial all = partials[r];
      for (int64_t i = 1; i < runs(); i++) all.merge(partials[i * linear.rows + r], answers.stats);
      if (answers.tokens) answers.tokens[r] = all.token;
      if (answers.samples) answers.samples[r] = all.sample;
      if (!answers.stats) continue;
      float* stats = answers.stats + 4 * r;
      const float log_sum = std::log(all.sum);
      stats[0] = 1.0f / all.sum;
      stats[1] = (1.0f - std::exp(all.second - all.peak)) / all.sum;
      stats[2] = log_sum - all.weighted / all.sum;
      stats[3] = all.peak + log_sum;
    }
  }
};

}  // namespace skipfast
