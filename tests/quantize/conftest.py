"""Layers with the statistics of real ones, small: correlated inputs, a few loud channels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor


class Layer(NamedTuple):
    """weight [out, in], inputs [tokens, in], hessian [in, in] = E[x xᵀ]; all float32."""

    weight: Tensor
    inputs: Tensor
    hessian: Tensor


@pytest.fixture(scope="session")
def make_layer() -> Callable[..., Layer]:
    def make(rows: int = 48, columns: int = 128, tokens: int = 1024, seed: int = 0) -> Layer:
        generator = torch.Generator().manual_seed(seed)
        rank = max(2, columns // 4)
        mixing = torch.randn(columns, rank, generator=generator) / math.sqrt(rank)
        inputs = torch.randn(tokens, rank, generator=generator) @ mixing.t()
        inputs += 0.3 * torch.randn(tokens, columns, generator=generator)
        loudness = torch.exp(0.8 * torch.randn(columns, generator=generator))
        loudness[torch.randperm(columns, generator=generator)[: max(1, columns // 64)]] *= 10
        inputs *= loudness
        weight = 0.02 * torch.randn(rows, columns, generator=generator)
        return Layer(weight, inputs, inputs.t() @ inputs / tokens)

    return make
