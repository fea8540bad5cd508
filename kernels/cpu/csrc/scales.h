// A linear's scales as floats, from each way of holding them.
#pragma once

#include "interface.h"
#include "isa.h"
#include "layout.h"

QTOOL_INLINE Floats load_scales(const void* scales, int32_t type, int64_t at) {
  switch (type) {
    case kFloat16: return load_float16(static_cast<const uint16_t*>(scales) + at);
    // The byte e of 2 to the e - 128.
    case kExponent8:
      return two_to_the(add_ints(load_bytes(static_cast<const uint8_t*>(scales) + at),
                                 set1_int(-128)));
    default: return load(static_cast<const float*>(scales) + at);
  }
}

inline int64_t scale_bytes(int32_t type) {
  return type == kFloat32 ? 4 : type == kFloat16 ? 2 : 1;
}

constexpr int kMaxGroups = 16;

inline int groups_a_super(int32_t kind) {
  return kind == kSixBitPairs || kind == kSixBitScales8 ? 8 : 16;
}

// 32-bit words of fields [words][32] of one panel and super-block, in bytes.
inline int64_t field_bytes(int32_t kind) {
  switch (kind) {
    case kSixBitPairs: return 12 * kPanel;
    case kSixBitScales: return 12 * kPanel;
    case kSixBitScales8: return 6 * kPanel;
    default: return 16 * kPanel;
  }
}

// Field kField of 4 bits of a row's words, 32 rows apart.
template <int kField>
QTOOL_INLINE Ints nibble(const uint8_t* words) {
  return and_bits(shift_right<kField % 8 * 4>(load_bits(words + kField / 8 * kLine)), set1_int(15));
}

// Field kField of 6 bits: the low four as nibbles, the high two of all in one word after them.
template <int kField>
QTOOL_INLINE Ints six_bits(const uint8_t* words) {
  const Ints high = load_bits(words + 2 * kLine);
  return or_bits(nibble<kField>(words),
                 and_bits(move_bits<2 * kField, 4>(high), set1_int(0x30)));
}

// The factors of super-block `super`, multiplied out: scales and offsets [group][vector].
template <int kVectors, int kGroup = 0>
QTOOL_INLINE void multiply_fields(int32_t kind, const uint8_t* fields, int v, Floats d,
                                  Floats offset, Floats (&scales)[kMaxGroups][kVectors],
                                  Floats (&offsets)[kMaxGroups][kVectors]) {
  if constexpr (kGroup < kMaxGroups) {
    switch (kind) {
      case kSixBitPairs:
        if constexpr (kGroup < 8) {
          scales[kGroup][v] = mul(d, to_floats(six_bits<kGroup>(fields)));
          offsets[kGroup][v] = mul(offset, to_floats(six_bits<8 + kGroup>(fields)));
        }
        break;
      case kSixBitScales:
        scales[kGroup][v] =
            mul(d, to_floats(add_ints(six_bits<kGroup>(fields), set1_int(-32))));
        break;
      case kEightBitScales:
        scales[kGroup][v] = mul(
            d, to_floats(shift_right_signed<24>(
                   shift_left<24 - kGroup % 4 * 8>(load_bits(fields + kGroup / 4 * kLine)))));
        break;
      default:
        scales[kGroup][v] = mul(d, to_floats(nibble<kGroup>(fields)));
        offsets[kGroup][v] = mul(offset, to_floats(nibble<kGroup>(fields + 2 * kLine)));
    }
    multiply_fields<kVectors, kGroup + 1>(kind, fields, v, d, offset, scales, offsets);
  }
}

template <int kVectors, int kGroup = 0>
QTOOL_INLINE void multiply_short_fields(const uint8_t* fields, const uint16_t* high, int v,
                                        Floats d, Floats (&scales)[kMaxGroups][kVectors]) {
  if constexpr (kGroup < 8) {
    const Ints six = or_bits(nibble<kGroup>(fields),
                             and_bits(move_bits<2 * kGroup, 4>(load_words(high)), set1_int(0x30)));
    scales[kGroup][v] = mul(d, to_floats(add_ints(six, set1_int(-32))));
    multiply_short_fields<kVectors, kGroup + 1>(fields, high, v, d, scales);
  }
}

template <int kVectors>
__attribute__((noinline)) void decode_scales(const QtoolLinear& linear, int64_t panel, int64_t super,
                                             int first_vector,
                                             Floats (&scales)[kMaxGroups][kVectors],
                                             Floats (&offsets)[kMaxGroups][kVectors]) {
  const int64_t at = panel * (linear.in / kSuper) + super;
  const uint8_t* const fields = linear.fields + at * field_bytes(linear.scale_kind);
  for (int v = 0; v < kVectors; ++v) {
    const int64_t lane = (first_vector + v) * kLanes;
    const Floats d = load_scales(linear.scales, linear.scale_type, at * kPanel + lane);
    const Floats offset = linear.offsets == nullptr
                              ? zeros()
                              : load_scales(linear.offsets, linear.scale_type, at * kPanel + lane);
    if (linear.scale_kind == kSixBitScales8)
      multiply_short_fields<kVectors>(
          fields + lane * 4, reinterpret_cast<const uint16_t*>(fields + kLine) + lane, v, d, scales);
    else
      multiply_fields<kVectors>(linear.scale_kind, fields + lane * 4, v, d, offset, scales, offsets);
  }
}
