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

QtoolLinear make_linear(const Buffer& codes, const Buffer& scales, int64_t out, int64_t in,
                        int64_t group, int bits, int scale_type) {
  QtoolLinear linear = {};
  linear.codes = static_cast<uint8_t*>(codes.data);
  linear.scales = scales.data;
  linear.out = out;
  linear.in = in;
  linear.group = group;
  linear.step = linear.span = group % 128 == 0 ? 128 : group % 64 == 0 ? 64 : 32;
  linear.bits = bits;
  linear.scale_type = scale_type;
  linear.midpoint = 1 << (bits - 1);
  return linear;
}

void run(const QtoolLinear& linear, int64_t rows, int type, int y_type, int threads) {
  Numbers x(rows * linear.in, type), bias(linear.out, y_type), y(rows * linear.out, y_type);
  Buffer scratch(static_cast<size_t>(qtool_linear_scratch(&linear, rows)));
  qtool_linear(&linear, x.data, type, rows, rows % 2 ? bias.data : nullptr, y.data, y_type,
               scratch.data, threads);
  if (rows == 0) return;
  Buffer one(static_cast<size_t>(qtool_linear_scratch(&linear, 1)));
  qtool_round_row(&linear, x.data, type, one.data);
}

void linear(int64_t out, int64_t in, int64_t group, int bits, bool with_zeros, int scale_type,
            int64_t rows, int type, int threads) {
  const int64_t panels = (out + 31) / 32, groups = in / group;
  Buffer codes(out * in), packed(panels * 32 * in * bits / 8), zeros(panels * groups * 32);
  for (size_t i = 0; i < codes.size; ++i)
    static_cast<uint8_t*>(codes.data)[i] = static_cast<uint8_t>(draw(1u << bits));
  Buffer scales(panels * groups * 32 * width(scale_type));
  qtool_pack_codes(static_cast<uint8_t*>(codes.data), out, in, bits,
                   static_cast<uint8_t*>(packed.data), threads);
  QtoolLinear description = make_linear(packed, scales, out, in, group, bits, scale_type);
  if (with_zeros) description.zeros = static_cast<uint8_t*>(zeros.data);
  run(description, rows, type, type, threads);
  run(description, rows, type, kFloat32, threads);
}

// A GGUF type by its number, block and what the library keeps of it; see native_linear.py.
struct BlockType {
  int number, block, bytes, bits, group, kind, field_bytes;
  bool offsets, table;
};
const BlockType kBlockTypes[] = {
    {2, 32, 18, 4, 32, 0, 0, false, false},    {3, 32, 20, 4, 32, 0, 0, true, false},
    {6, 32, 22, 5, 32, 0, 0, false, false},    {7, 32, 24, 5, 32, 0, 0, true, false},
    {8, 32, 34, 8, 32, 0, 0, false, false},    {10, 256, 84, 2, 16, 4, 16, true, false},
    {11, 256, 110, 3, 16, 2, 12, false, false}, {12, 256, 144, 4, 32, 1, 12, true, false},
    {13, 256, 176, 5, 32, 1, 12, true, false}, {14, 256, 210, 6, 16, 3, 16, false, false},
    {20, 32, 18, 4, 32, 0, 0, false, true},    {23, 256, 136, 4, 32, 5, 6, false, true},
    {35, 256, 66, 2, 256, 0, 0, false, false}, {39, 32, 17, 4, 32, 0, 0, false, true},
};

void block_linear(const BlockType& t, int64_t out, int64_t in, int64_t rows, int type,
                  int threads) {
  const int64_t panels = (out + 31) / 32, per_scale = t.field_bytes ? 256 : t.group;
  const int64_t scale_bytes = t.number == 39 ? 1 : 2;
  Buffer data(out * in / t.block * t.bytes), codes(panels * 32 * in * t.bits / 8);
  Buffer scales(panels * 32 * in / per_scale * scale_bytes), table(16);
  Buffer offsets(t.offsets ? scales.size : 0), fields(panels * 32 * in / 256 * t.field_bytes);
  for (size_t i = 0; i < data.size; ++i)
    static_cast<uint8_t*>(data.data)[i] = static_cast<uint8_t>(draw(256));
  qtool_pack_blocks(t.number, static_cast<uint8_t*>(data.data), out, in,
                    static_cast<uint8_t*>(codes.data),
                    static_cast<uint8_t*>(scales.data),
                    t.offsets ? static_cast<uint8_t*>(offsets.data) : nullptr,
                    t.field_bytes ? static_cast<uint8_t*>(fields.data) : nullptr, threads);
  QtoolLinear linear = make_linear(codes, scales, out, in, t.group, t.bits,
                                   t.number == 39 ? kExponent8 : kFloat16);
  if (t.group == 16) linear.step = 16, linear.span = 32;
  linear.scale_kind = t.kind;
  if (t.offsets) linear.offsets = offsets.data;
  if (t.field_bytes) linear.fields = static_cast<uint8_t*>(fields.data);
  if (t.table) linear.table = static_cast<uint8_t*>(table.data);
  run(linear, rows, type, type, threads);
}

