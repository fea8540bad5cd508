"""GGUF blocks run packed: the weights that their codec tells, in no more bytes than the file's."""

import pytest
import torch
from torch import Tensor

from qtool.convert.gguf.blocks.codecs import BLOCK_CODECS
from qtool.kernels.cpu import native_linear
from qtool.kernels.cpu.native import Native
from qtool.kernels.cpu.native_linear import BLOCKS, PANEL_ROWS
from qtool.weights import BlockWeight

TYPES = pytest.mark.parametrize("name", BLOCKS)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_blocks(name: str, out_features: int, in_features: int) -> BlockWeight:
    """Any bytes that are a weight: every code, and scales and minima of moderate size."""
    codec = BLOCK_CODECS[name]
    blocks = in_features // codec.block_size
    shape = (out_features, blocks, codec.block_bytes)
    data = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator(1))
    halves = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "TQ2_0": (64,), "MXFP4": ()}
    minima = name in ("Q4_1", "Q5_1", "Q4_K", "Q5_K")
    for at in halves.get(name, (0, 2) if minima else (0,)):
        drawn = torch.randn(shape[:2], generator=generator(at)).mul(0.02).half()
        data[..., at : at + 2] = drawn.view(torch.uint8).view(*shape[:2], 2)
    if name == "MXFP4":
        data[..., 0] = data[..., 0] % 12 + 115
    return BlockWeight(data.flatten(1), in_features, codec)


def rounded(x: Tensor, span: int) -> Tensor:
    """Activations as the kernel rounds them, in float64."""
    grouped = x.view(x.shape[0], -1, span)
    top = grouped.abs().amax(-1, keepdim=True)
    codes = torch.round(grouped * (127.0 / top)).double()
    return (codes * (top / 127.0).double()).view(x.shape)


@TYPES
def test_one_input_at_a_time_gives_the_weights_of_the_codec(native: Native, name: str) -> None:
    for out_features, in_features in ((33, 256), (70, 512)):
        weight = random_blocks(name, out_features, in_features)
        packed = native_linear.pack_for(native, weight)
        found = native_linear.matmul(torch.eye(in_features), packed, None).t()
        torch.testing.assert_close(found, weight.dequantize(), rtol=1e-6, atol=1e-6)


@TYPES
def test_products_are_those_of_the_rounded_activations(native: Native, name: str) -> None:
    weight = random_blocks(name, 45, 768)
    packed = native_linear.pack_for(native, weight)
    x = torch.randn(11, 768, generator=generator(2))
    expected = rounded(x, packed.record.span) @ weight.dequantize().double().t()
    found = native_linear.matmul(x, packed, None)
    assert float((found - expected).norm() / expected.norm()) < 1e-6


@TYPES
def test_a_token_has_the_same_bits_in_any_batch(native: Native, threads: int, name: str) -> None:
    packed = native_linear.pack_for(native, random_blocks(name, 100, 512))
    x = torch.randn(32, 512, generator=generator(3))
    expected = native_linear.matmul(x, packed, None)
    for start, stop in ((0, 1), (5, 6), (0, 8), (7, 20), (1, 32)):
        assert torch.equal(native_linear.matmul(x[start:stop], packed, None), expected[start:stop])


@TYPES
def test_both_instruction_sets_give_the_same_bits(natives: list[Native], name: str) -> None:
    weight = random_blocks(name, 40, 512)
    x = torch.randn(9, 512, generator=generator(4))
    first, *others = (
        native_linear.matmul(x, native_linear.pack_for(native, weight), None) for native in natives
    )
    assert all(torch.equal(first, other) for other in others)


@TYPES
def test_the_packed_form_is_no_larger_than_the_file(native: Native, name: str) -> None:
    weight = random_blocks(name, 4 * PANEL_ROWS, 512)
    packed = native_linear.pack_for(native, weight)
    tables = 0 if packed.table is None else packed.table.nbytes
    held = sum(part.nbytes for part in packed if isinstance(part, Tensor))
    assert held - tables == weight.nbytes
