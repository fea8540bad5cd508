"""What the experts chosen for a token computed, added up."""

import triton
import triton.language as tl


@triton.jit
def combine(
    parts_ptr,
    places_ptr,
    weights_ptr,
    out_ptr,
    parts_stride,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    CHOICES: tl.constexpr,
):
    """out [rows, CHANNELS]: the rows of parts [SPLIT, places, CHANNELS] at places [rows, CHOICES],
    times weights [rows, CHOICES], in the order of the choices.
    """
    row = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = channel < CHANNELS
    total = tl.zeros((BLOCK,), tl.float32)
    for choice in tl.static_range(CHOICES):
        at = tl.load(places_ptr + row * CHOICES + choice).to(tl.int64) * CHANNELS + channel
        weight = tl.load(weights_ptr + row * CHOICES + choice).to(tl.float32)
        for part in tl.static_range(SPLIT):
            value = tl.load(parts_ptr + part * parts_stride + at, mask=mask, other=0.0)
            total += weight * value.to(tl.float32)
    out_at = out_ptr + row.to(tl.int64) * CHANNELS + channel
    tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=mask)