void elementwise(int64_t rows, int64_t channels, int type, int threads) {
  Numbers x(rows * channels, type), more(rows * channels, type), weight(channels, kFloat32);
  Numbers y(rows * channels, type), gate_up(rows * 2 * channels, type);
  qtool_rms_norm(x.data, nullptr, static_cast<float*>(weight.data), y.data, rows, channels, 1e-5f, type, threads);
  qtool_rms_norm(x.data, more.data, nullptr, y.data, rows, channels, 1e-5f, type, threads);
  for (const int activation : {kSilu, kGelu})
    qtool_gate_mul(gate_up.data, y.data, rows, channels, activation, type, threads);
}

// One layer's cache, of the activations' type or of 8 bits.
struct CacheBuffers {
  Buffer keys, values, key_scales, value_scales;
  QtoolCache cache;

  CacheBuffers(int64_t kv_heads, int64_t slots, int64_t key_dim, int64_t value_dim, int type,
               bool small)
      : keys(kv_heads * slots * key_dim * (small ? 1 : width(type))),
        values(kv_heads * slots * value_dim * (small ? 1 : width(type))),
        key_scales(kv_heads * slots * 4),
        value_scales(kv_heads * slots * 4),
        cache{keys.data,
              values.data,
              small ? static_cast<float*>(key_scales.data) : nullptr,
              small ? static_cast<float*>(value_scales.data) : nullptr,
              kv_heads,
              key_dim,
              value_dim,
              slots} {}
};

void rope(int64_t rows, int64_t heads, int64_t kv_heads, int64_t head_dim, int type, bool small,
          int threads) {
  const int64_t all = heads + 2 * kv_heads, pool_slots = rows + 3;
  Numbers qkv(rows * all * head_dim, type), norm((heads + kv_heads) * head_dim, kFloat32);
  Numbers cos(rows * head_dim / 2, kFloat32), sin(rows * head_dim / 2, kFloat32);
  Numbers query(rows * heads * head_dim, type);
  Numbers key(rows * kv_heads * head_dim, type);
  const CacheBuffers pools(kv_heads, pool_slots, head_dim, head_dim, type, small);
  std::vector<int64_t> slots;
  for (int64_t row = 0; row < rows; ++row) slots.push_back(pool_slots - 1 - row);
  const float* c = static_cast<float*>(cos.data);
  const float* s = static_cast<float*>(sin.data);
  qtool_rope(qkv.data, all * head_dim, c, s, query.data, rows, heads, head_dim, type, threads);
  for (const float* gains : {static_cast<float*>(norm.data), static_cast<float*>(nullptr)})
    qtool_rope_and_write(qkv.data, gains, 1e-5f, c, s, slots.data(), query.data, &pools.cache, rows,
                         heads, type, threads);
  qtool_write_cache(key.data, key.data, slots.data(), &pools.cache, rows, type, threads);
}

void attention(const std::vector<std::pair<int64_t, int64_t>>& sizes, int64_t heads,
               int64_t kv_heads, int64_t key_dim, int64_t value_dim, int64_t block_size,
               int64_t window, bool extras, int type, int threads) {
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
  Numbers query(rows * heads * key_dim, type), y(rows * heads * value_dim, type);
  Numbers sinks(heads, kFloat32);
  const CacheBuffers pools(kv_heads, pool_slots, key_dim, value_dim, type, extras);
  // Exact copies of the tables: vectors may hold more than they show.
  const QtoolSpans spans = {queries.data(), lengths.data(), first_blocks.data(), blocks.data(),
                            static_cast<int64_t>(sizes.size()), block_size};
  const QtoolAttention rule = {heads, window, extras ? static_cast<float*>(sinks.data) : nullptr,
                               0.1f, extras ? 20.0f : 0.0f};
  if (!qtool_paged_attention(query.data, &pools.cache, &spans, &rule, y.data, type, threads))
    std::abort();
}

