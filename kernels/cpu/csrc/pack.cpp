// From weights as files hold them to the layout of a QtoolLinear.
//
// Codes and blocks are moved, nothing is rounded; a matrix in floating point is, row by row. The
// bytes of GGUF blocks are those of ggml-common.h; what their fields mean is told beside the codecs of
// this project.

#include "interface.h"
#include "isa.h"
#include "layout.h"
#include "threads.h"

#include <cstring>

namespace {

// 32 codes of one row into its place in a strip's planes; see `spread` in spread.h.
void pack_strip(const uint8_t* codes, int bits, int64_t row, uint8_t* strip) {
  uint32_t words[8];
  std::memcpy(words, codes, 32);
  const auto put = [&](int64_t line, uint32_t word) {
    std::memcpy(strip + line * kLine + row * 4, &word, 4);
  };
  if (bits == 8) {
    for (int g = 0; g < 8; ++g) put(g, words[g]);
    return;
  }
  const int low = bits >= 4 ? 4 : 2, in_byte = 8 / low;
  const uint32_t low_mask = low == 4 ? 0x0f0f0f0fu : 0x03030303u;
  for (int line = 0; line < 8 / in_byte; ++line) {
    uint32_t word = 0;
    for (int g = 0; g < in_byte; ++g)
      word |= (words[line * in_byte + g] & low_mask) << (g * low);
    put(line, word);
  }
  const int high = bits - low, first = 8 / in_byte;
  if (high == 0) return;
  const uint32_t high_mask = high == 1 ? 0x01010101u : 0x03030303u;
  for (int line = 0; line < high; ++line) {
    uint32_t word = 0;
    for (int g = 0; g < 8 / high; ++g)
      word |= ((words[line * (8 / high) + g] >> low) & high_mask) << (g * high);
    put(first + line, word);
  }
}

// ---- GGUF blocks: codes of one block, and where its scales go ----

enum BlockType : int32_t {
  kQ4_0 = 2, kQ4_1 = 3, kQ5_0 = 6, kQ5_1 = 7, kQ8_0 = 8, kQ2_K = 10, kQ3_K = 11, kQ4_K = 12,
  kQ5_K = 13, kQ6_K = 14, kIQ4_NL = 20, kIQ4_XS = 23, kTQ2_0 = 35, kMXFP4 = 39,
};

struct Layout {
  int64_t weights;  // in a block
  int64_t bytes;
  int bits;
  int d;            // where the scale's two bytes are; MXFP4: its one
  int offset;       // where the minimum's are, or -1
  int64_t fields;   // bytes of fields a row
};

Layout layout_of(int32_t type) {
  switch (type) {
    case kQ4_0: return {32, 18, 4, 0, -1, 0};
    case kQ4_1: return {32, 20, 4, 0, 2, 0};
    case kQ5_0: return {32, 22, 5, 0, -1, 0};
    case kQ5_1: return {32, 24, 5, 0, 2, 0};
    case kQ8_0: return {32, 34, 8, 0, -1, 0};
    case kIQ4_NL: return {32, 18, 4, 0, -1, 0};
    case kMXFP4: return {32, 17, 4, 0, -1, 0};
    case kTQ2_0: return {256, 66, 2, 64, -1, 0};
    case kQ2_K: return {256, 84, 2, 80, 82, 16};
    case kQ3_K: return {256, 110, 3, 108, -1, 12};
    case kQ4_K: return {256, 144, 4, 0, 2, 12};
    case kQ5_K: return {256, 176, 5, 0, 2, 12};
    case kQ6_K: return {256, 210, 6, 208, -1, 16};
    case kIQ4_XS: return {256, 136, 4, 0, -1, 6};
  }
  return {0, 0, 0, 0, 0, 0};
}

// 16 bytes: element j in the low bits of byte j, element j + 16 in the high ones.
void split_nibbles(const uint8_t* from, uint8_t* codes) {
  for (int j = 0; j < 16; ++j) {
    codes[j] = from[j] & 15;
    codes[j + 16] = from[j] >> 4;
  }
}

void add_fifth_bits(const uint8_t* from, uint8_t* codes) {
  uint32_t bits;
  std::memcpy(&bits, from, 4);
  for (int j = 0; j < 32; ++j) codes[j] |= static_cast<uint8_t>((bits >> j & 1) << 4);
}

void block_codes(int32_t type, const uint8_t* b, uint8_t* codes) {
  switch (type) {
    case kQ4_0: case kIQ4_NL: split_nibbles(b + 2, codes); break;
    case kQ4_1: split_nibbles(b + 4, codes); break;
    case kMXFP4: split_nibbles(b + 1, codes); break;
    case kQ5_0:
      split_nibbles(b + 6, codes);
      add_fifth_bits(b + 2, codes);
      break;
    case kQ5_1:
      split_nibbles(b + 8, codes);
      add_fifth_bits(b + 4, codes);
      break;
    case kQ8_0:
      for (int j = 0; j < 32; ++j) codes[j] = b[2 + j] ^ 0x80;  // signed -> around 128
      break;
    case kTQ2_0:  // as Q2_K's codes
    case kQ2_K:
    case kQ3_K: {
      const uint8_t* const q = type == kQ2_K ? b + 16 : type == kQ3_K ? b + 32 : b;
      for (int i = 0; i < 256; ++i) {
        const int half = i / 128, shift = i % 128 / 32 * 2, at = i % 32;
        codes[i] = q[half * 32 + at] >> shift & 3;
        if (type == kQ3_K) codes[i] |= (b[at] >> (i / 32) & 1) << 2;
      }
      break;
    }
    case kQ4_K:
    case kQ5_K: {
      const uint8_t* const q = type == kQ4_K ? b + 16 : b + 48;
      for (int i = 0; i < 256; ++i) {
        const int pair = i / 64, high = i % 64 / 32, at = i % 32;
        codes[i] = q[pair * 32 + at] >> (4 * high) & 15;
        if (type == kQ5_K) codes[i] |= (b[16 + at] >> (2 * pair + high) & 1) << 4;
      }
      break;
    }
    case kQ6_K:
      for (int i = 0; i < 256; ++i) {
        const int half = i / 128, quarter = i % 128 / 32, at = i % 32;
        const uint8_t low = b[half * 64 + quarter % 2 * 32 + at] >> (quarter / 2 * 4) & 15;
        const uint8_t high = b[128 + half * 32 + at] >> (2 * quarter) & 3;
        codes[i] = low | high << 4;
      }
      break;
    case kIQ4_XS:
      for (int part = 0; part < 8; ++part) split_nibbles(b + 8 + part * 16, codes + part * 32);
      break;
  }
}

// 16 numbers of 6 bits -> two words of low bits and one of high bits, as scales.h reads them.
void join_six_bits(const uint8_t* six, int count, uint32_t* words) {
  const int high = count / 8;
  for (int i = 0; i <= high; ++i) words[i] = 0;
  for (int i = 0; i < count; ++i) {
    words[i / 8] |= static_cast<uint32_t>(six[i] & 15) << (i % 8 * 4);
    words[high] |= static_cast<uint32_t>(six[i] >> 4) << (2 * i);
  }
}

void put_fields(int32_t type, const uint8_t* b, int64_t row, uint8_t* fields) {
  uint32_t words[4];
  uint8_t six[16];
  switch (type) {
    case kQ2_K:  // a byte is a scale and a minimum of 4 bits
      for (uint32_t& word : words) word = 0;
      for (int i = 0; i < 16; ++i) {
        words[i / 8] |= static_cast<uint32_t>(b[i] & 15) << (i % 8 * 4);
        words[2 + i / 8] |= static_cast<uint32_t>(b[i] >> 4) << (i % 8 * 4);
      }
      break;
    case kQ3_K: {
      const uint8_t* const s = b + 96;
      for (int i = 0; i < 16; ++i)
        six[i] = static_cast<uint8_t>((s[i % 8] >> (i / 8 * 4) & 15) |
                                      (s[8 + i % 4] >> (i / 4 * 2) & 3) << 4);
      join_six_bits(six, 16, words);
      break;
    }
    case kQ4_K:
    case kQ5_K: {
      const uint8_t* const s = b + 4;
      for (int i = 0; i < 4; ++i) {
        six[i] = s[i] & 63;
        six[8 + i] = s[i + 4] & 63;
        six[4 + i] = static_cast<uint8_t>((s[i + 8] & 15) | (s[i] >> 6) << 4);
        six[12 + i] = static_cast<uint8_t>((s[i + 8] >> 4) | (s[i + 4] >> 6) << 4);
      }
      join_six_bits(six, 16, words);
      break;
    }
    case kQ6_K: std::memcpy(words, b + 192, 16); break;
    case kIQ4_XS: {
      uint16_t high;
      std::memcpy(&high, b + 2, 2);
      std::memcpy(words, b + 4, 4);
      std::memcpy(fields + row * 4, words, 4);
      std::memcpy(fields + kLine + row * 2, &high, 2);
      return;
    }
  }
  for (int64_t word = 0; word < layout_of(type).fields / 4; ++word)
    std::memcpy(fields + word * kLine + row * 4, words + word, 4);
}

uint16_t negated_half(const uint8_t* from) {
  uint16_t half;
  std::memcpy(&half, from, 2);
  return half ^ 0x8000;
}

struct Parts {
  uint8_t* codes;
  uint8_t* scales;
  uint8_t* offsets;
  uint8_t* fields;
};

void pack_block_panel(int32_t type, const uint8_t* data, int64_t out, int64_t in, int64_t panel,
                      const Parts& to) {
  const Layout layout = layout_of(type);
  const int64_t blocks = in / layout.weights, strip_bytes = kStrip * kPanel * layout.bits / 8;
  const int64_t scale_bytes = type == kMXFP4 ? 1 : 2;
  // K-quants subtract their minima, Q4_1 and Q5_1 add them.
  const bool negate = layout.fields > 0;
  const int64_t rows = std::min<int64_t>(kPanel, out - panel * kPanel);
  const int64_t panel_bytes = in / kStrip * strip_bytes;
  if (rows < kPanel) std::memset(to.codes + panel * panel_bytes, 0, static_cast<size_t>(panel_bytes));
  uint8_t codes[kSuper];
  for (int64_t row = 0; row < rows; ++row) {
    const uint8_t* from = data + (panel * kPanel + row) * blocks * layout.bytes;
    for (int64_t block = 0; block < blocks; ++block, from += layout.bytes) {
      block_codes(type, from, codes);
      const int64_t strips = layout.weights / kStrip, first = (panel * blocks + block) * strips;
      for (int64_t s = 0; s < strips; ++s)
        pack_strip(codes + s * kStrip, layout.bits, row, to.codes + (first + s) * strip_bytes);
      const int64_t at = (panel * blocks + block) * kPanel + row;
      std::memcpy(to.scales + at * scale_bytes, from + layout.d, static_cast<size_t>(scale_bytes));
      // 2 to the -128 is no normal number; 1 is read as zero.
      if (type == kMXFP4) to.scales[at] = std::max<uint8_t>(to.scales[at], 1);
      if (layout.offset >= 0) {
        uint16_t half = negated_half(from + layout.offset);
        if (!negate) half ^= 0x8000;
        std::memcpy(to.offsets + at * 2, &half, 2);
      }
      if (layout.fields > 0)
        put_fields(type, from, row, to.fields + (panel * blocks + block) * layout.fields * kPanel);
    }
  }
}

template <class T>
void pack_matrix_panel(const T* values, int64_t out, int64_t in, int64_t panel, uint8_t* codes,
                       float* scales) {
  const int64_t rows = std::min<int64_t>(kPanel, out - panel * kPanel);
  uint8_t* const to = codes + panel * in * kPanel;
  if (rows < kPanel) std::memset(to, 0, static_cast<size_t>(in * kPanel));
  for (int64_t row = 0; row < rows; ++row) {
    const T* const from = values + (panel * kPanel + row) * in;
    Floats largest = zeros();
    for (int64_t i = 0; i < in; i += kLanes) largest = maximum(largest, absolute(load(from + i)));
    const float top = reduce_max(largest);
    const bool tiny = top < 1e-30f;
    scales[panel * kPanel + row] = tiny ? 0.0f : top / 127.0f;
    const Floats inverse = set1(tiny ? 0.0f : 127.0f / top);
    for (int64_t i = 0; i < in; i += kStrip) {
      int8_t whole[kStrip];
      for (int64_t j = 0; j < kStrip; j += kLanes)
        store_bytes(whole + j, round_to_ints(mul(load(from + i + j), inverse)));
      uint8_t moved[kStrip];
      for (int64_t j = 0; j < kStrip; ++j) moved[j] = static_cast<uint8_t>(whole[j]) ^ 0x80;
      pack_strip(moved, 8, row, to + i * kPanel);
    }
  }
}

}  // namespace

