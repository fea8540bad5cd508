// Blocks back to weights, for the types that the quantizers write; plain loops that compilers turn
// into vectors. The products are grouped as in blocks/*.py, so the weights are the same.

#include "interface.h"
#include "simd.h"

namespace qtool {
namespace {

constexpr int8_t kValues[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                1,    13,   25,  38,  53,  69,  89,  113};

template <int kBits, bool kMinimum>
struct Legacy {
  static constexpr int kHead = kMinimum ? 4 : 2;
  static constexpr int kWidth = 32, kBytes = kHead + (kBits == 5 ? 4 : 0) + 16;

  static void read(const uint8_t* in, float* out) {
    const float d = load_half(in), offset = kMinimum ? load_half(in + 2) : 0.0f;
    const uint8_t* low = in + kBytes - 16;
    uint8_t codes[32];
    for (int i = 0; i < 16; ++i) {
      codes[i] = low[i] & 15;
      codes[i + 16] = low[i] >> 4;
    }
    if (kBits == 5) {
      uint32_t bits;
      std::memcpy(&bits, in + kHead, sizeof bits);
      for (int i = 0; i < 32; ++i) codes[i] |= static_cast<uint8_t>((bits >> i & 1) << 4);
    }
    for (int i = 0; i < 32; ++i) {
      const int code = kMinimum ? codes[i] : codes[i] - (1 << (kBits - 1));
      const float scaled = d * static_cast<float>(code);
      out[i] = kMinimum ? scaled + offset : scaled;
    }
  }
};

struct Q8_0 {
  static constexpr int kWidth = 32, kBytes = 34;

  static void read(const uint8_t* in, float* out) {
    const float d = load_half(in);
    int8_t codes[32];
    std::memcpy(codes, in + 2, 32);
    for (int i = 0; i < 32; ++i) out[i] = d * static_cast<float>(codes[i]);
  }
};

// Codes of a super-block from their low and high bits; layouts stand in blocks/kquants.py.
void unpack_crumbs(const uint8_t* in, uint8_t* codes) {
  for (int n = 0; n < 2; ++n) {
    for (int j = 0; j < 4; ++j) {
      for (int l = 0; l < 32; ++l) codes[128 * n + 32 * j + l] = in[32 * n + l] >> 2 * j & 3;
    }
  }
}
void unpack_nibble_pairs(const uint8_t* in, uint8_t* codes) {
  for (int j = 0; j < 4; ++j) {
    for (int l = 0; l < 32; ++l) {
      codes[64 * j + l] = in[32 * j + l] & 15;
      codes[64 * j + 32 + l] = in[32 * j + l] >> 4;
    }
  }
}
void add_bits(const uint8_t* in, int place, uint8_t* codes) {
  for (int j = 0; j < 8; ++j) {
    for (int l = 0; l < 32; ++l) {
      codes[32 * j + l] = static_cast<uint8_t>(codes[32 * j + l] | (in[l] >> j & 1) << place);
    }
  }
}

template <int kBits>
struct Affine {
  static constexpr int kWidth = 256, kBytes = kBits == 2 ? 84 : kBits == 4 ? 144 : 176;
  static constexpr int kPart = kBits == 2 ? 16 : 32, kCount = kWidth / kPart;

  static void read(const uint8_t* in, float* out) {
    const uint8_t* halves = kBits == 2 ? in + 80 : in;
    const float d = load_half(halves), dmin = load_half(halves + 2);
    uint8_t codes[256], scales[kCount], minima[kCount];
    if (kBits == 2) {
      unpack_crumbs(in + 16, codes);
      for (int j = 0; j < kCount; ++j) {
        scales[j] = in[j] & 15;
        minima[j] = in[j] >> 4;
      }
    } else {
      unpack_nibble_pairs(in + (kBits == 4 ? 16 : 48), codes);
      if (kBits == 5) add_bits(in + 16, 4, codes);
      for (int j = 0; j < kCount / 2; ++j) {
        const int third = in[12 + j % 4];
        scales[j] = in[4 + j] & 63;
        minima[j] = in[8 + j] & 63;
        scales[(j + 4) % kCount] = static_cast<uint8_t>((third & 15) | (in[4 + j] >> 6) << 4);
        minima[(j + 4) % kCount] = static_cast<uint8_t>(third >> 4 | (in[8 + j] >> 6) << 4);
      }
    }
    for (int j = 0; j < kCount; ++j) {
      const float scale = d * static_cast<float>(scales[j]);
      const float minimum = dmin * static_cast<float>(minima[j]);
      for (int i = kPart * j; i < kPart * (j + 1); ++i) {
        out[i] = scale * static_cast<float>(codes[i]) - minimum;
      }
    }
  }
};

struct Q3_K {
  static constexpr int kWidth = 256, kBytes = 110;

  static void read(const uint8_t* in, float* out) {
    const float d = load_half(in + 108);
    uint8_t codes[256];
    unpack_crumbs(in + 32, codes);
    add_bits(in, 2, codes);
    for (int j = 0; j < 16; ++j) {
      const int low = j < 8 ? in[96 + j] & 15 : in[88 + j] >> 4;
      const int high = in[104 + j % 4] >> 2 * (j / 4) & 3;
      const float scale = d * static_cast<float>((low | high << 4) - 32);
      for (int i = 16 * j; i < 16 * (j + 1); ++i) {
        out[i] = scale * static_cast<float>(codes[i] - 4);
      }
    }
  }
};

struct Q6_K {
  static constexpr int kWidth = 256, kBytes = 210;

