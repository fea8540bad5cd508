// Linears with codes of 2 to 8 bits and group scales, on activations rounded to 8 bits on the fly.
//
//   scale[span] = max |x| / 127      q = round(x / scale)         over `span` inputs of one token
//   y = sum over steps, in order, of (scale of weight * scale[span]) * sum (code - zero) * q
//                                  + (offset of weight * scale[span]) * sum q
//
// The inner sums, over the `step` inputs that have one weight scale and one activation scale, are of
// whole numbers and exact; the steps are added in float, one fused multiply-add each, always in the
// same order. So a token's result depends neither on the tokens beside it, nor on the threads, nor
// on the instruction set: all of them give the same bits.
//
// sum (code - zero) * q is computed as sum code * q - zero * sum q, so that codes and zeros stay
// unsigned. A panel is 32 weight rows; a tile is a panel by up to kMaxRows tokens, whose sums fit
// the registers. With few tokens each panel is read once, in a straight line; with many, tokens go
// in chunks that stay in the second-level cache while the panels pass.
//
// Codes of 4 and 8 bits are multiplied from where they lie. Other widths, and codes that are places
// in a table, are first spread to bytes, 32 inputs of a panel at a time, in the first-level cache.
// Scales of K-quants are themselves codes, of 4 to 8 bits with a float16 for every 256 inputs; they
// are multiplied out as the panel passes.

#include "linear.h"

