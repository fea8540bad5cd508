// TQ1_0, TQ2_0 and MXFP4: the scale follows from the largest weight. Layouts stand in
// blocks/ternary.py.

#include <array>

#include "chunk.h"

namespace qtool {
namespace {

float largest_magnitude(const float* x, int count) {
  Floats peak = splat(0.0f);
  for (int i = 0; i < count; i += kLanes) peak = maximum(absolute(load(x + i)), peak);
  return largest(peak);
}

// Five trits a byte, `stride` weights apart, the first the most significant; as a fraction of 243
// rounded up to one of 256, so that multiplying by three brings out the first.
void pack_trits(uint8_t* out, const uint8_t* trits, int stride) {
  for (int i = 0; i < stride; ++i) {
    int number = 0;
    for (int n = 0; n < 5; ++n) number = number * 3 + trits[n * stride + i];
    out[i] = static_cast<uint8_t>((number * 256 + 242) / 243);
  }
}

template <bool kDense>
struct Ternary {
  static constexpr int kWidth = 256, kBytes = kDense ? 54 : 66;
  static constexpr int kHalves[] = {kBytes - 2};

  static void quantize_one(const float* x, uint8_t* out) {
    const float d = largest_magnitude(x, kWidth);
    const float inverse = finite_inverse(d == 0.0f ? 0.0f : 1.0f / d);
    uint8_t trits[kWidth + 4] = {};  // the last four bytes of TQ1_0 have a fifth trit, of 0
    for (int i = 0; i < kWidth; i += kLanes) {
      // Rounded with halves away from zero: -1, 0 or 1.
      const Floats v = load(x + i) * inverse, one = splat(1.0f), zero = splat(0.0f);
      const Floats trit = one + select(v >= 0.5f, one, zero) - select(v <= -0.5f, one, zero);
      store_bytes(trits + i, trit);
    }
    if (kDense) {
      pack_trits(out, trits, 32);
      pack_trits(out + 32, trits + 160, 16);
      pack_trits(out + 48, trits + 240, 4);
    } else {
      for (int n = 0; n < 2; ++n) {
        const uint8_t* from = trits + 128 * n;
        for (int l = 0; l < 32; ++l) {
          out[32 * n + l] = static_cast<uint8_t>(from[l] | from[l + 32] << 2 | from[l + 64] << 4 |
                                                 from[l + 96] << 6);
        }
      }
    }
    store_half(out + kBytes - 2, d);
  }

  static void quantize(const Chunk& chunk) {
    for (int i = 0; i < chunk.count; ++i) {
      quantize_one(chunk.x + i * kWidth, chunk.out + i * kBytes);
    }
  }
};

struct MXFP4 {
  static constexpr int kWidth = 32, kBytes = 17;
  static constexpr std::array<int, 0> kHalves{};
  static constexpr int8_t kValues[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

  static int exponent_of(float peak) {
    if (!(peak > 0.0f)) return 0;
    // The logarithm as a float: just below a power of two it rounds up to it.
    const float whole = std::floor(static_cast<float>(std::log2(static_cast<double>(peak))));
    const int exponent = static_cast<int>(std::fmin(whole, 127.0f)) - 2 + 127;
    return std::clamp(exponent, 0, 254);
  }

  static void quantize_one(const float* x, uint8_t* out) {
    const int exponent = exponent_of(largest_magnitude(x, kWidth));
    const uint32_t bits = exponent < 2 ? 0x200000u << exponent
                                       : static_cast<uint32_t>(exponent - 1) << 23;
    float scale;
    std::memcpy(&scale, &bits, sizeof scale);
    uint8_t codes[kWidth];
    for (int i = 0; i < kWidth; i += kLanes) {
      const Floats v = load(x + i);
      Floats best = absolute(kValues[0] * scale - v), found = splat(0.0f);
      for (int code = 1; code < 16; ++code) {
        const Floats distance = absolute(kValues[code] * scale - v);
        const Ints closer = distance < best;
        best = select(closer, distance, best);
        found = select(closer, splat(static_cast<float>(code)), found);
      }
      store_bytes(codes + i, found);
    }
    out[0] = static_cast<uint8_t>(exponent);
    for (int i = 0; i < 16; ++i) out[1 + i] = static_cast<uint8_t>(codes[i] | codes[i + 16] << 4);
  }

  static void quantize(const Chunk& chunk) {
    for (int i = 0; i < chunk.count; ++i) {
      quantize_one(chunk.x + i * kWidth, chunk.out + i * kBytes);
    }
  }
};

}  // namespace

int32_t quantize_fixed(int32_t type, const Matrix& matrix) {
  switch (type) {
    case 34: return quantize_matrix<Ternary<true>>(matrix);
    case 35: return quantize_matrix<Ternary<false>>(matrix);
    default: return quantize_matrix<MXFP4>(matrix);
  }
}

}  // namespace qtool
