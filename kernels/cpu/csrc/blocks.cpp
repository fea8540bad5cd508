// The blocks of a decoder one after the other, by the operations of this library.
//
//   each block:  x += o(attention(rope(qk_norm(qkv(norm(x))))))
//                x += down(silu(gate(norm(x))) * up(norm(x)))
//
// It adds no arithmetic. What it saves is the way back to Python between the nine operations of a
// block, 3 to 4 us each: for a model of half a billion parameters as much as a sixth of a token.

#include "interface.h"

#include <algorithm>
#include <cstddef>

namespace {

// Cuts a buffer into pieces that start at cache lines.
class Cutter {
 public:
  explicit Cutter(void* from) : next_(static_cast<char*>(from)) {}
  void* cut(int64_t bytes) {
    char* const piece = next_;
    next_ += (bytes + 63) / 64 * 64;
    return piece;
  }
  int64_t used(const void* from) const { return next_ - static_cast<const char*>(from); }

 private:
  char* next_;
};

int64_t linear_scratch(const QtoolLinear& linear, int64_t rows) {
  return (rows * linear.in + 63) / 64 * 64 + rows * (linear.in / linear.unit) * 8;
}

struct Pieces {
  void *normed, *qkv, *query, *attended, *more, *gate_up, *gated, *rounded;

  Pieces(Cutter& cutter, const QtoolDecoder& d, int64_t rows) {
    const int64_t width = d.type == kBfloat16 ? 2 : 4;
    const int64_t attention = d.heads * d.head_dim;
    normed = cutter.cut(rows * d.hidden * width);
    qkv = cutter.cut(rows * (attention + 2 * d.kv_heads * d.head_dim) * width);
    query = cutter.cut(rows * attention * width);
    attended = cutter.cut(rows * attention * width);
    more = cutter.cut(rows * d.hidden * width);
    gate_up = cutter.cut(rows * 2 * d.ffn * width);
    gated = cutter.cut(rows * d.ffn * width);
    int64_t largest = 0;
    for (int64_t i = 0; i < d.num_blocks; ++i)
      for (const QtoolLinear* linear :
           {d.blocks[i].qkv, d.blocks[i].o, d.blocks[i].gate_up, d.blocks[i].down})
        largest = std::max(largest, linear_scratch(*linear, rows));
    rounded = cutter.cut(largest);
  }
};

}  // namespace

int64_t qtool_blocks_scratch(const QtoolDecoder* decoder, int64_t rows) {
  alignas(64) char origin[64];
  Cutter cutter(origin);
  Pieces(cutter, *decoder, rows);
  return cutter.used(origin);
}

bool qtool_blocks(const QtoolDecoder* decoder, void* x, const float* cos, const float* sin,
                  const int64_t* slots, const QtoolSpans* spans, int64_t rows, void* scratch,
                  int32_t threads) {
  const QtoolDecoder& d = *decoder;
  Cutter cutter(scratch);
  const Pieces p(cutter, d, rows);
  const auto linear = [&](const QtoolLinear* weight, const void* bias, const void* from, void* to) {
    qtool_linear(weight, from, rows, bias, to, d.type, p.rounded, threads);
  };
  const auto norm = [&](const void* residual, const void* weight) {
    qtool_rms_norm(x, residual, weight, p.normed, rows, d.hidden, d.eps, d.type, threads);
  };
  for (int64_t i = 0; i < d.num_blocks; ++i) {
    const QtoolBlock& block = d.blocks[i];
    norm(i == 0 ? nullptr : p.more, block.attn_norm);
    linear(block.qkv, block.qkv_bias, p.normed, p.qkv);
    qtool_rope_and_write(p.qkv, block.qk_norm, d.eps, cos, sin, slots, p.query, block.keys,
                         block.values, rows, d.heads, d.kv_heads, d.head_dim, d.pool_slots, d.type,
                         threads);
    if (!qtool_paged_attention(p.query, block.keys, block.values, spans, p.attended, d.heads,
                               d.kv_heads, d.head_dim, d.pool_slots, d.scale, d.type, threads))
      return false;
    linear(block.o, block.o_bias, p.attended, p.more);
    norm(p.more, block.mlp_norm);
    linear(block.gate_up, block.gate_up_bias, p.normed, p.gate_up);
    qtool_silu_mul(p.gate_up, p.gated, rows, d.ffn, d.type, threads);
    linear(block.down, block.down_bias, p.gated, p.more);
  }
  // The last residual; the norm that comes with it is not used.
  if (d.num_blocks > 0) norm(p.more, nullptr);
  return true;
}
