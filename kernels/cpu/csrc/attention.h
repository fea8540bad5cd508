// Paged attention for operations that do more in one call; see attention.cpp.
#pragma once

#include "elementwise.h"

#include <memory>

// How a step's attention is cut into pieces; good for every layer of one shape and one window.
struct AttentionPlan {
  struct Piece;
  // Tokens times channels of both products below which a second thread does not pay.
  static constexpr int64_t kSerialWork = 1 << 17;

  std::unique_ptr<Piece[]> pieces;
  std::unique_ptr<float[]> partial;
  int64_t num_tiles = 0;
  int64_t num_pieces = 0;
  int64_t work = 0;
  bool split = false;

  AttentionPlan();
  ~AttentionPlan();
  // False if memory is not to be had.
  bool make(const QtoolSpans& spans, const QtoolAttention& rule, const QtoolCache& cache,
            int threads);
};

// Asks for the first keys and values that this member will attend to.
void ask_for_cache(const Team& team, const QtoolCache& cache, const QtoolSpans& spans,
                   const QtoolAttention& rule, int64_t element_bytes, const AttentionPlan& plan);

// y [tokens][heads][value_dim]; ends with a barrier.
template <class T>
void attend(Team& team, const T* query, const QtoolCache& cache, const QtoolSpans& spans,
            const QtoolAttention& rule, const AttentionPlan& plan, T* y);
