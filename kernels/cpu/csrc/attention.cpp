// Causal attention over a paged cache, for one new token of a sequence or many.
//
// The pools are [kv_heads][slots][dim], in the type of the queries or in whole numbers of 8 bits with
// a scale for each token and head; token t of a span lies in slot
// block_ids[t / block_size] * block_size + t % block_size. The `heads / kv_heads` query heads that
// read one KV head, times the span's queries, are rows that share keys and values; kTileRows of
// them are worked on together.
//
// Tokens are taken 32 at a time (a chunk, at absolute positions 0, 32, ...) with a running maximum,
// as in online softmax; every 512 tokens (a part) the running state is merged into the result. Both
// grids are fixed, every sum runs in the order of the tokens, and a row's numbers never meet
// another row's: so a token's attention has the same bits whether it is computed alone, inside a
// prompt, with or without its prefix cached, in blocks of any size, by any number of threads. Parts
// also spread one long sequence over the threads.
//
// A chunk is first brought to float, the keys transposed, so that both products are the same small
// matrix multiplication with tokens or channels along the lanes, and no lane is ever summed across.
//
// Scores may be capped, cap * tanh(score / cap), before they are masked; a head may have a sink, a
// logit with no value, which joins the softmax last.

#include "attention.h"

#include <memory>
#include <new>

namespace {

constexpr int kChunk = 32;
constexpr int kPart = 512;
constexpr int kTileRows = 32;
constexpr int kRowsAtOnce = kLanes == 16 ? 8 : 3;
constexpr int kVectorsAtOnce = kLanes == 16 ? 2 : 4;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// T: of queries and results; K: of the cache.
template <class T, class K>
struct Call {
  const T* query;
  T* y;
  const QtoolCache& cache;
  const QtoolSpans& spans;
  const QtoolAttention& rule;
  Pool keys, values;

  int64_t group() const { return rule.heads / cache.kv_heads; }
  // Channels in memory of a query and of a result, in whole vectors.
  int64_t key_width() const { return ceil_div(cache.key_dim, kLanes) * kLanes; }
  int64_t width() const { return ceil_div(cache.value_dim, kLanes) * kLanes; }
};

// Rows first .. first + rows - 1 of one KV head of one span; row r is query r / group.
struct Tile {
  int64_t span;
  int64_t first_token;  // the row of `query` where the span starts
  int64_t kv_head;
  int64_t first;
  int64_t rows;
};

// Tokens a row sees: begin .. end - 1.
struct Range {
  int64_t begin, end;
};

Range visible(const QtoolSpans& spans, const QtoolAttention& rule, int64_t group, int64_t span,
              int64_t row) {
  const int64_t position = spans.lengths[span] - spans.num_queries[span] + row / group;
  const int64_t window = rule.window;
  return {window == 0 ? 0 : std::max<int64_t>(0, position - window + 1), position + 1};
}

template <class C>
Range visible(const C& call, int64_t span, int64_t row) {
  return visible(call.spans, call.rule, call.group(), span, row);
}

// The running softmax of a tile: maximum, sum of weights by lane, weighted sum of values.
struct State {
  float* maximum;  // [rows]
  float* sum;      // [rows][kLanes]
  float* mixed;    // [rows][width]

