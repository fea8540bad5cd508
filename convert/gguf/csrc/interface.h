// The C interface of the block quantizers: what convert/gguf/blocks/native.py calls through ctypes.
#pragma once

#include <cstdint>

#define QTOOL_API extern "C" __attribute__((visibility("default")))

// Bits of the result of qtool_quantize_blocks.
enum Fault : int32_t {
  kUnknownType = 1,
  kInputNotFinite = 2,  // a weight is NaN or infinite
  kScaleNotFinite = 4,  // a scale or minimum is beyond half precision
};

// Which instruction set the library was built for.
QTOOL_API const char* qtool_blocks_isa();

// weights    [rows, columns], columns a multiple of the type's block
// importance [columns], or null
// row_sums   [rows] to work in; read only by types of 32 weights with importance
// blocks     [rows, bytes of a row]: written
// type       ggml's number
// returns    faults, 0 when there are none; the bytes are written all the same
QTOOL_API int32_t qtool_quantize_blocks(int32_t type, const float* weights, const float* importance,
                                        float* row_sums, uint8_t* blocks, int64_t rows,
                                        int64_t columns, int32_t threads);

// blocks [count * bytes of a block] -> weights [count * weights of a block]
QTOOL_API int32_t qtool_dequantize_blocks(int32_t type, const uint8_t* blocks, float* weights,
                                          int64_t count, int32_t threads);
