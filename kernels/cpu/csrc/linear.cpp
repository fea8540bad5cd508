// Linears with 4 or 8-bit codes and group scales, on activations rounded to 8 bits on the fly.
//
//   scale[unit] = max |x| / 127      q = round(x / scale)         over `unit` inputs of one token
//   y = sum over units, in order, of (scale of weight * scale[unit]) * sum (code - zero) * q
//
// The inner sum is of whole numbers and exact; the units are added in float, one fused multiply-add
// each, always in the same order. So a token's result depends neither on the tokens beside it, nor
// on the threads, nor on the instruction set: all of them give the same bits.
//
// sum (code - zero) * q is computed as sum code * q - zero * sum q, so that codes and zeros stay
// unsigned. A panel is 32 weight rows; a tile is a panel by up to kMaxRows tokens, whose sums fit
// the registers. With few tokens each panel is read once, in a straight line; with many, tokens go
// in chunks that stay in the second-level cache while the panels pass.

#include "interface.h"
#include "isa.h"

#include <sys/mman.h>

#include <algorithm>

namespace {

constexpr int kPanel = 32;
// Inputs that share a 16-bit sum in add_strip4.
constexpr int kStrip = 32;
// Below these many multiply-adds a second thread costs more than it saves (about 2 us).
constexpr int64_t kSerialWork = 1 << 17;
constexpr int64_t kSerialQuantize = 1 << 15;
constexpr int64_t kChunkBytes = 256 << 10;
constexpr uint64_t kHugePage = 2 << 20;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Where the parts of a quantized activation matrix lie in the scratch: tiles one after the other,
// q [in / 4][rows of the tile][4], scales and sums [units][rows of the tile].
struct Activations {
  int8_t* q;
  float* scales;
  int32_t* sums;

  Activations(void* scratch, int64_t rows, int64_t in, int64_t units) {
    q = static_cast<int8_t*>(scratch);
    scales = reinterpret_cast<float*>(q + ceil_div(rows * in, 64) * 64);
    sums = reinterpret_cast<int32_t*>(scales + rows * units);
  }
};

// One token's inputs into row `row` of a tile of `rows`.
template <class T>
void quantize_row(const T* x, int64_t in, int64_t unit, int64_t row, int64_t rows, int8_t* q,
                  float* scales, int32_t* sums) {
  for (int64_t first = 0; first < in; first += unit) {
    Floats largest = zeros();
    bool nan = false;
    for (int64_t i = first; i < first + unit; i += kLanes) {
      const Floats value = load(x + i);
      nan |= any_nan(value);
      largest = maximum(largest, absolute(value));
    }
    const float top = reduce_max(largest);
    // 127 / top overflows below 2**-121: such a unit counts as zeros.
    const bool tiny = top < 1e-30f;
    const Floats inverse = set1(tiny ? 0.0f : 127.0f / top);
    Ints sum = zero_ints();
    int8_t bytes[128];
    for (int64_t i = 0; i < unit; i += kLanes) {
      const Ints rounded = round_to_ints(mul(load(x + first + i), inverse));
      sum = add_ints(sum, rounded);
      store_bytes(bytes + i, rounded);
    }
    for (int64_t i = 0; i < unit; i += 4)
      std::memcpy(q + ((first + i) * rows + 4 * row), bytes + i, 4);
    const int64_t at = first / unit * rows + row;
    scales[at] = nan ? NAN : tiny ? 0.0f : top / 127.0f;
    sums[at] = reduce_add_ints(sum);
  }
}

template <class T>
void quantize_tile(const T* x, int64_t rows, const QtoolLinear& linear, int8_t* q, float* scales,
                   int32_t* sums) {
  for (int64_t row = 0; row < rows; ++row)
    quantize_row(x + row * linear.in, linear.in, linear.unit, row, rows, q, scales, sums);
}

QTOOL_INLINE Floats load_scales(const QtoolLinear& linear, int64_t at) {
  return linear.scale_type == kFloat16 ? load_float16(static_cast<const uint16_t*>(linear.scales) + at)
                                       : load(static_cast<const float*>(linear.scales) + at);
}

// Vectors first_vector ... of a panel, times a tile of kRows tokens, into total[row][vector].
template <int kBits, int kRows, int kVectors>
QTOOL_INLINE void multiply_tile(const QtoolLinear& linear, int64_t panel, int first_vector,
                                const int8_t* q, const float* scales, const int32_t* sums,
                                Floats (&total)[kRows][kVectors]) {
  constexpr int64_t kStripBytes = kStrip * kPanel * kBits / 8;
  constexpr int kBias = kBits == 8 ? kCodeBias8 : 0;
  const int64_t groups = linear.in / linear.group, units = linear.in / linear.unit;
  const int64_t units_a_group = linear.group / linear.unit;
  const int64_t strips = linear.unit / kStrip;
  const int64_t lanes = panel * groups * kPanel + first_vector * kLanes;
  const uint8_t* codes = linear.codes + panel * (linear.in / kStrip) * kStripBytes +
                         first_vector * kLanes * 4;
  for (auto& row : total)
    for (Floats& part : row) part = zeros();
  Ints zero[kVectors];
  for (Ints& part : zero) part = set1_int(linear.midpoint - kBias);
  Floats weight_scale[kVectors];
  int64_t group = 0, left = 0;
  for (int64_t unit = 0; unit < units; ++unit) {
    if (left == 0) {
      for (int v = 0; v < kVectors; ++v) {
        const int64_t at = lanes + group * kPanel + v * kLanes;
        weight_scale[v] = load_scales(linear, at);
        if (linear.zeros != nullptr)
          zero[v] = add_ints(load_bytes(linear.zeros + at), set1_int(-kBias));
      }
      ++group;
      left = units_a_group;
    }
    --left;
    Ints sum[kRows][kVectors];
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
      const Ints less = set1_int(-sums[unit * kRows + row]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[row][v] = multiply_small(zero[v], less);
    }
    for (int64_t strip = 0; strip < strips; ++strip) {
      if constexpr (kBits == 4)
        add_strip4<kRows, kVectors>(sum, codes, q);
      else
        add_strip8<kRows, kVectors>(sum, codes, q);
      codes += kStripBytes;
      q += kStrip * kRows;
    }
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
      const Floats token_scale = set1(scales[unit * kRows + row]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v)
        total[row][v] = fma(to_floats(sum[row][v]), mul(weight_scale[v], token_scale), total[row][v]);
    }
  }
}

