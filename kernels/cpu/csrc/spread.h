// Codes that are not multiplied from where they lie, spread to bytes: other widths than 4 and 8 bits,
// and places in a table.
#pragma once

#include "interface.h"
#include "isa.h"
#include "layout.h"

inline int64_t strip_bytes(const QtoolLinear& linear) {
  return kStrip * kPanel * linear.bits / 8;
}

// Group kGroup of four inputs: a vector of panel rows, codes as bytes. A strip's planes:
//
//   4, 5, 6 bits  4 lines, two groups a byte        then 5: 1 line of a bit, 6: 2 lines of two
//   2, 3 bits     2 lines, four groups a byte       then 3: 1 line of a bit
template <int kBits, int kGroup>
QTOOL_INLINE Ints spread(const uint8_t* strip) {
  constexpr bool kNibbles = kBits >= 4;
  constexpr int kLow = kNibbles ? 4 : 2, kAByte = 8 / kLow;
  const uint8_t* const high = strip + kGroupsAStrip / kAByte * kLine;
  const Ints low = and_bits(
      shift_right<kGroup % kAByte * kLow>(load_bits(strip + kGroup / kAByte * kLine)),
      set1_byte((1 << kLow) - 1));
  if constexpr (kBits == 6)
    return or_bits(low, and_bits(move_bits<kGroup % 4 * 2, 4>(load_bits(high + kGroup / 4 * kLine)),
                                 set1_byte(0x30)));
  else if constexpr (kBits == 5 || kBits == 3)
    return or_bits(low, and_bits(move_bits<kGroup, kLow>(load_bits(high)), set1_byte(1 << kLow)));
  else
    return low;
}

template <int kBits, int kGroup = 0>
QTOOL_INLINE void spread_groups(const uint8_t* strip, const uint8_t* table, uint8_t* to) {
  if constexpr (kGroup < kGroupsAStrip) {
    Ints codes = spread<kBits, kGroup>(strip);
    if (table != nullptr) codes = look_up(table, codes);
    store_bits(to + kGroup * kLine, codes);
    spread_groups<kBits, kGroup + 1>(strip, table, to);
  }
}

template <int kVectors>
void spread_strip(const QtoolLinear& linear, const uint8_t* strip, uint8_t* to) {
  for (int v = 0; v < kVectors; ++v, strip += kLanes * 4, to += kLanes * 4) switch (linear.bits) {
      case 2: spread_groups<2>(strip, nullptr, to); break;
      case 3: spread_groups<3>(strip, nullptr, to); break;
      case 4: spread_groups<4>(strip, linear.table, to); break;
      case 5: spread_groups<5>(strip, nullptr, to); break;
      case 6: spread_groups<6>(strip, nullptr, to); break;
    }
}
