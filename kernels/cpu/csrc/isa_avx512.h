// The words of isa.h with AVX-512 (F, BW, DQ, VL) and VNNI. Included by isa.h only.
#pragma once

#if defined(QTOOL_INTEL_SERVER)
constexpr const char* kIsaName = "avx512-vnni-intel";
#else
constexpr const char* kIsaName = "avx512-vnni";
#endif
constexpr int kLanes = 16;
using Floats = __m512;
using Ints = __m512i;

QTOOL_INLINE Floats zeros() { return _mm512_setzero_ps(); }
QTOOL_INLINE Floats set1(float x) { return _mm512_set1_ps(x); }
QTOOL_INLINE Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
QTOOL_INLINE Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
QTOOL_INLINE Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
QTOOL_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
QTOOL_INLINE Floats minimum(Floats a, Floats b) { return _mm512_min_ps(a, b); }
QTOOL_INLINE Floats maximum(Floats a, Floats b) { return _mm512_max_ps(a, b); }
QTOOL_INLINE Floats absolute(Floats a) { return _mm512_abs_ps(a); }
QTOOL_INLINE float reduce_add(Floats a) { return _mm512_reduce_add_ps(a); }
QTOOL_INLINE float reduce_max(Floats a) { return _mm512_reduce_max_ps(a); }
QTOOL_INLINE float first_lane(Floats a) { return _mm512_cvtss_f32(a); }
QTOOL_INLINE bool any_nan(Floats a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q) != 0; }
QTOOL_INLINE Floats zero_where_less(Floats value, Floats a, Floats b) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ), value);
}
QTOOL_INLINE Floats where_negative(Floats sign, Floats then, Floats otherwise) {
  return _mm512_mask_mov_ps(otherwise, _mm512_movepi32_mask(_mm512_castps_si512(sign)), then);
}

QTOOL_INLINE Ints zero_ints() { return _mm512_setzero_si512(); }
QTOOL_INLINE Ints set1_int(int32_t x) { return _mm512_set1_epi32(x); }
QTOOL_INLINE Ints add_ints(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
QTOOL_INLINE int32_t reduce_add_ints(Ints a) { return _mm512_reduce_add_epi32(a); }
QTOOL_INLINE Floats to_floats(Ints a) { return _mm512_cvtepi32_ps(a); }
QTOOL_INLINE Ints round_to_ints(Floats a) { return _mm512_cvtps_epi32(a); }
QTOOL_INLINE Floats two_to_the(Ints n) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(n, set1_int(127)), 23));
}

QTOOL_INLINE __mmask16 first(int64_t n) { return static_cast<__mmask16>((1u << n) - 1u); }

QTOOL_INLINE Floats load(const float* from) { return _mm512_loadu_ps(from); }
QTOOL_INLINE Floats load_part(const float* from, int64_t n) {
  return _mm512_maskz_loadu_ps(first(n), from);
}
QTOOL_INLINE void store(float* to, Floats a) { _mm512_storeu_ps(to, a); }
QTOOL_INLINE void store_part(float* to, Floats a, int64_t n) {
  _mm512_mask_storeu_ps(to, first(n), a);
}

