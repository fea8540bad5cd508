// One row of what lies between the linears; see elementwise.cpp.
#pragma once

#include "interface.h"
#include "isa.h"
#include "threads.h"

// Longest head that the per-head norm takes; Python refuses more.
constexpr int64_t kMaxHeadDim = 576;

// One side of a layer's cache: head h of token t at data + (h * slots + t) * stride elements.
struct Pool {
  void* data;
  float* scales;  // [kv_heads][slots] of whole numbers in 8 bits, or null
  int64_t slots;
  int64_t stride;
};

inline Pool key_pool(const QtoolCache& c) {
  return {c.keys, c.key_scales, c.slots, c.key_dim};
}
// Values that are the first channels of the keys lie where the keys do.
inline Pool value_pool(const QtoolCache& c) {
  return {c.values, c.value_scales, c.slots, c.values == c.keys ? c.key_dim : c.value_dim};
}

struct Heads {
  int64_t query, kv, dim;
};

// x += scale * residual if there is one; y = x / sqrt(mean of squares + eps) * weight, or without
// weight.
template <class T>
void norm_row(T* x, const T* residual, float scale, const float* weight, T* y, int64_t channels,
              float eps);

// y = act(gates) * ups.
template <class T>
void gate_row(const T* gates, const T* ups, T* y, int64_t channels, int32_t activation);

template <class T>
void add_row(T* x, const T* residual, float scale, int64_t channels);

// One token's heads, normed, their first `rotated` channels turned by cos and sin [rotated / 2]:
// queries to `query`, keys and values to the cache.
template <class T>
void rope_and_write_row(const T* qkv, const float* qk_norm, float eps, const float* cos,
                        const float* sin, int64_t rotated, int64_t slot, T* query,
                        const Heads& heads, const Pool& keys, const Pool& values);