  static int64_t size(int64_t rows, int64_t width) { return rows * (1 + kLanes + width); }
  State(float* memory, int64_t rows, int64_t width)
      : maximum(memory), sum(memory + rows), mixed(memory + rows * (1 + kLanes)) {
    std::fill(maximum, maximum + rows, -INFINITY);
    std::fill(sum, memory + size(rows, width), 0.0f);
  }
  struct AsIs {};
  State(AsIs, float* memory, int64_t rows)
      : maximum(memory), sum(memory + rows), mixed(memory + rows * (1 + kLanes)) {}
};

// c [kRows][vectors] += a [kRows][depth] times b [depth][vectors]; row distances in floats.
template <int kRows, int kVectors>
QTOOL_INLINE void multiply_block(const float* a, int64_t a_row, const float* b, int64_t b_row,
                                 int64_t depth, float* c, int64_t c_row) {
  Floats total[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) total[r][v] = load(c + r * c_row + v * kLanes);
  for (int64_t k = 0; k < depth; ++k) {
    Floats right[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) right[v] = load(b + k * b_row + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Floats left = set1(a[r * a_row + k]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) total[r][v] = fma(left, right[v], total[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(c + r * c_row + v * kLanes, total[r][v]);
}

template <int kRows>
void multiply_rows(const float* a, int64_t a_row, const float* b, int64_t b_row, int64_t depth,
                   float* c, int64_t c_row, int64_t width) {
  int64_t column = 0;
  for (; column + kVectorsAtOnce * kLanes <= width; column += kVectorsAtOnce * kLanes)
    multiply_block<kRows, kVectorsAtOnce>(a, a_row, b + column, b_row, depth, c + column, c_row);
  for (; column < width; column += kLanes)
    multiply_block<kRows, 1>(a, a_row, b + column, b_row, depth, c + column, c_row);
}

// As many rows at once as the registers hold. Which ones does not matter to any row's result.
template <int kRows>
void multiply(const float* a, int64_t a_row, const float* b, int64_t b_row, int64_t depth, float* c,
              int64_t c_row, int64_t width, int64_t rows) {
  for (; rows >= kRows; rows -= kRows, a += kRows * a_row, c += kRows * c_row)
    multiply_rows<kRows>(a, a_row, b, b_row, depth, c, c_row, width);
  if constexpr (kRows > 1)
    if (rows > 0) multiply<kRows - 1>(a, a_row, b, b_row, depth, c, c_row, width, rows);
}

template <class T>
QTOOL_INLINE Floats load_channels(const T* row, int64_t channel, int64_t head_dim) {
  const int64_t left = head_dim - channel;
  return left >= kLanes ? load(row + channel) : load_part(row + channel, left);
}

// Rows first .. first + kLanes - 1 of `tokens` rows, their `count` elements from `at`, as columns:
// element j of all of them -> to[j * kChunk]. Rows and elements past the end are zero. T is float, or
// whole numbers, which are widened.
template <class T>
QTOOL_INLINE void transpose_block(const T* const* from, int64_t first, int64_t tokens,
                                  int64_t at, int64_t count, float* to) {
  Floats block[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i)
    block[i] = first + i >= tokens ? zeros()
               : count >= kLanes   ? load(from[first + i] + at)
                                   : load_part(from[first + i] + at, count);
  transpose(block);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) store(to + i * kChunk, block[i]);
}

// The same of twice as many bfloat16, moved in pairs: half the shuffles, and a pair widens into two
// floats by a shift and a mask.
QTOOL_INLINE void transpose_block(const Bfloat16* const* from, int64_t first, int64_t tokens,
                                  int64_t at, int64_t count, float* to) {
  Floats block[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i)
    block[i] = first + i >= tokens ? zeros() : load_pairs(from[first + i] + at, count);
  transpose(block);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    store(to + 2 * i * kChunk, low_halves(block[i]));
    store(to + (2 * i + 1) * kChunk, high_halves(block[i]));
  }
}

// tokens rows of head_dim -> [head_dim, and what fills the last block][kChunk].
template <class T>
void transpose_keys(const T* const* from, int64_t tokens, int64_t head_dim, float* to) {
  constexpr int kElements = sizeof(T) == 2 ? 2 * kLanes : kLanes;
  for (int64_t token = 0; token < kChunk; token += kLanes)
    for (int64_t channel = 0; channel < head_dim; channel += kElements)
      transpose_block(from, token, tokens, channel, head_dim - channel,
                      to + channel * kChunk + token);
}

// What a thread works with, on its stack: 330 KB, of which short heads touch the first part.
struct Workspace {
  alignas(64) float query[kTileRows * kMaxHeadDim];
  alignas(64) float keys[kMaxHeadDim * kChunk];
  alignas(64) float values[kChunk * kMaxHeadDim];
  alignas(64) float scores[kTileRows * kChunk];
  alignas(64) float part[kTileRows * (1 + kLanes + kMaxHeadDim)];
  alignas(64) float total[kTileRows * (1 + kLanes + kMaxHeadDim)];
  Ahead* ahead;
};

template <class C>
void load_query(const C& call, const Tile& tile, Workspace& work) {
  const int64_t width = call.key_width(), group = call.group(), dim = call.cache.key_dim;
  for (int64_t r = 0; r < tile.rows; ++r) {
    const int64_t row = tile.first + r;
    const int64_t head = tile.kv_head * group + row % group;
    const auto* from = call.query + ((tile.first_token + row / group) * call.rule.heads + head) * dim;
    for (int64_t channel = 0; channel < width; channel += kLanes)
      store(work.query + r * width + channel,
            mul(load_channels(from, channel, dim), set1(call.rule.scale)));
  }
}

// cap * tanh(score / cap), by tanh(x) = 1 - 2 / (e^2x + 1).
void cap_scores(float* scores, int64_t count, float cap) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const Floats power = exponential(mul(load(scores + i), set1(2.0f / cap)));
    const Floats share = div(set1(-2.0f), add(power, set1(1.0f)));
    store(scores + i, mul(set1(cap), add(set1(1.0f), share)));
  }
}

// Scores of one row -> weights, and what is already in the state scaled to the new maximum.
void soften(float* scores, Range seen, State& state, int64_t row, int64_t width) {
  for (int64_t t = 0; t < seen.begin; ++t) scores[t] = -INFINITY;
  for (int64_t t = seen.end; t < kChunk; ++t) scores[t] = -INFINITY;
  Floats top = set1(state.maximum[row]);
  for (int64_t t = 0; t < kChunk; t += kLanes) top = maximum(load(scores + t), top);
  const float now = reduce_max(top);
  if (now == -INFINITY) {
    std::fill(scores, scores + kChunk, 0.0f);
    return;
  }
  float* const sums = state.sum + row * kLanes;
  Floats sum = load(sums);
  if (now != state.maximum[row]) {
    const Floats shrink = set1(exponential(state.maximum[row] - now));
    sum = mul(sum, shrink);
    float* const mixed = state.mixed + row * width;
    for (int64_t channel = 0; channel < width; channel += kLanes)
      store(mixed + channel, mul(load(mixed + channel), shrink));
    state.maximum[row] = now;
  }
  for (int64_t t = 0; t < kChunk; t += kLanes) {
    const Floats weight = exponential(add(load(scores + t), set1(-now)));
    store(scores + t, weight);
    sum = add(sum, weight);
  }
  store(sums, sum);
}

// Asks for keys and values of tokens start .. start + kChunk - 1 of a span, `end` at most: blocks lie
// anywhere, and the hardware does not guess where.
QTOOL_INLINE void ask_for_chunk(const Pool& keys, const Pool& values, int64_t element_bytes,
                                const QtoolSpans& spans, const Tile& tile, int64_t start,
                                int64_t end) {
  const int64_t* const blocks = spans.block_ids + spans.first_blocks[tile.span];
  const int64_t stop = std::min(end, start + kChunk), size = spans.block_size;
  for (int64_t t = start; t < stop;) {
    const int64_t tokens = std::min(stop - t, size - t % size);
    for (const Pool* pool : {&keys, &values}) {
      const int64_t slot = tile.kv_head * pool->slots + blocks[t / size] * size + t % size;
      const auto* from =
          static_cast<const char*>(pool->data) + slot * pool->stride * element_bytes;
      const int64_t bytes = tokens * pool->stride * element_bytes;
      for (int64_t at = 0; at < bytes; at += 64) _mm_prefetch(from + at, _MM_HINT_T0);
    }
    t += tokens;
  }
}

// Chunk `chunk` of the sequence into the state.
template <class T, class K>
void add_chunk(const Call<T, K>& call, const Tile& tile, int64_t chunk, Workspace& work,
               State& state) {
  const int64_t width = call.width(), key_width = call.key_width();
  const int64_t key_dim = call.cache.key_dim, value_dim = call.cache.value_dim;
  const int64_t start = chunk * kChunk;
  const int64_t end = visible(call, tile.span, tile.first + tile.rows - 1).end;
  const int64_t tokens = std::min<int64_t>(kChunk, end - start);
  const int64_t block_size = call.spans.block_size;
  const int64_t* blocks = call.spans.block_ids + call.spans.first_blocks[tile.span];
  const K* key_rows[kChunk];
  const K* value_rows[kChunk];
  alignas(64) float key_scales[kChunk] = {}, value_scales[kChunk] = {};
  int64_t block = start / block_size, offset = start % block_size;
  for (int64_t t = 0; t < tokens; ++block, offset = 0) {
    const int64_t first = tile.kv_head * call.cache.slots + blocks[block] * block_size;
    for (; t < tokens && offset < block_size; ++t, ++offset) {
      const int64_t slot = first + offset;
      key_rows[t] = static_cast<const K*>(call.keys.data) + slot * call.keys.stride;
      value_rows[t] = static_cast<const K*>(call.values.data) + slot * call.values.stride;
      if constexpr (sizeof(K) == 1) {
        key_scales[t] = call.keys.scales[slot];
        value_scales[t] = call.values.scales[slot];
      }
    }
  }
  ask_for_chunk(call.keys, call.values, sizeof(K), call.spans, tile, start + kChunk, end);
  work.ahead->ask();
  transpose_keys(key_rows, tokens, key_dim, work.keys);
  work.ahead->ask();
  std::fill(work.scores, work.scores + tile.rows * kChunk, 0.0f);
  multiply<kRowsAtOnce>(work.query, key_width, work.keys, kChunk, key_dim, work.scores, kChunk,
                        kChunk, tile.rows);
  if constexpr (sizeof(K) == 1)
    for (int64_t i = 0; i < tile.rows * kChunk; i += kLanes)
      store(work.scores + i, mul(load(work.scores + i), load(key_scales + i % kChunk)));
  if (call.rule.softcap > 0.0f) cap_scores(work.scores, tile.rows * kChunk, call.rule.softcap);
  work.ahead->ask();
  for (int64_t r = 0; r < tile.rows; ++r) {
    const Range range = visible(call, tile.span, tile.first + r);
    const Range seen = {std::clamp<int64_t>(range.begin - start, 0, kChunk),
                        std::clamp<int64_t>(range.end - start, 0, kChunk)};
    soften(work.scores + r * kChunk, seen, state, r, width);
  }
  work.ahead->ask();
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t channel = 0; channel < width; channel += kLanes) {
      Floats value = load_channels(value_rows[t], channel, value_dim);
      if constexpr (sizeof(K) == 1) value = mul(value, set1(value_scales[t]));
      store(work.values + t * width + channel, value);
    }
  work.ahead->ask();
  multiply<kRowsAtOnce>(work.scores, kChunk, work.values, width, tokens, state.mixed, width, width,
                        tile.rows);
}

