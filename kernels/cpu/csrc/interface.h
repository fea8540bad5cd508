// The plain C interface of the library, which Python calls through ctypes.
//
// Sizes are in elements, matrices in rows one after the other without gaps unless a stride is
// given. Where a type is named by a number it is one of ElementType. `threads` is how many the call
// may use. Nothing here allocates what outlives the call, and nothing throws.
#pragma once

#include <cstdint>

enum ElementType : int32_t { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2, kExponent8 = 3 };

// How the weight's scales are held. Those of K-quants are codes themselves, for every super-block of
// 256 inputs, multiplied by its own scale; `fields` has them.
enum ScaleKind : int32_t {
  kPlainScales = 0,     // one a group
  kSixBitPairs = 1,     // 8 groups: scales and offsets of 6 bits
  kSixBitScales = 2,    // 16 groups: scales of 6 bits, less 32
  kEightBitScales = 3,  // 16 groups: signed bytes
  kFourBitPairs = 4,    // 16 groups: scales and offsets of 4 bits
  kSixBitScales8 = 5,   // 8 groups: scales of 6 bits, less 32
};

// A packed linear: weight[row, i] = (code - zero) * scale of its group + offset of its group, where
// a code may be a place in `table`.
//
//   codes    [panels][in / 32] strips of 32 inputs of a panel, 128 * bits bytes: [line][32][4]
//            bytes; a line of bytes of one code has inputs 4 line + j, of two codes 8 line + j and
//            8 line + 4 + j, ...; widths of 3, 5 and 6 bits have a plane of 2 or 4 bits and then one
//            of the bits above. See `spread` in spread.h.
//   scales   [panels][groups][32], or a super-block's [panels][in / 256][32], of scale_type
//   offsets  like scales, or null: none
//   zeros    [panels][groups][32] bytes, or null: `midpoint` everywhere
//   fields   [panels][in / 256][words][32] of 32 bits, by scale_kind
//   table    16 bytes, or null: codes are numbers
//
// A panel is 32 rows; rows past the last are never looked at. `step` inputs share one weight scale
// and one activation scale, 16 or a multiple of 32 that divides `group`; `span` inputs share one
// activation scale: a multiple of 32 and of `step`, at most 128.
struct QtoolLinear {
  const uint8_t* codes;
  const void* scales;
  const void* offsets;
  const uint8_t* zeros;
  const uint8_t* fields;
  const uint8_t* table;
  int64_t out;
  int64_t in;
  int64_t group;
  int64_t step;
  int64_t span;
  int32_t bits;
  int32_t scale_type;
  int32_t midpoint;
  int32_t scale_kind;
};

// A step's sequences over a pool of blocks; see attention.cpp.
struct QtoolSpans {
  const int64_t* num_queries;   // [spans]
  const int64_t* lengths;       // [spans]
  const int64_t* first_blocks;  // [spans], where each span's block numbers start
  const int64_t* block_ids;     // all block numbers, span after span
  int64_t spans;
  int64_t block_size;
};

// One layer of the cache: keys [kv_heads][slots][key_dim] and values [kv_heads][slots][value_dim].
// Whole numbers of 8 bits have scales [kv_heads][slots]; without scales the cache is of the
// activations' type. Values at the keys' address are their first channels.
struct QtoolCache {
  void* keys;
  void* values;
  float* key_scales;
  float* value_scales;
  int64_t kv_heads;
  int64_t key_dim;
  int64_t value_dim;
  int64_t slots;
};

struct QtoolAttention {
  int64_t heads;
  int64_t window;      // tokens a token sees, itself with them; 0: unlimited
  const float* sinks;  // [heads] or null
  float scale;
  float softcap;       // 0: none
};

enum Activation : int32_t { kSilu = 0, kGelu = 1 };

// Linears of one input, their outputs side by side, with one bias over all of them or null.
struct QtoolLinears {
  const QtoolLinear* parts[3];
  const void* bias;
  int64_t count;
  int64_t out;
};

// One block of a decoder; norms [hidden] may be null, and qk_norm [heads + kv_heads][key_dim].
struct QtoolBlock {
  const float* attn_norm;
  QtoolLinears qkv;
  const float* qk_norm;
  QtoolLinears o;
  const float* post_attn_norm;
  const float* mlp_norm;
  QtoolLinears gate_up;
  QtoolLinears down;
  const float* post_mlp_norm;
  QtoolCache cache;
  QtoolAttention rule;
  int64_t rotation;      // which of the step's tables of angles
  int64_t rotated;       // channels of a head that are turned, from its first; even, perhaps 0
  float residual_scale;  // x += residual_scale * (...)
};

struct QtoolDecoder {
  const QtoolBlock* blocks;
  int64_t num_blocks;
  int64_t hidden;
  int64_t ffn;
  int64_t half;  // angles of a token in each table
  float eps;
  int32_t type;
  int32_t activation;
  // Of a rank's part of a decoder: adds up `count` values of what o and down give over all ranks, in
  // place, in the thread that called; 0: they cannot be had. Null: all of it is here.
  int32_t (*sum)(void* values, int64_t count);
};

