"""What requests change in the logits before tokens are drawn from them, on the device.

    logit_bias -> masks (grammar, allowed and bad words, min_tokens) -> penalties

A bias before a mask is the same as after it: what is ruled out stays so. The rules and their
meanings are those of `runtime.engine.logit_rules`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Tokens that a program looks at.
BLOCK = 4096
# Of a count, the bit that says that the prompt holds the token; below it, the times of the answer.
IN_PROMPT = 1 << 30


class Biases(NamedTuple):
    """rows, token_ids [biases] int64, each pair once; values [biases] float32"""

    rows: Tensor
    token_ids: Tensor
    values: Tensor


class Masks(NamedTuple):
    """Which tokens may be drawn.

    bits  [masks, words] int32, a bit for each token, the lowest of a word first; set: may be drawn
    rows  [rows] int32, each row's mask; negative: all tokens may
    """

    bits: Tensor
    rows: Tensor


class Penalized(NamedTuple):
    """Which texts are penalized for what they hold.

    counts     [slots, vocab] int32, how often the answer holds each token, and IN_PROMPT
    slots      [rows] int32, each row's text; negative: none
    counted    [rows] int64, a token that is counted before the penalties apply; negative: none
    penalties  [3, rows] float32: repetition, frequency, presence
    """

    counts: Tensor
    slots: Tensor
    counted: Tensor
    penalties: Tensor


class Rules(NamedTuple):
    """Of one step; None: no row asks for it."""

    biases: Biases | None = None
    masks: Masks | None = None
    penalized: Penalized | None = None


def num_words(vocab: int) -> int:
    """Of 32 bits, for a bit for each token."""
    return -(-vocab // 32)


def apply_rules(logits: Tensor, rules: Rules) -> None:
    """logits [rows, vocab] float32, changed in place; tokens are counted."""
    from qtool.kernels.cuda.device import sampling_rules

    rows, vocab = logits.shape
    assert logits.dtype == torch.float32
    assert logits.stride(1) == 1
    add_biases(logits, rules.biases)
    if rules.masks is None and rules.penalized is None:
        return
    none = torch.full((rows,), -1, dtype=torch.int32, device=logits.device)
    masks = rules.masks or Masks(none, none)
    # Of these, nothing is read where no row has a slot.
    held = rules.penalized or Penalized(none, none, none, logits.new_empty(3, 0))
    sampling_rules.apply_rules[(rows, -(-vocab // BLOCK))](
        logits,
        masks.rows,
        masks.bits,
        held.slots,
        held.counts,
        held.counted,
        *held.penalties.unbind(),
        logits.stride(0),
        VOCAB=vocab,
        WORDS=num_words(vocab),
        BLOCK=min(BLOCK, max(16, 1 << (vocab - 1).bit_length())),
        # Two roundings where the CPU has two.
        enable_fp_fusion=False,
        num_warps=8,
    )


def add_biases(logits: Tensor, biases: Biases | None) -> None:
    if biases is not None:
        held = logits[biases.rows, biases.token_ids]
        logits[biases.rows, biases.token_ids] = held + biases.values
