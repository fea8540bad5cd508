// IQ4_NL and IQ4_XS: 4-bit codes into a fixed table. Layouts and the search stand in blocks/iq4.py.

#include "chunk.h"

namespace qtool {
namespace {

constexpr int kPart = 32;
constexpr int8_t kValues[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                1,    13,   25,  38,  53,  69,  89,  113};
constexpr int kTries = 7;

// The nearest value, ties upwards, is the number of midpoints that x reaches. Midpoints lie 11.5 or
// more apart, so of the 32 stretches of 8 around multiples of 8 each holds at most one: a stretch
// knows the code below its midpoint, the midpoint, and whether there is one. No midpoint is the end
// of a stretch, so to which of two stretches an end belongs does not matter.
struct Stretches {
  alignas(64) float midpoint[32];  // infinite where there is none
  alignas(64) float code[32];      // below the midpoint
  alignas(64) float value[32];     // of that code
  alignas(64) float next[32];      // value of the code above
};

constexpr Stretches make_stretches() {
  Stretches s{};
  for (int stretch = 0; stretch < 32; ++stretch) {
    const int centre = stretch < 16 ? 8 * stretch : 8 * (stretch - 32);  // index: low 5 bits
    int code = 0;
    while (code < 15 && kValues[code] + kValues[code + 1] <= 2 * (centre - 4)) ++code;
    const bool has_next = code < 15 && kValues[code] + kValues[code + 1] < 2 * (centre + 4);
    s.code[stretch] = static_cast<float>(code);
    s.value[stretch] = kValues[code];
    s.next[stretch] = kValues[has_next ? code + 1 : code];
    s.midpoint[stretch] =
        has_next ? static_cast<float>(kValues[code] + kValues[code + 1]) / 2 : INFINITY;
  }
  return s;
}

constexpr Stretches kStretches = make_stretches();

// Adding 1.5 * 2^26, where floats are multiples of 8, leaves the stretch's number in the low bits.
constexpr float kToStretch = 100663296.0f;

struct Lookup {
  Floats x;
  Ints stretch;

  explicit QTOOL_INLINE Lookup(Floats v)
      : x(minimum(maximum(v, splat(kValues[0])), splat(kValues[15]))),
        stretch(bits_of(x + kToStretch) & 31) {}

  QTOOL_INLINE Floats of(const float* table) const {
#if defined(__AVX512F__)
    const __m512 low = _mm512_load_ps(table), high = _mm512_load_ps(table + 16);
    return _mm512_permutex2var_ps(low, (__m512i)stretch, high);
#elif defined(__AVX2__)
    return _mm256_i32gather_ps(table, (__m256i)stretch, 4);
#else
    Floats found;
    for (int i = 0; i < kLanes; ++i) found[i] = table[stretch[i]];
    return found;
#endif
  }

