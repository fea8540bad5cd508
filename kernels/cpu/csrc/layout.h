// How a QtoolLinear lies in memory; interface.h says what it means.
#pragma once

#include <cstdint>

constexpr int kPanel = 32;
// Inputs of a strip: eight groups of four.
constexpr int kStrip = 32;
constexpr int kGroupsAStrip = 8;
constexpr int kSuper = 256;
constexpr int64_t kLine = kPanel * 4;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
