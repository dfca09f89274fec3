// The CPU ops of skipfast: linear, norms, attention, whole layers, the exit head and whole rounds of decoding.
//
// One rule makes speculative decoding exact here: an output element is one fixed sequence of operations, the same for
// every number of rows, threads and cache slots. Tiling chooses WHICH elements are computed together, never the order
// in which one of them sums. Partial sums stay fp32 in memory, so storing them is exact. The build switches
// floating-point contraction off: products and sums fuse only where the source says fma.
//
// How a call gets here: kernels/linear.py etc. -> torch.ops.skipfast_cpu.* -> the functions of this file, which check
// and dispatch -> the header of the same name, which computes. Read vec.h, threads.h and linear.h first.
//
// It uses torch's stable ABI (2.10), whose headers compile in seconds. Threads come from torch's own pool, so that
// torch.set_num_threads governs them and no second OpenMP runtime is loaded.
//
// Shapes: K in features, N out features, T rows, H query heads, G kv heads, E head dim, S cache slots.
#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 10) << 48))
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "attention.h"
#include "exit_head.h"
#include "layers.h"
#include "linear.h"
#include "round.h"
#include "rows.h"

using namespace skipfast;

namespace {

using torch::stable::Tensor;

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

// A new contiguous tensor.
Tensor new_tensor(const std::vector<int64_t>& sizes, int32_t dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(sizes[i], 1)) strides[i] = stride;
  AtenTensorHandle handle;
  const auto code = aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), dtype,
                                             aoti_torch_device_type_cpu(), 0, &handle);
  STD_TORCH_CHECK(code == 0, "cannot allocate the result");
  return Tensor(handle);
}

// A new tensor like x, with another last dimension.
Tensor new_result(const Tensor& x, int64_t last_size) {
  const auto like = x.sizes();
  std::vector<int64_t> sizes(like.begin(), like.end());
  sizes.back() = last_size;
  return new_tensor(sizes, dtype_of(x));
}

template <typename T>
inline T* data(const Tensor& tensor) { return (T*)tensor.data_ptr(); }

// A packed weight as the kernels take it, with its shape.
struct CheckedWeight {
  Weight weight;
  int64_t features, outputs;  // outputs count the padding

  bool fits(int64_t k, int64_t n) const { return features == k && n <= outputs && n > outputs - BLOCK; }
};

// like: any tensor of the dtype of the rows.
CheckedWeight weight_of(const char* op, const Tensor& packed, const Tensor& like) {
  check_contiguous(op, "packed", packed);
  if (dtype_of(packed) == aoti_torch_dtype_int8()) {
    const int64_t k = packed.dim() == 3 ? packed.size(1) - Weight::INT8_TAIL / BLOCK : 1;
    STD_TORCH_CHECK(k % 2 == 0 && packed.size(2) == BLOCK, op,
                    ": an int8 weight must be [N/32, K + 4, 32], K even; see linear.pack_quantised");
    return {{packed.data_ptr(), Format::INT8, 0}, k, packed.size(0) * BLOCK};
  }
  if (dtype_of(packed) == aoti_torch_dtype_uint8()) {
    const int64_t group = packed.dim() == 3 ? (packed.size(2) - Weight::GROUP_HEAD) * 2 / BLOCK : 0;
    const Weight weight{packed.data_ptr(), Format::INT4, group};
    STD_TORCH_CHECK((group == 32 || group == 64 || group == 128) && weight.group_bytes() == packed.size(2), op,
                    ": an int4 weight must be [N/32, K/group, 64 + 16 group], group 32, 64 or 128; see "
                    "linear.pack_quantised");
    return {weight, packed.size(1) * group, packed.size(0) * BLOCK};
  }
  const bool pairs = is_bf16(like);
  check_same_dtype(op, "packed", packed, like);
  STD_TORCH_CHECK(packed.dim() == (pairs ? 4 : 3) && packed.size(2) == STRIP && (!pairs || packed.size(3) == 2), op,
                  ": packed must be [N/16, K/2, 16, 2] (bfloat16) or [N/16, K, 16] (float32); see linear.pack");
  return {{packed.data_ptr(), Format::PLAIN, 0}, packed.size(1) * (pairs ? 2 : 1), packed.size(0) * STRIP};
}

