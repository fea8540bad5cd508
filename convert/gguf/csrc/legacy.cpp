// Q4_0, Q4_1, Q5_0, Q5_1, Q8_0: blocks of 32 weights. Layouts stand in blocks/legacy.py.
//
// Without importance a block is rounded on the grid of its extremes, whose order of evaluation is
// free: vectors run along the block. With importance it is searched, kLanes blocks side by side.

#include "chunk.h"

namespace qtool {
namespace {

constexpr int kWidth = 32;

void pack_nibbles(uint8_t* to, const uint8_t* codes) {
  for (int i = 0; i < 16; ++i) to[i] = static_cast<uint8_t>((codes[i] & 15) | codes[i + 16] << 4);
}

void pack_fifth_bits(uint8_t* to, const uint8_t* codes) {
  uint32_t bits = 0;
  for (int i = 0; i < 32; ++i) bits |= static_cast<uint32_t>(codes[i] >> 4) << i;
  std::memcpy(to, &bits, sizeof bits);
}

struct Range {
  float least, largest;
};

Range range_of(const float* x) {
  Floats low = load(x), high = low;
  for (int i = kLanes; i < kWidth; i += kLanes) {
    low = minimum(load(x + i), low);
    high = maximum(load(x + i), high);
  }
  return {least(low), largest(high)};
}

// The first element that equals the value: tells 0 from -0.
float first_equal(const float* x, float value) {
  int i = 0;
  while (i < kWidth - 1 && x[i] != value) ++i;
  return x[i];
}

// kBits 4 or 5; kMinimum: Q4_1 and Q5_1.
template <int kBits, bool kMinimum>
struct Legacy {
  static constexpr int kWidth = 32;
  static constexpr int kHead = kMinimum ? 4 : 2;
  static constexpr int kBytes = kHead + (kBits == 5 ? 4 : 0) + 16;
  static constexpr int kHalves[] = {0, kMinimum ? 2 : 0};
  // Highest code of the affine types; of the symmetric ones half the number of codes.
  static constexpr float kLimit = kMinimum ? (1 << kBits) - 1 : 1 << (kBits - 1);

  static void pack(uint8_t* out, float scale, float offset, const uint8_t* codes) {
    store_half(out, scale);
    if (kMinimum) store_half(out + 2, offset);
    if (kBits == 5) pack_fifth_bits(out + kHead, codes);
    pack_nibbles(out + kBytes - 16, codes);
  }

  static void round_block(const float* x, uint8_t* out) {
    const Range range = range_of(x);
    float scale, offset;
    if (kMinimum) {
      offset = range.least == 0.0f ? first_equal(x, 0.0f) : range.least;
      scale = (range.largest - offset) / kLimit + 0.0f;  // never -0
    } else {
      offset = 0.0f;
      // Of the two extremes the larger in magnitude, and of equals the first; never -0.
      float peak = range.largest > -range.least ? range.largest : range.least;
      if (range.largest == -range.least) {
        int i = 0;
        while (i < kWidth - 1 && std::fabs(x[i]) != range.largest) ++i;
        peak = x[i] + 0.0f;
      }
      scale = peak / -kLimit;
    }
    const float inverse = scale == 0.0f ? 0.0f : 1.0f / scale;
    const float finite = finite_inverse(inverse);
    const float most = kMinimum ? kLimit : 2 * kLimit - 1, middle = kMinimum ? 0.5f : kLimit + 0.5f;
    uint8_t codes[kWidth];
    for (int i = 0; i < kWidth; i += kLanes) {
      // store_bytes truncates, as the reference does here
      const Floats code = (load(x + i) - offset) * finite + middle;
      store_bytes(codes + i, minimum(code, splat(most)));
    }
    if (!kMinimum && finite != inverse) std::memset(codes, 0, sizeof codes);
    pack(out, scale, offset, codes);
  }

