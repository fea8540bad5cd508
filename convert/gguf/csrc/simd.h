// Vectors of floats as wide as the instruction set, and IEEE half precision.
//
// Arithmetic is written with operators (GCC and Clang vectors); functions stand here where the
// compilers have no operator or miss the instruction. Every operation rounds on its own: the
// library is compiled without contraction into fused multiply-add.
//
// minimum(a, b) and maximum(a, b) are a < b ? a : b and a > b ? a : b, as the instructions: of two
// zeros, or beside a NaN, the second counts.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__SSE2__)
#include <immintrin.h>
#endif

#define QTOOL_INLINE inline __attribute__((always_inline))

namespace qtool {

#if defined(__AVX512F__)
constexpr const char* kIsaName = "avx512";
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr const char* kIsaName = "avx2";
constexpr int kLanes = 8;
#else
constexpr const char* kIsaName = "portable";
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));  // masks too: -1 or 0 a lane
typedef uint8_t Bytes __attribute__((vector_size(kLanes)));

QTOOL_INLINE Floats load(const float* from) {
  Floats v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
QTOOL_INLINE void store(float* to, Floats v) { std::memcpy(to, &v, sizeof v); }
QTOOL_INLINE Ints bits_of(Floats v) {
  Ints bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits;
}
QTOOL_INLINE Floats from_bits(Ints bits) {
  Floats v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}
QTOOL_INLINE Floats select(Ints mask, Floats then, Floats otherwise) {
  return mask ? then : otherwise;
}
QTOOL_INLINE Floats absolute(Floats v) { return from_bits(bits_of(v) & 0x7fffffff); }
// Whole numbers of -128 .. 255, as their low eight bits.
QTOOL_INLINE void store_bytes(uint8_t* to, Ints v) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  // Compilers convert eight integers to bytes one by one.
  const __m256i low = _mm256_and_si256((__m256i)v, _mm256_set1_epi32(255));
  const __m128i words =
      _mm_packs_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(words, words));
#elif defined(__SSE2__) && !defined(__AVX2__)
  const __m128i words = _mm_packs_epi32(_mm_and_si128((__m128i)v, _mm_set1_epi32(255)), __m128i{});
  const int bytes = _mm_cvtsi128_si32(_mm_packus_epi16(words, words));
  std::memcpy(to, &bytes, sizeof bytes);
#else
  const Bytes bytes = __builtin_convertvector(v, Bytes);
  std::memcpy(to, &bytes, sizeof bytes);
#endif
}
QTOOL_INLINE void store_bytes(uint8_t* to, Floats v) {
  store_bytes(to, __builtin_convertvector(v, Ints));
}

#if defined(__AVX512F__)

QTOOL_INLINE Floats splat(float x) { return _mm512_set1_ps(x); }
QTOOL_INLINE Floats minimum(Floats a, Floats b) { return _mm512_min_ps(a, b); }
QTOOL_INLINE Floats maximum(Floats a, Floats b) { return _mm512_max_ps(a, b); }
QTOOL_INLINE Floats round_even(Floats v) { return _mm512_roundscale_ps(v, 8); }
QTOOL_INLINE Floats square_root(Floats v) { return _mm512_sqrt_ps(v); }
QTOOL_INLINE bool any(Ints mask) { return _mm512_movepi32_mask((__m512i)mask) != 0; }
QTOOL_INLINE float largest(Floats v) { return _mm512_reduce_max_ps(v); }
QTOOL_INLINE float least(Floats v) { return _mm512_reduce_min_ps(v); }

#elif defined(__AVX2__)

QTOOL_INLINE Floats splat(float x) { return _mm256_set1_ps(x); }
QTOOL_INLINE Floats minimum(Floats a, Floats b) { return _mm256_min_ps(a, b); }
QTOOL_INLINE Floats maximum(Floats a, Floats b) { return _mm256_max_ps(a, b); }
QTOOL_INLINE Floats round_even(Floats v) {
  return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
QTOOL_INLINE Floats square_root(Floats v) { return _mm256_sqrt_ps(v); }
QTOOL_INLINE bool any(Ints mask) { return _mm256_movemask_ps(from_bits(mask)) != 0; }
QTOOL_INLINE float largest(Floats v) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
QTOOL_INLINE float least(Floats v) {
  const __m128 four = _mm_min_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_min_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_min_ss(two, _mm_movehdup_ps(two)));
}

#else

QTOOL_INLINE Floats splat(float x) { return x - Floats{}; }  // -0 - 0 is -0
QTOOL_INLINE Floats minimum(Floats a, Floats b) { return select(a < b, a, b); }
QTOOL_INLINE Floats maximum(Floats a, Floats b) { return select(a > b, a, b); }
// From 2^22 on every float of interest is whole, and NaN stays: only below does adding 1.5 * 2^23,
// where floats are whole numbers, round to the nearest of them.
QTOOL_INLINE Floats round_even(Floats v) {
  const Floats rounded = (v + 12582912.0f) - 12582912.0f;
  return select(absolute(v) < 4194304.0f, rounded, v);
}
QTOOL_INLINE Floats square_root(Floats v) {
  for (int i = 0; i < kLanes; ++i) v[i] = std::sqrt(v[i]);
  return v;
}
QTOOL_INLINE bool any(Ints mask) {
  int32_t found = 0;
  for (int i = 0; i < kLanes; ++i) found |= mask[i];
  return found != 0;
}
QTOOL_INLINE float largest(Floats v) {
  float result = v[0];
  for (int i = 1; i < kLanes; ++i) result = v[i] > result ? v[i] : result;
  return result;
}
QTOOL_INLINE float least(Floats v) {
  float result = v[0];
  for (int i = 1; i < kLanes; ++i) result = v[i] < result ? v[i] : result;
  return result;
}

