// What lies between the linears: RMSNorm, SiLU times up, rotary embedding with the cache write.
//
// All of it in float whatever the type in memory, each output row by one thread, so that a row's
// result does not depend on the rows beside it. Work of a few rows is done by the calling thread:
// waking a second one costs about 2 us.

#include "interface.h"
#include "isa.h"

#include <algorithm>

namespace {

constexpr int64_t kSerialElements = 1 << 15;

int threads_for(int64_t elements, int64_t pieces, int threads) {
  if (elements <= kSerialElements) return 1;
  return static_cast<int>(std::min<int64_t>(threads, pieces));
}

// f(i, n) for i = 0, kLanes, ... with n <= kLanes elements left to do.
template <class F>
QTOOL_INLINE void for_each_vector(int64_t elements, F f) {
  int64_t i = 0;
  for (; i + kLanes <= elements; i += kLanes) f(i, static_cast<int64_t>(kLanes));
  if (i < elements) f(i, elements - i);
}

template <class T>
QTOOL_INLINE Floats load_up_to(const T* from, int64_t n) {
  return n == kLanes ? load(from) : load_part(from, n);
}

template <class T>
QTOOL_INLINE void store_up_to(T* to, Floats value, int64_t n) {
  if (n == kLanes)
    store(to, value);
  else
    store_part(to, value, n);
}

// y = x / sqrt(mean of squares + eps) * weight, or without weight where it is null.
template <class T, class U>
QTOOL_INLINE void normalise(const T* x, const U* weight, T* y, int64_t channels, float eps) {
  Floats squares = zeros();
  for_each_vector(channels, [&](int64_t i, int64_t n) {
    const Floats value = load_up_to(x + i, n);
    squares = fma(value, value, squares);
  });
  const float mean = reduce_add(squares) / static_cast<float>(channels);
  const Floats scale = set1(1.0f / std::sqrt(mean + eps));
  for_each_vector(channels, [&](int64_t i, int64_t n) {
    const Floats value = mul(load_up_to(x + i, n), scale);
    store_up_to(y + i, weight == nullptr ? value : mul(value, load_up_to(weight + i, n)), n);
  });
}

template <class T>
void rms_norm(T* x, const T* residual, const T* weight, T* y, int64_t rows, int64_t channels,
              float eps, int threads) {
  threads = threads_for(rows * channels, rows, threads);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t row = 0; row < rows; ++row) {
    T* const from = x + row * channels;
    if (residual != nullptr)
      for_each_vector(channels, [&](int64_t i, int64_t n) {
        const Floats more = load_up_to(residual + row * channels + i, n);
        store_up_to(from + i, add(load_up_to(from + i, n), more), n);
      });
    normalise(from, weight, y + row * channels, channels, eps);
  }
}

template <class T>
void silu_mul(const T* gate_up, T* y, int64_t rows, int64_t channels, int threads) {
  threads = threads_for(rows * channels, rows, threads);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t row = 0; row < rows; ++row) {
    const T* gates = gate_up + row * 2 * channels;
    for_each_vector(channels, [&](int64_t i, int64_t n) {
      const Floats gate = load_up_to(gates + i, n);
      const Floats up = load_up_to(gates + channels + i, n);
      // sigmoid(g) = (g < 0 ? e^-|g| : 1) / (1 + e^-|g|): nothing here overflows.
      const Floats small = exponential(mul(absolute(gate), set1(-1.0f)));
      const Floats above = where_negative(gate, mul(gate, small), gate);
      store_up_to(y + row * channels + i, mul(div(above, add(set1(1.0f), small)), up), n);
    });
  }
}

// Rotates the pairs (x[i], x[i + half]); x of any type, in float or in memory.
template <class T, class U>
QTOOL_INLINE void rotate(const T* x, const float* cos, const float* sin, U* y, int64_t half) {
  for_each_vector(half, [&](int64_t i, int64_t n) {
    const Floats first = load_up_to(x + i, n), second = load_up_to(x + half + i, n);
    const Floats c = load_up_to(cos + i, n), s = load_up_to(sin + i, n);
    store_up_to(y + i, fma(first, c, mul(mul(second, s), set1(-1.0f))), n);
    store_up_to(y + half + i, fma(second, c, mul(first, s)), n);
  });
}

template <class T>
void rope(const T* x, int64_t stride, const float* cos, const float* sin, T* y, int64_t rows,
          int64_t heads, int64_t head_dim, int threads) {
  const int64_t half = head_dim / 2;
  threads = threads_for(rows * heads * head_dim, rows, threads);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t head = 0; head < heads; ++head)
      rotate(x + row * stride + head * head_dim, cos + row * half, sin + row * half,
             y + (row * heads + head) * head_dim, half);
}