void qtool_pack_matrix(const void* values, int32_t type, int64_t out, int64_t in, uint8_t* codes,
                       float* scales, int32_t threads) {
  with_team(threads, [&](Team& team) {
    team.each(ceil_div(out, kPanel), 4, [&](int64_t panel) {
      if (type == kBfloat16)
        pack_matrix_panel(static_cast<const Bfloat16*>(values), out, in, panel, codes, scales);
      else
        pack_matrix_panel(static_cast<const float*>(values), out, in, panel, codes, scales);
    });
  });
}

void qtool_pack_codes(const uint8_t* codes, int64_t out, int64_t in, int32_t bits, uint8_t* packed,
                      int32_t threads) {
  const int64_t panels = ceil_div(out, kPanel), strip_bytes = kStrip * kPanel * bits / 8;
  const int64_t strips = in / kStrip;
  with_team(threads, [&](Team& team) {
    team.each(panels, 1, [&](int64_t panel) {
      uint8_t* const to = packed + panel * strips * strip_bytes;
      const int64_t rows = std::min<int64_t>(kPanel, out - panel * kPanel);
      if (rows < kPanel) std::memset(to, 0, static_cast<size_t>(strips * strip_bytes));
      for (int64_t strip = 0; strip < strips; ++strip)
        for (int64_t row = 0; row < rows; ++row)
          pack_strip(codes + (panel * kPanel + row) * in + strip * kStrip, bits, row,
                     to + strip * strip_bytes);
    });
  });
}

void qtool_pack_blocks(int32_t type, const uint8_t* data, int64_t out, int64_t in, uint8_t* codes,
                       uint8_t* scales, uint8_t* offsets, uint8_t* fields, int32_t threads) {
  const Parts to = {codes, scales, offsets, fields};
  with_team(threads, [&](Team& team) {
    team.each(ceil_div(out, kPanel), 1,
              [&](int64_t panel) { pack_block_panel(type, data, out, in, panel, to); });
  });
}