// The tile's result to y, whose rows are linear.out apart.
template <int kBits, int kRows, class T>
void write_tile(const QtoolLinear& linear, int64_t panel, const int8_t* q, const float* scales,
                const int32_t* sums, const T* bias, T* y) {
  constexpr int kVectors = vectors_at_once(kRows);
  for (int first = 0; first < kPanel / kLanes; first += kVectors) {
    Floats total[kRows][kVectors];
    multiply_tile<kBits, kRows, kVectors>(linear, panel, first, q, scales, sums, total);
    for (int v = 0; v < kVectors; ++v) {
      const int64_t column = panel * kPanel + (first + v) * kLanes;
      const int64_t held = std::min<int64_t>(linear.out - column, kLanes);
      if (held <= 0) break;
      const Floats added = bias == nullptr ? zeros()
                           : held == kLanes ? load(bias + column)
                                            : load_part(bias + column, held);
      for (int row = 0; row < kRows; ++row) {
        const Floats result = bias == nullptr ? total[row][v] : add(total[row][v], added);
        T* to = y + row * linear.out + column;
        if (held == kLanes)
          store(to, result);
        else
          store_part(to, result, held);
      }
    }
  }
}

template <class T>
using WriteTile = void (*)(const QtoolLinear&, int64_t, const int8_t*, const float*,
                           const int32_t*, const T*, T*);

// By the tile's rows, 1 .. kMaxRows.
template <int kBits, class T>
WriteTile<T> choose_write_tile(int64_t rows) {
  switch (rows) {
    case 1: return write_tile<kBits, 1, T>;
    case 2: return write_tile<kBits, 2, T>;
    case 3: return write_tile<kBits, 3, T>;
    case 4: return write_tile<kBits, 4, T>;
#if defined(__AVX512F__)
    case 5: return write_tile<kBits, 5, T>;
    case 6: return write_tile<kBits, 6, T>;
    case 7: return write_tile<kBits, 7, T>;
    case 8: return write_tile<kBits, 8, T>;
#endif
  }
  return nullptr;
}

