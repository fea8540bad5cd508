// Every function of the library on buffers of exactly the size it may touch, over awkward shapes.
// Built with the address and undefined-behaviour sanitizers by test_native_build.py: whatever reads
// or writes past an end stops it. Values are not checked here.

#include "interface.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

namespace {

uint32_t state = 1;

// 0 .. below - 1, from a linear congruence: good enough to fill buffers, and quick.
uint32_t draw(uint32_t below) {
  state = state * 1664525u + 1013904223u;
  return (state >> 8) % below;
}

size_t width(int type) { return type == kFloat32 ? 4 : 2; }

// An allocation of its own, so that the sanitizer knows both ends; aligned as malloc aligns.
struct Buffer {
  explicit Buffer(size_t bytes) : data(std::malloc(bytes ? bytes : 1)), size(bytes) {
    std::memset(data, 0, bytes);
  }
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;
  void* data;
  size_t size;
};

struct Numbers : Buffer {
  Numbers(int64_t count, int type) : Buffer(static_cast<size_t>(count) * width(type)) {
    for (int64_t i = 0; i < count; ++i) {
      const float value = (static_cast<float>(draw(2000)) - 1000.0f) / 500.0f;
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      if (type == kFloat32)
        static_cast<float*>(data)[i] = value;
      else
        static_cast<uint16_t*>(data)[i] = static_cast<uint16_t>(bits >> 16);
    }
  }
};

void linear(int64_t out, int64_t in, int64_t group, int bits, bool with_zeros, int scale_type,
            int64_t rows, int type, int threads) {
  const int64_t panels = (out + 31) / 32, groups = in / group;
  const int64_t unit = group % 128 == 0 ? 128 : group % 64 == 0 ? 64 : 32;
  Buffer codes(out * in), packed(panels * 32 * in * bits / 8), zeros(panels * groups * 32);
  for (size_t i = 0; i < codes.size; ++i)
    static_cast<uint8_t*>(codes.data)[i] = static_cast<uint8_t>(draw(1u << bits));
  Buffer scales(panels * groups * 32 * width(scale_type));
  qtool_pack_codes(static_cast<uint8_t*>(codes.data), out, in, bits,
                   static_cast<uint8_t*>(packed.data), packed.size, threads);
  const QtoolLinear description = {static_cast<uint8_t*>(packed.data), scales.data,
                                   with_zeros ? static_cast<uint8_t*>(zeros.data) : nullptr, out, in,
                                   group, unit, bits, scale_type, 1 << (bits - 1)};
  Numbers x(rows * in, type), bias(out, type), y(rows * out, type);
  Buffer scratch((rows * in + 63) / 64 * 64 + rows * (in / unit) * 8);
  qtool_linear(&description, x.data, rows, rows % 2 ? bias.data : nullptr, y.data, type,
               scratch.data, threads);
  if (rows == 0) return;
  Buffer q(in), unit_scales(in / unit * 4), sums(in / unit * 4);
  qtool_quantize_row(x.data, type, in, unit, static_cast<int8_t*>(q.data),
                     static_cast<float*>(unit_scales.data), static_cast<int32_t*>(sums.data));
}

void elementwise(int64_t rows, int64_t channels, int type, int threads) {
  Numbers x(rows * channels, type), more(rows * channels, type), weight(channels, type);
  Numbers y(rows * channels, type), gate_up(rows * 2 * channels, type);
  qtool_rms_norm(x.data, nullptr, weight.data, y.data, rows, channels, 1e-5f, type, threads);
  qtool_rms_norm(x.data, more.data, nullptr, y.data, rows, channels, 1e-5f, type, threads);
  qtool_silu_mul(gate_up.data, y.data, rows, channels, type, threads);
}

void rope(int64_t rows, int64_t heads, int64_t kv_heads, int64_t head_dim, int type, int threads) {
  const int64_t all = heads + 2 * kv_heads, pool_slots = rows + 3;
  Numbers qkv(rows * all * head_dim, type), norm((heads + kv_heads) * head_dim, type);
  Numbers cos(rows * head_dim / 2, kFloat32), sin(rows * head_dim / 2, kFloat32);
  Numbers query(rows * heads * head_dim, type);
  Numbers keys(kv_heads * pool_slots * head_dim, type), values(kv_heads * pool_slots * head_dim, type);
  std::vector<int64_t> slots;
  for (int64_t row = 0; row < rows; ++row) slots.push_back(pool_slots - 1 - row);
  const float* c = static_cast<float*>(cos.data);
  const float* s = static_cast<float*>(sin.data);
  qtool_rope(qkv.data, all * head_dim, c, s, query.data, rows, heads, head_dim, type, threads);
  for (void* gains : {norm.data, static_cast<void*>(nullptr)})
    qtool_rope_and_write(qkv.data, gains, 1e-5f, c, s, slots.data(), query.data, keys.data,
                         values.data, rows, heads, kv_heads, head_dim, pool_slots, type, threads);
}

void attention(const std::vector<std::pair<int64_t, int64_t>>& sizes, int64_t heads,
               int64_t kv_heads, int64_t head_dim, int64_t block_size, int64_t window, int type,
               int threads) {
  std::vector<int64_t> queries, lengths, first_blocks, blocks;
  int64_t rows = 0;
  for (const auto& [count, length] : sizes) {
    queries.push_back(count);
    lengths.push_back(length);
    first_blocks.push_back(static_cast<int64_t>(blocks.size()));
    for (int64_t t = 0; t < length; t += block_size)
      blocks.push_back(static_cast<int64_t>(blocks.size()));
    rows += count;
  }
  for (int64_t& block : blocks) std::swap(block, blocks[draw(static_cast<uint32_t>(blocks.size()))]);
  const int64_t pool_slots = static_cast<int64_t>(blocks.size()) * block_size;
  Numbers query(rows * heads * head_dim, type), y(rows * heads * head_dim, type);
  Numbers keys(kv_heads * pool_slots * head_dim, type), values(kv_heads * pool_slots * head_dim, type);
  // Exact copies of the tables: vectors may hold more than they show.
  const QtoolSpans spans = {queries.data(), lengths.data(), first_blocks.data(), blocks.data(),
                            static_cast<int64_t>(sizes.size()), block_size, window};
  if (!qtool_paged_attention(query.data, keys.data, values.data, &spans, y.data, heads, kv_heads,
                             head_dim, pool_slots, 0.1f, type, threads))
    std::abort();
}

// Two blocks in one call, their scratch as large as the library says and no larger.
void blocks(int64_t rows, int type, int threads) {
  const int64_t hidden = 64, ffn = 96, heads = 3, kv_heads = 1, head_dim = 32, block_size = 16;
  const int64_t pool_slots = (rows + block_size - 1) / block_size * block_size;
  const int64_t widest = 2 * ffn, panels = widest / 32;
  Buffer codes(panels * 32 * 96 / 2), scales(panels * 3 * 32 * 2);
  const auto linear = [&](int64_t out, int64_t in) {
    return QtoolLinear{static_cast<uint8_t*>(codes.data), scales.data, nullptr, out, in, 32, 32, 4,
                       kFloat16, 8};
  };
  const QtoolLinear qkv = linear((heads + 2 * kv_heads) * head_dim, hidden);
  const QtoolLinear o = linear(hidden, heads * head_dim), gate_up = linear(2 * ffn, hidden);
  const QtoolLinear down = linear(hidden, ffn);
  Numbers norm(hidden, type), head_norm((heads + kv_heads) * head_dim, type), bias(widest, type);
  Numbers keys(kv_heads * pool_slots * head_dim, type), values(kv_heads * pool_slots * head_dim, type);
  const QtoolBlock block = {norm.data, &qkv,     bias.data, head_norm.data, &o,
                            nullptr,   norm.data, &gate_up,  nullptr,        &down,
                            bias.data, keys.data, values.data};
  const QtoolBlock both[] = {block, block};
  const QtoolDecoder decoder = {both, 2, hidden, ffn, heads, kv_heads, head_dim, pool_slots,
                                1e-5f, 0.1f, type};
  Numbers x(rows * hidden, type), cos(rows * head_dim / 2, kFloat32), sin(rows * head_dim / 2, kFloat32);
  std::vector<int64_t> slots, ids;
  for (int64_t row = 0; row < rows; ++row) slots.push_back(row);
  for (int64_t id = 0; id < pool_slots / block_size; ++id) ids.push_back(id);
  const int64_t zero = 0;
  const QtoolSpans spans = {&rows, &rows, &zero, ids.data(), 1, block_size, 0};
  Buffer scratch(qtool_blocks_scratch(&decoder, rows));
  if (!qtool_blocks(&decoder, x.data, static_cast<float*>(cos.data), static_cast<float*>(sin.data),
                    slots.data(), &spans, rows, scratch.data, threads))
    std::abort();
}

}  // namespace