  static void search(const Chunk& chunk) {
    alignas(64) float weights[kLanes * kWidth] = {};
    for (int block = 0; block < chunk.count; ++block) {
      const float columns = static_cast<float>(chunk.matrix.columns);
      const float sigma2 = chunk.matrix.row_sums[chunk.row(block)] / columns;
      weigh<kWidth>(weights + block * kWidth, chunk.x + block * kWidth, chunk.importance(block),
                    sigma2);
    }
    Floats x[kWidth], w[kWidth];
    to_lanes<kWidth>(x, chunk.x);
    to_lanes<kWidth>(w, weights);
    float scales[kLanes], offsets[kLanes], inverses[kLanes], bases[kLanes];
    if (kMinimum) {
      const AffineFit fit = fit_affine<kWidth, false>(x, w, kLimit, -0.9f, 0.05f, 36);
      store(scales, fit.scale);
      store(offsets, fit.minimum);
      store(inverses, fit.inverse);
      store(bases, fit.base);
    } else {
      const ScaleFit fit = fit_scale<kWidth>(x, w, kLimit);
      store(scales, fit.scale);
      store(inverses, select(fit.empty, splat(0.0f), fit.inverse));
      store(offsets, splat(0.0f));
      store(bases, splat(0.0f));
    }
    for (int block = 0; block < chunk.count; ++block) {
      const float inverse = inverses[block], base = bases[block];
      uint8_t codes[kWidth] = {};
      for (int i = 0; i < kWidth; i += kLanes) {
        const Floats v = load(chunk.x + block * kWidth + i);
        if (kMinimum) {
          store_bytes(codes + i, round_within((v - base) * inverse, 0.0f, kLimit));
        } else if (inverse != 0.0f) {  // an empty block has codes 0, not the middle
          store_bytes(codes + i, round_within(v * inverse, -kLimit, kLimit - 1) + kLimit);
        }
      }
      pack(chunk.out + block * kBytes, scales[block], offsets[block], codes);
    }
  }

  static void quantize(const Chunk& chunk) {
    if (chunk.matrix.importance != nullptr) {
      search(chunk);
      return;
    }
    for (int block = 0; block < chunk.count; ++block) {
      round_block(chunk.x + block * kWidth, chunk.out + block * kBytes);
    }
  }
};

struct Q8_0 {
  static constexpr int kWidth = 32, kBytes = 34;
  static constexpr int kHalves[] = {0};

  static void quantize(const Chunk& chunk) {
    for (int block = 0; block < chunk.count; ++block) {
      const float* x = chunk.x + block * kWidth;
      uint8_t* out = chunk.out + block * kBytes;
      Floats peak = splat(0.0f);
      for (int i = 0; i < kWidth; i += kLanes) peak = maximum(absolute(load(x + i)), peak);
      const float scale = largest(peak) / 127.0f;
      const float inverse = finite_inverse(scale == 0.0f ? 0.0f : 1.0f / scale);
      store_half(out, scale);
      for (int i = 0; i < kWidth; i += kLanes) {
        // Halves away from zero, by the exact fraction: x + 0.5 would itself be rounded.
        const Floats v = load(x + i) * inverse;
        const Ints whole = __builtin_convertvector(v, Ints);
        const Floats fraction = v - __builtin_convertvector(whole, Floats);
        const Ints up = fraction >= 0.5f, down = fraction <= -0.5f;  // -1 where true
        store_bytes(out + 2 + i, whole - up + down);
      }
    }
  }
};

// The sum of squares of each row, from left to right, some rows at a time to hide the latency.
void sum_rows(const Matrix& matrix, float* sums) {
  constexpr int kRows = 8;
#pragma omp parallel for schedule(static) num_threads(matrix.threads) if (matrix.threads > 1)
  for (int64_t first = 0; first < matrix.rows; first += kRows) {
    const int count = static_cast<int>(std::min<int64_t>(kRows, matrix.rows - first));
    float totals[kRows] = {};
    const float* x = matrix.weights + first * matrix.columns;
    for (int64_t column = 0; column < matrix.columns; ++column) {
      for (int row = 0; row < count; ++row) {
        const float v = x[row * matrix.columns + column];
        totals[row] += v * v;
      }
    }
    std::copy_n(totals, count, sums + first);
  }
}

}  // namespace

int32_t quantize_legacy(int32_t type, const Matrix& matrix, float* row_sums) {
  if (type == 8) return quantize_matrix<Q8_0>(matrix);
  if (matrix.importance != nullptr) sum_rows(matrix, row_sums);
  switch (type) {
    case 2: return quantize_matrix<Legacy<4, false>>(matrix);
    case 3: return quantize_matrix<Legacy<4, true>>(matrix);
    case 6: return quantize_matrix<Legacy<5, false>>(matrix);
    default: return quantize_matrix<Legacy<5, true>>(matrix);
  }
}

}  // namespace qtool