// Tokens of part `part` that any row of the tile sees, into a fresh state.
template <class C>
void add_part(const C& call, const Tile& tile, int64_t part, Workspace& work, State& state) {
  const int64_t begin = visible(call, tile.span, tile.first).begin;
  const int64_t end = visible(call, tile.span, tile.first + tile.rows - 1).end;
  const int64_t first = std::max(part * (kPart / kChunk), begin / kChunk);
  const int64_t stop = std::min((part + 1) * (kPart / kChunk), ceil_div(end, kChunk));
  for (int64_t chunk = first; chunk < stop; ++chunk) add_chunk(call, tile, chunk, work, state);
}

void merge(State& total, const State& part, int64_t rows, int64_t width) {
  for (int64_t r = 0; r < rows; ++r) {
    if (part.maximum[r] == -INFINITY) continue;
    const float now = std::max(total.maximum[r], part.maximum[r]);
    const Floats old_share = set1(exponential(total.maximum[r] - now));
    const Floats new_share = set1(exponential(part.maximum[r] - now));
    const auto mix = [&](float* to, const float* from) {
      store(to, fma(load(from), new_share, mul(load(to), old_share)));
    };
    mix(total.sum + r * kLanes, part.sum + r * kLanes);
    for (int64_t channel = 0; channel < width; channel += kLanes)
      mix(total.mixed + r * width + channel, part.mixed + r * width + channel);
    total.maximum[r] = now;
  }
}