QTOOL_INLINE Floats widen(__m256i bits) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
QTOOL_INLINE __m256i narrow(Floats a) {
  const Ints bits = _mm512_castps_si512(a);
  const Ints odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), set1_int(1));
  const Ints rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, set1_int(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
  const Ints kept = _mm512_mask_or_epi32(rounded, nan, bits, set1_int(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
}
QTOOL_INLINE Floats load(const Bfloat16* from) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
QTOOL_INLINE Floats load_part(const Bfloat16* from, int64_t n) {
  return widen(_mm256_maskz_loadu_epi16(first(n), from));
}
QTOOL_INLINE void store(Bfloat16* to, Floats a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrow(a));
}
QTOOL_INLINE void store_part(Bfloat16* to, Floats a, int64_t n) {
  _mm256_mask_storeu_epi16(to, first(n), narrow(a));
}
// Pairs of bfloat16 as they lie, up to `count` elements, in lanes of 32 bits; and their parts.
QTOOL_INLINE Floats load_pairs(const Bfloat16* from, int64_t count) {
  const __mmask32 mask = count >= 32 ? ~0u : (1u << count) - 1u;
  return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(mask, from));
}
QTOOL_INLINE Floats low_halves(Floats pairs) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(pairs), 16));
}
QTOOL_INLINE Floats high_halves(Floats pairs) {
  return _mm512_castsi512_ps(_mm512_andnot_si512(set1_int(0xffff), _mm512_castps_si512(pairs)));
}
QTOOL_INLINE Floats load_float16(const uint16_t* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
QTOOL_INLINE Ints load_bits(const void* from) { return _mm512_loadu_si512(from); }
QTOOL_INLINE void store_bits(void* to, Ints a) { _mm512_storeu_si512(to, a); }
QTOOL_INLINE Ints and_bits(Ints a, Ints b) { return _mm512_and_si512(a, b); }
QTOOL_INLINE Ints or_bits(Ints a, Ints b) { return _mm512_or_si512(a, b); }
QTOOL_INLINE Ints set1_byte(int x) { return _mm512_set1_epi8(static_cast<char>(x)); }
// Each 32-bit lane shifted; bits cross bytes, so masks follow.
template <int kBits>
QTOOL_INLINE Ints shift_left(Ints a) { return _mm512_slli_epi32(a, kBits); }
template <int kBits>
QTOOL_INLINE Ints shift_right(Ints a) { return _mm512_srli_epi32(a, kBits); }
template <int kBits>
QTOOL_INLINE Ints shift_right_signed(Ints a) { return _mm512_srai_epi32(a, kBits); }
// table[byte] for bytes 0 .. 15.
QTOOL_INLINE Ints look_up(const uint8_t* table, Ints places) {
  const __m128i entries = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(entries), places);
}
// kLanes unsigned numbers of 16 bits.
QTOOL_INLINE Ints load_words(const uint16_t* from) {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
// kLanes or fewer signed bytes, as numbers.
QTOOL_INLINE Floats load_part(const int8_t* from, int64_t n) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first(n), from)));
}
QTOOL_INLINE Floats load(const int8_t* from) {
  return _mm512_cvtepi32_ps(
      _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
// kLanes unsigned bytes, as whole numbers.
QTOOL_INLINE Ints load_bytes(const uint8_t* from) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
// Whole numbers in -128 .. 127, as kLanes signed bytes.
QTOOL_INLINE void store_bytes(int8_t* to, Ints a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(a));
}

// Per lane a * b, both within 16 bits, a not negative. One multiply-add of pairs: a's high halves
// are zero, so b's high halves (its sign) do not count.
QTOOL_INLINE Ints multiply_small(Ints a, Ints b) { return _mm512_madd_epi16(a, b); }

// VNNI adds four products of an unsigned and a signed byte to a lane, without saturation: codes of
// 8 bits are used as they are.
constexpr int kCodeBias8 = 0;
// Accumulators: 8 rows x 2 vectors leave 16 registers for the rest.
constexpr int kMaxRows = 8;
QTOOL_INLINE constexpr int vectors_at_once(int) { return 2; }

// What a thread asks for of one linear while there is no product: a quarter of such a CPU's
// second-level cache. Twice as much is no faster; other CPUs have not been measured.
#if defined(QTOOL_INTEL_SERVER)
constexpr int64_t kAheadBytes = 512 << 10;
#else
constexpr int64_t kAheadBytes = 0;
#endif

// With few tokens a linear waits for its weights, and unpacking them leaves the hardware's own
// prefetch behind. Asking for them ahead, on one core and 4-bit weights:
//
//   Xeon with AMX   3 KB ahead, into the second-level cache: from 14.5 to 17.1 GB/s with one token
//                   (19.6 is what reading gives), 8-bit weights from 12.9 to 16.1; no loss up to 8
//   Zen 4           8 KB ahead: from 18 to 25 GB/s (4096 x 4096) and 22 to 30 (9728 x 896) with
//                   one token or two; with more, or 8-bit weights, it only costs
template <int kBits, int kRows>
QTOOL_INLINE void ask_ahead(const uint8_t* codes) {
#if defined(QTOOL_INTEL_SERVER)
  _mm_prefetch(codes + 3072, _MM_HINT_T1);
#else
  if constexpr (kBits == 4 && kRows <= 2) _mm_prefetch(codes + 8192, _MM_HINT_T0);
#endif
}

// sum[row][v] += codes times activations over kGroups groups of four inputs.
//
//   codes  at vector v of a panel line; a line holds 4 bytes for each of 32 weight rows
//   x      [groups][rows][4] int8
//
// Codes of 4 bits: a line serves two groups, in the low and in the high bits of its bytes.
template <int kGroups, int kRows, int kVectors>
QTOOL_INLINE void add_groups4(Ints (&sum)[kRows][kVectors], const uint8_t* codes, const int8_t* x) {
  const Ints low_bits = set1_byte(15);
  // With few rows the chains of dependent sums are too short to fill the pipeline: use twice as
  // many. Those of the high bits are then of 16 times the codes, which saves the shifts.
  constexpr bool kSplit = kRows <= 2;
  const Ints high_bits = set1_byte(0xf0);
  Ints high_sum[kRows][kVectors];
  if constexpr (kSplit) {
    for (auto& row : high_sum)
      for (Ints& part : row) part = zero_ints();
  }
#pragma GCC unroll 4
  for (int line = 0; line < kGroups / 2; ++line) {
    Ints low[kVectors], high[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const Ints bytes = load_bits(codes + line * 128 + v * 64);
      ask_ahead<4, kRows>(codes + line * 128 + v * 64);
      low[v] = and_bits(bytes, low_bits);
      high[v] = kSplit ? and_bits(bytes, high_bits) : and_bits(shift_right<4>(bytes), low_bits);
    }
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
      const Ints first_four = set1_int(load_word(x + (2 * line * kRows + row) * 4));
      const Ints next_four = set1_int(load_word(x + ((2 * line + 1) * kRows + row) * 4));
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        sum[row][v] = _mm512_dpbusd_epi32(sum[row][v], low[v], first_four);
        Ints& other = kSplit ? high_sum[row][v] : sum[row][v];
        other = _mm512_dpbusd_epi32(other, high[v], next_four);
      }
    }
  }
  if constexpr (kSplit) {
    for (int row = 0; row < kRows; ++row)
      for (int v = 0; v < kVectors; ++v)
        sum[row][v] = add_ints(sum[row][v], shift_right_signed<4>(high_sum[row][v]));
  }
}