  static void read(const uint8_t* in, float* out) {
    const float d = load_half(in + 208);
    uint8_t codes[256];
    unpack_crumbs(in + 128, codes);
    for (int n = 0; n < 2; ++n) {
      for (int l = 0; l < 64; ++l) {
        uint8_t* first = codes + 128 * n + l;
        first[0] = static_cast<uint8_t>(first[0] << 4 | (in[64 * n + l] & 15));
        first[64] = static_cast<uint8_t>(first[64] << 4 | in[64 * n + l] >> 4);
      }
    }
    for (int j = 0; j < 16; ++j) {
      const float scale = d * static_cast<float>(static_cast<int8_t>(in[192 + j]));
      for (int i = 16 * j; i < 16 * (j + 1); ++i) {
        out[i] = scale * static_cast<float>(codes[i] - 32);
      }
    }
  }
};

void read_values(const uint8_t* in, float scale, float* out) {
  for (int i = 0; i < 16; ++i) {
    out[i] = scale * static_cast<float>(kValues[in[i] & 15]);
    out[i + 16] = scale * static_cast<float>(kValues[in[i] >> 4]);
  }
}

struct IQ4_NL {
  static constexpr int kWidth = 32, kBytes = 18;

  static void read(const uint8_t* in, float* out) { read_values(in + 2, load_half(in), out); }
};

struct IQ4_XS {
  static constexpr int kWidth = 256, kBytes = 136;

  static void read(const uint8_t* in, float* out) {
    const float d = load_half(in);
    const int high = in[2] | in[3] << 8;
    for (int j = 0; j < 8; ++j) {
      const int low = in[4 + j / 2] >> 4 * (j % 2) & 15;
      const float scale = d * static_cast<float>((low | (high >> 2 * j & 3) << 4) - 32);
      read_values(in + 8 + 16 * j, scale, out + 32 * j);
    }
  }
};

// Trits of `stride` bytes: three times the fraction b / 256 has the first trit as its whole part.
template <int kTrits>
void unpack_trits(const uint8_t* in, int stride, uint8_t* trits) {
  int power = 1;
  for (int n = 0; n < kTrits; ++n, power *= 3) {
    for (int i = 0; i < stride; ++i) {
      trits[n * stride + i] = static_cast<uint8_t>(((in[i] * power) & 255) * 3 >> 8);
    }
  }
}

template <bool kDense>
struct Ternary {
  static constexpr int kWidth = 256, kBytes = kDense ? 54 : 66;

  static void read(const uint8_t* in, float* out) {
    const float d = load_half(in + kBytes - 2);
    uint8_t trits[256];
    if (kDense) {
      unpack_trits<5>(in, 32, trits);
      unpack_trits<5>(in + 32, 16, trits + 160);
      unpack_trits<4>(in + 48, 4, trits + 240);
    } else {
      unpack_crumbs(in, trits);
    }
    for (int i = 0; i < 256; ++i) out[i] = d * static_cast<float>(trits[i] - 1);
  }
};

struct MXFP4 {
  static constexpr int kWidth = 32, kBytes = 17;
  static constexpr int8_t kDoubled[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

  static void read(const uint8_t* in, float* out) {
    const uint32_t bits = in[0] < 2 ? 0x200000u << in[0] : (in[0] - 1u) << 23;
    float scale;  // 2^(e - 128); the two smallest are subnormal
    std::memcpy(&scale, &bits, sizeof scale);
    for (int i = 0; i < 16; ++i) {
      out[i] = scale * static_cast<float>(kDoubled[in[1 + i] & 15]);
      out[i + 16] = scale * static_cast<float>(kDoubled[in[1 + i] >> 4]);
    }
  }
};

template <class Reader>
int32_t read_all(const uint8_t* blocks, float* weights, int64_t count, int32_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < count; ++i) {
    Reader::read(blocks + i * Reader::kBytes, weights + i * Reader::kWidth);
  }
  return 0;
}

}  // namespace
}  // namespace qtool

using namespace qtool;

int32_t qtool_dequantize_blocks(int32_t type, const uint8_t* blocks, float* weights, int64_t count,
                                int32_t threads) {
  switch (type) {
    case 2: return read_all<Legacy<4, false>>(blocks, weights, count, threads);
    case 3: return read_all<Legacy<4, true>>(blocks, weights, count, threads);
    case 6: return read_all<Legacy<5, false>>(blocks, weights, count, threads);
    case 7: return read_all<Legacy<5, true>>(blocks, weights, count, threads);
    case 8: return read_all<Q8_0>(blocks, weights, count, threads);
    case 10: return read_all<Affine<2>>(blocks, weights, count, threads);
    case 11: return read_all<Q3_K>(blocks, weights, count, threads);
    case 12: return read_all<Affine<4>>(blocks, weights, count, threads);
    case 13: return read_all<Affine<5>>(blocks, weights, count, threads);
    case 14: return read_all<Q6_K>(blocks, weights, count, threads);
    case 20: return read_all<IQ4_NL>(blocks, weights, count, threads);
    case 23: return read_all<IQ4_XS>(blocks, weights, count, threads);
    case 34: return read_all<Ternary<true>>(blocks, weights, count, threads);
    case 35: return read_all<Ternary<false>>(blocks, weights, count, threads);
    case 39: return read_all<MXFP4>(blocks, weights, count, threads);
    default: return kUnknownType;
  }
}
