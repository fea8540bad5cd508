import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtool import grid
from qtool.errors import FormatError
from qtool.scheme import QuantScheme
from qtool.weights import DenseWeight, QuantizedWeight


def quantized(weight: torch.Tensor, scheme: QuantScheme) -> QuantizedWeight:
    fitted = grid.fit(weight, scheme)
    zeros = None if fitted.zeros is None else fitted.zeros.to(torch.uint8)
    return QuantizedWeight(grid.codes(weight, fitted, scheme), fitted.scales, zeros, scheme)


def test_the_worked_example_of_the_docstring() -> None:
    scheme = QuantScheme(4, None)
    weight = torch.tensor([[1.0, -0.5, 0.25]])
    fitted = grid.fit(weight, scheme)
    assert fitted.scales.tolist() == [[-0.125]]
    assert grid.codes(weight, fitted, scheme).tolist() == [[0, 12, 6]]
    assert quantized(weight, scheme).dequantize().tolist() == weight.tolist()


def test_an_asymmetric_grid_by_hand() -> None:
    scheme = QuantScheme(2, None, symmetric=False)
    weight = torch.tensor([[-1.0, 0.0, 1.0, 2.0]])
    fitted = grid.fit(weight, scheme)
    assert fitted.scales.tolist() == [[1.0]]
    assert fitted.zeros is not None
    assert fitted.zeros.tolist() == [[1.0]]
    assert grid.codes(weight, fitted, scheme).tolist() == [[0, 1, 2, 3]]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    spread=st.sampled_from([1e-3, 1.0, 300.0]),
)
def test_every_weight_is_within_one_step(
    seed: int, bits: int, symmetric: bool, spread: float
) -> None:
    scheme = QuantScheme(bits, 32, symmetric)
    weight = torch.randn(5, 96, generator=torch.Generator().manual_seed(seed)) * spread
    result = quantized(weight, scheme)
    step = result.scales.abs().repeat_interleave(32, dim=1)
    # Half a step inside the grid; at the positive end of a symmetric one, and where the scale was
    # rounded, up to a whole one.
    error = (result.dequantize() - weight).abs()
    assert (error <= step * (1 + 2**-7 * scheme.num_codes)).all()


def test_scales_are_exact_in_bfloat16_and_float16() -> None:
    scales = torch.tensor([0.1, -0.3, 1e-9, 0.0, -1e9])
    rounded = grid.round_scales(scales)
    assert torch.equal(rounded.to(torch.bfloat16).float(), rounded)
    assert torch.equal(rounded.to(torch.float16).float(), rounded)
    assert torch.equal(rounded.sign(), torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0]))


def test_a_zero_group_stays_zero() -> None:
    for symmetric in (True, False):
        scheme = QuantScheme(4, 32, symmetric)
        assert quantized(torch.zeros(2, 64), scheme).dequantize().abs().max() == 0


def test_weights_are_valid_once_built() -> None:
    scheme = QuantScheme(4, 32)
    codes = torch.zeros(2, 64, dtype=torch.uint8)
    with pytest.raises(FormatError, match=r"scales have shape \[2, 3\]"):
        QuantizedWeight(codes, torch.ones(2, 3), None, scheme)
    with pytest.raises(FormatError, match="takes no zeros"):
        QuantizedWeight(codes, torch.ones(2, 2), torch.zeros(2, 2, dtype=torch.uint8), scheme)
    with pytest.raises(FormatError, match="floating-point matrix"):
        DenseWeight(codes)


def test_rows_can_be_reordered() -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    order = torch.tensor([2, 0, 3, 1])
    result = quantized(weight, QuantScheme(4, 32))
    assert torch.equal(result.rows(order).dequantize(), result.dequantize()[order])