// The same with codes of a byte each, a line a group.
template <int kGroups, int kRows, int kVectors>
QTOOL_INLINE void add_groups8(Ints (&sum)[kRows][kVectors], const uint8_t* codes, const int8_t* x) {
  constexpr bool kSplit = kRows * kVectors <= 4;
  Ints odd_sum[kRows][kVectors];
  if constexpr (kSplit) {
    for (auto& row : odd_sum)
      for (Ints& part : row) part = zero_ints();
  }
#pragma GCC unroll 8
  for (int line = 0; line < kGroups; ++line) {
    Ints bytes[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      bytes[v] = load_bits(codes + line * 128 + v * 64);
      ask_ahead<8, kRows>(codes + line * 128 + v * 64);
    }
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
      const Ints four = set1_int(load_word(x + (line * kRows + row) * 4));
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        Ints& part = kSplit && line % 2 ? odd_sum[row][v] : sum[row][v];
        part = _mm512_dpbusd_epi32(part, bytes[v], four);
      }
    }
  }
  if constexpr (kSplit) {
    for (int row = 0; row < kRows; ++row)
      for (int v = 0; v < kVectors; ++v) sum[row][v] = add_ints(sum[row][v], odd_sum[row][v]);
  }
}

QTOOL_INLINE void transpose(Floats (&r)[kLanes]) {
  Floats t[kLanes];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    const __m512d a = _mm512_castps_pd(t[i]), b = _mm512_castps_pd(t[i + 1]);
    const __m512d c = _mm512_castps_pd(t[i + 2]), d = _mm512_castps_pd(t[i + 3]);
    r[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    r[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    r[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    r[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
  }
  // r[4 q + j] now holds, in its 128-bit part p, column 4 p + j of rows 4 q .. 4 q + 3.
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const Floats even01 = _mm512_shuffle_f32x4(r[j], r[4 + j], 0x88);
    const Floats odd01 = _mm512_shuffle_f32x4(r[j], r[4 + j], 0xdd);
    const Floats even23 = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0x88);
    const Floats odd23 = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0xdd);
    t[j] = _mm512_shuffle_f32x4(even01, even23, 0x88);
    t[4 + j] = _mm512_shuffle_f32x4(odd01, odd23, 0x88);
    t[8 + j] = _mm512_shuffle_f32x4(even01, even23, 0xdd);
    t[12 + j] = _mm512_shuffle_f32x4(odd01, odd23, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}
