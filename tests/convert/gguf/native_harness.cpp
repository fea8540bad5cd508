// Every type of the block quantizers on buffers of exactly the size they may touch, with rows and
// columns that leave vectors part-filled. Built with the address and undefined-behaviour sanitizers
// by test_native.py: whatever reads or writes past an end stops it. Values are not checked.

#include "interface.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace {

struct Type {
  int32_t id;
  int64_t width, bytes;
};

constexpr Type kTypes[] = {{2, 32, 18},    {3, 32, 20},    {6, 32, 22},    {7, 32, 24},
                           {8, 32, 34},    {10, 256, 84},  {11, 256, 110}, {12, 256, 144},
                           {13, 256, 176}, {14, 256, 210}, {20, 32, 18},   {23, 256, 136}, {34, 256, 54},
                           {35, 256, 66},  {39, 32, 17}};

uint32_t state = 1;

float draw() {
  state = state * 1664525u + 1013904223u;
  return static_cast<float>(state >> 8) / (1 << 23) - 1.0f;
}

template <class T>
struct Buffer {  // an allocation of its own, so that the sanitizer knows both ends
  explicit Buffer(int64_t count) : data(static_cast<T*>(std::malloc(count * sizeof(T)))) {}
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;
  T* data;
};

void fail(const char* what, int32_t type) {
  std::printf("%s, type %d\n", what, type);
  std::exit(1);
}

// kind: 0 random, 1 zeros, 2 heavy tails, 3 tiny, 4 with an infinity
float value(int kind) {
  const float x = draw();
  if (kind == 1) return 0.0f;
  if (kind == 2) return x * std::exp(8.0f * draw());
  if (kind == 3) return x * 1e-38f;
  return x;
}

void run(const Type& type, int64_t rows, int64_t blocks, bool weighted, int kind, int threads) {
  const int64_t columns = blocks * type.width, count = rows * blocks;
  Buffer<float> weights(rows * columns), importance(columns), sums(rows), back(rows * columns);
  Buffer<uint8_t> data(count * type.bytes);
  for (int64_t i = 0; i < rows * columns; ++i) weights.data[i] = value(kind);
  for (int64_t i = 0; i < columns; ++i) importance.data[i] = i % 5 ? draw() + 1.0f : 0.0f;
  if (kind == 4) weights.data[rows * columns - 1] = INFINITY;
  const int32_t faults =
      qtool_quantize_blocks(type.id, weights.data, weighted ? importance.data : nullptr, sums.data,
                            data.data, rows, columns, threads);
  if (((faults & kInputNotFinite) != 0) != (kind == 4)) fail("infinity not reported", type.id);
  if (kind != 4 && faults != 0) fail("a fault", type.id);
  if (qtool_dequantize_blocks(type.id, data.data, back.data, count, threads) != 0) {
    fail("not read back", type.id);
  }
}

}  // namespace

int main() {
  for (const Type& type : kTypes) {
    for (const int64_t rows : {1, 3, 17}) {
      for (const int64_t blocks : {1, 2, 5}) {
        for (int kind = 0; kind < 5; ++kind) {
          run(type, rows, blocks, false, kind, kind % 2 + 1);
          run(type, rows, blocks, true, kind, kind % 2 + 1);
        }
      }
    }
  }
  if (qtool_quantize_blocks(99, nullptr, nullptr, nullptr, nullptr, 0, 0, 1) != kUnknownType) {
    fail("an unknown type", 99);
  }
  std::printf("%s clean\n", qtool_blocks_isa());
}
