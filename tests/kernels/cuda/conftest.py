"""Triton kernels, by the interpreter where there is no GPU and by the GPU where there is one.

The interpreter computes float16 and float32 right, and bfloat16 silently wrong: it is for a GPU.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qtool import grid
from qtool.scheme import QuantScheme
from qtool.weights import QuantizedWeight


@pytest.fixture(scope="session")
def device() -> torch.device:
    pytest.importorskip("triton")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def random(device: torch.device) -> Callable[..., Tensor]:
    """Normal numbers of a shape: the same where kernels are interpreted and on a GPU."""

    def make(*shape: int, seed: int = 0) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)

    return make


@pytest.fixture
def quantized() -> Callable[..., QuantizedWeight]:
    """A weight [out, in] rounded to a scheme, on the CPU as files are read."""

    def make(out_features: int, in_features: int, scheme: str, seed: int = 0) -> QuantizedWeight:
        parsed = QuantScheme.parse(scheme)
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(out_features, in_features, generator=generator) * 0.1
        found = grid.fit(weight, parsed)
        zeros = None if found.zeros is None else found.zeros.to(torch.uint8)
        return QuantizedWeight(grid.codes(weight, found, parsed), found.scales, zeros, parsed)

    return make


@pytest.fixture(scope="session")
def relative_error() -> Callable[[Tensor, Tensor], float]:
    def error(found: Tensor, expected: Tensor) -> float:
        found, expected = found.double().cpu(), expected.double().cpu()
        return float((found - expected).norm() / expected.norm())

    return error