template <class C>
void write_result(const C& call, const Tile& tile, const State& state) {
  const int64_t width = call.width(), group = call.group(), dim = call.cache.value_dim;
  for (int64_t r = 0; r < tile.rows; ++r) {
    const int64_t row = tile.first + r;
    const int64_t head = tile.kv_head * group + row % group;
    auto* const to = call.y + ((tile.first_token + row / group) * call.rule.heads + head) * dim;
    float sum = reduce_add(load(state.sum + r * kLanes)), share = 1.0f;
    if (call.rule.sinks != nullptr) {
      const float sink = call.rule.sinks[head], top = std::max(state.maximum[r], sink);
      share = exponential(state.maximum[r] - top);
      sum = sum * share + exponential(sink - top);
    }
    const Floats factor = set1(share / sum);
    for (int64_t channel = 0; channel < dim; channel += kLanes) {
      const Floats result = mul(load(state.mixed + r * width + channel), factor);
      const int64_t left = dim - channel;
      if (left >= kLanes)
        store(to + channel, result);
      else
        store_part(to + channel, result, left);
    }
  }
}

template <class C>
Range parts_of(const C& call, const Tile& tile) {
  return {visible(call, tile.span, tile.first).begin / kPart,
          ceil_div(visible(call, tile.span, tile.first + tile.rows - 1).end, kPart)};
}

