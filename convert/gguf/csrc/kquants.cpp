// Q2_K .. Q6_K: super-blocks of 256 weights. Layouts and steps stand in blocks/kquants.py.
//
// A chunk has kLanes super-blocks. Their sub-blocks are fitted kLanes at a time, side by side; the
// scales of sub-blocks are then quantized for each super-block, or, where that is a search, for
// all kLanes super-blocks side by side; rounding on the final grids runs along the sub-blocks.

#include "chunk.h"

namespace qtool {
namespace {

constexpr int kSuper = 256;

// A number for each sub-block of a chunk, kCount for a super-block; and over super-blocks side by
// side: to[sub-block][super-block].
template <int kCount>
void parts_to_lanes(Floats* to, const float* table) {
  for (int j = 0; j < kCount; ++j) {
    float column[kLanes];
    for (int i = 0; i < kLanes; ++i) column[i] = table[i * kCount + j];
    to[j] = load(column);
  }
}
// The way back, for codes: whole numbers, kept as bytes.
template <int kCount>
void lanes_to_bytes(uint8_t* table, const Floats* from) {
  for (int j = 0; j < kCount; ++j) {
    float column[kLanes];
    store(column, from[j]);
    for (int i = 0; i < kLanes; ++i) {
      table[i * kCount + j] = static_cast<uint8_t>(static_cast<int32_t>(column[i]));
    }
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

// Groups of kLanes sub-blocks in a chunk of so many for each super-block.
int groups_of(const Chunk& chunk, int parts) { return (chunk.count * parts + kLanes - 1) / kLanes; }

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

// Scales and minima go to the block and come back as they can be read: the same, but for the bytes
// of negative scales, which spill into their neighbours.
void store_parts_q2(uint8_t* out, uint8_t* scales, uint8_t* minima) {
  for (int j = 0; j < 16; ++j) {
    out[j] = static_cast<uint8_t>(scales[j] | minima[j] << 4);
    scales[j] = out[j] & 15;
    minima[j] = out[j] >> 4;
  }
}
void store_parts_q4(uint8_t* out, uint8_t* scales, uint8_t* minima) {
  for (int j = 0; j < 4; ++j) {
    out[4 + j] = static_cast<uint8_t>(scales[j] | (scales[j + 4] >> 4) << 6);
    out[8 + j] = static_cast<uint8_t>(minima[j] | (minima[j + 4] >> 4) << 6);
    out[12 + j] = static_cast<uint8_t>((scales[j + 4] & 15) | (minima[j + 4] & 15) << 4);
    scales[j] = out[4 + j] & 63;
    minima[j] = out[8 + j] & 63;
    scales[j + 4] = static_cast<uint8_t>((out[12 + j] & 15) | (out[4 + j] >> 6) << 4);
    minima[j + 4] = static_cast<uint8_t>(out[12 + j] >> 4 | (out[8 + j] >> 6) << 4);
  }
}

template <int kBits>
void pack_q4_or_q5(uint8_t* out, const uint8_t* codes) {
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
  static constexpr int kScaleLimit = kBits == 2 ? 15 : 63;
  static constexpr int kAll = kLanes * kCount;

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

  // Scales of sub-blocks as parts of the largest. Codes are kept as bytes, negative ones too.
  static void fractions(const float* values, float* d, uint8_t* codes) {
    float largest = 0.0f;
    for (int j = 0; j < kCount; ++j) largest = values[j] > largest ? values[j] : largest;
    const float inverse = finite_inverse(largest == 0.0f ? 0.0f : kScaleLimit / largest);
    for (int j = 0; j < kCount; ++j) {
      codes[j] = static_cast<uint8_t>(static_cast<int32_t>(round_even(inverse * values[j])));
      if (kBits != 2 && codes[j] > kScaleLimit) codes[j] = kScaleLimit;
    }
    *d = largest / kScaleLimit;
  }

  // The same by search, each sub-block weighted by its sum of importance.
  static void weighted_fractions(const float* values, const Floats* sums, float* d,
                                 uint8_t* codes) {
    Floats lanes[kCount], found[kCount];
    parts_to_lanes<kCount>(lanes, values);
    store(d, fit_positive<kCount>(lanes, sums, kScaleLimit, found));
    lanes_to_bytes<kCount>(codes, found);
    if (kBits == 5) {  // the reference's Q4_K lets the byte of a negative scale spill
      for (int i = 0; i < kAll; ++i) codes[i] = std::min<uint8_t>(codes[i], kScaleLimit);
    }
  }

  static void quantize(const Chunk& chunk) {
    const bool weighted = chunk.matrix.importance != nullptr;
    alignas(64) float weights[kLanes * kSuper];
    if (weighted) weigh_chunk(chunk, kBits == 2 ? 1.0f : 2.0f, weights);
    float scales[kAll] = {}, minima[kAll] = {}, inverses[kAll], bases[kAll], sums[kAll] = {};
    for (int group = 0; group < groups_of(chunk, kCount); ++group) {
      Floats x[kPart], w[kPart];
      to_lanes<kPart>(x, chunk.x + group * kLanes * kPart);
      AffineFit fit;
      if (weighted) {
        to_lanes<kPart>(w, weights + group * kLanes * kPart);
        fit = fit_affine<kPart, false>(x, w, kLimit, -0.9f, 0.05f, 36);
      } else {
        fit = fit_plain(x);
      }
      store(scales + group * kLanes, fit.scale);
      store(minima + group * kLanes, -fit.minimum);
      store(inverses + group * kLanes, fit.inverse);
      store(bases + group * kLanes, fit.base);
      store(sums + group * kLanes, fit.weight_sum);
    }
    float d[kLanes], dmin[kLanes];
    uint8_t scale_codes[kAll], minimum_codes[kAll];
    if (weighted) {
      Floats part_weights[kCount];
      parts_to_lanes<kCount>(part_weights, sums);
      weighted_fractions(scales, part_weights, d, scale_codes);
      weighted_fractions(minima, part_weights, dmin, minimum_codes);
    } else {
      for (int i = 0; i < chunk.count; ++i) {
        fractions(scales + i * kCount, d + i, scale_codes + i * kCount);
        fractions(minima + i * kCount, dmin + i, minimum_codes + i * kCount);
      }
    }
    for (int i = 0; i < chunk.count; ++i) {
      const float stored_d = from_half(to_half(d[i])), stored_dmin = from_half(to_half(dmin[i]));
      uint8_t* out = chunk.out + i * kBytes;
      store_half(out + kHalves[0], d[i]);
      store_half(out + kHalves[1], dmin[i]);
      if constexpr (kBits == 2) {
        store_parts_q2(out, scale_codes + i * kCount, minimum_codes + i * kCount);
      } else {
        store_parts_q4(out, scale_codes + i * kCount, minimum_codes + i * kCount);
      }
      alignas(64) uint8_t codes[kSuper];
      for (int j = 0; j < kCount; ++j) {
        const int part = i * kCount + j;
        const float grid = stored_d * static_cast<float>(scale_codes[part]);
        const float offset = stored_dmin * static_cast<float>(minimum_codes[part]);
        round_affine<kPart>(chunk.x + part * kPart, grid, offset, inverses[part], bases[part],
                            kLimit, codes + j * kPart);
      }
      if constexpr (kBits == 2) {
        pack_crumbs(out + 16, codes);
      } else {
        pack_q4_or_q5<kBits>(out, codes);
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
    const float peak = peak_of<16>(scales);
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
    float scales[kLanes * 16] = {}, sums[kLanes * 16] = {};
    // Codes of the first fit, for sub-blocks whose grid becomes 0: [group][element][lane].
    Floats first_codes[16][16];
    for (int group = 0; group < groups_of(chunk, 16); ++group) {
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
        store(sums + group * kLanes, sum<16>(w));
      } else {
        scale = fit_scale_by_descent<16>(x, 4.0f, first_codes[group]);
      }
      store(scales + group * kLanes, scale);
    }
    float d[kLanes];
    uint8_t scale_codes[kLanes * 16];
    if (weighted) {
      Floats lanes[16], part_weights[16];
      parts_to_lanes<16>(lanes, scales);
      parts_to_lanes<16>(part_weights, sums);
      const ScaleFit fit = fit_scale<16>(lanes, part_weights, 32.0f);
      Floats nothing = splat(0.0f);  // NaN where a scale is not finite: let it show
      for (int j = 0; j < 16; ++j) nothing += lanes[j] * 0.0f;
      store(d, select(nothing == splat(0.0f), fit.scale, nothing));
      for (int j = 0; j < 16; ++j) {
        const Floats code = round_within(fit.inverse * lanes[j], -32.0f, 31.0f) + 32.0f;
        lanes[j] = select(fit.empty, splat(0.0f), code);
      }
      lanes_to_bytes<16>(scale_codes, lanes);
    } else {
      for (int i = 0; i < chunk.count; ++i) {
        quantize_scales(scales + i * 16, d + i, scale_codes + i * 16);
      }
    }
    for (int i = 0; i < chunk.count; ++i) {
      const float stored_d = from_half(to_half(d[i]));
      alignas(64) uint8_t codes[kSuper];
      for (int j = 0; j < 16; ++j) {
        const int part = i * 16 + j;
        const float grid = stored_d * (static_cast<float>(scale_codes[part]) - 32.0f);
        if (grid != 0.0f) {
          round_symmetric(chunk.x + part * 16, grid, 4.0f, codes + j * 16);
          continue;
        }
        for (int k = 0; k < 16; ++k) {
          const float code = first_codes[part / kLanes][k][part % kLanes];
          codes[j * 16 + k] = static_cast<uint8_t>(code);
        }
      }
      pack(chunk.out + i * kBytes, d[i], scale_codes + i * 16, codes);
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
    const float peak = peak_of<16>(scales);
    if (std::fabs(peak) < kEmptyBelow) {  // the codes of small weights are cleared too
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
    float scales[kLanes * 16], inverses[kLanes * 16];
    for (int group = 0; group < groups_of(chunk, 16); ++group) {
      Floats x[16], w[16];
      to_lanes<16>(x, chunk.x + group * kLanes * 16);
      if (weighted) {
        to_lanes<16>(w, weights + group * kLanes * 16);
      } else {
        for (int k = 0; k < 16; ++k) w[k] = x[k] * x[k];
      }
      const ScaleFit fit = fit_scale<16>(x, w, 32.0f);
      store(scales + group * kLanes, fit.scale);
      store(inverses + group * kLanes, select(fit.empty, splat(0.0f), fit.inverse));
    }
    for (int i = 0; i < chunk.count; ++i) {
      quantize_one(chunk.x + i * kSuper, scales + i * 16, inverses + i * 16, chunk.out + i * kBytes);
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