namespace {

constexpr int kPanel = 32;
// Inputs of a strip: eight groups of four.
constexpr int kStrip = 32;
constexpr int kGroupsAStrip = 8;
constexpr int kSuper = 256;
constexpr int64_t kLine = kPanel * 4;
constexpr int64_t kMaxSpan = 128;
// Below these many multiply-adds a second thread costs more than it saves.
constexpr int64_t kSerialWork = 1 << 17;
constexpr int64_t kChunkBytes = 256 << 10;
// Bytes of weights that a thread takes at once, at most: some microseconds of memory.
constexpr int64_t kPieceBytes = 64 << 10;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t strip_bytes(const QtoolLinear& linear) { return kStrip * kPanel * linear.bits / 8; }

// ---- codes of other widths, spread to bytes ----

template <int kAt, int kTo>
QTOOL_INLINE Ints move_bits(Ints a) {
  if constexpr (kAt >= kTo)
    return shift_right<kAt - kTo>(a);
  else
    return shift_left<kTo - kAt>(a);
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

// ---- scales ----

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

constexpr int kMaxGroups = 16;

int groups_a_super(int32_t kind) {
  return kind == kSixBitPairs || kind == kSixBitScales8 ? 8 : 16;
}

// 32-bit words of fields [words][32] of one panel and super-block, in bytes.
int64_t field_bytes(int32_t kind) {
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

// ---- the product ----

enum class Codes { k4, k8, kSpread };

// A panel times a tile of kRows tokens -> result [kRows][32]. kGroups: groups of four inputs that a
// step has at least, 8, or 4 where weight scales are for 16 inputs.
template <Codes kCodes, int kGroups, int kRows>
void multiply_tile(const QtoolLinear& linear, int64_t panel, const int8_t* q, const float* scales,
                   const int32_t* sums, float* result) {
  constexpr int kVectors = vectors_at_once(kRows);
  constexpr int kBias = kCodes == Codes::k4 ? 0 : kCodeBias8;
  constexpr int kSteps = kGroupsAStrip / kGroups;
  const int64_t bytes_a_strip = strip_bytes(linear);
  const int64_t groups = linear.in / linear.group, strips = linear.in / kStrip;
  const int64_t strips_a_step = std::max<int64_t>(1, linear.step / kStrip);
  const int64_t steps_a_group = linear.group / linear.step;
  const bool has_offsets = linear.offsets != nullptr, is_plain = linear.scale_kind == kPlainScales;
  const bool is_shifted = !has_offsets && linear.zeros == nullptr;
  const int in_super = is_plain ? 1 : groups_a_super(linear.scale_kind);

  for (int first = 0; first < kPanel / kLanes; first += kVectors) {
    const uint8_t* codes = linear.codes + panel * strips * bytes_a_strip + first * kLanes * 4;
    const int8_t* x = q;
    const int64_t lanes = panel * groups * kPanel + first * kLanes;
    Floats total[kRows][kVectors];
    for (auto& row : total)
      for (Floats& part : row) part = zeros();
    Ints sum[kRows][kVectors];
    Ints zero[kVectors];
    for (Ints& part : zero) part = set1_int(linear.midpoint - kBias);
    Floats weight_scale[kVectors], weight_offset[kVectors];
    for (Floats& part : weight_offset) part = zeros();
    Floats many_scales[kMaxGroups][kVectors], many_offsets[kMaxGroups][kVectors];
    int64_t group = 0, steps_left = 0, step = 0;
    alignas(64) uint8_t bytes[kStrip * kPanel];

    const auto begin_step = [&]() __attribute__((always_inline)) {
      if (steps_left == 0) {
        if (is_plain) {
          for (int v = 0; v < kVectors; ++v) {
            const int64_t at = lanes + group * kPanel + v * kLanes;
            weight_scale[v] = load_scales(linear.scales, linear.scale_type, at);
            if (linear.zeros != nullptr)
              zero[v] = add_ints(load_bytes(linear.zeros + at), set1_int(-kBias));
            if (has_offsets) weight_offset[v] = load_scales(linear.offsets, linear.scale_type, at);
          }
        } else {
          const int64_t inside = group % in_super;
          if (inside == 0)
            decode_scales<kVectors>(linear, panel, group / in_super, first, many_scales,
                                    many_offsets);
          for (int v = 0; v < kVectors; ++v) {
            weight_scale[v] = many_scales[inside][v];
            if (has_offsets) weight_offset[v] = many_offsets[inside][v];
          }
        }
        ++group;
        steps_left = steps_a_group;
      }
      --steps_left;
      if (is_shifted) {
#pragma GCC unroll 8
        for (int row = 0; row < kRows; ++row) {
          const Ints shift = set1_int(sums[step * kRows + row]);
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) sum[row][v] = shift;
        }
        return;
      }
#pragma GCC unroll 8
      for (int row = 0; row < kRows; ++row) {
        const Ints less = set1_int(-sums[step * kRows + row]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sum[row][v] = multiply_small(zero[v], less);
      }
    };
    const auto end_step = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 8
      for (int row = 0; row < kRows; ++row) {
        const Floats token_scale = set1(scales[step * kRows + row]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v)
          total[row][v] =
              fma(to_floats(sum[row][v]), mul(weight_scale[v], token_scale), total[row][v]);
      }
      if (has_offsets) {
#pragma GCC unroll 8
        for (int row = 0; row < kRows; ++row) {
          const Floats token_sum = set1(static_cast<float>(sums[step * kRows + row]) *
                                        scales[step * kRows + row]);
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v)
            total[row][v] = fma(weight_offset[v], token_sum, total[row][v]);
        }
      }
      ++step;
    };

    if constexpr (kSteps == 1) {
      for (int64_t strip = 0; strip < strips;) {
        begin_step();
        for (int64_t stop = strip + strips_a_step; strip < stop; ++strip) {
          if constexpr (kCodes == Codes::k4) {
            add_groups4<kGroups, kRows, kVectors>(sum, codes, x);
          } else if constexpr (kCodes == Codes::k8) {
            add_groups8<kGroups, kRows, kVectors>(sum, codes, x);
          } else {
            spread_strip<kVectors>(linear, codes, bytes);
            add_groups8<kGroups, kRows, kVectors>(sum, bytes, x);
          }
          codes += bytes_a_strip;
          x += kStrip * kRows;
        }
        end_step();
      }
    } else {
      for (int64_t strip = 0; strip < strips; ++strip) {
        spread_strip<kVectors>(linear, codes, bytes);
        for (int half = 0; half < kSteps; ++half) {
          begin_step();
          add_groups8<kGroups, kRows, kVectors>(sum, bytes + half * kGroups * kLine, x);
          x += kGroups * 4 * kRows;
          end_step();
        }
        codes += bytes_a_strip;
      }
    }
    for (int row = 0; row < kRows; ++row)
      for (int v = 0; v < kVectors; ++v)
        store(result + row * kPanel + (first + v) * kLanes, total[row][v]);
  }
}

using MultiplyTile = void (*)(const QtoolLinear&, int64_t, const int8_t*, const float*,
                              const int32_t*, float*);

// By the tile's rows, 1 .. kMaxRows.
template <Codes kCodes, int kGroups>
MultiplyTile choose_rows(int64_t rows) {
  switch (rows) {
    case 1: return multiply_tile<kCodes, kGroups, 1>;
    case 2: return multiply_tile<kCodes, kGroups, 2>;
    case 3: return multiply_tile<kCodes, kGroups, 3>;
    case 4: return multiply_tile<kCodes, kGroups, 4>;
#if defined(__AVX512F__)
    case 5: return multiply_tile<kCodes, kGroups, 5>;
    case 6: return multiply_tile<kCodes, kGroups, 6>;
    case 7: return multiply_tile<kCodes, kGroups, 7>;
    case 8: return multiply_tile<kCodes, kGroups, 8>;
#endif
  }
  return nullptr;
}

MultiplyTile choose(const QtoolLinear& linear, int64_t rows) {
  if (linear.step < kStrip) return choose_rows<Codes::kSpread, 4>(rows);
  if (linear.bits == 4 && linear.table == nullptr) return choose_rows<Codes::k4, 8>(rows);
  if (linear.bits == 8) return choose_rows<Codes::k8, 8>(rows);
  return choose_rows<Codes::kSpread, 8>(rows);
}

// A tile's result [rows][32], plus the bias, to y.
template <class T>
void write_tile(const QtoolLinear& linear, int64_t panel, const float* result, int64_t rows,
                const T* bias, T* y, int64_t stride) {
  for (int64_t lane = 0; lane < kPanel; lane += kLanes) {
    const int64_t column = panel * kPanel + lane;
    const int64_t held = std::min<int64_t>(linear.out - column, kLanes);
    if (held <= 0) break;
    const Floats added = bias == nullptr ? zeros()
                         : held == kLanes ? load(bias + column)
                                          : load_part(bias + column, held);
    for (int64_t row = 0; row < rows; ++row) {
      const Floats sum = load(result + row * kPanel + lane);
      const Floats value = bias == nullptr ? sum : add(sum, added);
      T* const to = y + row * stride + column;
      if (held == kLanes)
        store(to, value);
      else
        store_part(to, value, held);
    }
  }
}

}  // namespace