Tensor linear(Tensor x, Tensor packed, int64_t out_features) {
  check_dtype("linear", "x", x);
  check_contiguous("linear", "x", x);
  STD_TORCH_CHECK(x.dim() >= 1, "linear: x must have at least one dimension");
  const int64_t k = x.size(x.dim() - 1);
  const CheckedWeight w = weight_of("linear", packed, x);
  STD_TORCH_CHECK(w.features == k, "linear: x has ", k, " features, the weight takes ", w.features);
  STD_TORCH_CHECK(w.fits(k, out_features), "linear: out_features must be in ", w.outputs - BLOCK + 1, "..", w.outputs,
                  " for this weight, got ", out_features);
  Tensor y = new_result(x, out_features);
  const int64_t rows = k ? x.numel() / k : 0;
  if (is_bf16(x)) Linear<bf16>{data<bf16>(x), w.weight, data<bf16>(y), rows, k, out_features, 1, nullptr}.run();
  else Linear<float>{data<float>(x), w.weight, data<float>(y), rows, k, out_features, 1, nullptr}.run();
  return y;
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
    STD_TORCH_CHECK(data<int64_t>(positions)[t] >= -1 && data<int64_t>(positions)[t] < slots, op,
                    ": positions must be in 0..", slots - 1, ", or -1 for padding, got ", data<int64_t>(positions)[t]);
}

template <typename T>
void attention_as(const Tensor& q, const Tensor& k, const Tensor& v, Tensor& k_cache, Tensor& v_cache,
                  const Tensor& positions, const Tensor& y) {
  Attention<T> op{};
  op.q = data<T>(q), op.k = data<T>(k), op.v = data<T>(v);
  op.k_cache = data<T>(k_cache), op.v_cache = data<T>(v_cache), op.out = data<T>(y);
  op.positions = data<int64_t>(positions);
  op.q_stride = q.stride(0), op.k_stride = k.stride(0), op.v_stride = v.stride(0);
  op.rows = q.size(0), op.heads = q.size(1), op.groups = k.size(1), op.e = q.size(2), op.slots = v_cache.size(1);
  op.run();
}

// k_cache [G, S/16, E/2, 16, 2] (bfloat16) or [G, S/16, E, 16] (float32), v_cache [G, S, E].
void check_caches(const char* op, const Tensor& k_cache, const Tensor& v_cache) {
  const bool pairs = is_bf16(v_cache);
  check_same_dtype(op, "k_cache", k_cache, v_cache);
  check_contiguous(op, "k_cache", k_cache), check_contiguous(op, "v_cache", v_cache);
  STD_TORCH_CHECK(v_cache.dim() == 3 && k_cache.dim() == (pairs ? 5 : 4) && k_cache.size(0) == v_cache.size(0) &&
                      k_cache.size(1) * STRIP == v_cache.size(1) && v_cache.size(1) % BLOCK == 0 &&
                      k_cache.size(2) * (pairs ? 2 : 1) == v_cache.size(2) && k_cache.size(3) == STRIP,
                  op, ": the caches must be [G, S/16, E/2, 16, 2] (bfloat16) or [G, S/16, E, 16] (float32), and "
                  "[G, S, E]; see attention.new_cache");
}

