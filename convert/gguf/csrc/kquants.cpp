// Q2_K .. Q6_K: super-blocks of 256 weights. Layouts and steps stand in blocks/kquants.py.
//
// A chunk has kLanes super-blocks. Their sub-blocks are fitted kLanes at a time, side by side; the
// scales of sub-blocks are then quantized for each super-block, or, where that is a search, for
// all kLanes super-blocks side by side; rounding on the final grids runs along the sub-blocks.

#include "chunk.h"

namespace qtool {
namespace {

constexpr int kSuper = 256;

template <int kWidth>
struct Parts {
  static constexpr int kCount = kSuper / kWidth;
  // One number for each sub-block of a chunk.
  typedef float Table[kLanes][kCount];
};

// [super-block][sub-block] -> [sub-block] vectors over super-blocks, and back.
template <int kCount>
void table_to_lanes(Floats* to, const float (*table)[kCount]) {
  for (int j = 0; j < kCount; ++j) {
    for (int i = 0; i < kLanes; ++i) to[j][i] = table[i][j];
  }
}
template <int kCount>
void lanes_to_table(float (*table)[kCount], const Floats* from) {
  for (int j = 0; j < kCount; ++j) {
    for (int i = 0; i < kLanes; ++i) table[i][j] = from[j][i];
  }
}

// Importance of all weights of a chunk, scaled by their size: sigma2 = factor * mean square.
void weigh_chunk(const Chunk& chunk, float factor, float* weights) {
  float sigma2[kLanes];
  store(sigma2, factor * sums_of_squares<kSuper>(chunk.x) / static_cast<float>(kSuper));
  for (int i = 0; i < chunk.count; ++i) {
    weigh<kSuper>(weights + i * kSuper, chunk.x + i * kSuper, chunk.importance(i), sigma2[i]);
  }
  std::fill(weights + chunk.count * kSuper, weights + kLanes * kSuper, 0.0f);
}

template <int kWidth>
int groups_of(const Chunk& chunk) {
  return (chunk.count * Parts<kWidth>::kCount + kLanes - 1) / kLanes;
}

// 2 bits each: byte 32n+l holds 128n+l, +32, +64, +96, low first.
void pack_crumbs(uint8_t* to, const uint8_t* codes) {
  for (int n = 0; n < 2; ++n, codes += 128, to += 32) {
    for (int l = 0; l < 32; ++l) {
      to[l] = static_cast<uint8_t>((codes[l] & 3) | (codes[l + 32] & 3) << 2 |
                                   (codes[l + 64] & 3) << 4 | (codes[l + 96] & 3) << 6);
    }
  }
}

// Codes of a sub-block on the grid that is stored; where that is 0, on its own first grid.
template <int kWidth>
QTOOL_INLINE void round_affine(const float* x, float grid, float offset, float inverse, float base,
                               float limit, uint8_t* codes) {
  if (grid != 0.0f) {
    for (int i = 0; i < kWidth; i += kLanes) {
      store_bytes(codes + i, round_within((load(x + i) + offset) / splat(grid), 0.0f, limit));
    }
  } else {
    for (int i = 0; i < kWidth; i += kLanes) {
      store_bytes(codes + i, round_within((load(x + i) - base) * inverse, 0.0f, limit));
    }
  }
}

QTOOL_INLINE void round_symmetric(const float* x, float grid, float limit, uint8_t* codes) {
  for (int i = 0; i < 16; i += kLanes) {
    const Floats code = round_within(load(x + i) / splat(grid), -limit, limit - 1) + limit;
    store_bytes(codes + i, code);
  }
}

void pack_q2(uint8_t* out, float d, float dmin, const uint8_t* scales, const uint8_t* minima,
             const uint8_t* codes) {
  for (int j = 0; j < 16; ++j) out[j] = static_cast<uint8_t>(scales[j] | minima[j] << 4);
  pack_crumbs(out + 16, codes);
  store_half(out + 80, d);
  store_half(out + 82, dmin);
}

template <int kBits>
void pack_q4_or_q5(uint8_t* out, float d, float dmin, const uint8_t* scales, const uint8_t* minima,
                   const uint8_t* codes) {
  store_half(out, d);
  store_half(out + 2, dmin);
  for (int j = 0; j < 4; ++j) {
    out[4 + j] = static_cast<uint8_t>(scales[j] | (scales[j + 4] >> 4) << 6);
    out[8 + j] = static_cast<uint8_t>(minima[j] | (minima[j + 4] >> 4) << 6);
    out[12 + j] = static_cast<uint8_t>((scales[j + 4] & 15) | (minima[j + 4] & 15) << 4);
  }
  uint8_t* low = out + 16;
  if (kBits == 5) {
    for (int l = 0; l < 32; ++l) {
      int bits = 0;
      for (int j = 0; j < 8; ++j) bits |= (codes[32 * j + l] >> 4) << j;
      low[l] = static_cast<uint8_t>(bits);
    }
    low += 32;
  }
  for (int j = 0; j < 4; ++j, low += 32, codes += 64) {
    for (int l = 0; l < 32; ++l) {
      low[l] = static_cast<uint8_t>((codes[l] & 15) | (codes[l + 32] & 15) << 4);
    }
  }
}

// Scales and minima: Q2_K, Q4_K, Q5_K.
template <int kBits>
struct Affine {
  static constexpr int kWidth = kSuper;
  static constexpr int kPart = kBits == 2 ? 16 : 32;
  static constexpr int kCount = kSuper / kPart;
  static constexpr int kBytes = kBits == 2 ? 84 : kBits == 4 ? 144 : 176;
  static constexpr int kHalves[] = {kBits == 2 ? 80 : 0, kBits == 2 ? 82 : 2};
  static constexpr float kLimit = (1 << kBits) - 1;
  static constexpr float kScaleLimit = kBits == 2 ? 15 : 63;
  typedef typename Parts<kPart>::Table Table;

