// The words of isa.h with AVX2, FMA and F16C. Included by isa.h only.
#pragma once

constexpr const char* kIsaName = "avx2";
constexpr int kLanes = 8;
using Floats = __m256;
using Ints = __m256i;

QTOOL_INLINE Floats zeros() { return _mm256_setzero_ps(); }
QTOOL_INLINE Floats set1(float x) { return _mm256_set1_ps(x); }
QTOOL_INLINE Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
QTOOL_INLINE Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
QTOOL_INLINE Floats div(Floats a, Floats b) { return _mm256_div_ps(a, b); }
QTOOL_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
QTOOL_INLINE Floats minimum(Floats a, Floats b) { return _mm256_min_ps(a, b); }
QTOOL_INLINE Floats maximum(Floats a, Floats b) { return _mm256_max_ps(a, b); }
QTOOL_INLINE Floats absolute(Floats a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
QTOOL_INLINE float first_lane(Floats a) { return _mm256_cvtss_f32(a); }
QTOOL_INLINE float reduce_add(Floats a) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
QTOOL_INLINE float reduce_max(Floats a) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}
QTOOL_INLINE bool any_nan(Floats a) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)) != 0;
}
QTOOL_INLINE Floats zero_where_less(Floats value, Floats a, Floats b) {
  return _mm256_and_ps(_mm256_cmp_ps(a, b, _CMP_NLT_UQ), value);
}
QTOOL_INLINE Floats where_negative(Floats sign, Floats then, Floats otherwise) {
  return _mm256_blendv_ps(otherwise, then, sign);
}

QTOOL_INLINE Ints zero_ints() { return _mm256_setzero_si256(); }
QTOOL_INLINE Ints set1_int(int32_t x) { return _mm256_set1_epi32(x); }
QTOOL_INLINE Ints add_ints(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
QTOOL_INLINE int32_t reduce_add_ints(Ints a) {
  __m128i half = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  half = _mm_add_epi32(half, _mm_unpackhi_epi64(half, half));
  return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 1)));
}
QTOOL_INLINE Floats to_floats(Ints a) { return _mm256_cvtepi32_ps(a); }
QTOOL_INLINE Ints round_to_ints(Floats a) { return _mm256_cvtps_epi32(a); }
QTOOL_INLINE Floats two_to_the(Ints n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, set1_int(127)), 23));
}

QTOOL_INLINE Ints first(int64_t n) {
  const Ints lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(set1_int(static_cast<int32_t>(n)), lane);
}

QTOOL_INLINE Floats load(const float* from) { return _mm256_loadu_ps(from); }
QTOOL_INLINE Floats load_part(const float* from, int64_t n) {
  return _mm256_maskload_ps(from, first(n));
}
QTOOL_INLINE void store(float* to, Floats a) { _mm256_storeu_ps(to, a); }
QTOOL_INLINE void store_part(float* to, Floats a, int64_t n) {
  _mm256_maskstore_ps(to, first(n), a);
}

QTOOL_INLINE Floats widen(__m128i bits) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
QTOOL_INLINE __m128i narrow(Floats a) {
  const Ints bits = _mm256_castps_si256(a);
  const Ints odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), set1_int(1));
  const Ints rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, set1_int(0x7fff)));
  const Ints nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  const Ints quiet = _mm256_or_si256(bits, set1_int(0x400000));
  const Ints kept = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(kept), _mm256_extracti128_si256(kept, 1));
}
QTOOL_INLINE Floats load(const Bfloat16* from) {
  return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
QTOOL_INLINE Floats load_part(const Bfloat16* from, int64_t n) {
  Bfloat16 part[kLanes] = {};
  std::memcpy(part, from, static_cast<size_t>(n) * sizeof(Bfloat16));
  return load(part);
}
QTOOL_INLINE void store(Bfloat16* to, Floats a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), narrow(a));
}
QTOOL_INLINE void store_part(Bfloat16* to, Floats a, int64_t n) {
  Bfloat16 part[kLanes];
  store(part, a);
  std::memcpy(to, part, static_cast<size_t>(n) * sizeof(Bfloat16));
}
// Pairs of bfloat16 as they lie, up to `count` elements, in lanes of 32 bits; and their parts.
QTOOL_INLINE Floats load_pairs(const Bfloat16* from, int64_t count) {
  if (count >= 16) return _mm256_loadu_ps(reinterpret_cast<const float*>(from));
  Bfloat16 part[16] = {};
  std::memcpy(part, from, static_cast<size_t>(count) * sizeof(Bfloat16));
  return _mm256_loadu_ps(reinterpret_cast<const float*>(part));
}
QTOOL_INLINE Floats low_halves(Floats pairs) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(pairs), 16));
}
QTOOL_INLINE Floats high_halves(Floats pairs) {
  return _mm256_castsi256_ps(_mm256_andnot_si256(set1_int(0xffff), _mm256_castps_si256(pairs)));
}
QTOOL_INLINE Floats load_float16(const uint16_t* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
QTOOL_INLINE Ints load_bits(const void* from) {
  return _mm256_loadu_si256(static_cast<const Ints*>(from));
}
QTOOL_INLINE void store_bits(void* to, Ints a) { _mm256_storeu_si256(static_cast<Ints*>(to), a); }
QTOOL_INLINE Ints and_bits(Ints a, Ints b) { return _mm256_and_si256(a, b); }
QTOOL_INLINE Ints or_bits(Ints a, Ints b) { return _mm256_or_si256(a, b); }
QTOOL_INLINE Ints set1_byte(int x) { return _mm256_set1_epi8(static_cast<char>(x)); }
// Each 32-bit lane shifted; bits cross bytes, so masks follow.
template <int kBits>
QTOOL_INLINE Ints shift_left(Ints a) { return _mm256_slli_epi32(a, kBits); }
template <int kBits>
QTOOL_INLINE Ints shift_right(Ints a) { return _mm256_srli_epi32(a, kBits); }
template <int kBits>
QTOOL_INLINE Ints shift_right_signed(Ints a) { return _mm256_srai_epi32(a, kBits); }
// table[byte] for bytes 0 .. 15.
QTOOL_INLINE Ints look_up(const uint8_t* table, Ints places) {
  const __m128i entries = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
  return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(entries), places);
}
// kLanes unsigned numbers of 16 bits.
QTOOL_INLINE Ints load_words(const uint16_t* from) {
  return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
// kLanes or fewer signed bytes, as numbers.
QTOOL_INLINE Floats load(const int8_t* from) {
  return _mm256_cvtepi32_ps(
      _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
}
QTOOL_INLINE Floats load_part(const int8_t* from, int64_t n) {
  int8_t part[kLanes] = {};
  std::memcpy(part, from, static_cast<size_t>(n));
  return load(part);
}
// kLanes unsigned bytes, as whole numbers.
QTOOL_INLINE Ints load_bytes(const uint8_t* from) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
}
// Whole numbers in -128 .. 127, as kLanes signed bytes.
QTOOL_INLINE void store_bytes(int8_t* to, Ints a) {
  const __m128i words =
      _mm_packs_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packs_epi16(words, words));
}

