// A matrix cut into chunks of kLanes blocks, and what all quantizers do with a chunk.
//
// A quantizer is a struct with
//   kWidth      weights a block
//   kBytes      bytes a block
//   kHalves     where in a block its half-precision numbers lie
//   quantize    (const Chunk&): writes chunk.count blocks
#pragma once

#include <algorithm>

#include "interface.h"
#include "search.h"

namespace qtool {

struct Matrix {
  const float* weights;     // [rows, columns]
  const float* importance;  // [columns] or null
  const float* row_sums;    // [rows] sums of squares, for the types that want them
  uint8_t* blocks;
  int64_t rows, columns;
  int32_t threads;
};

// Blocks first .. first+count-1 of the matrix; x has room for kLanes of them, zeros at the end.
struct Chunk {
  const Matrix& matrix;
  const float* x;
  int64_t first;
  int count, width;
  uint8_t* out;

  int64_t begin(int block) const { return (first + block) * width; }
  // Importance of the weights of a block, and the row it is in.
  const float* importance(int block) const {
    return matrix.importance + begin(block) % matrix.columns;
  }
  int64_t row(int block) const { return begin(block) / matrix.columns; }
};

inline bool is_finite(const float* x, int64_t count) {
  Ints largest = {};
  for (int64_t i = 0; i < count; i += kLanes) {
    const Ints size = bits_of(absolute(load(x + i)));
    largest = size > largest ? size : largest;
  }
  return !any(largest >= 0x7f800000);
}

template <class Quantizer>
inline int32_t quantize_chunk(const Matrix& matrix, int64_t first, int64_t total) {
  constexpr int kWidth = Quantizer::kWidth, kBytes = Quantizer::kBytes;
  const int count = static_cast<int>(std::min<int64_t>(kLanes, total - first));
  const float* x = matrix.weights + first * kWidth;
  alignas(64) float padded[kLanes * kWidth];
  if (count < kLanes) {
    std::copy_n(x, count * kWidth, padded);
    std::fill(padded + count * kWidth, padded + kLanes * kWidth, 0.0f);
    x = padded;
  }
  uint8_t* out = matrix.blocks + first * kBytes;
  int32_t faults = is_finite(x, count * kWidth) ? 0 : kInputNotFinite;
  Quantizer::quantize(Chunk{matrix, x, first, count, kWidth, out});
  for (int block = 0; block < count; ++block) {
    for (const int place : Quantizer::kHalves) {
      const int exponent = out[block * kBytes + place + 1] & 0x7c;
      if (exponent == 0x7c) faults |= kScaleNotFinite;
    }
  }
  return faults;
}

template <class Quantizer>
inline int32_t quantize_matrix(const Matrix& matrix) {
  const int64_t total = matrix.rows * matrix.columns / Quantizer::kWidth;
  int32_t faults = 0;
#pragma omp parallel for schedule(static) num_threads(matrix.threads) \
    reduction(| : faults) if (matrix.threads > 1 && total > kLanes)
  for (int64_t first = 0; first < total; first += kLanes) {
    faults |= quantize_chunk<Quantizer>(matrix, first, total);
  }
  return faults;
}

// Of a super-block's scales the one of largest magnitude, the first of equals; never -0. NaN where
// any is not finite, which then shows in what is stored.
template <int kCount>
QTOOL_INLINE float peak_of(const float* scales) {
  float peak = 0.0f, nothing = 0.0f;
  for (int j = 0; j < kCount; ++j) {
    if (std::fabs(scales[j]) > std::fabs(peak)) peak = scales[j];
    nothing += scales[j] * 0.0f;
  }
  return peak + nothing;
}

// qw * sqrt(sigma2 + x^2), the weights of a block by importance.
template <int kCount>
QTOOL_INLINE void weigh(float* to, const float* x, const float* importance, float sigma2) {
  for (int i = 0; i < kCount; i += kLanes) {
    const Floats v = load(x + i);
    store(to + i, load(importance + i) * square_root(sigma2 + v * v));
  }
}

// Sums of squares of kLanes blocks, each from left to right.
template <int kWidth>
QTOOL_INLINE Floats sums_of_squares(const float* x) {
  Floats total = splat(0.0f), lanes[kLanes];
  for (int i = 0; i < kWidth; i += kLanes) {
    transpose(lanes, x + i, kWidth);
    for (int k = 0; k < kLanes; ++k) total += lanes[k] * lanes[k];
  }
  return total;
}

int32_t quantize_legacy(int32_t type, const Matrix& matrix, float* row_sums);
int32_t quantize_kquant(int32_t type, const Matrix& matrix);
int32_t quantize_iq4(int32_t type, const Matrix& matrix);
int32_t quantize_fixed(int32_t type, const Matrix& matrix);

}  // namespace qtool