  QTOOL_INLINE Ints above() const { return x >= of(kStretches.midpoint); }
};

QTOOL_INLINE Floats nearest_value(Floats v) {
  const Lookup found(v);
  return select(found.above(), found.of(kStretches.next), found.of(kStretches.value));
}

QTOOL_INLINE Floats nearest_code(Floats v) {
  const Lookup found(v);
  const Floats code = found.of(kStretches.code);
  return select(found.above(), code + 1.0f, code);
}

// The scale that explains most of a block, of 16 tries.
Floats fit(const Floats* x, const Floats* w) {
  const Floats zero = splat(0.0f);
  const Floats peak = signed_peak<kPart>(x);
  const Ints empty = absolute(peak) < kEmptyBelow;
  const Floats safe_peak = select(empty, splat(1.0f), peak);
  Floats sum_qx, sum_q2;
  const auto evaluate = [&](Floats inverse) {
    sum_qx = sum_q2 = zero;
    for (int k = 0; k < kPart; ++k) {
      const Floats value = nearest_value(inverse * x[k]);
      const Floats weighted = w[k] * value;
      sum_qx += weighted * x[k];
      sum_q2 += weighted * value;
    }
  };
  evaluate(splat(1.0f) / (-safe_peak / splat(kValues[0])));
  Floats scale = select(sum_q2 > zero, sum_qx / sum_q2, zero);
  Floats best = scale * sum_qx;
  for (int step = -kTries; step <= kTries; ++step) {
    evaluate(splat(static_cast<float>(step + kValues[0])) / safe_peak);
    const Ints better = (sum_q2 > zero) & (sum_qx * sum_qx > best * sum_q2);
    scale = select(better, sum_qx / sum_q2, scale);
    best = select(better, scale * sum_qx, best);
  }
  return select(empty, zero, scale);
}

// Codes of one block of 32 at an inverse scale, packed: byte j holds elements j and j + 16.
QTOOL_INLINE void store_codes(const float* x, float inverse, uint8_t* out) {
  uint8_t codes[kPart];
  const float finite = finite_inverse(inverse);
  for (int i = 0; i < kPart; i += kLanes) store_bytes(codes + i, nearest_code(load(x + i) * finite));
  for (int i = 0; i < 16; ++i) out[i] = static_cast<uint8_t>(codes[i] | codes[i + 16] << 4);
}

// Scales of all blocks of 32 of a chunk; kBlock: weights over which importance takes its mean.
template <int kBlock>
void fit_chunk(const Chunk& chunk, float* scales) {
  constexpr int kParts = kBlock / kPart;
  const bool weighted = chunk.matrix.importance != nullptr;
  alignas(64) float weights[kLanes * kBlock];
  if (weighted) {
    float sigma2[kLanes];
    store(sigma2, sums_of_squares<kBlock>(chunk.x) * (2.0f / kBlock));
    for (int i = 0; i < chunk.count; ++i) {
      weigh<kBlock>(weights + i * kBlock, chunk.x + i * kBlock, chunk.importance(i), sigma2[i]);
    }
    std::fill(weights + chunk.count * kBlock, weights + kLanes * kBlock, 0.0f);
  }
  const int groups = (chunk.count * kParts + kLanes - 1) / kLanes;
  for (int group = 0; group < groups; ++group) {
    Floats x[kPart], w[kPart];
    to_lanes<kPart>(x, chunk.x + group * kLanes * kPart);
    if (weighted) {
      to_lanes<kPart>(w, weights + group * kLanes * kPart);
    } else {
      for (int k = 0; k < kPart; ++k) w[k] = x[k] * x[k];
    }
    store(scales + group * kLanes, fit(x, w));
  }
}

struct IQ4_NL {
  static constexpr int kWidth = 32, kBytes = 18;
  static constexpr int kHalves[] = {0};

  static void quantize(const Chunk& chunk) {
    float scales[kLanes];
    fit_chunk<kWidth>(chunk, scales);
    for (int i = 0; i < chunk.count; ++i) {
      uint8_t* out = chunk.out + i * kBytes;
      const float scale = scales[i];
      store_half(out, scale);
      store_codes(chunk.x + i * kWidth, scale == 0.0f ? 0.0f : 1.0f / scale, out + 2);
    }
  }
};

struct IQ4_XS {
  static constexpr int kWidth = 256, kBytes = 136;
  static constexpr int kHalves[] = {0};

  static void quantize(const Chunk& chunk) {
    float all_scales[kLanes * 8];
    fit_chunk<kWidth>(chunk, all_scales);
    for (int i = 0; i < chunk.count; ++i) {
      uint8_t* out = chunk.out + i * kBytes;
      const float* scales = all_scales + i * 8;
      const float d = -peak_of<8>(scales) / 32.0f;
      const float inverse = finite_inverse(d == 0.0f ? 0.0f : 1.0f / d);
      store_half(out, d);
      int high = 0;
      uint8_t low[8];
      for (int j = 0; j < 8; ++j) {
        const float step = round_within(inverse * scales[j], -32.0f, 31.0f);
        // the grid of d as it is, not as half precision stores it: so the reference
        const float grid = d * step;
        store_codes(chunk.x + i * kWidth + j * kPart, grid == 0.0f ? 0.0f : 1.0f / grid,
                    out + 8 + 16 * j);
        const int code = static_cast<int>(step) + 32;
        high |= (code >> 4) << 2 * j;
        low[j] = static_cast<uint8_t>(code & 15);
      }
      out[2] = static_cast<uint8_t>(high & 255);
      out[3] = static_cast<uint8_t>(high >> 8);
      for (int j = 0; j < 4; ++j) {
        out[4 + j] = static_cast<uint8_t>(low[2 * j] | low[2 * j + 1] << 4);
      }
    }
  }
};

}  // namespace

int32_t quantize_iq4(int32_t type, const Matrix& matrix) {
  return type == 20 ? quantize_matrix<IQ4_NL>(matrix) : quantize_matrix<IQ4_XS>(matrix);
}

}  // namespace qtool