int main() {
  for (const int type : {kFloat32, kBfloat16})
    for (const int threads : {1, 2}) {
      for (const int bits : {4, 8})
        for (const bool with_zeros : {false, true})
          for (const int64_t out : {1, 31, 32, 100})
            for (const auto& [in, group] : std::vector<std::pair<int64_t, int64_t>>{
                     {32, 32}, {96, 96}, {128, 64}, {256, 128}})
              for (const int64_t rows : {0, 1, 2, 3, 5, 8, 13})
                linear(out, in, group, bits, with_zeros, with_zeros ? kFloat32 : kFloat16, rows,
                       type, threads);
      linear(70, 2048, 128, 4, true, kFloat16, 150, type, threads);
      for (const int64_t channels : {1, 7, 8, 15, 16, 17, 1000})
        for (const int64_t rows : {1, 3, 40}) elementwise(rows, channels, type, threads);
      for (const int64_t head_dim : {2, 6, 16, 20, 64, 512})
        for (const int64_t rows : {1, 40}) rope(rows, 4, 2, head_dim, type, threads);
      for (const int64_t head_dim : {2, 20, 64})
        for (const int64_t block_size : {1, 32, 100})
          for (const int64_t window : {0, 50})
            for (const int64_t heads : {2, 14})
              attention({{1, 1}, {1, 33}, {40, 40}, {3, 520}, {1, 1030}}, heads, 2, head_dim,
                        block_size, window, type, threads);
      attention({{1, 1500}}, 66, 1, 64, 32, 0, type, threads);
      attention({{20, 40}}, 3, 1, 512, 32, 7, type, threads);
      for (const int64_t rows : {1, 5, 50}) blocks(rows, type, threads);
    }
  std::printf("%s clean\n", qtool_isa());
}
