"""A token from each row of logits, with no sort: bounds are searched for, four ways at a time.

What top_k and top_p keep is everything above some bound, and what typical_p keeps everything within
some distance. The bound is a float, and floats of one
sign are ordered as their bits are: so it is searched for as a whole number, three questions a pass
over the row, two bits each. All sums are taken in one order; the same numbers draw the same token,
whatever else is in the batch.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# Bits of 1.0, which no probability relative to the likeliest is above.
ONE = tl.constexpr(0x3F800000)
INFINITY = tl.constexpr(0x7F800000)


@triton.jit
def _ordered(x):
    """Bits of float32 as int32 that are ordered as the floats are."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _scaled(logits_ptr, first, inverse_temperature, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    token = first + tl.arange(0, BLOCK)
    x = tl.load(logits_ptr + token, mask=token < VOCAB, other=float("-inf"))
    return token, x * inverse_temperature


@triton.jit
def _mass(x, best, least, bound):
    """Relative to the likeliest's, of scaled logits that top_k, min_p and top_p leave; else 0."""
    mass = tl.where(x >= least, tl.exp2((x - best) * LOG2_E), 0.0)
    return tl.where(mass >= bound, mass, 0.0)


@triton.jit
def draw_tokens(
    logits_ptr,
    temperatures_ptr,
    top_ks_ptr,
    top_ps_ptr,
    min_ps_ptr,
    typical_ps_ptr,
    numbers_ptr,
    tokens_ptr,
    finite_ptr,
    row_stride,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """tokens [rows] int64 of logits [rows, VOCAB] float32, and whether the row's are numbers.

    temperatures [rows], 0: the likeliest; top_ks [rows] int32, 0: all; top_ps, min_ps,
    typical_ps [rows]
    numbers      [rows] float32 in [0, 1): where the token lies in the cumulated probabilities
    """
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * row_stride
    temperature = tl.load(temperatures_ptr + row)
    inverse = 1.0 / tl.where(temperature > 0, temperature, 1.0)

    # The likeliest, the first of several.
    best = float("-inf")
    likeliest = 0
    numbers = 1
    for first in range(0, VOCAB, BLOCK):
        token, x = _scaled(logits_ptr, first, inverse, VOCAB, BLOCK)
        numbers = tl.minimum(numbers, tl.min((x == x).to(tl.int32)))
        here = tl.max(x)
        place = tl.min(tl.where(x == here, token, VOCAB))
        likeliest = tl.where(here > best, place, likeliest)
        best = tl.maximum(best, here)
    finite = (numbers == 1) & (best > float("-inf")) & (best < float("inf"))
    tl.store(finite_ptr + row, finite.to(tl.int32))
    tl.store(tokens_ptr + row, likeliest.to(tl.int64))
    if (temperature <= 0) | (finite == 0):
        return

    # Everything below this is not drawn: least is a scaled logit.
    least = float("-inf")
    top_k = tl.load(top_ks_ptr + row)
    if (top_k > 0) & (top_k < VOCAB):
        # At least top_k are >= low, fewer are >= high.
        high = _ordered(best).to(tl.int64) + 1
        low = tl.full((), -0x7F800001, tl.int64)  # of -inf
        while high - low > 1:
            step = tl.maximum((high - low) // 4, 1)
            one, two, three = low + step, low + 2 * step, low + 3 * step
            from_one, from_two, from_three = 0, 0, 0
            for first in range(0, VOCAB, BLOCK):
                token, x = _scaled(logits_ptr, first, inverse, VOCAB, BLOCK)
                order = tl.where(token < VOCAB, _ordered(x).to(tl.int64), low - 1)
                from_one += tl.sum((order >= one).to(tl.int32))
                from_two += tl.sum((order >= two).to(tl.int32))
                from_three += tl.sum((order >= three).to(tl.int32))
            # Bounds at or above high are known to be too high.
            is_one = (from_one >= top_k) & (one < high)
            is_two = (from_two >= top_k) & (two < high)
            is_three = (from_three >= top_k) & (three < high)
            new_high = tl.where(is_three, high, tl.where(is_two, three, tl.where(is_one, two, one)))
            high = tl.minimum(high, new_high)
            low = tl.where(is_three, three, tl.where(is_two, two, tl.where(is_one, one, low)))
        bits = low.to(tl.int32)
        least = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    min_p = tl.load(min_ps_ptr + row)
    if min_p > 0:
        least = tl.maximum(least, best + tl.log(min_p))

    # Masses are relative to the likeliest's.
    total = 0.0
    for first in range(0, VOCAB, BLOCK):
        token, x = _scaled(logits_ptr, first, inverse, VOCAB, BLOCK)
        mass = tl.where(x >= least, tl.exp2((x - best) * LOG2_E), 0.0)
        total += tl.sum(mass)

    bound = 0.0
    top_p = tl.load(top_ps_ptr + row)
    if top_p < 1:
        wanted = top_p * total
        # Masses >= low hold enough together, those >= high do not.
        low = tl.full((), 0, tl.int32)
        high = tl.full((), ONE + 1, tl.int32)
        while high - low > 1:
            step = tl.maximum((high - low) // 4, 1)
            one, two, three = low + step, low + 2 * step, low + 3 * step
            from_one, from_two, from_three = 0.0, 0.0, 0.0
            for first in range(0, VOCAB, BLOCK):
                token, x = _scaled(logits_ptr, first, inverse, VOCAB, BLOCK)
                mass = tl.where(x >= least, tl.exp2((x - best) * LOG2_E), 0.0)
                order = mass.to(tl.int32, bitcast=True)
                from_one += tl.sum(tl.where(order >= one, mass, 0.0))
                from_two += tl.sum(tl.where(order >= two, mass, 0.0))
                from_three += tl.sum(tl.where(order >= three, mass, 0.0))
            is_one = (from_one >= wanted) & (one < high)
            is_two = (from_two >= wanted) & (two < high)
            is_three = (from_three >= wanted) & (three < high)
            new_high = tl.where(is_three, high, tl.where(is_two, three, tl.where(is_one, two, one)))
            high = tl.minimum(high, new_high)
            low = tl.where(is_three, three, tl.where(is_two, two, tl.where(is_one, one, low)))
        bound = low.to(tl.float32, bitcast=True)
        total = 0.0
        for first in range(0, VOCAB, BLOCK):
            token, x = _scaled(logits_ptr, first, inverse, VOCAB, BLOCK)
            total += tl.sum(_mass(x, best, least, bound))

    # A token's surprise is (best - x) and a constant, which is left out of what is expected, too.
    expected = 0.0
    farthest = float("inf")
    typical_p = tl.load(typical_ps_ptr + row)
    if typical_p < 1:
        for first in range(0, VOCAB, BLOCK):
            token, x = _scaled(logits_ptr, first, inverse, VOCAB, BLOCK)
            mass = _mass(x, best, least, bound)
            expected += tl.sum(mass * tl.where(mass > 0, best - x, 0.0))
        expected = expected / total
        wanted = typical_p * total
        # Those at distances <= low do not hold enough; those <= high do, or are all.
        low = tl.full((), -1, tl.int32)
        high = tl.full((), INFINITY, tl.int32)
        while high - low > 1:
            step = tl.maximum((high - low) // 4, 1)
            one, two, three = low + step, low + 2 * step, low + 3 * step
            to_one, to_two, to_three = 0.0, 0.0, 0.0
            for first in range(0, VOCAB, BLOCK):
                token, x = _scaled(logits_ptr, first, inverse, VOCAB, BLOCK)
                mass = _mass(x, best, least, bound)
                order = tl.abs(best - x - expected).to(tl.int32, bitcast=True)
                to_one += tl.sum(tl.where(order <= one, mass, 0.0))
                to_two += tl.sum(tl.where(order <= two, mass, 0.0))
                to_three += tl.sum(tl.where(order <= three, mass, 0.0))
            is_one = to_one >= wanted
            is_two = (to_two >= wanted) | (two >= high)
            is_three = (to_three >= wanted) | (three >= high)
            new_low = tl.where(is_one, low, tl.where(is_two, one, tl.where(is_three, two, three)))
            new_high = tl.where(is_one, one, tl.where(is_two, two, tl.where(is_three, three, high)))
            low, high = new_low, tl.minimum(high, new_high)
        farthest = high.to(tl.float32, bitcast=True)
        total = 0.0
        for first in range(0, VOCAB, BLOCK):
            token, x = _scaled(logits_ptr, first, inverse, VOCAB, BLOCK)
            near = tl.abs(best - x - expected) <= farthest
            total += tl.sum(tl.where(near, _mass(x, best, least, bound), 0.0))

    # The first token up to which more than this share is cumulated.
    target = tl.load(numbers_ptr + row) * total
    before = 0.0
    drawn = -1
    last = likeliest
    for first in range(0, VOCAB, BLOCK):
        token, x = _scaled(logits_ptr, first, inverse, VOCAB, BLOCK)
        near = tl.abs(best - x - expected) <= farthest
        mass = tl.where(near, _mass(x, best, least, bound), 0.0)
        here = tl.sum(mass)
        if (drawn < 0) & (before + here > target):
            passed = before + tl.cumsum(mass, 0) > target
            drawn = tl.min(tl.where(passed & (mass > 0), token, VOCAB))
            # Rounding may leave none: the last that can be drawn is then the one.
            drawn = tl.where(drawn == VOCAB, tl.max(tl.where(mass > 0, token, -1)), drawn)
        last = tl.maximum(last, tl.max(tl.where(mass > 0, token, -1)))
        before += here
    tl.store(tokens_ptr + row, tl.where(drawn >= 0, drawn, last).to(tl.int64))