// Two blocks in one call, their scratch as large as the library says and no larger.
void blocks(int64_t rows, int type, bool extras, int threads) {
  const int64_t hidden = 64, ffn = 96, heads = 3, kv_heads = 1, head_dim = 32, block_size = 16;
  const int64_t pool_slots = (rows + block_size - 1) / block_size * block_size;
  const int64_t widest = 2 * ffn, panels = widest / 32;
  Buffer codes(panels * 32 * 96 / 2), scales(panels * 3 * 32 * 2);
  Numbers norms(hidden, kFloat32), head_norm((heads + kv_heads) * head_dim, kFloat32);
  Numbers bias(widest, type);
  const float* const norm = static_cast<float*>(norms.data);
  std::vector<QtoolLinear> made;
  made.reserve(16);
  const auto linears = [&](int64_t out, int64_t in, int64_t parts) {
    QtoolLinears all = {};
    all.bias = extras ? bias.data : nullptr;
    all.count = parts;
    all.out = out;
    for (int64_t part = 0; part < parts; ++part) {
      made.push_back(make_linear(codes, scales, out / parts, in, 32, 4, kFloat16));
      if (part == 1) made.back().group = made.back().step = made.back().span = in % 64 ? 32 : 64;
      all.parts[part] = &made.back();
    }
    return all;
  };
  const CacheBuffers pools(kv_heads, pool_slots, head_dim, head_dim, type, extras);
  QtoolBlock block = {};
  block.attn_norm = block.mlp_norm = norm;
  block.rotated = extras ? 20 : head_dim;
  block.residual_scale = 1.0f;
  block.qkv = linears((heads + 2 * kv_heads) * head_dim, hidden, 1);
  block.o = linears(hidden, heads * head_dim, 1);
  block.gate_up = linears(2 * ffn, hidden, extras ? 2 : 1);
  block.down = linears(hidden, ffn, 1);
  block.cache = pools.cache;
  block.rule = {heads, 0, nullptr, 0.1f, 0.0f};
  if (extras) {
    block.qk_norm = static_cast<float*>(head_norm.data);
    block.post_attn_norm = block.post_mlp_norm = norm;
    block.rotation = 1;
  }
  const QtoolBlock both[] = {block, block};
  const QtoolDecoder decoder = {both, 2, hidden, ffn, head_dim / 2, 1e-5f, type, extras ? kGelu : kSilu,
                                nullptr};
  Numbers x(rows * hidden, type);
  Numbers cos(2 * rows * head_dim / 2, kFloat32), sin(2 * rows * head_dim / 2, kFloat32);
  std::vector<int64_t> slots, ids;
  for (int64_t row = 0; row < rows; ++row) slots.push_back(row);
  for (int64_t id = 0; id < pool_slots / block_size; ++id) ids.push_back(id);
  const int64_t zero = 0;
  const QtoolSpans spans = {&rows, &rows, &zero, ids.data(), 1, block_size};
  Buffer scratch(qtool_blocks_scratch(&decoder, rows));
  if (!qtool_blocks(&decoder, x.data, static_cast<float*>(cos.data), static_cast<float*>(sin.data),
                    slots.data(), &spans, rows, scratch.data, threads))
    std::abort();
}

}  // namespace

int main() {
  for (const int type : {kFloat32, kBfloat16})
    for (const int threads : {1, 2}) {
      for (const int bits : {2, 3, 4, 5, 6, 8})
        for (const bool with_zeros : {false, true})
          for (const int64_t out : {1, 31, 32, 100})
            for (const auto& [in, group] : std::vector<std::pair<int64_t, int64_t>>{
                     {32, 32}, {96, 96}, {128, 64}, {256, 128}})
              for (const int64_t rows : {0, 1, 2, 3, 5, 8, 13})
                linear(out, in, group, bits, with_zeros, with_zeros ? kFloat32 : kFloat16, rows,
                       type, threads);
      linear(70, 2048, 128, 4, true, kFloat16, 150, type, threads);
      for (const BlockType& block : kBlockTypes)
        for (const int64_t out : {1, 33})
          for (const int64_t in : {256, 768})
            for (const int64_t rows : {1, 3, 9}) block_linear(block, out, in, rows, type, threads);
      for (const int64_t channels : {1, 7, 8, 15, 16, 17, 1000})
        for (const int64_t rows : {1, 3, 40}) elementwise(rows, channels, type, threads);
      for (const bool small : {false, true})
        for (const int64_t head_dim : {2, 6, 16, 20, 64, 576})
          for (const int64_t rows : {1, 40}) rope(rows, 4, 2, head_dim, type, small, threads);
      for (const bool extras : {false, true}) {
        for (const int64_t head_dim : {2, 20, 64})
          for (const int64_t block_size : {1, 32, 100})
            for (const int64_t window : {0, 50})
              for (const int64_t heads : {2, 14})
                attention({{1, 1}, {1, 33}, {40, 40}, {3, 520}, {1, 1030}}, heads, 2, head_dim,
                          head_dim, block_size, window, extras, type, threads);
        attention({{1, 1500}}, 66, 1, 64, 64, 32, 0, extras, type, threads);
        attention({{20, 40}}, 3, 1, 576, 512, 32, 7, extras, type, threads);
        attention({{20, 40}}, 3, 1, 24, 40, 32, 7, extras, type, threads);
        for (const int64_t rows : {1, 5, 50}) blocks(rows, type, extras, threads);
      }
    }
  std::printf("%s clean\n", qtool_isa());
}
