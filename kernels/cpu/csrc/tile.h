// A panel of weights times a tile of tokens. Both functions compute the same.
#pragma once

#include "scales.h"
#include "spread.h"

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

// The same where a step has one scale and all weights one zero, and codes lie ready: most files. With
// so little to decide for each step, a token's product takes half the instructions.
template <Codes kCodes, int kRows>
void multiply_plain_tile(const QtoolLinear& linear, int64_t panel, const int8_t* q,
                         const float* scales, const int32_t* sums, float* result) {
  static_assert(kCodes != Codes::kSpread, "read from where they lie");
  constexpr int kVectors = vectors_at_once(kRows);
  constexpr int64_t kStripBytes = kGroupsAStrip * kLine / (kCodes == Codes::k4 ? 2 : 1);
  const int64_t strips_a_step = linear.step / kStrip, steps = linear.in / linear.step;
  const int64_t steps_a_group = linear.group / linear.step, groups = linear.in / linear.group;
  for (int first = 0; first < kPanel / kLanes; first += kVectors) {
    const uint8_t* codes =
        linear.codes + panel * (linear.in / kStrip) * kStripBytes + first * kLanes * 4;
    const int8_t* x = q;
    const float* token_scales = scales;
    const int32_t* token_sums = sums;
    int64_t at = panel * groups * kPanel + first * kLanes, left = steps_a_group;
    Floats total[kRows][kVectors];
    for (auto& row : total)
      for (Floats& part : row) part = zeros();
    for (int64_t step = 0; step < steps; ++step) {
      Ints sum[kRows][kVectors];
#pragma GCC unroll 8
      for (int row = 0; row < kRows; ++row) {
        const Ints shift = set1_int(token_sums[row]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sum[row][v] = shift;
      }
      for (int64_t strip = 0; strip < strips_a_step; ++strip) {
        if constexpr (kCodes == Codes::k4)
          add_groups4<kGroupsAStrip, kRows, kVectors>(sum, codes, x);
        else
          add_groups8<kGroupsAStrip, kRows, kVectors>(sum, codes, x);
        codes += kStripBytes;
        x += kStrip * kRows;
      }
      Floats weight_scale[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v)
        weight_scale[v] = load_scales(linear.scales, linear.scale_type, at + v * kLanes);
#pragma GCC unroll 8
      for (int row = 0; row < kRows; ++row) {
        const Floats token_scale = set1(token_scales[row]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v)
          total[row][v] =
              fma(to_floats(sum[row][v]), mul(weight_scale[v], token_scale), total[row][v]);
      }
      token_scales += kRows;
      token_sums += kRows;
      if (--left == 0) {
        left = steps_a_group;
        at += kPanel;
      }
    }
    for (int row = 0; row < kRows; ++row)
      for (int v = 0; v < kVectors; ++v)
        store(result + row * kPanel + (first + v) * kLanes, total[row][v]);
  }
}