  static AffineFit fit_plain(const Floats* x) {
    Floats w[kPart];
    if (kBits == 2) {
      for (int k = 0; k < kPart; ++k) w[k] = absolute(x[k]);
      return fit_affine<kPart, true>(x, w, kLimit, -0.5f, 0.1f, 15);
    }
    Floats squares = splat(0.0f);
    for (int k = 0; k < kPart; ++k) squares += x[k] * x[k];
    const Floats mean = square_root(squares / static_cast<float>(kPart));
    for (int k = 0; k < kPart; ++k) w[k] = mean + absolute(x[k]);
    return fit_affine<kPart, false>(x, w, kLimit, kBits == 4 ? -1.0f : -0.5f, 0.1f,
                                    kBits == 4 ? 20 : 15);
  }

  // Scales of sub-blocks as parts of the largest.
  static void fractions(const float* values, float* d, uint8_t* codes) {
    float largest = 0.0f;
    for (int j = 0; j < kCount; ++j) largest = values[j] > largest ? values[j] : largest;
    const float inverse = finite_inverse(largest == 0.0f ? 0.0f : kScaleLimit / largest);
    for (int j = 0; j < kCount; ++j) {
      const float code = round_even(inverse * values[j]);
      codes[j] = static_cast<uint8_t>(static_cast<int32_t>(code < kScaleLimit ? code : kScaleLimit));
    }
    *d = largest / kScaleLimit;
  }

  // The same by search, each sub-block weighted by its sum of importance.
  static void weighted_fractions(const Table values, const Floats* sums, float* d,
                                 uint8_t (*codes)[kCount]) {
    Floats lanes[kCount], found[kCount];
    table_to_lanes<kCount>(lanes, values);
    store(d, fit_positive<kCount>(lanes, sums, kScaleLimit, found));
    for (int j = 0; j < kCount; ++j) {
      for (int i = 0; i < kLanes; ++i) {
        codes[i][j] = static_cast<uint8_t>(static_cast<int32_t>(found[j][i]));
      }
    }
  }

