"""The compiled norm, activation and rotary embedding equal the reference."""

import math

import pytest
import torch
from torch import Tensor

from qtool.kernels import reference
from qtool.kernels.cpu.native import Native, make_cache


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_read_adds_up_every_word(native: Native, threads: int) -> None:
    data = torch.arange(1, 100_001, dtype=torch.int32)
    assert native.read(data) == 100_000 * 100_001 // 2 % 2**32


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
# 300 x 128 and 40 x 1000 are enough work for a second thread; 37 and 1000 end inside a vector.
SHAPES = [(1, 64), (3, 37), (300, 128), (40, 1000), (2, 3, 24)]


def check(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype
    # Both round one float32 result; a bfloat16 may land on the other side.
    tolerance = 2e-6 if found.dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@DTYPES
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(native: Native, threads: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = random(*shape).to(dtype), random(shape[-1], seed=1).to(dtype)
    check(native.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    ones = torch.ones_like(weight)
    check(native.rms_norm(x, None, 1e-5), reference.rms_norm(x, ones, 1e-5))


@DTYPES
def test_rms_norm_adds_a_residual_first_and_keeps_the_sum(
    native: Native, dtype: torch.dtype
) -> None:
    x, more, weight = (random(5, 70, seed=seed).to(dtype) for seed in range(3))
    weight = weight[0].contiguous()
    total = x + more
    check(native.rms_norm(x, weight, 1e-6, residual=more), reference.rms_norm(total, weight, 1e-6))
    assert torch.equal(x, total)


@DTYPES
@pytest.mark.parametrize("channels", [8, 100, 1000])
def test_silu_mul(native: Native, threads: int, channels: int, dtype: torch.dtype) -> None:
    gate_up = (random(41, 2 * channels) * 4).to(dtype)
    check(native.gate_mul(gate_up), reference.silu_mul(gate_up))


def test_silu_mul_of_large_and_special_numbers(native: Native) -> None:
    gates = [0.0, -0.0, 88.0, -88.0, 200.0, -200.0, 1e30, -1e30, math.inf, math.nan]
    gate_up = torch.tensor([[*gates, *([1.0] * len(gates))]])
    found = native.gate_mul(gate_up)
    torch.testing.assert_close(
        found, reference.silu_mul(gate_up), rtol=1e-6, atol=1e-30, equal_nan=True
    )


@DTYPES
def test_gelu_mul(native: Native, threads: int, dtype: torch.dtype) -> None:
    gate_up = (random(41, 2000) * 4).to(dtype)
    # PyTorch's own in float32 cancels digits where tanh is near -1.
    gate, up = gate_up.double().chunk(2, dim=-1)
    expected = torch.nn.functional.gelu(gate, approximate="tanh") * up
    check(native.gate_mul(gate_up, "gelu_tanh"), expected.to(dtype))


def angles_of(positions: list[int], head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """(angles, cos, sin) [tokens, head_dim / 2]"""
    frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    angles = reference.rope_angles(torch.tensor(positions), frequencies)
    return angles, angles.cos(), angles.sin()


@DTYPES
@pytest.mark.parametrize("head_dim", [2, 8, 20, 64, 128])
def test_rope(native: Native, threads: int, head_dim: int, dtype: torch.dtype) -> None:
    positions = [0, 1, 5, 1000, 3] * 40
    angles, cos, sin = angles_of(positions, head_dim)
    x = random(200, 3, head_dim).to(dtype)
    check(native.rope(x, cos, sin), reference.rope(x, angles))


def test_rope_takes_heads_out_of_a_wider_matrix(native: Native) -> None:
    qkv = random(4, 5, 16)
    angles, cos, sin = angles_of([3, 1, 4, 1], 16)
    check(native.rope(qkv[:, 1:3], cos, sin), reference.rope(qkv[:, 1:3], angles))


@DTYPES
@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 16), (3, 1, 24), (2, 2, 128)])
def test_rope_and_write(
    native: Native,
    threads: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    with_norm: bool,
    dtype: torch.dtype,
) -> None:
    tokens = 90
    qkv = random(tokens, heads + 2 * kv_heads, head_dim).to(dtype)
    angles, cos, sin = angles_of(list(range(7, 7 + tokens)), head_dim)
    slots = torch.randperm(128, generator=torch.Generator().manual_seed(3))[:tokens]
    keys, values = (torch.full((kv_heads, 128, head_dim), 7.0).to(dtype) for _ in range(2))
    gains = random(heads + kv_heads, head_dim, seed=4).to(dtype) if with_norm else None
    cache = make_cache(keys, values)
    query = native.rope_and_write(qkv, cos, sin, cache, slots, qk_norm=gains, eps=1e-5)

    rotated = qkv[:, : heads + kv_heads]
    if gains is not None:
        rotated = torch.stack(
            [reference.rms_norm(rotated[:, i], gain, 1e-5) for i, gain in enumerate(gains)], dim=1
        )
    rotated = reference.rope(rotated, angles)
    check(query, rotated[:, :heads].contiguous())
    check(keys[:, slots], rotated[:, heads:].transpose(0, 1).contiguous())
    assert torch.equal(values[:, slots], qkv[:, heads + kv_heads :].transpose(0, 1))
    untouched = torch.ones(128, dtype=torch.bool)
    untouched[slots] = False
    assert bool((keys[:, untouched] == 7.0).all())
    assert bool((values[:, untouched] == 7.0).all())


def test_a_row_has_the_same_bits_in_any_batch(native: Native, threads: int) -> None:
    x, weight = random(300, 200), random(200, seed=1)
    together = native.rms_norm(x, weight, 1e-6)
    alone = torch.cat([native.rms_norm(row[None], weight, 1e-6) for row in x])
    assert torch.equal(together, alone)
    together = native.gate_mul(x)
    assert torch.equal(together, torch.cat([native.gate_mul(row[None]) for row in x]))
