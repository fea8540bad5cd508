// What lies between the linears: RMSNorm, SiLU times up, rotary embedding with the cache write.
//
// All of it in float whatever the type in memory, each output row by one thread, so that a row's
// result does not depend on the rows beside it.

#include "elementwise.h"

namespace {

// Below these many elements a second thread costs more than it saves.
constexpr int64_t kSerialElements = 1 << 15;
// Channels of a row that a thread takes at once where rows are few.
constexpr int64_t kChannels = 1024;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int threads_for(int64_t elements, int threads) { return elements <= kSerialElements ? 1 : threads; }

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

// silu(gate) = gate * sigmoid(gate); sigmoid(g) = (g < 0 ? e^-|g| : 1) / (1 + e^-|g|), in which
// nothing overflows.
QTOOL_INLINE Floats silu(Floats gate) {
  const Floats small = exponential(mul(absolute(gate), set1(-1.0f)));
  const Floats above = where_negative(gate, mul(gate, small), gate);
  return div(above, add(set1(1.0f), small));
}

// gelu(gate) by its usual tanh: gate * sigmoid(2 sqrt(2 / pi) (gate + 0.044715 gate^3)).
QTOOL_INLINE Floats gelu(Floats gate) {
  const Floats cube = mul(mul(gate, gate), gate);
  const Floats inner = mul(fma(set1(0.044715f), cube, gate), set1(1.5957691216057308f));
  const Floats small = exponential(mul(absolute(inner), set1(-1.0f)));
  const Floats above = where_negative(inner, mul(gate, small), gate);
  return div(above, add(set1(1.0f), small));
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
void rope(Team& team, const T* x, int64_t stride, const float* cos, const float* sin, T* y,
          int64_t rows, int64_t heads, int64_t head_dim) {
  const int64_t half = head_dim / 2;
  team.each(rows, team.share(rows, 4), [&](int64_t row) {
    for (int64_t head = 0; head < heads; ++head)
      rotate(x + row * stride + head * head_dim, cos + row * half, sin + row * half,
             y + (row * heads + head) * head_dim, half);
  });
}

// The cache's own form of one head of one token: as it is, or in whole numbers of a 127th of its
// largest channel.
template <class T>
QTOOL_INLINE void write_head(const T* from, const Pool& pool, int64_t kv_head, int64_t slot,
                             int64_t channels) {
  const int64_t at = kv_head * pool.slots + slot;
  if (pool.scales == nullptr) {
    std::memcpy(static_cast<T*>(pool.data) + at * pool.stride, from,
                static_cast<size_t>(channels) * sizeof(T));
    return;
  }
  Floats largest = zeros();
  bool nan = false;
  for_each_vector(channels, [&](int64_t i, int64_t n) {
    const Floats value = load_up_to(from + i, n);
    nan |= any_nan(value);
    largest = maximum(largest, absolute(value));
  });
  const float top = reduce_max(largest);
  const bool tiny = top < 1e-30f;
  const Floats inverse = set1(tiny ? 0.0f : 127.0f / top);
  int8_t* const to = static_cast<int8_t*>(pool.data) + at * pool.stride;
  for_each_vector(channels, [&](int64_t i, int64_t n) {
    int8_t bytes[kLanes];
    store_bytes(bytes, round_to_ints(mul(load_up_to(from + i, n), inverse)));
    std::memcpy(to + i, bytes, static_cast<size_t>(n));
  });
  pool.scales[at] = nan ? NAN : tiny ? 0.0f : top / 127.0f;
}

}  // namespace

template <class T>
void add_row(T* x, const T* residual, float scale, int64_t channels) {
  for_each_vector(channels, [&](int64_t i, int64_t n) {
    const Floats more = mul(load_up_to(residual + i, n), set1(scale));
    store_up_to(x + i, add(load_up_to(x + i, n), more), n);
  });
}

template <class T>
void norm_row(T* x, const T* residual, float scale, const float* weight, T* y, int64_t channels,
              float eps) {
  if (residual != nullptr) add_row(x, residual, scale, channels);
  normalise(x, weight, y, channels, eps);
}

template <class T>
void gate_row(const T* gates, const T* ups, T* y, int64_t channels, int32_t activation) {
  if (activation == kGelu)
    for_each_vector(channels, [&](int64_t i, int64_t n) {
      store_up_to(y + i, mul(gelu(load_up_to(gates + i, n)), load_up_to(ups + i, n)), n);
    });
  else
    for_each_vector(channels, [&](int64_t i, int64_t n) {
      store_up_to(y + i, mul(silu(load_up_to(gates + i, n)), load_up_to(ups + i, n)), n);
    });
}

template <class T>
void rope_and_write_row(const T* qkv, const float* qk_norm, float eps, const float* cos,
                        const float* sin, int64_t rotated, int64_t slot, T* query,
                        const Heads& heads, const Pool& keys, const Pool& values) {
  const int64_t half = rotated / 2;
  const auto rest = static_cast<size_t>(heads.dim - rotated) * sizeof(T);
  for (int64_t head = 0; head < heads.query + heads.kv; ++head, qkv += heads.dim) {
    const T* from = qkv;
    T normed[kMaxHeadDim], turned[kMaxHeadDim];
    if (qk_norm != nullptr) {
      normalise(from, qk_norm + head * heads.dim, normed, heads.dim, eps);
      from = normed;
    }
    T* const to = head < heads.query ? query + head * heads.dim : turned;
    rotate(from, cos, sin, to, half);
    std::memcpy(to + rotated, from + rotated, rest);
    if (head >= heads.query) write_head(turned, keys, head - heads.query, slot, heads.dim);
  }
  for (int64_t kv_head = 0; kv_head < heads.kv; ++kv_head, qkv += heads.dim)
    write_head(qkv, values, kv_head, slot, heads.dim);
}

template <class T>
void write_rows(Team& team, const T* key, const T* value, const int64_t* slots, int64_t rows,
                int64_t kv_heads, int64_t key_dim, int64_t value_dim, const Pool& keys,
                const Pool& values) {
  team.each(rows, team.share(rows, 4), [&](int64_t row) {
    for (int64_t head = 0; head < kv_heads; ++head) {
      write_head(key + (row * kv_heads + head) * key_dim, keys, head, slots[row], key_dim);
      if (value != nullptr)
        write_head(value + (row * kv_heads + head) * value_dim, values, head, slots[row],
                   value_dim);
    }
  });
}

#define QTOOL_FOR(T)                                                                              \
  template void norm_row(T*, const T*, float, const float*, T*, int64_t, float);                 \
  template void gate_row(const T*, const T*, T*, int64_t, int32_t);                              \
  template void add_row(T*, const T*, float, int64_t);                                           \
  template void rope_and_write_row(const T*, const float*, float, const float*, const float*,    \
                                   int64_t, int64_t, T*, const Heads&, const Pool&, const Pool&);
QTOOL_FOR(float)
QTOOL_FOR(Bfloat16)
#undef QTOOL_FOR

uint32_t qtool_read(const void* data, int64_t bytes, int32_t threads) {
  constexpr int64_t kVector = kLanes * 4, kPiece = 64 << 10;
  const uint8_t* const from = static_cast<const uint8_t*>(data);
  std::atomic<uint32_t> total{0};
  with_team(threads, [&](Team& team) {
    team.each_piece(bytes / kVector, kPiece / kVector, [&](int64_t begin, int64_t end) {
      Ints sum = zero_ints();
      for (int64_t i = begin * kVector; i < end * kVector; i += kVector) {
        ask_ahead<8, 1>(from + i);
        sum = add_ints(sum, load_bits(from + i));
      }
      total.fetch_add(static_cast<uint32_t>(reduce_add_ints(sum)), std::memory_order_relaxed);
    });
  });
  uint32_t last = 0;
  for (int64_t i = bytes / kVector * kVector; i + 4 <= bytes; i += 4)
    last += static_cast<uint32_t>(load_word(from + i));
  return total.load() + last;
}

namespace {

template <class T>
void rms_norm(void* x, const void* residual, const float* weight, void* y, int64_t rows,
              int64_t channels, float eps, int threads) {
  T* const from = static_cast<T*>(x);
  const T* const more = static_cast<const T*>(residual);
  with_team(threads_for(rows * channels, threads), [&](Team& team) {
    team.each(rows, team.share(rows, 4), [&](int64_t row) {
      norm_row(from + row * channels, more == nullptr ? nullptr : more + row * channels, 1.0f,
               weight, static_cast<T*>(y) + row * channels, channels, eps);
    });
  });
}

template <class T>
void gate_mul(const void* gate_up, void* y, int64_t rows, int64_t channels, int32_t activation,
              int threads) {
  const int64_t pieces = ceil_div(channels, kChannels);
  with_team(threads_for(rows * channels, threads), [&](Team& team) {
    team.each(rows * pieces, team.share(rows * pieces, 4), [&](int64_t piece) {
      const int64_t row = piece / pieces, first = piece % pieces * kChannels;
      const T* const gates = static_cast<const T*>(gate_up) + row * 2 * channels + first;
      gate_row(gates, gates + channels, static_cast<T*>(y) + row * channels + first,
               std::min(kChannels, channels - first), activation);
    });
  });
}

template <class T>
void rope_and_write(const void* qkv, const float* qk_norm, float eps, const float* cos,
                    const float* sin, const int64_t* slots, void* query, const Pool& keys,
                    const Pool& values, int64_t rows, const Heads& heads, int threads) {
  const int64_t all = heads.query + 2 * heads.kv;
  with_team(threads_for(rows * all * heads.dim, threads), [&](Team& team) {
    team.each(rows, team.share(rows, 4), [&](int64_t row) {
      rope_and_write_row(static_cast<const T*>(qkv) + row * all * heads.dim,
                         qk_norm, eps, cos + row * heads.dim / 2, sin + row * heads.dim / 2,
                         heads.dim, slots[row],
                         static_cast<T*>(query) + row * heads.query * heads.dim, heads, keys,
                         values);
    });
  });
}

}  // namespace

void qtool_rms_norm(void* x, const void* residual, const float* weight, void* y, int64_t rows,
                    int64_t channels, float eps, int32_t type, int32_t threads) {
  (type == kBfloat16 ? rms_norm<Bfloat16> : rms_norm<float>)(x, residual, weight, y, rows, channels,
                                                             eps, threads);
}

void qtool_gate_mul(const void* gate_up, void* y, int64_t rows, int64_t channels,
                    int32_t activation, int32_t type, int32_t threads) {
  (type == kBfloat16 ? gate_mul<Bfloat16> : gate_mul<float>)(gate_up, y, rows, channels, activation,
                                                             threads);
}

void qtool_rope(const void* x, int64_t stride, const float* cos, const float* sin, void* y,
                int64_t rows, int64_t heads, int64_t head_dim, int32_t type, int32_t threads) {
  with_team(threads_for(rows * heads * head_dim, threads), [&](Team& team) {
    if (type == kBfloat16)
      rope(team, static_cast<const Bfloat16*>(x), stride, cos, sin, static_cast<Bfloat16*>(y), rows,
           heads, head_dim);
    else
      rope(team, static_cast<const float*>(x), stride, cos, sin, static_cast<float*>(y), rows,
           heads, head_dim);
  });
}

void qtool_rope_and_write(const void* qkv, const float* qk_norm, float eps, const float* cos,
                          const float* sin, const int64_t* slots, void* query,
                          const QtoolCache* cache, int64_t rows, int64_t heads, int32_t type,
                          int32_t threads) {
  (type == kBfloat16 ? rope_and_write<Bfloat16> : rope_and_write<float>)(
      qkv, qk_norm, eps, cos, sin, slots, query, key_pool(*cache), value_pool(*cache), rows,
      Heads{heads, cache->kv_heads, cache->key_dim}, threads);
}

void qtool_write_cache(const void* key, const void* value, const int64_t* slots,
                       const QtoolCache* cache, int64_t rows, int32_t type, int32_t threads) {
  const QtoolCache& c = *cache;
  with_team(threads_for(rows * c.kv_heads * (c.key_dim + c.value_dim), threads), [&](Team& team) {
    if (type == kBfloat16)
      write_rows(team, static_cast<const Bfloat16*>(key), static_cast<const Bfloat16*>(value), slots,
                 rows, c.kv_heads, c.key_dim, c.value_dim, key_pool(c), value_pool(c));
    else
      write_rows(team, static_cast<const float*>(key), static_cast<const float*>(value), slots, rows,
                 c.kv_heads, c.key_dim, c.value_dim, key_pool(c), value_pool(c));
  });
}