  static void quantize(const Chunk& chunk) {
    const bool weighted = chunk.matrix.importance != nullptr;
    alignas(64) float weights[kLanes * kSuper];
    if (weighted) weigh_chunk(chunk, kBits == 2 ? 1.0f : 2.0f, weights);
    alignas(64) Table scales = {}, minima = {}, inverses = {}, bases = {}, sums = {};
    for (int group = 0; group < groups_of<kPart>(chunk); ++group) {
      Floats x[kPart], w[kPart];
      to_lanes<kPart>(x, chunk.x + group * kLanes * kPart);
      AffineFit fit;
      if (weighted) {
        to_lanes<kPart>(w, weights + group * kLanes * kPart);
        fit = fit_affine<kPart, false>(x, w, kLimit, -0.9f, 0.05f, 36);
      } else {
        fit = fit_plain(x);
      }
      store(&scales[0][0] + group * kLanes, fit.scale);
      store(&minima[0][0] + group * kLanes, -fit.minimum);
      store(&inverses[0][0] + group * kLanes, fit.inverse);
      store(&bases[0][0] + group * kLanes, fit.base);
      store(&sums[0][0] + group * kLanes, fit.weight_sum);
    }
    float d[kLanes], dmin[kLanes];
    uint8_t scale_codes[kLanes][kCount], minimum_codes[kLanes][kCount];
    if (weighted) {
      Floats part_weights[kCount];
      table_to_lanes<kCount>(part_weights, sums);
      weighted_fractions(scales, part_weights, d, scale_codes);
      weighted_fractions(minima, part_weights, dmin, minimum_codes);
    } else {
      for (int i = 0; i < chunk.count; ++i) {
        fractions(scales[i], d + i, scale_codes[i]);
        fractions(minima[i], dmin + i, minimum_codes[i]);
      }
    }
    for (int i = 0; i < chunk.count; ++i) {
      const float stored_d = from_half(to_half(d[i])), stored_dmin = from_half(to_half(dmin[i]));
      alignas(64) uint8_t codes[kSuper];
      for (int j = 0; j < kCount; ++j) {
        const float grid = stored_d * static_cast<float>(scale_codes[i][j]);
        const float offset = stored_dmin * static_cast<float>(minimum_codes[i][j]);
        round_affine<kPart>(chunk.x + i * kSuper + j * kPart, grid, offset, inverses[i][j],
                            bases[i][j], kLimit, codes + j * kPart);
      }
      uint8_t* out = chunk.out + i * kBytes;
      if (kBits == 2) {
        pack_q2(out, d[i], dmin[i], scale_codes[i], minimum_codes[i], codes);
      } else {
        pack_q4_or_q5<kBits>(out, d[i], dmin[i], scale_codes[i], minimum_codes[i], codes);
      }
    }
  }
};

struct Q3_K {
  static constexpr int kWidth = kSuper, kBytes = 110;
  static constexpr int kHalves[] = {108};

  static void pack(uint8_t* out, float d, const uint8_t* scales, const uint8_t* codes) {
    for (int l = 0; l < 32; ++l) {
      int bits = 0;
      for (int j = 0; j < 8; ++j) bits |= (codes[32 * j + l] >> 2) << j;
      out[l] = static_cast<uint8_t>(bits);
    }
    pack_crumbs(out + 32, codes);
    for (int j = 0; j < 8; ++j) {
      out[96 + j] = static_cast<uint8_t>((scales[j] & 15) | (scales[j + 8] & 15) << 4);
    }
    for (int j = 0; j < 4; ++j) {
      out[104 + j] = static_cast<uint8_t>(scales[j] >> 4 | (scales[j + 4] >> 4) << 2 |
                                          (scales[j + 8] >> 4) << 4 | (scales[j + 12] >> 4) << 6);
    }
    store_half(out + 108, d);
  }

