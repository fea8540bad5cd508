// The blocks of a decoder one after the other, by the operations of this library.
//
//   each block:  x += scale * post_norm(o(attention(rope(qk_norm(qkv(norm(x)))))))
//                x += scale * post_norm(down(act(gate(norm(x))) * up(norm(x))))
//
// Norms that a model does not have are left out. It adds no arithmetic: one operation called after
// the other gives the same bits. What it saves is the way back to Python between them, waking the
// threads for each, and with few rows the waits between steps that one thread can do at once.

#include "attention.h"
#include "linear.h"

#include <new>

namespace {

constexpr int64_t kParts = 3;
// Channels of a row that one thread gates and rounds at once.
constexpr int64_t kGated = 1024;
// Channels between two bursts of asking ahead, a multiple of every span: as long as a burst takes.
constexpr int64_t kSlice = 128;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

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

struct Pieces {
  void *normed, *qkv, *query, *attended, *more, *gate_up, *gated;
  void* rounded[kParts];

  Pieces(Cutter& cutter, const QtoolDecoder& d, int64_t rows) {
    const int64_t width = d.type == kBfloat16 ? 2 : 4;
    int64_t qkv_out = 0, queries = 0, values = 0, gate_up_out = 0, largest = 0;
    for (int64_t i = 0; i < d.num_blocks; ++i) {
      const QtoolBlock& block = d.blocks[i];
      qkv_out = std::max(qkv_out, block.qkv.out);
      gate_up_out = std::max(gate_up_out, block.gate_up.out);
      queries = std::max(queries, block.rule.heads * block.cache.key_dim);
      values = std::max(values, block.rule.heads * block.cache.value_dim);
      for (const QtoolLinears* linears : {&block.qkv, &block.o, &block.gate_up, &block.down})
        for (int64_t part = 0; part < linears->count; ++part)
          largest = std::max(largest, Activations::bytes(*linears->parts[part], rows));
    }
    normed = cutter.cut(rows * d.hidden * width);
    qkv = cutter.cut(rows * qkv_out * width);
    query = cutter.cut(rows * queries * width);
    attended = cutter.cut(rows * values * width);
    more = cutter.cut(rows * d.hidden * width);
    gate_up = cutter.cut(rows * gate_up_out * width);
    gated = cutter.cut(rows * d.ffn * width);
    for (void*& each : rounded) each = cutter.cut(largest);
  }
};

// Linears of one input, and that input rounded as each of them wants it.
template <class T>
class Product {
 public:
  Product(const QtoolLinears& linears, int64_t rows, const Pieces& pieces) : linears_(linears) {
    for (int64_t part = 0; part < linears.count; ++part) {
      const QtoolLinear& linear = *linears.parts[part];
      int64_t like = 0;
      while (like < num_forms_ && !forms_[like].fit(linear)) ++like;
      if (like == num_forms_) forms_[num_forms_++] = Activations(linear, rows, pieces.rounded[like]);
      form_of_[part] = like;
    }
  }

  // A whole row, asking ahead.
  void round(Team& team, const T* x, int64_t row) const {
    for (int64_t first = 0; first < forms_[0].in; first += kSlice) {
      team.ahead().ask();
      round(x, row, first, std::min(kSlice, forms_[0].in - first));
    }
  }
  void round(const T* x, int64_t row, int64_t first, int64_t count) const {
    for (int64_t i = 0; i < num_forms_; ++i) round_part(x, row, first, count, forms_[i]);
  }

  void write(Team& team, T* y) const {
    const T* bias = static_cast<const T*>(linears_.bias);
    for (int64_t part = 0; part < linears_.count; ++part) {
      const QtoolLinear& linear = *linears_.parts[part];
      multiply(team, linear, forms_[form_of_[part]], bias, y, linears_.out);
      y += linear.out;
      if (bias != nullptr) bias += linear.out;
    }
  }

