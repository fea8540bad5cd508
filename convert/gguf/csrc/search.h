// ggml's searches for the scale (and minimum) of a block, as blocks/search.py words them, for
// kLanes blocks at once: lane i of every vector belongs to block i, so each block's sums run from
// left to right as in scalar code, and its bits are the same.
//
// Searches return the inverse scale of the best grid, not that grid's codes: they are computed
// once, at the end, and only for blocks that keep them.
#pragma once

#include "simd.h"

// A search is long and used by several types: one copy of each, not one for each call.
#define QTOOL_SEARCH __attribute__((noinline))

namespace qtool {

constexpr float kEmptyBelow = 1e-15f;  // GROUP_MAX_EPS
constexpr int kDescentPasses = 5;

struct ScaleFit {
  Floats scale, inverse;
  Ints empty;
};

// weight = scale * code + minimum, code = round(inverse * (weight - base)); inverse 0 gives code 0.
struct AffineFit {
  Floats scale, minimum, inverse, base, weight_sum;
};

// The element of largest magnitude with its sign, the first of equals; never -0.
template <int N>
QTOOL_INLINE Floats signed_peak(const Floats* x) {
  Floats peak = splat(0.0f), size = peak;
  for (int k = 0; k < N; ++k) {
    const Floats candidate = absolute(x[k]);
    peak = select(candidate > size, x[k], peak);
    size = maximum(candidate, size);
  }
  return peak;
}

// 0 in place of an inverse that overflowed: see finite_inverse in blocks/lanes.py.
QTOOL_INLINE Floats finite_inverse(Floats inverse) {
  return select(absolute(inverse) < INFINITY, inverse, splat(0.0f));
}
QTOOL_INLINE float finite_inverse(float inverse) {
  return std::fabs(inverse) < INFINITY ? inverse : 0.0f;
}
// Whole numbers modulo 256: what is left of a negative one in a byte.
QTOOL_INLINE Floats as_byte(Floats v) {
  const Floats turns = round_even(v * (1.0f / 256.0f) - 0.499f);  // v is whole: this is its floor
  return select(v < splat(0.0f), v - 256.0f * turns, v);
}
QTOOL_INLINE Floats divide_or_zero(Floats a, Floats b) {
  return select(b == splat(0.0f), splat(0.0f), a / b);
}

template <int N>
QTOOL_INLINE Floats sum(const Floats* x) {
  Floats total = splat(0.0f);
  for (int k = 0; k < N; ++k) total += x[k];
  return total;
}

// make_qx_quants: codes -limit .. limit-1, 18 grids around the peak. w: weight of each element.
template <int N>
QTOOL_SEARCH ScaleFit fit_scale(const Floats* x, const Floats* w, float limit) {
  const Floats peak = signed_peak<N>(x);
  const Ints empty = absolute(peak) < kEmptyBelow;
  const Floats safe_peak = select(empty, splat(1.0f), peak);
  Floats wx[N];
  for (int k = 0; k < N; ++k) wx[k] = w[k] * x[k];
  struct Sums {
    Floats lx, l2;
  };
  const auto evaluate = [&](Floats inverse) {
    Sums sums{splat(0.0f), splat(0.0f)};
    for (int k = 0; k < N; ++k) {
      const Floats code = round_within(inverse * x[k], -limit, limit - 1);
      sums.lx += wx[k] * code;
      sums.l2 += w[k] * code * code;
    }
    return sums;
  };
  Floats winner = splat(-limit) / safe_peak;
  const Sums first = evaluate(winner);
  Floats scale = divide_or_zero(first.lx, first.l2);
  Floats best = scale * first.lx;
  for (int step = -9; step <= 9; ++step) {
    if (step == 0) continue;
    const Floats inverse = splat(-(limit + 0.1f * static_cast<float>(step))) / safe_peak;
    const Sums sums = evaluate(inverse);
    const Ints better = (sums.l2 > splat(0.0f)) & (sums.lx * sums.lx > best * sums.l2);
    scale = select(better, sums.lx / sums.l2, scale);
    best = select(better, scale * sums.lx, best);
    winner = select(better, inverse, winner);
  }
  return {select(empty, splat(0.0f), scale), winner, empty};
}

// make_qkx2_quants and make_qkx3_quants: codes 0 .. limit over a range that includes 0. The
// minimum of the best grid so far is where the next ones begin.
template <int N, bool kAbsoluteError>
QTOOL_SEARCH AffineFit fit_affine(const Floats* x, const Floats* w, float limit, float first,
                                  float step, int steps) {
  Floats least = x[0], highest = x[0];
  Floats sum_w = splat(0.0f), sum_x = splat(0.0f);
  for (int k = 0; k < N; ++k) {
    least = minimum(x[k], least);
    highest = maximum(x[k], highest);
    sum_w += w[k];
    sum_x += w[k] * x[k];
  }
  const Floats lowest = select(least > splat(0.0f), splat(0.0f), least);
  const Ints flat = highest <= lowest;
  Floats codes[N];
  const auto quantize = [&](Floats inverse, Floats base) {
    const Floats finite = finite_inverse(inverse);
    for (int k = 0; k < N; ++k) codes[k] = round_within((x[k] - base) * finite, 0.0f, limit);
  };
  const auto error_of = [&](Floats scale, Floats base) {
    Floats total = splat(0.0f);
    for (int k = 0; k < N; ++k) {
      const Floats difference = scale * codes[k] + base - x[k];
      total += w[k] * (kAbsoluteError ? absolute(difference) : difference * difference);
    }
    return total;
  };
  Floats winner = splat(limit) / select(flat, splat(1.0f), highest - lowest);
  Floats winner_base = lowest, base = lowest;
  Floats scale = splat(1.0f) / winner;
  quantize(winner, lowest);
  Floats best = error_of(scale, lowest);
  for (int grid = 0; grid <= steps; ++grid) {
    const float numerator = first + step * static_cast<float>(grid) + limit;
    const Floats inverse = splat(numerator) / select(flat, splat(1.0f), highest - base);
    const Floats finite = finite_inverse(inverse);
    Floats sum_l = splat(0.0f), sum_l2 = splat(0.0f), sum_xl = splat(0.0f);
    for (int k = 0; k < N; ++k) {
      codes[k] = round_within((x[k] - base) * finite, 0.0f, limit);
      const Floats weighted = w[k] * codes[k];
      sum_l += weighted;
      sum_l2 += weighted * codes[k];
      sum_xl += weighted * x[k];
    }
    const Floats determinant = sum_w * sum_l2 - sum_l * sum_l;
    const Ints solvable = determinant > splat(0.0f);
    const Floats safe = select(solvable, determinant, splat(1.0f));
    Floats trial = (sum_w * sum_xl - sum_x * sum_l) / safe;
    Floats trial_base = (sum_l2 * sum_x - sum_l * sum_xl) / safe;
    const Ints positive = trial_base > splat(0.0f);
    if (any(positive)) {
      trial = select(positive, divide_or_zero(sum_xl, sum_l2), trial);
      trial_base = select(positive, splat(0.0f), trial_base);
    }
    const Floats trial_error = error_of(trial, trial_base);
    const Ints better = solvable & (trial_error < best);
    best = select(better, trial_error, best);
    scale = select(better, trial, scale);
    winner = select(better, inverse, winner);
    winner_base = select(better, base, winner_base);
    base = select(better, trial_base, base);
  }
  const Floats zero = splat(0.0f);
  return {select(flat, zero, scale), select(flat, lowest, base),
          select(flat, zero, finite_inverse(winner)), winner_base, sum_w};
}

// Improve codes one element at a time, as make_q3_quants and make_qp_quants end; returns the
// least-squares scales. kSigned: codes have the lower bound `lower`; otherwise none, they are kept
// as bytes, and the energy without the element must be positive.
template <int N, bool kSigned>
QTOOL_INLINE Floats descend(const Floats* x, const Floats* w, Floats* codes, float lower,
                            float upper) {
  const Floats zero = splat(0.0f);
  Floats wx[N];
  Floats sum_lx = zero, sum_l2 = zero;
  for (int k = 0; k < N; ++k) {
    wx[k] = w[k] * x[k];
    sum_lx += wx[k] * codes[k];
    sum_l2 += w[k] * codes[k] * codes[k];
    if (!kSigned) codes[k] = as_byte(codes[k]);
  }
  Ints active = zero == zero;
  for (int pass = 0; pass < kDescentPasses && any(active); ++pass) {
    Ints changed = zero != zero;
    for (int k = 0; k < N; ++k) {
      const Floats code = codes[k];
      const Floats rest_lx = sum_lx - wx[k] * code;
      const Floats rest_l2 = sum_l2 - w[k] * code * code;
      Ints accept = active & (rest_lx > zero);
      if (!kSigned) accept &= rest_l2 > zero;
      const Floats ideal = x[k] * rest_l2 / select(accept, rest_lx, splat(1.0f));
      Floats trial = minimum(round_even(ideal), splat(upper));
      if (kSigned) trial = maximum(trial, splat(lower));
      accept &= trial != code;
      if (!any(accept)) continue;
      const Floats new_lx = rest_lx + wx[k] * trial;
      const Floats new_l2 = rest_l2 + w[k] * trial * trial;
      if (kSigned) accept &= new_l2 > zero;
      accept &= new_lx * new_lx * sum_l2 > sum_lx * sum_lx * new_l2;
      codes[k] = select(accept, kSigned ? trial : as_byte(trial), code);
      sum_lx = select(accept, new_lx, sum_lx);
      sum_l2 = select(accept, new_l2, sum_l2);
      changed |= accept;
    }
    active &= changed;
  }
  return select(sum_l2 > zero, sum_lx / sum_l2, zero);
}

// make_q3_quants: codes -limit .. limit-1, returned from 0; scales.
template <int N>
QTOOL_SEARCH Floats fit_scale_by_descent(const Floats* x, float limit, Floats* codes) {
  const Floats peak = signed_peak<N>(x), zero = splat(0.0f);
  const Ints empty = absolute(peak) < kEmptyBelow;
  const Floats inverse = splat(-limit) / select(empty, splat(1.0f), peak);
  Floats w[N];
  for (int k = 0; k < N; ++k) {
    w[k] = x[k] * x[k];
    codes[k] = round_within(inverse * x[k], -limit, limit - 1);
  }
  const Floats scale = descend<N, true>(x, w, codes, -limit, limit - 1);
  for (int k = 0; k < N; ++k) codes[k] = select(empty, zero, codes[k] + limit);
  return select(empty, zero, scale);
}

// make_qp_quants: codes 0 .. limit, scales. Codes of a negative x are kept as bytes: see
// fit_positive in blocks/search.py.
template <int N>
QTOOL_SEARCH Floats fit_positive(const Floats* x, const Floats* w, float limit, Floats* codes) {
  const Floats zero = splat(0.0f);
  Floats peak = zero;
  for (int k = 0; k < N; ++k) peak = maximum(x[k], peak);
  const Ints empty = peak < kEmptyBelow;
  const Floats safe_peak = select(empty, splat(1.0f), peak);
  Floats winner = splat(limit) / safe_peak;
  const auto error_of = [&](Floats inverse) {
    const Floats scale = splat(1.0f) / inverse;
    Floats total = zero;
    for (int k = 0; k < N; ++k) {
      const Floats difference = x[k] - scale * codes[k];
      total += w[k] * difference * difference;
    }
    return total;
  };
  for (int k = 0; k < N; ++k) codes[k] = as_byte(round_even(winner * x[k]));
  Floats best = error_of(winner);
  for (int step = -4; step <= 4; ++step) {
    if (step == 0) continue;
    const Floats inverse = splat(0.1f * static_cast<float>(step) + limit) / safe_peak;
    for (int k = 0; k < N; ++k) codes[k] = minimum(round_even(inverse * x[k]), splat(limit));
    const Floats error = error_of(inverse);
    const Ints better = error < best;
    best = select(better, error, best);
    winner = select(better, inverse, winner);
  }
  for (int k = 0; k < N; ++k) codes[k] = minimum(round_even(winner * x[k]), splat(limit));
  const Floats scale = descend<N, false>(x, w, codes, 0.0f, limit);
  for (int k = 0; k < N; ++k) codes[k] = select(empty, zero, codes[k]);
  return select(empty, zero, scale);
}

}  // namespace qtool