template <class T>
void forward(const QtoolLinear& linear, const T* x, int64_t rows, const T* bias, T* y,
             void* scratch, int threads) {
  const int64_t in = linear.in, units = in / linear.unit;
  const int64_t panels = ceil_div(linear.out, kPanel), tiles = ceil_div(rows, kMaxRows);
  const Activations activations(scratch, rows, in, units);
  const auto tile_rows = [&](int64_t tile) {
    return std::min<int64_t>(kMaxRows, rows - tile * kMaxRows);
  };
  const auto choose = [&](int64_t size) {
    return linear.bits == 4 ? choose_write_tile<4, T>(size) : choose_write_tile<8, T>(size);
  };
  const WriteTile<T> write_full = choose(kMaxRows), write_last = choose(tile_rows(tiles - 1));
  const auto quantize = [&](int64_t tile) {
    const int64_t row = tile * kMaxRows;
    quantize_tile(x + row * in, tile_rows(tile), linear, activations.q + row * in,
                  activations.scales + row * units, activations.sums + row * units);
  };
  const auto multiply = [&](int64_t tile, int64_t panel) {
    const int64_t row = tile * kMaxRows;
    (tile == tiles - 1 ? write_last : write_full)(
        linear, panel, activations.q + row * in, activations.scales + row * units,
        activations.sums + row * units, bias, y + row * linear.out);
  };
  const int64_t chunk = std::max<int64_t>(4, kChunkBytes / (in * kMaxRows));
  const bool quantize_alone = rows * in <= kSerialQuantize;
  if (rows * in * linear.out < kSerialWork) threads = 1;
  threads = static_cast<int>(std::min<int64_t>(threads, panels));
  if (quantize_alone)
    for (int64_t tile = 0; tile < tiles; ++tile) quantize(tile);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    if (!quantize_alone) {
#pragma omp for schedule(static)
      for (int64_t tile = 0; tile < tiles; ++tile) quantize(tile);
    }
    for (int64_t first = 0; first < tiles; first += chunk) {
      const int64_t stop = std::min(tiles, first + chunk);
#pragma omp for schedule(static) nowait
      for (int64_t panel = 0; panel < panels; ++panel)
        for (int64_t tile = first; tile < stop; ++tile) multiply(tile, panel);
    }
  }
}

void pack_panel(const uint8_t* codes, int64_t out, int64_t in, int bits, int64_t panel,
                uint8_t* packed) {
  const int64_t step = bits == 4 ? 8 : 4;
  for (int64_t i = 0; i < in; i += step) {
    for (int64_t row = panel * kPanel; row < (panel + 1) * kPanel; ++row, packed += 4) {
      uint32_t word = 0;
      if (row < out) {
        std::memcpy(&word, codes + row * in + i, 4);
        if (bits == 4) {
          uint32_t next;
          std::memcpy(&next, codes + row * in + i + 4, 4);
          word |= next << 4;
        }
      }
      std::memcpy(packed, &word, 4);
    }
  }
}

}  // namespace

const char* qtool_isa() { return kIsaName; }

void qtool_pack_codes(const uint8_t* codes, int64_t out, int64_t in, int32_t bits, uint8_t* packed,
                      int64_t packed_bytes, int32_t threads) {
  // Fewer misses of the address cache while the weights stream by: 10 to 15 % of bandwidth.
  const uint64_t begin = reinterpret_cast<uint64_t>(packed);
  const uint64_t from = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uint64_t to = (begin + static_cast<uint64_t>(packed_bytes)) / kHugePage * kHugePage;
  if (from < to) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
  const int64_t panels = ceil_div(out, kPanel), panel_bytes = kPanel * in * bits / 8;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t panel = 0; panel < panels; ++panel)
    pack_panel(codes, out, in, bits, panel, packed + panel * panel_bytes);
}

void qtool_linear(const QtoolLinear* linear, const void* x, int64_t rows, const void* bias, void* y,
                  int32_t type, void* scratch, int32_t threads) {
  if (rows < 1) return;
  if (type == kBfloat16)
    forward(*linear, static_cast<const Bfloat16*>(x), rows, static_cast<const Bfloat16*>(bias),
            static_cast<Bfloat16*>(y), scratch, threads);
  else
    forward(*linear, static_cast<const float*>(x), rows, static_cast<const float*>(bias),
            static_cast<float*>(y), scratch, threads);
}

void qtool_quantize_row(const void* x, int32_t type, int64_t in, int64_t unit, int8_t* q,
                        float* scales, int32_t* sums) {
  if (type == kBfloat16)
    quantize_row(static_cast<const Bfloat16*>(x), in, unit, 0, 1, q, scales, sums);
  else
    quantize_row(static_cast<const float*>(x), in, unit, 0, 1, q, scales, sums);
}