// Per lane a * b; here a may be negative (see kCodeBias8), so the full product.
QTOOL_INLINE Ints multiply_small(Ints a, Ints b) { return _mm256_mullo_epi32(a, b); }

// AVX2 multiplies unsigned by signed bytes into sums of two that saturate at 16 bits. 255 * 127 * 2
// would; |code - 128| * 127 * 2 = 32512 does not. So codes of 8 bits are taken less 128, their sign
// moved to the activation.
constexpr int kCodeBias8 = 128;
// As in isa_avx512.h: not measured, so nothing.
constexpr int64_t kAheadBytes = 0;
// 16 registers: 4 rows x 2 vectors, or 1 row x 4.
constexpr int kMaxRows = 4;
QTOOL_INLINE constexpr int vectors_at_once(int rows) { return rows == 1 ? 4 : 2; }

// See isa_avx512.h.
template <int kBits, int kRows>
QTOOL_INLINE void ask_ahead(const uint8_t* codes) {
  if constexpr (kBits == 4 && kRows == 1) _mm_prefetch(codes + 8192, _MM_HINT_T0);
}

// See isa_avx512.h. 16-bit sums of 32 inputs stay below 16 * 15 * 127 = 30480, so they are widened
// once for eight groups.
template <int kGroups, int kRows, int kVectors>
QTOOL_INLINE void add_groups4(Ints (&sum)[kRows][kVectors], const uint8_t* codes, const int8_t* x) {
  static_assert(kGroups <= 8, "sums of 16 bits");
  const Ints low_bits = _mm256_set1_epi8(15);
  Ints narrow_sum[kRows][kVectors];
  for (auto& row : narrow_sum)
    for (Ints& part : row) part = zero_ints();
#pragma GCC unroll 4
  for (int line = 0; line < kGroups / 2; ++line) {
    Ints low[kVectors], high[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const Ints bytes =
          _mm256_loadu_si256(reinterpret_cast<const Ints*>(codes + line * 128 + v * 32));
      if (v % 2 == 0) ask_ahead<4, kRows>(codes + line * 128 + v * 32);
      low[v] = _mm256_and_si256(bytes, low_bits);
      high[v] = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), low_bits);
    }
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) {
      const Ints first_four = set1_int(load_word(x + (2 * line * kRows + row) * 4));
      const Ints next_four = set1_int(load_word(x + ((2 * line + 1) * kRows + row) * 4));
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const Ints both = _mm256_add_epi16(_mm256_maddubs_epi16(low[v], first_four),
                                           _mm256_maddubs_epi16(high[v], next_four));
        narrow_sum[row][v] = _mm256_add_epi16(narrow_sum[row][v], both);
      }
    }
  }
  const Ints ones = _mm256_set1_epi16(1);
  for (int row = 0; row < kRows; ++row)
    for (int v = 0; v < kVectors; ++v)
      sum[row][v] = add_ints(sum[row][v], _mm256_madd_epi16(narrow_sum[row][v], ones));
}

template <int kGroups, int kRows, int kVectors>
QTOOL_INLINE void add_groups8(Ints (&sum)[kRows][kVectors], const uint8_t* codes, const int8_t* x) {
  const Ints bias = _mm256_set1_epi8(-128), ones = _mm256_set1_epi16(1);
#pragma GCC unroll 8
  for (int line = 0; line < kGroups; ++line) {
    Ints less[kVectors], size[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const Ints bytes =
          _mm256_loadu_si256(reinterpret_cast<const Ints*>(codes + line * 128 + v * 32));
      less[v] = _mm256_xor_si256(bytes, bias);
      size[v] = _mm256_abs_epi8(less[v]);
    }
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) {
      const Ints four = set1_int(load_word(x + (line * kRows + row) * 4));
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const Ints pairs = _mm256_maddubs_epi16(size[v], _mm256_sign_epi8(four, less[v]));
        sum[row][v] = add_ints(sum[row][v], _mm256_madd_epi16(pairs, ones));
      }
    }
  }
}

QTOOL_INLINE void transpose(Floats (&r)[kLanes]) {
  Floats t[kLanes];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    t[j] = _mm256_permute2f128_ps(r[j], r[4 + j], 0x20);
    t[4 + j] = _mm256_permute2f128_ps(r[j], r[4 + j], 0x31);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) r[i] = t[i];
}