// Longest head that the per-head norm takes; Python refuses more.
constexpr int64_t kMaxHeadDim = 512;

template <class T>
void rope_and_write(const T* qkv, const T* qk_norm, float eps, const float* cos, const float* sin,
                    const int64_t* slots, T* query, T* keys, T* values, int64_t rows,
                    int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t pool_slots,
                    int threads) {
  const int64_t half = head_dim / 2, all_heads = heads + 2 * kv_heads;
  threads = threads_for(rows * all_heads * head_dim, rows, threads);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t row = 0; row < rows; ++row) {
    const T* from = qkv + row * all_heads * head_dim;
    const auto pool_row = [&](T* pool, int64_t kv_head) {
      return pool + (kv_head * pool_slots + slots[row]) * head_dim;
    };
    for (int64_t head = 0; head < heads + kv_heads; ++head, from += head_dim) {
      T* to = head < heads ? query + (row * heads + head) * head_dim : pool_row(keys, head - heads);
      if (qk_norm == nullptr) {
        rotate(from, cos + row * half, sin + row * half, to, half);
      } else {
        T normed[kMaxHeadDim];
        normalise(from, qk_norm + head * head_dim, normed, head_dim, eps);
        rotate(normed, cos + row * half, sin + row * half, to, half);
      }
    }
    for (int64_t kv_head = 0; kv_head < kv_heads; ++kv_head, from += head_dim)
      std::memcpy(pool_row(values, kv_head), from, static_cast<size_t>(head_dim) * sizeof(T));
  }
}

}  // namespace

uint32_t qtool_read(const void* data, int64_t bytes, int32_t threads) {
  const int64_t words = bytes / 4;
  const int32_t* const from = static_cast<const int32_t*>(data);
  uint32_t total = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : total)
  for (int64_t part = 0; part < threads; ++part) {
    const int64_t first = words * part / threads, last = words * (part + 1) / threads;
    for (int64_t i = first; i < last; ++i) total += static_cast<uint32_t>(from[i]);
  }
  return total;
}

void qtool_rms_norm(void* x, const void* residual, const void* weight, void* y, int64_t rows,
                    int64_t channels, float eps, int32_t type, int32_t threads) {
  if (type == kBfloat16)
    rms_norm(static_cast<Bfloat16*>(x), static_cast<const Bfloat16*>(residual),
             static_cast<const Bfloat16*>(weight), static_cast<Bfloat16*>(y), rows, channels, eps,
             threads);
  else
    rms_norm(static_cast<float*>(x), static_cast<const float*>(residual),
             static_cast<const float*>(weight), static_cast<float*>(y), rows, channels, eps,
             threads);
}

void qtool_silu_mul(const void* gate_up, void* y, int64_t rows, int64_t channels, int32_t type,
                    int32_t threads) {
  if (type == kBfloat16)
    silu_mul(static_cast<const Bfloat16*>(gate_up), static_cast<Bfloat16*>(y), rows, channels,
             threads);
  else
    silu_mul(static_cast<const float*>(gate_up), static_cast<float*>(y), rows, channels, threads);
}

void qtool_rope(const void* x, int64_t stride, const float* cos, const float* sin, void* y,
                int64_t rows, int64_t heads, int64_t head_dim, int32_t type, int32_t threads) {
  if (type == kBfloat16)
    rope(static_cast<const Bfloat16*>(x), stride, cos, sin, static_cast<Bfloat16*>(y), rows, heads,
         head_dim, threads);
  else
    rope(static_cast<const float*>(x), stride, cos, sin, static_cast<float*>(y), rows, heads,
         head_dim, threads);
}

void qtool_rope_and_write(const void* qkv, const void* qk_norm, float eps, const float* cos,
                          const float* sin, const int64_t* slots, void* query, void* keys,
                          void* values, int64_t rows, int64_t heads, int64_t kv_heads,
                          int64_t head_dim, int64_t pool_slots, int32_t type, int32_t threads) {
  if (type == kBfloat16)
    rope_and_write(static_cast<const Bfloat16*>(qkv), static_cast<const Bfloat16*>(qk_norm), eps,
                   cos, sin, slots, static_cast<Bfloat16*>(query), static_cast<Bfloat16*>(keys),
                   static_cast<Bfloat16*>(values), rows, heads, kv_heads, head_dim, pool_slots,
                   threads);
  else
    rope_and_write(static_cast<const float*>(qkv), static_cast<const float*>(qk_norm), eps, cos,
                   sin, slots, static_cast<float*>(query), static_cast<float*>(keys),
                   static_cast<float*>(values), rows, heads, kv_heads, head_dim, pool_slots,
                   threads);
}
