"""Drawing tokens on a GPU, by the rules of `runtime.engine.sampler`: one launch for all rows.

    temperature -> top_k, min_p -> top_p -> typical_p -> one uniform number -> token

Everything that a request says is read from the device, so that the launch can be recorded once and
replayed for other requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qtool.kernels.cuda.launch import to_device

# Tokens that are looked at at once.
BLOCK = 4096
# Numbers in [0, 1) keep so many bits, and stay below 1 in float32.
NUMBER_BITS = 24


class Draw(NamedTuple):
    """How one row is drawn from; see `Draws`."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    number: float = 0.0


class Draws(NamedTuple):
    """How each row is drawn from, each [rows].

    temperatures  float32; 0: the likeliest token
    top_ks        int32; 0: all
    top_ps        float32; 1: all
    min_ps        float32; 0: all
    typical_ps    float32; 1: all
    numbers       float32 in [0, 1)
    """

    temperatures: Tensor
    top_ks: Tensor
    top_ps: Tensor
    min_ps: Tensor
    typical_ps: Tensor
    numbers: Tensor

    @classmethod
    def empty(cls, rows: int, device: torch.device) -> Draws:
        """Of rows that take the likeliest token."""
        return cls(
            temperatures=torch.zeros(rows, device=device),
            top_ks=torch.zeros(rows, dtype=torch.int32, device=device),
            top_ps=torch.ones(rows, device=device),
            min_ps=torch.zeros(rows, device=device),
            typical_ps=torch.ones(rows, device=device),
            numbers=torch.zeros(rows, device=device),
        )


def on_device(draws: Sequence[Draw], device: torch.device) -> Draws:
    temperatures, top_ks, *rest, numbers = zip(*draws, strict=True)
    floats = [temperatures, *rest, list(map(shorten, numbers))]
    temperature, top_p, min_p, typical_p, number = to_device(floats, torch.float32, device).unbind()
    top_k = to_device(top_ks, torch.int32, device)
    return Draws(temperature, top_k, top_p, min_p, typical_p, number)


def shorten(number: float) -> float:
    """A number in [0, 1) as float32 holds it without reaching 1."""
    return int(number * (1 << NUMBER_BITS)) / (1 << NUMBER_BITS)


def draw_tokens(logits: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
    """logits [rows, vocab] float32 -> tokens [rows] int64, and 1 where all of a row are numbers
    and some of them finite, else 0: [rows] int32.
    """
    from qtool.kernels.cuda.device import sampling

    rows, vocab = logits.shape
    assert logits.dtype == torch.float32
    assert logits.stride(1) == 1
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    finite = torch.empty(rows, dtype=torch.int32, device=logits.device)
    sampling.draw_tokens[(rows,)](
        logits,
        *draws,
        tokens,
        finite,
        logits.stride(0),
        VOCAB=vocab,
        BLOCK=min(BLOCK, max(16, 1 << (vocab - 1).bit_length())),
        num_warps=16,
    )
    return tokens, finite
