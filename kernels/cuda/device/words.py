"""Marlin words to a tile of the transposed weight, in registers and with no exchange of threads.

A word holds, of the 16 x 16 tile W[n, k] that one step of a tensor core multiplies, exactly what
one thread needs of it (convert/marlin.py has the order). So a block of words becomes the left
operand of `tl.dot` by renaming axes alone, if the product is taken transposed, C^T = W^T^T X^T:

    words  [kt, (nb, r, c, jh, jl)]   4 bits; 8 bits have (.., jh, jl, b)
    fields [.., l, h, b]              4 bits: field 4 l + 2 b + h; 8: [.., l, h], byte 2 l + h
    tile   [(jl, jh, nb, b, r), (kt, h, c, l)]

Rows come out with the strips nb inside, so that each warp has one strip's words and no other's;
`output_columns` says which output a row is.

Codes are turned into floating point by setting exponent bits, two at a time: 0x4300 | q is the
bfloat16 128 + q, 0x6400 | q the float16 1024 + q. Four bits stay biased by that, since subtracting
here costs an instruction a pair: the caller subtracts (bias + zero) times the sum of its inputs
once a group. Eight bits do not fit into bfloat16's seven beside a bias, and come out centred:

    q - 128 = (128 + (q & 127)) - (128 if q >= 128 else 256)    0x4300 | q & 127, 0x4300 | ~q & 128

Where inline assembly is not to be had (AMD, the interpreter), shifts and conversions do the same.
"""

import triton
import triton.language as tl

# Two codes of four bits at a time, for $8 and magic number %s.
_FOUR = """
{
 .reg .b32 t0, t1, t2, t3, s1, s2, s3;
 shr.u32 s1, $8, 4; shr.u32 s2, $8, 8; shr.u32 s3, $8, 12;
 lop3.b32 t0, $8, 0x000f000f, MAGIC, 0xea;
 lop3.b32 t1, s1, 0x000f000f, MAGIC, 0xea;
 lop3.b32 t2, s2, 0x000f000f, MAGIC, 0xea;
 lop3.b32 t3, s3, 0x000f000f, MAGIC, 0xea;
 mov.b32 {$0, $4}, t0; mov.b32 {$1, $5}, t1; mov.b32 {$2, $6}, t2; mov.b32 {$3, $7}, t3;
}
"""
FOUR_BF16 = tl.constexpr(_FOUR.replace("MAGIC", "0x43004300"))
FOUR_FP16 = tl.constexpr(_FOUR.replace("MAGIC", "0x64006400"))
FOUR_REGISTERS = tl.constexpr("=h,=h,=h,=h,=h,=h,=h,=h,r")
# (a & b) | c is table 0xea of lop3, (~a & b) | c is 0xae. The second has the sign bit set, and an
# addition by fma is what bfloat16 has from sm_80 on; 0x3f80 is 1.
EIGHT_BF16 = tl.constexpr("""
{
 .reg .b32 t0, t1, u0, u1, s, one;
 shr.u32 s, $4, 8;
 mov.b32 one, 0x3f803f80;
 lop3.b32 t0, $4, 0x007f007f, 0x43004300, 0xea;
 lop3.b32 t1, s, 0x007f007f, 0x43004300, 0xea;
 lop3.b32 u0, $4, 0x00800080, 0xc300c300, 0xae;
 lop3.b32 u1, s, 0x00800080, 0xc300c300, 0xae;
 fma.rn.bf16x2 t0, t0, one, u0;
 fma.rn.bf16x2 t1, t1, one, u1;
 mov.b32 {$0, $2}, t0; mov.b32 {$1, $3}, t1;
}
""")
# 0x6480 is 1152.
EIGHT_FP16 = tl.constexpr("""
{
 .reg .b32 t0, t1, s, m;
 shr.u32 s, $4, 8;
 mov.b32 m, 0x64806480;
 lop3.b32 t0, $4, 0x00ff00ff, 0x64006400, 0xea;
 lop3.b32 t1, s, 0x00ff00ff, 0x64006400, 0xea;
 sub.f16x2 t0, t0, m;
 sub.f16x2 t1, t1, m;
 mov.b32 {$0, $2}, t0; mov.b32 {$1, $3}, t1;
}
""")
EIGHT_REGISTERS = tl.constexpr("=h,=h,=h,=h,r")


@triton.jit
def _field(words, SHIFT: tl.constexpr, MASK: tl.constexpr, ADD: tl.constexpr, DTYPE: tl.constexpr):
    return (((words >> SHIFT) & MASK) + ADD).to(DTYPE)


