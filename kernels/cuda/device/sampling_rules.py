"""What requests rule out and what they penalize, in one pass over the logits.

    mask -> repetition -> frequency -> presence

A mask has a bit for each token, the lowest bit of a word first; what a text holds is counted for
each token, and the token that the step has read is counted here.
"""

import triton
import triton.language as tl

# Of a count, the bit that says that the prompt holds the token; below it, the times of the answer.
IN_PROMPT = tl.constexpr(1 << 30)


@triton.jit
def apply_rules(
    logits_ptr,
    mask_rows_ptr,
    masks_ptr,
    slots_ptr,
    counts_ptr,
    counted_ptr,
    repetitions_ptr,
    frequencies_ptr,
    presences_ptr,
    row_stride,
    VOCAB: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """logits [rows, VOCAB] float32, changed in place.

    mask_rows [rows] int32 into masks [masks, WORDS] int32, or negative: nothing is ruled out
    slots     [rows] int32 into counts [slots, VOCAB] int32, or negative: nothing is penalized
    counted   [rows] int64, a token that the answer holds once more; negative: none
    repetitions, frequencies, presences  [rows] float32
    """
    row = tl.program_id(0)
    mask_row = tl.load(mask_rows_ptr + row)
    slot = tl.load(slots_ptr + row)
    if (mask_row < 0) & (slot < 0):
        return
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = token < VOCAB
    logits_ptr += row.to(tl.int64) * row_stride
    x = tl.load(logits_ptr + token, mask=here, other=0.0)
    if mask_row >= 0:
        words_ptr = masks_ptr + mask_row.to(tl.int64) * WORDS
        word = tl.load(words_ptr + token // 32, mask=here, other=0)
        x = tl.where((word >> (token % 32)) & 1 != 0, x, float("-inf"))
    if slot >= 0:
        counts_ptr += slot.to(tl.int64) * VOCAB
        count = tl.load(counts_ptr + token, mask=here, other=0)
        is_new = token == tl.load(counted_ptr + row)
        count += is_new.to(tl.int32)
        tl.store(counts_ptr + token, count, mask=here & is_new)
        repetition = tl.load(repetitions_ptr + row)
        penalized = tl.where(x > 0, tl.div_rn(x, repetition), x * repetition)
        x = tl.where(count != 0, penalized, x)
        times = (count & (IN_PROMPT - 1)).to(tl.float32)
        x -= tl.load(frequencies_ptr + row) * times
        x -= tl.where(times > 0, tl.load(presences_ptr + row), 0.0)
    tl.store(logits_ptr + token, x, mask=here)
