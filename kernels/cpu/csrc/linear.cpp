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

#include "layout.h"
#include "tile.h"

namespace {

constexpr int64_t kMaxSpan = 128;
// Below these many multiply-adds a second thread costs more than it saves.
constexpr int64_t kSerialWork = 1 << 17;
constexpr int64_t kChunkBytes = 256 << 10;
// Bytes of weights that a thread takes at once, at most: some microseconds of memory.
constexpr int64_t kPieceBytes = 64 << 10;

using MultiplyTile = void (*)(const QtoolLinear&, int64_t, const int8_t*, const float*,
                              const int32_t*, float*);

template <Codes kCodes, int kGroups, bool kPlain, int kRows>
constexpr MultiplyTile the_tile() {
  if constexpr (kPlain)
    return multiply_plain_tile<kCodes, kRows>;
  else
    return multiply_tile<kCodes, kGroups, kRows>;
}

// By the tile's rows, 1 .. kMaxRows.
template <Codes kCodes, int kGroups, bool kPlain = false>
MultiplyTile choose_rows(int64_t rows) {
  switch (rows) {
    case 1: return the_tile<kCodes, kGroups, kPlain, 1>();
    case 2: return the_tile<kCodes, kGroups, kPlain, 2>();
    case 3: return the_tile<kCodes, kGroups, kPlain, 3>();
    case 4: return the_tile<kCodes, kGroups, kPlain, 4>();
#if defined(__AVX512F__)
    case 5: return the_tile<kCodes, kGroups, kPlain, 5>();
    case 6: return the_tile<kCodes, kGroups, kPlain, 6>();
    case 7: return the_tile<kCodes, kGroups, kPlain, 7>();
    case 8: return the_tile<kCodes, kGroups, kPlain, 8>();
#endif
  }
  return nullptr;
}

bool is_plain(const QtoolLinear& linear) {
  return linear.step >= kStrip && linear.table == nullptr && linear.offsets == nullptr &&
         linear.zeros == nullptr && linear.scale_kind == kPlainScales;
}

MultiplyTile choose(const QtoolLinear& linear, int64_t rows) {
  if (linear.step < kStrip) return choose_rows<Codes::kSpread, 4>(rows);
  if (is_plain(linear) && linear.bits == 4) return choose_rows<Codes::k4, 8, true>(rows);
  if (is_plain(linear) && linear.bits == 8) return choose_rows<Codes::k8, 8, true>(rows);
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

void expect(Team& team, const QtoolLinear& linear) {
  const int64_t panels = ceil_div(linear.out, kPanel);
  const int64_t first = team.share_begin(panels, team.index());
  const int64_t codes = linear.in / kStrip * strip_bytes(linear);
  const int64_t scales = linear.in / linear.group * kPanel * scale_bytes(linear.scale_type);
  int64_t held = team.share_begin(panels, team.index() + 1) - first;
  held = std::min(held, kAheadBytes / (codes + scales));
  team.ahead().add(linear.codes + first * codes, held * codes);
  if (linear.scale_kind == kPlainScales)
    team.ahead().add(static_cast<const char*>(linear.scales) + first * scales, held * scales);
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
