// noise: the Gumbel noise of kernels/noise.py. Its hash is the same to the bit, its logarithms but for the last bits.
#pragma once
#include "vec.h"

namespace skipfast {

// What a coupled sample depends on besides logits. Rows choose the tokens of position, position + 1, …
struct Draw {
  float temperature = 0.0f;
  uint64_t seed = 0;
  int64_t position = 0;
};

// Hash one integer, or 16, as mix32 does.
template <typename X>
inline X mixed(X x) {
  x = x ^ (x >> 16);
  x = x * 0x7FEB352Du;
  x = x ^ (x >> 15);
  x = x * 0x846CA68Bu;
  return x ^ (x >> 16);
}

// The noise of one position.
class Noise {
 public:
  Noise(uint64_t seed, int64_t position) {
    const uint32_t key = mixed(mixed(uint32_t(seed)) ^ uint32_t(seed >> 32));
    first = mixed(key + uint32_t(position) * 0x9E3779B9u);
    second = mixed(first ^ 0x85EBCA6Bu);
  }
  // The noise of tokens id .. id + 15.
  Vec at(int64_t id) const {
    const Bits ids = counting() + uint32_t(id), bits = mixed(mixed(ids ^ first) + second);
    const Vec uniform = mul(add(to_floats(bits >> 9), splat(0.5f)), splat(0x1p-23f));  // exact
    const Vec zero = splat(0.0f);
    return sub(zero, log(sub(zero, log(uniform))));
  }

 private:
  uint32_t first, second;
};

}  // namespace skipfast