template <class C>
void attend_whole(const C& call, const Tile& tile, Workspace& work) {
  const int64_t width = call.width();
  load_query(call, tile, work);
  State total(work.total, tile.rows, width);
  const Range parts = parts_of(call, tile);
  for (int64_t part = parts.begin; part < parts.end; ++part) {
    State state(work.part, tile.rows, width);
    add_part(call, tile, part, work, state);
    merge(total, state, tile.rows, width);
  }
  write_result(call, tile, total);
}

}  // namespace

// Tile `first` of a span's KV head and what a part of it left, in the plan's memory.
struct AttentionPlan::Piece {
  Tile tile;
  int64_t tile_number, part, offset;
};

AttentionPlan::AttentionPlan() = default;
AttentionPlan::~AttentionPlan() = default;

bool AttentionPlan::make(const QtoolSpans& spans, const QtoolAttention& rule,
                         const QtoolCache& cache, int threads) {
  const int64_t group = rule.heads / cache.kv_heads;
  const int64_t width = ceil_div(cache.value_dim, kLanes) * kLanes;
  int64_t most_pieces = 0;
  work = 0;
  num_tiles = 0;
  for (int64_t span = 0; span < spans.spans; ++span) {
    const int64_t rows = spans.num_queries[span] * group;
    const int64_t tiles = ceil_div(rows, kTileRows) * cache.kv_heads;
    num_tiles += tiles;
    most_pieces += tiles * ceil_div(spans.lengths[span], kPart);
    work += rows * cache.kv_heads * spans.lengths[span] * (cache.key_dim + cache.value_dim) / 2;
  }
  // Few tiles of long sequences: the parts are spread over the threads and merged afterwards.
  split = threads > 1 && num_tiles < 4 * threads && most_pieces > num_tiles;
  pieces.reset(new (std::nothrow) Piece[static_cast<size_t>(split ? most_pieces : num_tiles)]);
  if (!pieces) return false;
  int64_t first_token = 0, floats = 0, tile_number = 0;
  num_pieces = 0;
  for (int64_t span = 0; span < spans.spans; first_token += spans.num_queries[span], ++span) {
    const int64_t rows = spans.num_queries[span] * group;
    for (int64_t kv_head = 0; kv_head < cache.kv_heads; ++kv_head)
      for (int64_t first = 0; first < rows; first += kTileRows, ++tile_number) {
        const Tile tile = {span, first_token, kv_head, first,
                           std::min<int64_t>(kTileRows, rows - first)};
        if (!split) {
          pieces[num_pieces++] = {tile, tile_number, 0, 0};
          continue;
        }
        const Range seen = {visible(spans, rule, group, span, first).begin,
                            visible(spans, rule, group, span, first + tile.rows - 1).end};
        for (int64_t part = seen.begin / kPart; part < ceil_div(seen.end, kPart); ++part) {
          pieces[num_pieces++] = {tile, tile_number, part, floats};
          floats += State::size(tile.rows, width);
        }
      }
  }
  partial.reset(new (std::nothrow) float[static_cast<size_t>(floats)]);
  return static_cast<bool>(partial);
}

