"""The small parts that blocks are made of: norms, activations, rotations.

A part is chosen once, when a model is built, and called every step; which one it is follows from
the family's row and its config.json (runtime/models/build.py).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from qtool.decoder_config import Activation
from qtool.kernels.cpu.torch_ops import rms_norm, rope, silu_mul
from qtool.rope import Rope


class Norm(Protocol):
    def __call__(self, x: Tensor, /) -> Tensor: ...


@dataclass(frozen=True, slots=True, eq=False)
class RmsNorm:
    """x / rms(x) * weight [channels], of x's own type."""

    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


@dataclass(frozen=True, slots=True, eq=False)
class WideRmsNorm:
    """The same with a float32 weight. Gemma multiplies by 1 + its weight, and bfloat16 would round
    that sum to 8 bits where it holds the weight itself in 8.
    """

    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x.float(), self.weight, self.eps).to(x.dtype)


@dataclass(frozen=True, slots=True, eq=False)
class LayerNorm:
    """(x - mean) / deviation * weight + bias, each [channels]."""

    weight: Tensor
    bias: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (x.shape[-1],), self.weight, self.bias, self.eps)


@dataclass(frozen=True, slots=True, eq=False)
class HeadNorm:
    """RMS norm of every head by itself: weight [heads + kv_heads, head_dim]."""

    weight: Tensor
    eps: float

    def __call__(self, qk: Tensor) -> Tensor:
        return (rms_norm(qk, None, self.eps) * self.weight).to(qk.dtype)


@dataclass(frozen=True, slots=True, eq=False)
class AllHeadsNorm:
    """RMS norm of all query heads together and of all key heads together.

    query [heads * head_dim], key [kv_heads * head_dim]
    """

    query: Tensor
    key: Tensor
    eps: float

    def __call__(self, qk: Tensor) -> Tensor:
        rows, _, head_dim = qk.shape
        flat = qk.reshape(rows, -1)
        query, key = flat.tensor_split((self.query.shape[0],), dim=-1)
        normed = (rms_norm(query, self.query, self.eps), rms_norm(key, self.key, self.eps))
        return torch.cat(normed, dim=-1).view(rows, -1, head_dim)


def _gated(activate: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def gated(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return activate(gate).mul_(up)

    return gated


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "relu2": _relu2,
}
# [rows, 2 * channels], gates first -> [rows, channels]
GATED: dict[Activation, Callable[[Tensor], Tensor]] = {
    name: _gated(activate) for name, activate in ACTIVATIONS.items()
} | {"silu": silu_mul}

# cos and sin [rows, 1, rotated channels] of a step, as `torch_ops.rope` takes them.
Turn = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Rotation:
    """One rotary embedding: inverse_frequencies [rotated channels / 2] float32."""

    rope: Rope
    head_dim: int
    inverse_frequencies: Tensor

    @classmethod
    def of(cls, rope: Rope, head_dim: int, context: int, device: torch.device) -> "Rotation":
        """For sequences of up to `context` tokens."""
        frequencies = rope.inverse_frequencies(head_dim, context)
        return cls(rope, head_dim, torch.tensor(frequencies, dtype=torch.float32, device=device))

    def turn(self, positions: Tensor, dtype: torch.dtype) -> Turn:
        """positions [rows] int64; sin's first half is negated."""
        angles = positions.float()[:, None, None] * self.inverse_frequencies
        cos, sin = angles.cos(), angles.sin()
        if self.rope.attention_factor != 1.0:
            cos, sin = cos * self.rope.attention_factor, sin * self.rope.attention_factor
        return (
            torch.cat((cos, cos), dim=-1).to(dtype),
            torch.cat((-sin, sin), dim=-1).to(dtype),
        )


def rotate(x: Tensor, turn: Turn) -> Tensor:
    """x [rows, heads, head_dim], its first channels turned, as many as `turn` has."""
    cos, sin = turn
    rotated = cos.shape[-1]
    if rotated == x.shape[-1]:
        return rope(x, cos, sin)
    return torch.cat((rope(x[..., :rotated], cos, sin), x[..., rotated:]), dim=-1)
