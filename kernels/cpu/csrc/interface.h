// The plain C interface of the library, which Python calls through ctypes.
//
// Sizes are in elements, matrices in rows one after the other without gaps unless a stride is
// given. Where a type is named by a number it is one of ElementType. `threads` is how many the call
// may use. Nothing here allocates what outlives the call, and nothing throws.
#pragma once

#include <cstdint>

enum ElementType : int32_t { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

// A packed linear: weight[row, i] = (code - zero) * scale of its group.
//
//   codes   [panels][in / 8][32][4] bytes of two codes, or [panels][in / 4][32][4] of one
//   scales  [panels][groups][32] of scale_type, float32 or float16
//   zeros   [panels][groups][32] bytes, or null: `midpoint` everywhere
//
// A panel is 32 rows; rows past the last are zero. `unit` inputs share one scale of the
// activations: a multiple of 32, at most 128, that divides `group`.
struct QtoolLinear {
  const uint8_t* codes;
  const void* scales;
  const uint8_t* zeros;
  int64_t out;
  int64_t in;
  int64_t group;
  int64_t unit;
  int32_t bits;
  int32_t scale_type;
  int32_t midpoint;
};

// A step's sequences over a pool of blocks; see attention.cpp.
struct QtoolSpans {
  const int64_t* num_queries;   // [spans]
  const int64_t* lengths;       // [spans]
  const int64_t* first_blocks;  // [spans], where each span's block numbers start
  const int64_t* block_ids;     // all block numbers, span after span
  int64_t spans;
  int64_t block_size;
  int64_t window;  // 0: unlimited
};

// One block of a decoder: weights [channels] and linears, and its layer of the pools. Biases and
// qk_norm [heads + kv_heads][head_dim] may be null.
struct QtoolBlock {
  const void* attn_norm;
  const QtoolLinear* qkv;
  const void* qkv_bias;
  const void* qk_norm;
  const QtoolLinear* o;
  const void* o_bias;
  const void* mlp_norm;
  const QtoolLinear* gate_up;
  const void* gate_up_bias;
  const QtoolLinear* down;
  const void* down_bias;
  void* keys;
  void* values;
};

struct QtoolDecoder {
  const QtoolBlock* blocks;
  int64_t num_blocks;
  int64_t hidden;
  int64_t ffn;
  int64_t heads;
  int64_t kv_heads;
  int64_t head_dim;
  int64_t pool_slots;
  float eps;
  float scale;
  int32_t type;
};

#define QTOOL_EXPORT extern "C" __attribute__((visibility("default")))

QTOOL_EXPORT const char* qtool_isa();

// Reads all bytes and returns a number that depends on them: for measuring bandwidth.
QTOOL_EXPORT uint32_t qtool_read(const void* data, int64_t bytes, int32_t threads);

// codes [out][in] bytes -> packed, as QtoolLinear tells.
QTOOL_EXPORT void qtool_pack_codes(const uint8_t* codes, int64_t out, int64_t in, int32_t bits,
                                   uint8_t* packed, int64_t packed_bytes, int32_t threads);

// y [rows][out] = x [rows][in] times the weight, plus bias [out] or null; x, bias and y of `type`.
// scratch: rows * in bytes for the rounded activations, in whole cache lines of 64, and 8 bytes more
// for each unit of each row.
QTOOL_EXPORT void qtool_linear(const QtoolLinear* linear, const void* x, int64_t rows,
                               const void* bias, void* y, int32_t type, void* scratch,
                               int32_t threads);

// What qtool_linear does first: one row of x -> q [in], scales [in / unit], sums [in / unit].
QTOOL_EXPORT void qtool_quantize_row(const void* x, int32_t type, int64_t in, int64_t unit,
                                     int8_t* q, float* scales, int32_t* sums);

// x [rows][channels] over its root mean square, times weight [channels] or 1. If `residual` is not
// null, x += residual comes first and is kept in x.
QTOOL_EXPORT void qtool_rms_norm(void* x, const void* residual, const void* weight, void* y,
                                 int64_t rows, int64_t channels, float eps, int32_t type,
                                 int32_t threads);

// gate_up [rows][2 * channels] -> y [rows][channels]: silu(gate) * up.
QTOOL_EXPORT void qtool_silu_mul(const void* gate_up, void* y, int64_t rows, int64_t channels,
                                 int32_t type, int32_t threads);

// x [rows][heads][head_dim], rows `stride` apart, rotated by cos and sin [rows][head_dim / 2]
// float32 -> y [rows][heads][head_dim].
QTOOL_EXPORT void qtool_rope(const void* x, int64_t stride, const float* cos, const float* sin,
                             void* y, int64_t rows, int64_t heads, int64_t head_dim, int32_t type,
                             int32_t threads);

// qkv [rows][heads + 2 * kv_heads][head_dim]: queries and keys normalised by qk_norm
// [heads + kv_heads][head_dim] if not null, and rotated; queries -> query [rows][heads][head_dim],
// keys and values -> pools [kv_heads][pool_slots][head_dim] at slots [rows].
QTOOL_EXPORT void qtool_rope_and_write(const void* qkv, const void* qk_norm, float eps,
                                       const float* cos, const float* sin, const int64_t* slots,
                                       void* query, void* keys, void* values, int64_t rows,
                                       int64_t heads, int64_t kv_heads, int64_t head_dim,
                                       int64_t pool_slots, int32_t type, int32_t threads);

// Causal attention: query [tokens][heads][head_dim], pools [kv_heads][pool_slots][head_dim] -> y
// like query. False if memory for partial results is not to be had.
QTOOL_EXPORT bool qtool_paged_attention(const void* query, const void* keys, const void* values,
                                        const QtoolSpans* spans, void* y, int64_t heads,
                                        int64_t kv_heads, int64_t head_dim, int64_t pool_slots,
                                        float scale, int32_t type, int32_t threads);

// Bytes of scratch that qtool_blocks needs for this many rows.
QTOOL_EXPORT int64_t qtool_blocks_scratch(const QtoolDecoder* decoder, int64_t rows);

// x [rows][hidden] through all blocks, in place; see blocks.cpp. False as qtool_paged_attention.
QTOOL_EXPORT bool qtool_blocks(const QtoolDecoder* decoder, void* x, const float* cos,
                               const float* sin, const int64_t* slots, const QtoolSpans* spans,
                               int64_t rows, void* scratch, int32_t threads);