namespace {

// Later tiles of a prompt see more tokens: long ones are handed out first, unless they are in parts.
const AttentionPlan::Piece& piece_of(const AttentionPlan& plan, int64_t i) {
  return plan.pieces[plan.split ? i : plan.num_pieces - 1 - i];
}

template <class C>
void attend_team(Team& team, const C& call, const AttentionPlan& plan) {
  Workspace work;
  work.ahead = &team.ahead();
  if (!plan.split) {
    team.each(plan.num_pieces, 1,
              [&](int64_t i) { attend_whole(call, piece_of(plan, i).tile, work); });
    return;
  }
  team.each(plan.num_pieces, 1, [&](int64_t i) {
    const AttentionPlan::Piece& piece = plan.pieces[i];
    State state(plan.partial.get() + piece.offset, piece.tile.rows, call.width());
    load_query(call, piece.tile, work);
    add_part(call, piece.tile, piece.part, work, state);
  });
  team.each(plan.num_pieces, 1, [&](int64_t i) {
    const AttentionPlan::Piece& first = plan.pieces[i];
    if (i > 0 && plan.pieces[i - 1].tile_number == first.tile_number) return;
    State total(work.total, first.tile.rows, call.width());
    for (; i < plan.num_pieces && plan.pieces[i].tile_number == first.tile_number; ++i)
      merge(total, State(State::AsIs{}, plan.partial.get() + plan.pieces[i].offset, first.tile.rows),
            first.tile.rows, call.width());
    write_result(call, first.tile, total);
  });
}

}  // namespace

void ask_for_cache(const Team& team, const QtoolCache& cache, const QtoolSpans& spans,
                   const QtoolAttention& rule, int64_t element_bytes, const AttentionPlan& plan) {
  const Pool keys = key_pool(cache), values = value_pool(cache);
  const int64_t group = rule.heads / cache.kv_heads;
  const int64_t stop = team.share_begin(plan.num_pieces, team.index() + 1);
  for (int64_t i = team.share_begin(plan.num_pieces, team.index()); i < stop; ++i) {
    const AttentionPlan::Piece& piece = piece_of(plan, i);
    const Tile& tile = piece.tile;
    const int64_t begin = visible(spans, rule, group, tile.span, tile.first).begin;
    const int64_t end = visible(spans, rule, group, tile.span, tile.first + tile.rows - 1).end;
    ask_for_chunk(keys, values, element_bytes, spans, tile,
                  std::max(begin / kChunk * kChunk, piece.part * kPart), end);
  }
}

template <class T>
void attend(Team& team, const T* query, const QtoolCache& cache, const QtoolSpans& spans,
            const QtoolAttention& rule, const AttentionPlan& plan, T* y) {
  const Pool keys = key_pool(cache), values = value_pool(cache);
  if (keys.scales != nullptr)
    attend_team(team, Call<T, int8_t>{query, y, cache, spans, rule, keys, values}, plan);
  else
    attend_team(team, Call<T, T>{query, y, cache, spans, rule, keys, values}, plan);
}

template void attend(Team&, const float*, const QtoolCache&, const QtoolSpans&,
                     const QtoolAttention&, const AttentionPlan&, float*);
template void attend(Team&, const Bfloat16*, const QtoolCache&, const QtoolSpans&,
                     const QtoolAttention&, const AttentionPlan&, Bfloat16*);

bool qtool_paged_attention(const void* query, const QtoolCache* cache, const QtoolSpans* spans,
                           const QtoolAttention* rule, void* y, int32_t type, int32_t threads) {
  AttentionPlan plan;
  if (!plan.make(*spans, *rule, *cache, threads)) return false;
  with_team(plan.work < AttentionPlan::kSerialWork ? 1 : threads, [&](Team& team) {
    if (type == kBfloat16)
      attend(team, static_cast<const Bfloat16*>(query), *cache, *spans, *rule, plan,
             static_cast<Bfloat16*>(y));
    else
      attend(team, static_cast<const float*>(query), *cache, *spans, *rule, plan,
             static_cast<float*>(y));
  });
  return true;
}