Activations::Activations(const QtoolLinear& linear, int64_t rows, void* scratch)
    : rows(rows),
      tile(ceil_div(rows, std::max<int64_t>(1, ceil_div(rows, kMaxRows)))),
      in(linear.in),
      step(linear.step),
      span(linear.span),
      factor(factor_of(linear)) {
  q = static_cast<int8_t*>(scratch);
  scales = reinterpret_cast<float*>(q + ceil_div(rows * in, 64) * 64);
  sums = reinterpret_cast<int32_t*>(scales + rows * (in / step));
}

int32_t Activations::factor_of(const QtoolLinear& linear) {
  if (linear.zeros != nullptr || linear.offsets != nullptr) return 1;
  const bool is_direct = linear.bits == 4 && linear.table == nullptr && linear.step >= kStrip;
  return (is_direct ? 0 : kCodeBias8) - linear.midpoint;
}

int64_t Activations::bytes(const QtoolLinear& linear, int64_t rows) {
  return ceil_div(rows * linear.in, 64) * 64 + rows * (linear.in / linear.step) * 8;
}

template <class T>
void round_part(const T* x, int64_t row, int64_t from, int64_t count, const Activations& to) {
  const int64_t tile = row / to.tile, rows = to.tile_rows(tile), inside = row - tile * to.tile;
  const int64_t steps = to.in / to.step;
  int8_t* const q = to.q + tile * to.tile * to.in;
  float* const scales = to.scales + tile * to.tile * steps;
  int32_t* const sums = to.sums + tile * to.tile * steps;
  for (int64_t first = from; first < from + count; first += to.span) {
    Floats largest = zeros();
    bool nan = false;
    for (int64_t i = first; i < first + to.span; i += kLanes) {
      const Floats value = load(x + i);
      nan |= any_nan(value);
      largest = maximum(largest, absolute(value));
    }
    const float top = reduce_max(largest);
    // 127 / top overflows below 2**-121: such a span counts as zeros.
    const bool tiny = top < 1e-30f;
    const Floats inverse = set1(tiny ? 0.0f : 127.0f / top);
    const float scale = nan ? NAN : tiny ? 0.0f : top / 127.0f;
    int8_t bytes[kMaxSpan];
    for (int64_t begin = 0; begin < to.span; begin += to.step) {
      Ints sum = zero_ints();
      for (int64_t i = begin; i < begin + to.step; i += kLanes) {
        const Ints rounded = round_to_ints(mul(load(x + first + i), inverse));
        sum = add_ints(sum, rounded);
        store_bytes(bytes + i, rounded);
      }
      const int64_t at = (first + begin) / to.step * rows + inside;
      scales[at] = scale;
      sums[at] = to.factor * reduce_add_ints(sum);
    }
    for (int64_t i = 0; i < to.span; i += 4)
      std::memcpy(q + ((first + i) * rows + 4 * inside), bytes + i, 4);
  }
}