Tensor attention(Tensor q, Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor positions) {
  check_dtype("attention", "q", q);
  check_same_dtype("attention", "k", k, q), check_same_dtype("attention", "v", v, q);
  check_same_dtype("attention", "v_cache", v_cache, q);
  check_caches("attention", k_cache, v_cache);
  STD_TORCH_CHECK(q.dim() == 3 && k.dim() == 3 && v.dim() == 3,
                  "attention: q must be [T, H, E], k and v [T, G, E]");
  const int64_t rows = q.size(0), heads = q.size(1), e = q.size(2), groups = k.size(1), slots = v_cache.size(1);
  STD_TORCH_CHECK(groups > 0 && heads % groups == 0, "attention: ", heads, " query heads cannot share ", groups,
                  " kv heads");
  for (const Tensor* one : {&k, &v})
    STD_TORCH_CHECK(one->size(0) == rows && one->size(1) == groups && one->size(2) == e,
                    "attention: k and v must be [", rows, ", ", groups, ", ", e, "] like q");
  STD_TORCH_CHECK(v_cache.size(0) == groups && v_cache.size(2) == e, "attention: the caches must be of ", groups,
                  " kv heads of ", e);
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
// exit_head
// ---------------------------------------------------------------------------------------------------------------------
Draw draw_of(const char* op, double temperature, int64_t seed, int64_t position) {
  STD_TORCH_CHECK(temperature >= 0 && std::isfinite(float(temperature)), op,
                  ": temperature must be 0 or a positive number, got ", temperature);
  STD_TORCH_CHECK(seed >= 0, op, ": seed must be 0 or more, got ", seed);
  return {float(temperature), uint64_t(seed), position};
}

std::tuple<Tensor, Tensor, Tensor> exit_head(Tensor hidden, Tensor norm, Tensor packed, int64_t n_vocab, double eps,
                                             bool want_stats, double temperature, int64_t seed, int64_t position) {
  check_dtype("exit_head", "hidden", hidden);
  check_same_dtype("exit_head", "norm", norm, hidden);
  check_contiguous("exit_head", "hidden", hidden), check_contiguous("exit_head", "norm", norm);
  const CheckedWeight w = weight_of("exit_head", packed, hidden);
  STD_TORCH_CHECK(hidden.dim() == 2, "exit_head: hidden must be [T, D]");
  const int64_t rows = hidden.size(0), d = hidden.size(1);
  STD_TORCH_CHECK(w.features == d && norm.numel() == d, "exit_head: hidden has ", d, " features, the weight ",
                  w.features, ", the norm ", norm.numel());
  STD_TORCH_CHECK(0 < n_vocab && n_vocab <= w.outputs, "exit_head: n_vocab must be in 1..", w.outputs, ", got ",
                  n_vocab);
  const Draw draw = draw_of("exit_head", temperature, seed, position);
  const bool sampled = draw.temperature > 0;
  Tensor tokens = new_tensor({rows}, aoti_torch_dtype_int64());
  static const Tensor no_stats = new_tensor({0, 4}, aoti_torch_dtype_float32());  // making one takes half a microsecond
  static const Tensor no_samples = new_tensor({0}, aoti_torch_dtype_int64());
  Tensor stats = want_stats ? new_tensor({rows, 4}, aoti_torch_dtype_float32()) : no_stats;
  Tensor samples = sampled ? new_tensor({rows}, aoti_torch_dtype_int64()) : no_samples;
  const Answers answers{data<int64_t>(tokens), want_stats ? data<float>(stats) : nullptr,
                        sampled ? data<int64_t>(samples) : nullptr};
  auto run = [&](auto zero) {
    using T = decltype(zero);
    const Head<T> head{data<T>(norm), w.weight, d, n_vocab, float(eps)};
    head.run(data<T>(hidden), rows, draw, answers);
  };
  if (rows && is_bf16(hidden)) run(bf16{});
  else if (rows) run(0.0f);
  return {tokens, stats, samples};
}

// ---------------------------------------------------------------------------------------------------------------------
// layers
// ---------------------------------------------------------------------------------------------------------------------
// Check the tensors of every layer (those of decoding.packed.TENSORS, layer after layer) and note where they are.
Tensor layer_table(std::vector<Tensor> tensors, Tensor cos, Tensor sin, int64_t heads, double eps) {
  constexpr int64_t each = 8;
  const char* op = "layer_table";
  const int64_t n_layer = int64_t(tensors.size()) / each;
  STD_TORCH_CHECK(n_layer > 0 && n_layer * each == int64_t(tensors.size()), op, ": ", each, " tensors a layer");
  const Tensor &first_norm = tensors[0], &first_v = tensors[7];
  check_dtype(op, "every norm", first_norm);
  STD_TORCH_CHECK(first_v.dim() == 3, op, ": v_cache must be [G, S, E]");
  const int64_t d = first_norm.numel(), f = weight_of(op, tensors[5], first_norm).features;
  const int64_t groups = first_v.size(0), slots = first_v.size(1), e = first_v.size(2);
  for (const Tensor* one : {&cos, &sin}) {
    check_contiguous(op, "cos and sin", *one);
    STD_TORCH_CHECK(dtype_of(*one) == aoti_torch_dtype_float32() && one->numel() == slots * e, op,
                    ": cos and sin must be float32 [S, 1, E]");
  }
  Tensor result = new_tensor({LayerTable::words(n_layer)}, aoti_torch_dtype_int64());
  auto* table = reinterpret_cast<LayerTable*>(data<int64_t>(result));
  *table = {is_bf16(first_norm), n_layer, d, f, heads, groups, e, slots, eps, data<float>(cos), data<float>(sin)};
  auto* layers = reinterpret_cast<LayerTable::Layer*>(table + 1);
  for (int64_t i = 0; i < n_layer; i++) {
    const Tensor* t = &tensors[i * each];
    auto weight = [&](int64_t at) { return weight_of(op, t[at], first_norm); };
    const CheckedWeight wqkv = weight(1), wo = weight(2), w13 = weight(4), w2 = weight(5);
    for (int64_t at : {0, 3, 6, 7}) {
      check_contiguous(op, "every tensor", t[at]);
      check_same_dtype(op, "every tensor", t[at], first_norm);
    }
    check_caches(op, t[6], t[7]);
    STD_TORCH_CHECK(groups > 0 && e % 2 == 0 && heads % groups == 0 && t[0].numel() == d && t[3].numel() == d &&
                        wqkv.fits(d, (heads + 2 * groups) * e) && wo.fits(heads * e, d) && w13.fits(d, 2 * f) &&
                        w2.fits(f, d) && t[7].size(0) == groups && t[7].size(1) == slots && t[7].size(2) == e,
                    op, ": layer ", i, " does not fit ", d, " features and ", heads, " heads of ", e);
    layers[i] = {t[0].data_ptr(), wqkv.weight, wo.weight, t[3].data_ptr(), w13.weight, w2.weight, t[6].data_ptr(),
                 t[7].data_ptr()};
  }
  return result;
}

constexpr int64_t TEAM_BYTES = 256 << 10;  // of weights, for which a thread is worth waking

const LayerTable& table_of(const char* op, const Tensor& tensor) {
  STD_TORCH_CHECK(dtype_of(tensor) == aoti_torch_dtype_int64() && tensor.numel() > LayerTable::words(0), op,
                  ": the table must come from layer_table");
  return *reinterpret_cast<const LayerTable*>(data<int64_t>(tensor));
}
template <typename T>
int64_t bytes_of_layers(const LayerTable& table, int64_t layers) {
  return layers * table.d * (4 * table.d + 3 * table.f) * int64_t(sizeof(T));
}

Tensor layers(Tensor hidden, Tensor table_tensor, int64_t position, int64_t start, int64_t stop,
              std::vector<int64_t> skips) {
  const LayerTable& table = table_of("layers", table_tensor);
  check_contiguous("layers", "hidden", hidden);
  STD_TORCH_CHECK(hidden.dim() == 2 && hidden.size(1) == table.d && is_bf16(hidden) == bool(table.bf16) &&
                      (is_bf16(hidden) || dtype_of(hidden) == aoti_torch_dtype_float32()),
                  "layers: hidden must be [T, ", table.d, "] in the dtype of the weights");
  const int64_t rows = hidden.size(0), d = table.d;
  STD_TORCH_CHECK(0 <= position && position + rows <= table.slots, "layers: positions must be in 0..", table.slots - 1,
                  ", got ", position, "..", position + rows - 1);
  STD_TORCH_CHECK(0 <= start && start <= stop && stop <= table.n_layer, "layers: start and stop must be in 0..",
                  table.n_layer, ", got ", start, " and ", stop);
  Tensor out = new_result(hidden, d);
  auto skipped = [&](int64_t sublayer) { return std::find(skips.begin(), skips.end(), sublayer) != skips.end(); };
  auto run = [&](auto zero) {
    using T = decltype(zero);
    std::memcpy(out.data_ptr(), hidden.data_ptr(), rows * d * sizeof(T));
    with_team(threads_for(bytes_of_layers<T>(table, stop - start), TEAM_BYTES), [&] {
      LayerRun<T>{table, data<T>(out), rows, position}.run(start, stop, skipped);
    });
  };
  if (rows && table.bf16) run(bf16{});
  else if (rows) run(0.0f);
  return out;
}

// ---------------------------------------------------------------------------------------------------------------------
// play_round, and the tables it reads
// ---------------------------------------------------------------------------------------------------------------------
// Check an embedding and say how its rows are read. scale: of a quantised one, [V] fp32 or [V, groups] bf16.
Embedding embedding_of(const char* op, const Tensor& weight, const std::optional<Tensor>& scale, int64_t d,
                       int64_t n_vocab, const Tensor& like) {
  check_contiguous(op, "embedding", weight);
  const void* data = weight.data_ptr();
  if (!scale) {
    check_same_dtype(op, "embedding", weight, like);
    const bool packed = weight.dim() > 2;
    const int64_t features = packed ? weight_of(op, weight, like).features : weight.size(1);
    const int64_t rows = packed ? weight_of(op, weight, like).outputs : weight.size(0);
    STD_TORCH_CHECK(features == d && rows >= n_vocab, op, ": embedding does not fit ", d, " features and ", n_vocab,
                    " tokens");
    return {packed ? Embedding::PACKED : Embedding::PLAIN, data, nullptr, 0};
  }
  check_contiguous(op, "the embedding's scale", *scale);
  const bool int8 = dtype_of(weight) == aoti_torch_dtype_int8();
  const int64_t groups = int8 ? 1 : scale->size(scale->dim() - 1);
  STD_TORCH_CHECK(dtype_of(weight) == (int8 ? aoti_torch_dtype_int8() : aoti_torch_dtype_uint8()) &&
                      dtype_of(*scale) == (int8 ? aoti_torch_dtype_float32() : aoti_torch_dtype_bfloat16()) &&
                      weight.dim() == 2 && weight.size(0) >= n_vocab && weight.size(1) == (int8 ? d : d / 2) &&
                      scale->dim() == (int8 ? 1 : 2) && scale->size(0) == weight.size(0) && groups > 0 &&
                      d % groups == 0 && (int8 || d / groups % 2 == 0),
                  op, ": the quantised embedding does not fit ", d, " features and ", n_vocab, " tokens");
  return {int8 ? Embedding::INT8 : Embedding::INT4, data, scale->data_ptr(), groups};
}

// A table that an op of this file has made; `made_by` names it.
template <typename Table>
const Table& checked_table(const char* op, const Tensor& tensor, const char* made_by) {
  STD_TORCH_CHECK(dtype_of(tensor) == aoti_torch_dtype_int64() && tensor.numel() >= int64_t(sizeof(Table)) / 8 &&
                      data<int64_t>(tensor)[0] == Table::TAG,
                  op, ": the table must come from ", made_by);
  return *reinterpret_cast<const Table*>(data<int64_t>(tensor));
}

// A ModelTable. draft_layers, draft_head: low-bit copies for drafts; draft_vocab: drafts know the first so many tokens.
Tensor model_table(Tensor layers_tensor, Tensor embedding, std::optional<Tensor> embedding_scale, Tensor norm,
                   Tensor head, int64_t n_vocab, std::optional<Tensor> draft_layers_tensor,
                   std::optional<Tensor> draft_head, int64_t draft_vocab) {
  const char* op = "model_table";
  const LayerTable& layers = table_of(op, layers_tensor);
  const LayerTable& draft_layers = draft_layers_tensor ? table_of(op, *draft_layers_tensor) : layers;
  check_contiguous(op, "norm", norm);
  STD_TORCH_CHECK(is_bf16(norm) == bool(layers.bf16), op, ": every weight must have the layers' dtype");
  const CheckedWeight w = weight_of(op, head, norm), draft_w = draft_head ? weight_of(op, *draft_head, norm) : w;
  STD_TORCH_CHECK(w.features == layers.d && norm.numel() == layers.d && n_vocab <= w.outputs, op,
                  ": norm and head do not fit ", layers.d, " features and ", n_vocab, " tokens");
  STD_TORCH_CHECK(draft_w.features == layers.d && draft_vocab <= draft_w.outputs && draft_layers.bf16 == layers.bf16 &&
                      draft_layers.d == layers.d && draft_layers.slots == layers.slots &&
                      draft_layers.n_layer <= layers.n_layer,
                  op, ": the draft's layers and head are of another model");
  STD_TORCH_CHECK(0 < draft_vocab && draft_vocab <= n_vocab, op, ": draft_vocab must be in 1..", n_vocab, ", got ",
                  draft_vocab);
  Tensor result = new_tensor({int64_t(sizeof(ModelTable)) / 8}, aoti_torch_dtype_int64());
  const Embedding rows = embedding_of(op, embedding, embedding_scale, layers.d, n_vocab, norm);
  *reinterpret_cast<ModelTable*>(data<int64_t>(result)) = {
      ModelTable::TAG, &layers, &draft_layers, rows, norm.data_ptr(), w.weight, draft_w.weight, n_vocab, draft_vocab};
  return result;
}

// A PlanTable. exits: the candidates; measures: of the rules to exit and to go on, -1 for none; skips: 2 * layer for its
// attention, 2 * layer + 1 for its MLP; downs, ups, ranks: of the adapter of each exit (rank 0: none), or nothing at
// all; eos: the tokens that end a text. norm: of the model, for its dtype.
Tensor plan_table(Tensor model_tensor, Tensor norm, std::vector<int64_t> exits, int64_t exit_measure,
                  int64_t stop_measure, std::vector<int64_t> skips, std::vector<Tensor> downs, std::vector<Tensor> ups,
                  std::vector<int64_t> ranks, std::vector<int64_t> eos) {
  const char* op = "plan_table";
  const ModelTable& model = checked_table<ModelTable>(op, model_tensor, "model_table");
  const LayerTable &layers = *model.layers, &draft_layers = *model.draft_layers;
  const int64_t n_exits = int64_t(exits.size()), n_eos = int64_t(eos.size());
  STD_TORCH_CHECK(norm.data_ptr() == model.norm, op, ": norm must be the model's");
  STD_TORCH_CHECK(NONE <= exit_measure && exit_measure <= REPEATS && NONE <= stop_measure && stop_measure <= ENTROPY,
                  op, ": no rules to exit and to go on have the measures ", exit_measure, " and ", stop_measure);
  STD_TORCH_CHECK(exit_measure != NONE || n_exits < 2, op, ": several exits need a rule to exit");
  STD_TORCH_CHECK(downs.size() == ranks.size() && ups.size() == ranks.size() &&
                      (ranks.empty() || ranks.size() == exits.size()),
                  op, ": adapters need a down, an up and a rank for each exit");
  Tensor result = new_tensor({PlanTable::words(n_exits, layers.n_layer, n_eos)}, aoti_torch_dtype_int64());
  auto& plan = *reinterpret_cast<PlanTable*>(data<int64_t>(result));
  const int64_t exact_depth = model.draft_layers == model.layers ? layers.n_layer : 0;
  plan = {PlanTable::TAG, &model, exact_depth, exit_measure, stop_measure, n_exits, n_eos};
  for (int64_t i = 0; i < n_exits; i++) {
    STD_TORCH_CHECK((i ? exits[i - 1] : 0) < exits[i] && exits[i] <= draft_layers.n_layer, op,
                    ": exits must ascend in 1..", draft_layers.n_layer, ", got ", exits[i]);
    plan.candidates()[i] = {exits[i], {}};
    if (ranks.empty() || !ranks[i]) continue;
    const CheckedWeight down = weight_of(op, downs[i], norm), up = weight_of(op, ups[i], norm);
    STD_TORCH_CHECK(ranks[i] > 0 && down.features == layers.d && ranks[i] <= down.outputs && up.features == ranks[i] &&
                        layers.d <= up.outputs,
                    op, ": adapter ", i, " does not fit ", layers.d, " features and rank ", ranks[i]);
    plan.candidates()[i].adapter = {down.weight, up.weight, ranks[i]};
  }
  std::fill_n(plan.skipped(), 2 * layers.n_layer, 0);
  for (int64_t sublayer : skips) {
    STD_TORCH_CHECK(0 <= sublayer && sublayer < 2 * layers.n_layer, op, ": skips must be in 0..",
                    2 * layers.n_layer - 1, ", got ", sublayer);
    plan.skipped()[sublayer] = 1;
    plan.exact_depth = std::min(plan.exact_depth, sublayer / 2);
  }
  std::copy(eos.begin(), eos.end(), plan.eos());
  return result;
}

// Draft up to `drafts` tokens after `token` at `position`, or take the proposed ones, and verify them.
// Returns [drafted n, heads read while drafting, layers read, layers of copies read, attentions and MLPs skipped in the
// latter, resume layer], then n drafted tokens, n exit layers (0 if proposed), and n + 1 choices of the full model;
// and, if wanted, the n + 1 states they were chosen from.
std::tuple<Tensor, Tensor> play_round(Tensor plan_tensor, int64_t token, int64_t position, int64_t drafts,
                                      std::vector<int64_t> proposed, double exit_threshold, double stop_threshold,
                                      double temperature, int64_t seed, bool want_hidden) {
  const char* op = "play_round";
  const PlanTable& plan = checked_table<PlanTable>(op, plan_tensor, "plan_table");
  const ModelTable& model = *plan.model;
  const LayerTable& table = *model.layers;
  auto check_token = [&](const char* name, int64_t id) {
    STD_TORCH_CHECK(0 <= id && id < model.n_vocab, op, ": ", name, " must be in 0..", model.n_vocab - 1, ", got ", id);
  };
  check_token("token", token);
  for (int64_t id : proposed) check_token("every proposed token", id);
  const bool given = !proposed.empty();
  if (given) drafts = int64_t(proposed.size());
  STD_TORCH_CHECK(0 <= drafts && 0 <= position && position + drafts < table.slots, op, ": positions must be in 0..",
                  table.slots - 1, ", got ", position, "..", position + drafts);
  STD_TORCH_CHECK(given || !drafts || plan.n_candidates, op, ": drafts need an exit");
  const Draw draw = draw_of(op, temperature, seed, position);
  std::vector<int64_t> drafted(proposed), exit_layers(drafts), chosen(drafts + 1), depth(2 * (drafts + 1)), counts;
  drafted.resize(drafts);
  static const Tensor no_states = new_tensor({0}, aoti_torch_dtype_float32());
  Tensor states = no_states;
  auto run = [&](auto zero) {
    using T = decltype(zero);
    static thread_local Scratch scratch;
    T* hidden = (T*)scratch.get(2 * (drafts + 1) * table.d);
    const float eps = float(table.eps);
    const Head<T> draft_head{(const T*)model.norm, model.draft_head, table.d, model.draft_vocab, eps};
    const Head<T> full_head{(const T*)model.norm, model.head, table.d, model.n_vocab, eps};
    Round<T> round{plan, model, table, *model.draft_layers, draft_head, full_head, draw,
                   {plan.exit_measure, exit_threshold}, {plan.stop_measure, stop_threshold}, position,
                   {hidden, depth.data()}, {hidden + (drafts + 1) * table.d, depth.data() + drafts + 1}};
    with_team(threads_for(bytes_of_layers<T>(table, table.n_layer), TEAM_BYTES),
              [&] { round.run(token, drafts, given, drafted.data(), exit_layers.data(), chosen.data()); });
    const auto& c = round.counts;
    counts = {c.drafted, c.heads, c.layers, c.draft_layers, c.skipped_attention, c.skipped_mlp, c.resume};
    if (!want_hidden) return;
    states = new_tensor({c.drafted + 1, table.d}, table.bf16 ? aoti_torch_dtype_bfloat16() : aoti_torch_dtype_float32());
    std::copy_n(hidden, (c.drafted + 1) * table.d, data<T>(states));
  };
  if (table.bf16) run(bf16{});
  else run(0.0f);
  const int64_t n = counts[0];
  Tensor result = new_tensor({int64_t(counts.size()) + 3 * n + 1}, aoti_torch_dtype_int64());
  int64_t* to = std::copy(counts.begin(), counts.end(), data<int64_t>(result));
  to = std::copy_n(drafted.begin(), n, to);
  to = std::copy_n(exit_layers.begin(), n, to);
  std::copy_n(chosen.begin(), n + 1, to);
  return {result, states};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(skipfast_cpu, m) {
  m.def("linear(Tensor x, Tensor packed, int out_features) -> Tensor");
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def("swiglu(Tensor gate_up) -> Tensor");
  m.def("attention(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor positions) -> Tensor");
  m.def("exit_head(Tensor hidden, Tensor norm, Tensor packed, int n_vocab, float eps, bool want_stats, "
        "float temperature, int seed, int position) -> (Tensor tokens, Tensor stats, Tensor samples)");
  m.def("layer_table(Tensor[] tensors, Tensor cos, Tensor sin, int heads, float eps) -> Tensor");
  m.def("layers(Tensor hidden, Tensor table, int position, int start, int stop, int[] skips) -> Tensor");
  m.def("model_table(Tensor layers, Tensor embedding, Tensor? embedding_scale, Tensor norm, Tensor head, int n_vocab, "
        "Tensor? draft_layers, Tensor? draft_head, int draft_vocab) -> Tensor");
  m.def("plan_table(Tensor model, Tensor norm, int[] exits, int exit_measure, int stop_measure, int[] skips, "
        "Tensor[] downs, Tensor[] ups, int[] ranks, int[] eos) -> Tensor");
  m.def("play_round(Tensor plan, int token, int position, int drafts, int[] proposed, float exit_threshold, "
        "float stop_threshold, float temperature, int seed, bool want_hidden) -> (Tensor found, Tensor hidden)");
}

STABLE_TORCH_LIBRARY_IMPL(skipfast_cpu, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("swiglu", TORCH_BOX(&swiglu));
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("exit_head", TORCH_BOX(&exit_head));
  m.impl("layer_table", TORCH_BOX(&layer_table));
  m.impl("layers", TORCH_BOX(&layers));
  m.impl("model_table", TORCH_BOX(&model_table));
  m.impl("plan_table", TORCH_BOX(&plan_table));
  m.impl("play_round", TORCH_BOX(&play_round));
}