  // Signed 6-bit scales, the largest -32; codes from 0.
  static void quantize_scales(const float* scales, float* d, uint8_t* codes) {
    float peak = 0.0f, size = 0.0f;
    for (int j = 0; j < 16; ++j) {
      if (std::fabs(scales[j]) > size) {
        size = std::fabs(scales[j]);
        peak = scales[j];
      }
    }
    *d = 0.0f;
    std::memset(codes, 0, 16);
    if (peak == 0.0f) return;
    const float inverse = -32.0f / peak;
    *d = 1.0f / inverse;
    for (int j = 0; j < 16; ++j) {
      const float code = round_within(inverse * scales[j], -32.0f, 31.0f) + 32.0f;
      codes[j] = static_cast<uint8_t>(code);
    }
  }

  static void quantize(const Chunk& chunk) {
    const bool weighted = chunk.matrix.importance != nullptr;
    alignas(64) float weights[kLanes * kSuper];
    if (weighted) weigh_chunk(chunk, 2.0f, weights);
    alignas(64) Parts<16>::Table scales = {}, sums = {};
    // Codes of the first fit, for sub-blocks whose grid becomes 0: [group][element][lane].
    Floats first_codes[16][16];
    for (int group = 0; group < groups_of<16>(chunk); ++group) {
      Floats x[16], w[16];
      to_lanes<16>(x, chunk.x + group * kLanes * 16);
      Floats scale;
      if (weighted) {
        to_lanes<16>(w, weights + group * kLanes * 16);
        const ScaleFit fit = fit_scale<16>(x, w, 4.0f);
        scale = fit.scale;
        for (int k = 0; k < 16; ++k) {
          const Floats code = round_within(fit.inverse * x[k], -4.0f, 3.0f) + 4.0f;
          first_codes[group][k] = select(fit.empty, splat(0.0f), code);
        }
        store(&sums[0][0] + group * kLanes, sum<16>(w));
      } else {
        scale = fit_scale_by_descent<16>(x, 4.0f, first_codes[group]);
      }
      store(&scales[0][0] + group * kLanes, scale);
    }
    float d[kLanes];
    uint8_t scale_codes[kLanes][16];
    if (weighted) {
      Floats lanes[16], part_weights[16];
      table_to_lanes<16>(lanes, scales);
      table_to_lanes<16>(part_weights, sums);
      const ScaleFit fit = fit_scale<16>(lanes, part_weights, 32.0f);
      store(d, fit.scale);
      for (int j = 0; j < 16; ++j) {
        const Floats code = round_within(fit.inverse * lanes[j], -32.0f, 31.0f) + 32.0f;
        const Floats kept = select(fit.empty, splat(0.0f), code);
        for (int i = 0; i < kLanes; ++i) scale_codes[i][j] = static_cast<uint8_t>(kept[i]);
      }
    } else {
      for (int i = 0; i < chunk.count; ++i) quantize_scales(scales[i], d + i, scale_codes[i]);
    }
    for (int i = 0; i < chunk.count; ++i) {
      const float stored_d = from_half(to_half(d[i]));
      alignas(64) uint8_t codes[kSuper];
      for (int j = 0; j < 16; ++j) {
        const float grid = stored_d * (static_cast<float>(scale_codes[i][j]) - 32.0f);
        if (grid != 0.0f) {
          round_symmetric(chunk.x + i * kSuper + j * 16, grid, 4.0f, codes + j * 16);
          continue;
        }
        const int part = i * 16 + j;
        for (int k = 0; k < 16; ++k) {
          const float code = first_codes[part / kLanes][k][part % kLanes];
          codes[j * 16 + k] = static_cast<uint8_t>(code);
        }
      }
      pack(chunk.out + i * kBytes, d[i], scale_codes[i], codes);
    }
  }
};

struct Q6_K {
  static constexpr int kWidth = kSuper, kBytes = 210;
  static constexpr int kHalves[] = {208};