@triton.jit
def _four_bits(words, BIAS: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """BIAS + code of fields 0 .. 7."""
    if ASM and DTYPE == tl.bfloat16:
        v0, v1, v2, v3, v4, v5, v6, v7 = tl.inline_asm_elementwise(
            FOUR_BF16,
            FOUR_REGISTERS,
            [words],
            dtype=(
                tl.bfloat16,
                tl.bfloat16,
                tl.bfloat16,
                tl.bfloat16,
                tl.bfloat16,
                tl.bfloat16,
                tl.bfloat16,
                tl.bfloat16,
            ),
            is_pure=True,
            pack=1,
        )
    elif ASM:
        v0, v1, v2, v3, v4, v5, v6, v7 = tl.inline_asm_elementwise(
            FOUR_FP16,
            FOUR_REGISTERS,
            [words],
            dtype=(
                tl.float16,
                tl.float16,
                tl.float16,
                tl.float16,
                tl.float16,
                tl.float16,
                tl.float16,
                tl.float16,
            ),
            is_pure=True,
            pack=1,
        )
    else:
        v0 = _field(words, 0, 15, BIAS, DTYPE)
        v1 = _field(words, 4, 15, BIAS, DTYPE)
        v2 = _field(words, 8, 15, BIAS, DTYPE)
        v3 = _field(words, 12, 15, BIAS, DTYPE)
        v4 = _field(words, 16, 15, BIAS, DTYPE)
        v5 = _field(words, 20, 15, BIAS, DTYPE)
        v6 = _field(words, 24, 15, BIAS, DTYPE)
        v7 = _field(words, 28, 15, BIAS, DTYPE)
    # Joined from the inside out: l, h, b.
    first = tl.join(tl.join(v0, v4), tl.join(v1, v5))
    second = tl.join(tl.join(v2, v6), tl.join(v3, v7))
    return tl.join(first, second)


@triton.jit
def _eight_bits(words, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """code - 128 of bytes 0 .. 3."""
    if ASM and DTYPE == tl.bfloat16:
        v0, v1, v2, v3 = tl.inline_asm_elementwise(
            EIGHT_BF16,
            EIGHT_REGISTERS,
            [words],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=1,
        )
    elif ASM:
        v0, v1, v2, v3 = tl.inline_asm_elementwise(
            EIGHT_FP16,
            EIGHT_REGISTERS,
            [words],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=1,
        )
    else:
        v0 = _field(words, 0, 255, -128, DTYPE)
        v1 = _field(words, 8, 255, -128, DTYPE)
        v2 = _field(words, 16, 255, -128, DTYPE)
        v3 = _field(words, 24, 255, -128, DTYPE)
    # l, h
    return tl.join(tl.join(v0, v2), tl.join(v1, v3))


@triton.jit
def weight_tile(
    words,
    BITS: tl.constexpr,
    STRIPS: tl.constexpr,
    BK: tl.constexpr,
    BIAS: tl.constexpr,
    DTYPE: tl.constexpr,
    ASM: tl.constexpr,
    K_BY_THREAD: tl.constexpr,
):
    """words [BK / 16, STRIPS * 32 * BITS] int32 -> codes [64 * STRIPS, BK] of DTYPE.

    Codes of 4 bits have BIAS added, codes of 8 have 128 subtracted.

    K_BY_THREAD  inputs in the order (kt, c, h, l) instead of (kt, h, c, l): for compilers that want
                 four neighbouring inputs in a thread (Triton 3.6 with mma.sync); see `input_order`
    """
    KT: tl.constexpr = BK // 16
    if BITS == 4:
        fields = _four_bits(words, BIAS, DTYPE, ASM)
        # 0 kt, 1 nb, 2 r, 3 c, 4 jh, 5 jl, 6 l, 7 h, 8 b
        split = tl.reshape(fields, (KT, STRIPS, 8, 4, 2, 2, 2, 2, 2))
        if K_BY_THREAD:
            ordered = tl.permute(split, (5, 4, 1, 8, 2, 0, 3, 7, 6))
        else:
            ordered = tl.permute(split, (5, 4, 1, 8, 2, 0, 7, 3, 6))
    else:
        fields = _eight_bits(words, DTYPE, ASM)
        # 0 kt, 1 nb, 2 r, 3 c, 4 jh, 5 jl, 6 b, 7 l, 8 h
        split = tl.reshape(fields, (KT, STRIPS, 8, 4, 2, 2, 2, 2, 2))
        if K_BY_THREAD:
            ordered = tl.permute(split, (5, 4, 1, 6, 2, 0, 3, 8, 7))
        else:
            ordered = tl.permute(split, (5, 4, 1, 6, 2, 0, 8, 3, 7))
    return tl.reshape(ordered, (64 * STRIPS, BK))


@triton.jit
def output_columns(STRIPS: tl.constexpr):
    """Which output, counted from the tile's first, each of its 64 * STRIPS rows is."""
    row = tl.arange(0, 64 * STRIPS)
    within = row % 16
    strip = (row // 16) % STRIPS
    high = (row // (16 * STRIPS)) % 2
    low = row // (32 * STRIPS)
    return strip * 64 + (high * 2 + low) * 16 + within


@triton.jit
def input_order(BK: tl.constexpr, K_BY_THREAD: tl.constexpr):
    """Which input, counted from the tile's first, each of its BK columns is."""
    column = tl.arange(0, BK)
    if K_BY_THREAD:
        in_thread = ((column // 2) % 2) * 8 + ((column // 4) % 4) * 2 + column % 2
        return (column // 16) * 16 + in_thread
    else:
        return column