 private:
  const QtoolLinears& linears_;
  Activations forms_[kParts];
  int64_t num_forms_ = 0;
  int64_t form_of_[kParts] = {};
};

// Keeps the weights of the next two of a decoder's linears in the queue of what is asked for ahead.
// With many rows products wait for their arithmetic, not for weights: nothing is.
class Upcoming {
 public:
  Upcoming(Team& team, const QtoolDecoder& d, int64_t rows)
      : team_(team), d_(d), any_(kAheadBytes > 0 && rows <= kFewRows) {
    add(0);
    add(1);
  }
  bool any() const { return any_; }

  // Linears `index` of the decoder, four a block, are about to be read.
  void begin(int64_t index) {
    team_.ahead().skip(ends_[index % 2]);
    add(index + 2);
  }

 private:
  static constexpr int64_t kFewRows = 16;

  void add(int64_t index) {
    if (!any_ || index >= 4 * d_.num_blocks) return;
    const QtoolBlock& block = d_.blocks[index / 4];
    const QtoolLinears* const all[] = {&block.qkv, &block.o, &block.gate_up, &block.down};
    const QtoolLinears& linears = *all[index % 4];
    for (int64_t part = 0; part < linears.count; ++part) expect(team_, *linears.parts[part]);
    ends_[index % 2] = team_.ahead().end();
  }