#define QTOOL_EXPORT extern "C" __attribute__((visibility("default")))

QTOOL_EXPORT const char* qtool_isa();

// Reads whole words of 32 bits and returns their sum: for measuring bandwidth.
QTOOL_EXPORT uint32_t qtool_read(const void* data, int64_t bytes, int32_t threads);

// codes [out][in] bytes -> QtoolLinear's codes.
QTOOL_EXPORT void qtool_pack_codes(const uint8_t* codes, int64_t out, int64_t in, int32_t bits,
                                   uint8_t* packed, int32_t threads);

// Rows of GGUF blocks, type by ggml's number -> a QtoolLinear's parts, float16 scales and offsets.
QTOOL_EXPORT void qtool_pack_blocks(int32_t type, const uint8_t* data, int64_t out, int64_t in,
                                    uint8_t* codes, uint8_t* scales, uint8_t* offsets,
                                    uint8_t* fields, int32_t threads);

// A matrix [out][in] of `type`, in a multiple of 32 -> codes of 8 bits around 128, one scale a row:
// its largest magnitude is 127 of them. scales [panels][32] float32.
QTOOL_EXPORT void qtool_pack_matrix(const void* values, int32_t type, int64_t out, int64_t in,
                                    uint8_t* codes, float* scales, int32_t threads);

// Bytes of scratch that qtool_linear needs for this many rows.
QTOOL_EXPORT int64_t qtool_linear_scratch(const QtoolLinear* linear, int64_t rows);

// y [rows][out] of y_type = x [rows][in] of x_type times the weight, plus bias [out] of y_type or
// null. Both types are one, or bfloat16 and then float32.
QTOOL_EXPORT void qtool_linear(const QtoolLinear* linear, const void* x, int32_t x_type,
                               int64_t rows, const void* bias, void* y, int32_t y_type,
                               void* scratch, int32_t threads);

// What qtool_linear does first, of one row: scratch gets q [in], scales and sums [in / step].
QTOOL_EXPORT void qtool_round_row(const QtoolLinear* linear, const void* x, int32_t type,
                                  void* scratch);

// x [rows][channels] over its root mean square, times weight [channels] or 1. If `residual` is not
// null, x += residual comes first and is kept in x.
QTOOL_EXPORT void qtool_rms_norm(void* x, const void* residual, const float* weight, void* y,
                                 int64_t rows, int64_t channels, float eps, int32_t type,
                                 int32_t threads);

// gate_up [rows][2 * channels] -> y [rows][channels]: activation(gate) * up.
QTOOL_EXPORT void qtool_gate_mul(const void* gate_up, void* y, int64_t rows, int64_t channels,
                                 int32_t activation, int32_t type, int32_t threads);

// x [rows][heads][head_dim], rows `stride` apart, rotated by cos and sin [rows][head_dim / 2]
// float32 -> y [rows][heads][head_dim].
QTOOL_EXPORT void qtool_rope(const void* x, int64_t stride, const float* cos, const float* sin,
                             void* y, int64_t rows, int64_t heads, int64_t head_dim, int32_t type,
                             int32_t threads);

// qkv [rows][heads + 2 * kv_heads][key_dim]: queries and keys normalised by qk_norm
// [heads + kv_heads][key_dim] if not null, and rotated; queries -> query [rows][heads][key_dim],
// keys and values -> the cache at slots [rows].
QTOOL_EXPORT void qtool_rope_and_write(const void* qkv, const float* qk_norm, float eps,
                                       const float* cos, const float* sin, const int64_t* slots,
                                       void* query, const QtoolCache* cache, int64_t rows,
                                       int64_t heads, int32_t type, int32_t threads);

// key [rows][kv_heads][key_dim] and value [rows][kv_heads][value_dim], or null where it is in the
// key -> the cache at slots [rows].
QTOOL_EXPORT void qtool_write_cache(const void* key, const void* value, const int64_t* slots,
                                    const QtoolCache* cache, int64_t rows, int32_t type,
                                    int32_t threads);

// Causal attention: query [tokens][heads][key_dim] -> y [tokens][heads][value_dim]. False if memory
// for partial results is not to be had.
QTOOL_EXPORT bool qtool_paged_attention(const void* query, const QtoolCache* cache,
                                        const QtoolSpans* spans, const QtoolAttention* rule,
                                        void* y, int32_t type, int32_t threads);

// Bytes of scratch that qtool_blocks needs for this many rows.
QTOOL_EXPORT int64_t qtool_blocks_scratch(const QtoolDecoder* decoder, int64_t rows);

// x [rows][hidden] through all blocks, in place; see blocks.cpp. cos, sin: tables [rows][half], one
// after the other for each rotation. False as qtool_paged_attention.
QTOOL_EXPORT bool qtool_blocks(const QtoolDecoder* decoder, void* x, const float* cos,
                               const float* sin, const int64_t* slots, const QtoolSpans* spans,
                               int64_t rows, void* scratch, int32_t threads);
