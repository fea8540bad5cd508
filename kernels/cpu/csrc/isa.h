// One set of vector words over two instruction sets, chosen by the compiler's flags.
//
// Floats and Ints hold kLanes 32-bit lanes: 16 with AVX-512, 8 with AVX2. What both headers define:
//
//   load store fma ...     the usual; `load_part` and `store_part` touch only the first n lanes
//   add_groups4/8          a linear's integer dot product over a few inputs, exact in both
//   transpose              kLanes x kLanes floats
//
// Elements in memory are float or Bfloat16; arithmetic is in float. Rounding to bfloat16 is to
// nearest, ties to even, as PyTorch does; NaN stays NaN.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#define QTOOL_INLINE inline __attribute__((always_inline))

struct Bfloat16 {
  uint16_t bits;
};

QTOOL_INLINE int32_t load_word(const void* from) {
  int32_t word;
  std::memcpy(&word, from, sizeof word);
  return word;
}

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && \
    defined(__AVX512VL__) && defined(__AVX512VNNI__)
#include "isa_avx512.h"
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "isa_avx2.h"
#else
#error "no instruction set that these kernels are written for"
#endif

// Bits at kAt of each byte or word, moved to kTo.
template <int kAt, int kTo>
QTOOL_INLINE Ints move_bits(Ints a) {
  if constexpr (kAt >= kTo)
    return shift_right<kAt - kTo>(a);
  else
    return shift_left<kTo - kAt>(a);
}

// e to the x: Cephes' expf, below 2 ulp; exactly 0 under -87.33, exactly 1 at 0, NaN at NaN.
// The operands of min and max are in an order that lets a NaN through.
QTOOL_INLINE Floats exponential(Floats x) {
  const Floats smallest = set1(-87.33f);
  const Floats clamped = minimum(set1(88.37f), maximum(smallest, x));
  const Ints power = round_to_ints(mul(clamped, set1(1.44269504088896341f)));
  const Floats n = to_floats(power);
  const Floats r = fma(n, set1(2.12194440e-4f), fma(n, set1(-0.693359375f), clamped));
  Floats p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = add(fma(p, mul(r, r), r), set1(1.0f));
  return zero_where_less(mul(p, two_to_the(power)), x, smallest);
}

// The same of one number, by the same steps.
QTOOL_INLINE float exponential(float x) { return first_lane(exponential(set1(x))); }