  Team& team_;
  const QtoolDecoder& d_;
  const bool any_;
  int64_t ends_[2] = {};
};

template <class T>
void run_blocks(Team& team, const QtoolDecoder& d, T* x, const float* cos, const float* sin,
                const int64_t* slots, const QtoolSpans& spans, int64_t rows, const Pieces& p,
                const AttentionPlan* const* plans, bool& failed) {
  T* const normed = static_cast<T*>(p.normed);
  T* const qkv = static_cast<T*>(p.qkv);
  T* const query = static_cast<T*>(p.query);
  T* const attended = static_cast<T*>(p.attended);
  T* const more = static_cast<T*>(p.more);
  T* const gate_up = static_cast<T*>(p.gate_up);
  T* const gated = static_cast<T*>(p.gated);
  const int64_t hidden = d.hidden, ffn = d.ffn;
  const auto each_row = [&](auto f) {
    team.each(rows, team.share(rows, 4), [&](int64_t row) {
      team.ahead().ask();
      f(row);
    });
  };
  Upcoming upcoming(team, d, rows);
  // x += scale * post_norm(more), if there is more; then the next linears' input, if there are any.
  struct Left {
    bool any;
    float scale;
    const float* post_norm;
  };
  const auto pass_on = [&](const Left& left, const float* norm, const Product<T>* next) {
    each_row([&](int64_t row) {
      T* const from = x + row * hidden;
      T* const added = left.any ? more + row * hidden : nullptr;
      if (left.post_norm != nullptr)
        norm_row<T>(added, nullptr, 0.0f, left.post_norm, added, hidden, d.eps);
      if (next != nullptr && norm != nullptr) {
        T* const to = normed + row * hidden;
        norm_row<T>(from, added, left.scale, norm, to, hidden, d.eps);
        next->round(team, to, row);
        return;
      }
      if (added != nullptr) add_row<T>(from, added, left.scale, hidden);
      if (next != nullptr) next->round(team, from, row);
    });
  };

  // What all ranks give, of what this one does; the caller is member 0.
  const auto summed = [&](T* values) {
    if (d.sum == nullptr) return true;
    if (team.index() == 0) failed = d.sum(values, rows * hidden) == 0;
    team.barrier();
    return !failed;
  };

  Left left = {false, 1.0f, nullptr};
  for (int64_t i = 0; i < d.num_blocks; ++i) {
    const QtoolBlock& block = d.blocks[i];
    const Heads heads = {block.rule.heads, block.cache.kv_heads, block.cache.key_dim};
    const Pool keys = key_pool(block.cache), values = value_pool(block.cache);
    const float* const block_cos = cos + block.rotation * rows * d.half;
    const float* const block_sin = sin + block.rotation * rows * d.half;

    const Product<T> to_qkv(block.qkv, rows, p);
    pass_on(left, block.attn_norm, &to_qkv);
    const int64_t cached_bytes = block.cache.key_scales == nullptr ? sizeof(T) : 1;
    if (upcoming.any())
      ask_for_cache(team, block.cache, spans, block.rule, cached_bytes, *plans[i]);
    upcoming.begin(4 * i);
    to_qkv.write(team, qkv);
    each_row([&](int64_t row) {
      rope_and_write_row(qkv + row * block.qkv.out, block.qk_norm, d.eps, block_cos + row * d.half,
                         block_sin + row * d.half, block.rotated, slots[row],
                         query + row * heads.query * heads.dim, heads, keys, values);
    });
    attend(team, query, block.cache, spans, block.rule, *plans[i], attended);

    const Product<T> to_o(block.o, rows, p);
    const int64_t mixed = block.rule.heads * block.cache.value_dim;
    each_row([&](int64_t row) { to_o.round(team, attended + row * mixed, row); });
    upcoming.begin(4 * i + 1);
    to_o.write(team, more);
    if (!summed(more)) return;

    const Product<T> to_gate_up(block.gate_up, rows, p);
    pass_on({true, block.residual_scale, block.post_attn_norm}, block.mlp_norm, &to_gate_up);
    upcoming.begin(4 * i + 2);
    to_gate_up.write(team, gate_up);

    const Product<T> to_down(block.down, rows, p);
    const int64_t pieces = ceil_div(ffn, kGated);
    team.each(rows * pieces, team.share(rows * pieces, 4), [&](int64_t piece) {
      const int64_t row = piece / pieces, first = piece % pieces * kGated;
      const int64_t count = std::min(kGated, ffn - first);
      const T* const gates = gate_up + row * 2 * ffn;
      for (int64_t at = first; at < first + count; at += kSlice) {
        team.ahead().ask();
        const int64_t held = std::min(kSlice, first + count - at);
        gate_row(gates + at, gates + ffn + at, gated + row * ffn + at, held, d.activation);
        to_down.round(gated + row * ffn, row, at, held);
      }
    });
    upcoming.begin(4 * i + 3);
    to_down.write(team, more);
    if (!summed(more)) return;
    left = {true, block.residual_scale, block.post_mlp_norm};
  }
  if (left.any) pass_on(left, nullptr, nullptr);
}

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
  if (rows < 1) return true;
  Cutter cutter(scratch);
  const Pieces pieces(cutter, d, rows);
  // Layers with the same window and shape are cut alike.
  struct Shape {
    int64_t window, heads, kv_heads, key_dim, value_dim;
    bool operator==(const Shape& o) const {
      return window == o.window && heads == o.heads && kv_heads == o.kv_heads &&
             key_dim == o.key_dim && value_dim == o.value_dim;
    }
  };
  constexpr int kMostPlans = 8;
  Shape shapes[kMostPlans];
  AttentionPlan made[kMostPlans];
  int num_plans = 0;
  const std::unique_ptr<const AttentionPlan*[]> plans(
      new (std::nothrow) const AttentionPlan*[static_cast<size_t>(d.num_blocks)]);
  if (!plans) return false;
  for (int64_t i = 0; i < d.num_blocks; ++i) {
    const QtoolBlock& block = d.blocks[i];
    const Shape shape = {block.rule.window, block.rule.heads, block.cache.kv_heads,
                         block.cache.key_dim, block.cache.value_dim};
    int plan = 0;
    while (plan < num_plans && !(shapes[plan] == shape)) ++plan;
    if (plan == num_plans) {
      if (num_plans == kMostPlans) return false;
      if (!made[plan].make(*spans, block.rule, block.cache, threads)) return false;
      shapes[num_plans++] = shape;
    }
    plans[i] = &made[plan];
  }
  bool failed = false;
  with_team(threads, [&](Team& team) {
    if (d.type == kBfloat16)
      run_blocks(team, d, static_cast<Bfloat16*>(x), cos, sin, slots, *spans, rows, pieces,
                 plans.get(), failed);
    else
      run_blocks(team, d, static_cast<float*>(x), cos, sin, slots, *spans, rows, pieces,
                 plans.get(), failed);
  });
  return !failed;
}