#endif

QTOOL_INLINE float round_even(float x) {
  const float rounded = (x + 12582912.0f) - 12582912.0f;
  return std::fabs(x) < 4194304.0f ? rounded : x;
}
QTOOL_INLINE float square_root(float x) { return std::sqrt(x); }

// Rounded to the nearest whole number, ties to even, within low .. high; NaN is low.
QTOOL_INLINE Floats round_within(Floats v, float low, float high) {
  return minimum(maximum(round_even(v), splat(low)), splat(high));
}
QTOOL_INLINE float round_within(float x, float low, float high) {
  const float rounded = round_even(x);
  const float raised = rounded > low ? rounded : low;
  return raised < high ? raised : high;
}

// A square of kLanes by kLanes floats: to[k][lane] = from[lane * stride + k].
QTOOL_INLINE void transpose(Floats* to, const float* from, int stride) {
#if defined(__AVX512F__)
  __m512 a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = load(from + i * stride);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      const __m512d low = _mm512_castps_pd(b[i + j]), high = _mm512_castps_pd(b[i + j + 2]);
      a[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      a[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  }
  for (int j = 0; j < 4; ++j) {  // quarters of rows j, j + 4, j + 8, j + 12 change places
    const __m512 low = _mm512_shuffle_f32x4(a[j], a[j + 4], 0x88);
    const __m512 high = _mm512_shuffle_f32x4(a[j + 8], a[j + 12], 0x88);
    const __m512 low_odd = _mm512_shuffle_f32x4(a[j], a[j + 4], 0xdd);
    const __m512 high_odd = _mm512_shuffle_f32x4(a[j + 8], a[j + 12], 0xdd);
    to[j] = _mm512_shuffle_f32x4(low, high, 0x88);
    to[j + 4] = _mm512_shuffle_f32x4(low_odd, high_odd, 0x88);
    to[j + 8] = _mm512_shuffle_f32x4(low, high, 0xdd);
    to[j + 12] = _mm512_shuffle_f32x4(low_odd, high_odd, 0xdd);
  }
#elif defined(__AVX2__)
  __m256 a[8], b[8];
  for (int i = 0; i < 8; ++i) a[i] = load(from + i * stride);
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int j = 0; j < 2; ++j) {
      const __m256d low = _mm256_castps_pd(b[i + j]), high = _mm256_castps_pd(b[i + j + 2]);
      a[i + 2 * j] = _mm256_castpd_ps(_mm256_unpacklo_pd(low, high));
      a[i + 2 * j + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(low, high));
    }
  }
  for (int j = 0; j < 4; ++j) {
    to[j] = _mm256_permute2f128_ps(a[j], a[j + 4], 0x20);
    to[j + 4] = _mm256_permute2f128_ps(a[j], a[j + 4], 0x31);
  }
#else
  for (int k = 0; k < kLanes; ++k) {
    for (int lane = 0; lane < kLanes; ++lane) to[k][lane] = from[lane * stride + k];
  }
#endif
}

// kLanes sub-blocks of kWidth floats, one after another, side by side: to[k][lane].
template <int kWidth>
QTOOL_INLINE void to_lanes(Floats* to, const float* from) {
  for (int k = 0; k < kWidth; k += kLanes) transpose(to + k, from + k, kWidth);
}

// Half precision, rounded to the nearest, ties to even; beyond its range infinite.
QTOOL_INLINE uint16_t to_half(float x) {
#if defined(__F16C__)
  return static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT));
#else
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t sign = (bits >> 16) & 0x8000, size = bits & 0x7fffffff;
  uint32_t half;
  if (size >= 0x47800000) {  // 65536 and more, infinite, NaN
    half = size > 0x7f800000 ? 0x7e00 : 0x7c00;
  } else if (size < 0x38800000) {  // below 2^-14: added to 0.5, whose last bit is 2^-24
    float shifted;
    std::memcpy(&shifted, &size, sizeof shifted);
    shifted += 0.5f;
    std::memcpy(&half, &shifted, sizeof half);
    half -= 0x3f000000;
  } else {
    half = (size + 0xfff + ((size >> 13) & 1) - 0x38000000) >> 13;
  }
  return static_cast<uint16_t>(sign | half);
#endif
}
QTOOL_INLINE float from_half(uint16_t half) {
#if defined(__F16C__)
  return _cvtsh_ss(half);
#else
  const uint32_t sign = (half & 0x8000u) << 16, exponent = (half >> 10) & 31, digits = half & 0x3ff;
  uint32_t bits;
  if (exponent == 0) {
    const float size = static_cast<float>(digits) * 0x1p-24f;
    std::memcpy(&bits, &size, sizeof bits);
  } else {
    bits = (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | digits << 13;
  }
  bits |= sign;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
#endif
}
QTOOL_INLINE void store_half(uint8_t* to, float x) {
  const uint16_t half = to_half(x);
  std::memcpy(to, &half, sizeof half);
}
QTOOL_INLINE float load_half(const uint8_t* from) {
  uint16_t half;
  std::memcpy(&half, from, sizeof half);
  return from_half(half);
}

}  // namespace qtool
