// The steps of a linear, for operations that make more of them than one call; see linear.cpp.
#pragma once

#include "interface.h"
#include "isa.h"
#include "threads.h"

// Where the parts of rounded activations lie in a scratch, in tiles of `tile` rows one after the
// other: q [in / 4][rows of the tile][4], scales and sums [in / step][rows of the tile]. Sums are of
// a step's q, times `factor`.
struct Activations {
  int8_t* q;
  float* scales;
  int32_t* sums;
  int64_t rows;
  int64_t tile;
  int64_t in;
  int64_t step;
  int64_t span;
  int32_t factor;

  Activations() = default;
  Activations(const QtoolLinear& linear, int64_t rows, void* scratch);
  static int64_t bytes(const QtoolLinear& linear, int64_t rows);

  // Whether activations rounded for one linear serve another as they are.
  bool fit(const QtoolLinear& linear) const {
    return in == linear.in && step == linear.step && span == linear.span &&
           factor == factor_of(linear);
  }
  // With one zero for all weights, what it takes from a sum is known before the weights are read.
  static int32_t factor_of(const QtoolLinear& linear);
  int64_t tiles() const { return (rows + tile - 1) / tile; }
  int64_t tile_rows(int64_t index) const { return std::min(tile, rows - index * tile); }
};

// Inputs first .. first + count - 1 of row `row` of a matrix, whose first input is at x; both
// multiples of the span.
template <class T>
void round_part(const T* x, int64_t row, int64_t first, int64_t count, const Activations& to);
template <class T>
void round_row(const T* x, int64_t row, const Activations& to) {
  round_part(x, row, 0, to.in, to);
}

// All rows of x [rows][in]; ends with a barrier.
template <class T>
void round_rows(Team& team, const T* x, const Activations& to);

// What this member of the team reads first when it multiplies, as soon as there is time to ask.
void expect(Team& team, const QtoolLinear& linear);

// y [rows][linear.out], rows `stride` apart; ends with a barrier.
template <class T>
void multiply(Team& team, const QtoolLinear& linear, const Activations& from, const T* bias, T* y,
              int64_t stride);