template <class T>
void round_rows(Team& team, const T* x, const Activations& to) {
  team.each(to.rows, team.share(to.rows, 4), [&](int64_t row) { round_row(x + row * to.in, row, to); });
}

template <class T>
void multiply(Team& team, const QtoolLinear& linear, const Activations& from, const T* bias, T* y,
              int64_t stride) {
  const int64_t in = linear.in, steps = in / linear.step;
  const int64_t panels = ceil_div(linear.out, kPanel), tiles = from.tiles();
  const MultiplyTile full = choose(linear, from.tile);
  const MultiplyTile last = choose(linear, from.tile_rows(tiles - 1));
  const int64_t chunk = std::max<int64_t>(4, kChunkBytes / (in * from.tile));
  const int64_t panel_bytes = in / kStrip * strip_bytes(linear);
  const int64_t grain =
      std::min(team.share(panels, 4), std::max<int64_t>(1, kPieceBytes / panel_bytes));
  for (int64_t first = 0; first < tiles; first += chunk) {
    const int64_t stop = std::min(tiles, first + chunk);
    team.each(panels, grain, [&](int64_t panel) {
      alignas(64) float result[kMaxRows * kPanel];
      for (int64_t tile = first; tile < stop; ++tile) {
        const int64_t row = tile * from.tile;
        (tile == tiles - 1 ? last : full)(linear, panel, from.q + row * in,
                                          from.scales + row * steps, from.sums + row * steps,
                                          result);
        write_tile(linear, panel, result, from.tile_rows(tile), bias, y + row * stride, stride);
      }
    });
  }
}

template void round_part(const float*, int64_t, int64_t, int64_t, const Activations&);
template void round_part(const Bfloat16*, int64_t, int64_t, int64_t, const Activations&);
template void round_rows(Team&, const float*, const Activations&);
template void round_rows(Team&, const Bfloat16*, const Activations&);
template void multiply(Team&, const QtoolLinear&, const Activations&, const float*, float*, int64_t);
template void multiply(Team&, const QtoolLinear&, const Activations&, const Bfloat16*, Bfloat16*,
                       int64_t);

namespace {

template <class X, class Y>
void forward(const QtoolLinear& linear, const void* x, int64_t rows, const void* bias, void* y,
             void* scratch, int threads) {
  if (rows * linear.in * linear.out < kSerialWork) threads = 1;
  const Activations activations(linear, rows, scratch);
  with_team(threads, [&](Team& team) {
    round_rows(team, static_cast<const X*>(x), activations);
    multiply(team, linear, activations, static_cast<const Y*>(bias), static_cast<Y*>(y),
             linear.out);
  });
}

}  // namespace

const char* qtool_isa() { return kIsaName; }

int64_t qtool_linear_scratch(const QtoolLinear* linear, int64_t rows) {
  return Activations::bytes(*linear, rows);
}

void qtool_linear(const QtoolLinear* linear, const void* x, int32_t x_type, int64_t rows,
                  const void* bias, void* y, int32_t y_type, void* scratch, int32_t threads) {
  if (rows < 1) return;
  const auto run = x_type == kFloat32   ? forward<float, float>
                   : y_type == kFloat32 ? forward<Bfloat16, float>
                                        : forward<Bfloat16, Bfloat16>;
  run(*linear, x, rows, bias, y, scratch, threads);
}

void qtool_round_row(const QtoolLinear* linear, const void* x, int32_t type, void* scratch) {
  const Activations to(*linear, 1, scratch);
  if (type == kBfloat16)
    round_row(static_cast<const Bfloat16*>(x), 0, to);
  else
    round_row(static_cast<const float*>(x), 0, to);
}