  static void pack(uint8_t* out, float d, const int8_t* scales, const uint8_t* codes) {
    uint8_t *low = out, *high = out + 128;
    for (int n = 0; n < 2; ++n, low += 64, high += 32, codes += 128) {
      for (int l = 0; l < 32; ++l) {
        low[l] = static_cast<uint8_t>((codes[l] & 15) | (codes[l + 64] & 15) << 4);
        low[l + 32] = static_cast<uint8_t>((codes[l + 32] & 15) | (codes[l + 96] & 15) << 4);
        high[l] = static_cast<uint8_t>(codes[l] >> 4 | (codes[l + 32] >> 4) << 2 |
                                       (codes[l + 64] >> 4) << 4 | (codes[l + 96] >> 4) << 6);
      }
    }
    std::memcpy(out + 192, scales, 16);
    store_half(out + 208, d);
  }

  static void quantize_one(const float* x, const float* scales, const float* inverses,
                           uint8_t* out) {
    float peak = 0.0f, size = 0.0f;
    for (int j = 0; j < 16; ++j) {
      if (std::fabs(scales[j]) > size) {
        size = std::fabs(scales[j]);
        peak = scales[j];
      }
    }
    if (size < kEmptyBelow) {  // the codes of small weights are cleared too
      std::memset(out, 0, kBytes);
      return;
    }
    const float inverse = -128.0f / peak;
    const float d = 1.0f / inverse, stored_d = from_half(to_half(d));
    int8_t scale_codes[16];
    alignas(64) uint8_t codes[kSuper];
    for (int j = 0; j < 16; ++j) {
      const float code = round_within(inverse * scales[j], -128.0f, 127.0f);
      scale_codes[j] = static_cast<int8_t>(code);
      const float grid = stored_d * code;
      uint8_t* to = codes + j * 16;
      const float* from = x + j * 16;
      if (grid != 0.0f) {
        round_symmetric(from, grid, 32.0f, to);
      } else if (inverses[j] == 0.0f) {  // an empty sub-block has codes 0, not the middle
        std::memset(to, 0, 16);
      } else {
        for (int k = 0; k < 16; k += kLanes) {
          const Floats v = round_within(load(from + k) * inverses[j], -32.0f, 31.0f) + 32.0f;
          store_bytes(to + k, v);
        }
      }
    }
    pack(out, d, scale_codes, codes);
  }

  static void quantize(const Chunk& chunk) {
    const bool weighted = chunk.matrix.importance != nullptr;
    alignas(64) float weights[kLanes * kSuper];
    if (weighted) {  // raw, not scaled by the weights' size as in the other types
      for (int i = 0; i < chunk.count; ++i) {
        std::copy_n(chunk.importance(i), kSuper, weights + i * kSuper);
      }
      std::fill(weights + chunk.count * kSuper, weights + kLanes * kSuper, 0.0f);
    }
    alignas(64) Parts<16>::Table scales = {}, inverses = {};
    for (int group = 0; group < groups_of<16>(chunk); ++group) {
      Floats x[16], w[16];
      to_lanes<16>(x, chunk.x + group * kLanes * 16);
      if (weighted) {
        to_lanes<16>(w, weights + group * kLanes * 16);
      } else {
        for (int k = 0; k < 16; ++k) w[k] = x[k] * x[k];
      }
      const ScaleFit fit = fit_scale<16>(x, w, 32.0f);
      store(&scales[0][0] + group * kLanes, fit.scale);
      store(&inverses[0][0] + group * kLanes, select(fit.empty, splat(0.0f), fit.inverse));
    }
    for (int i = 0; i < chunk.count; ++i) {
      quantize_one(chunk.x + i * kSuper, scales[i], inverses[i], chunk.out + i * kBytes);
    }
  }
};

}  // namespace

int32_t quantize_kquant(int32_t type, const Matrix& matrix) {
  switch (type) {
    case 10: return quantize_matrix<Affine<2>>(matrix);
    case 11: return quantize_matrix<Q3_K>(matrix);
    case 12: return quantize_matrix<Affine<4>>(matrix);
    case 13: return quantize_matrix<Affine<5>>(matrix);
    default: return quantize_matrix<Q6_K>(matrix);
  }
}

}  // namespace qtool
