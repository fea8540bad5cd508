// The entry point of the quantizers.

#include "chunk.h"

using namespace qtool;

const char* qtool_blocks_isa() { return kIsaName; }

int32_t qtool_quantize_blocks(int32_t type, const float* weights, const float* importance,
                              float* row_sums, uint8_t* blocks, int64_t rows, int64_t columns,
                              int32_t threads) {
  const Matrix matrix{weights, importance, row_sums, blocks, rows, columns, threads};
  switch (type) {
    case 2:
    case 3:
    case 6:
    case 7:
    case 8: return quantize_legacy(type, matrix, row_sums);
    case 10:
    case 11:
    case 12:
    case 13:
    case 14: return quantize_kquant(type, matrix);
    case 20:
    case 23: return quantize_iq4(type, matrix);
    case 34:
    case 35:
    case 39: return quantize_fixed(type, matrix);
    default: return kUnknownType;
  }
}
