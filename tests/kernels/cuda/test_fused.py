"""Each fused step equals the plain operations one after the other."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qtool.kernels import reference
from qtool.kernels.cpu.attention import to_8_bits
from qtool.kernels.cuda import fused
from qtool.kernels.cuda.fused import CacheLayer

Random = Callable[..., Tensor]
Error = Callable[[Tensor, Tensor], float]
DTYPES = [torch.float16, torch.float32]
# The interpreter rounds to 8-bit floats wrongly where that carries into the exponent.
EIGHT_BITS = [torch.int8, pytest.param(torch.float8_e4m3fn, marks=pytest.mark.gpu)]
TOLERANCE = {torch.float16: 1e-3, torch.float32: 1e-6}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("channels", "block"), [(64, 0), (96, 32), (896, 128)])
@pytest.mark.parametrize("num_parts", [0, 3])
def test_adding_and_norming(
    dtype: torch.dtype,
    channels: int,
    block: int,
    num_parts: int,
    random: Random,
    relative_error: Error,
) -> None:
    residual, weight = random(3, channels, seed=1).to(dtype), random(channels, seed=2)
    parts = random(num_parts, 3, channels, seed=3) if num_parts else None
    expected = residual.float() + (0.0 if parts is None else 0.5 * parts.sum(0))
    found = fused.add_norm(residual, parts, weight, 1e-5, residual_scale=0.5, sum_block=block)
    assert relative_error(residual, expected) < TOLERANCE[dtype]
    normed = reference.rms_norm(residual.float(), weight, 1e-5)
    assert relative_error(found.values, normed) < TOLERANCE[dtype]
    assert found.values.dtype == dtype
    if block:
        # Of what was written, so that products with it come out right.
        sums = found.values.float().view(3, -1, block).sum(-1).t()
        torch.testing.assert_close(found.sums, sums, rtol=1e-5, atol=1e-4)


def test_a_norm_of_what_is_added_and_none_of_the_sum(random: Random, relative_error: Error) -> None:
    residual, parts, post = random(2, 96), random(2, 2, 96, seed=1), random(96, seed=2)
    expected = residual + reference.rms_norm(parts.sum(0), post, 1e-5)
    found = fused.add_norm(residual, parts, None, 1e-5, post_weight=post)
    assert relative_error(residual, expected) < 1e-6
    assert torch.equal(found.values, residual)
    assert found.sums.numel() == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [32, 96, 1088])
@pytest.mark.parametrize("num_parts", [1, 2])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated_products(
    dtype: torch.dtype,
    channels: int,
    num_parts: int,
    activation: fused.Activation,
    random: Random,
    relative_error: Error,
) -> None:
    parts = random(num_parts, 3, 2 * channels)
    gate, up = parts.sum(0).chunk(2, dim=-1)
    if activation == "silu":
        expected = reference.silu_mul(parts.sum(0))
    else:
        expected = torch.nn.functional.gelu(gate, approximate="tanh") * up
    found = fused.gate_mul(parts, activation, dtype, sum_block=32)
    assert relative_error(found.values, expected) < TOLERANCE[dtype]
    sums = found.values.float().view(3, -1, 32).sum(-1).t()
    torch.testing.assert_close(found.sums, sums, rtol=1e-5, atol=1e-4)


def _turned(x: Tensor, angles: Tensor, rotated: int) -> Tensor:
    return torch.cat((reference.rope(x[..., :rotated], angles), x[..., rotated:]), dim=-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("channels", "rotated"), [(64, 64), (80, 32), (64, 0)])
@pytest.mark.parametrize("with_norm", [False, True])
def test_turning_and_caching(
    dtype: torch.dtype,
    channels: int,
    rotated: int,
    with_norm: bool,
    random: Random,
    relative_error: Error,
    device: torch.device,
) -> None:
    heads, kv_heads, rows = 3, 1, 4
    parts = random(2, rows, (heads + 2 * kv_heads) * channels)
    norm = random(heads + kv_heads, channels, seed=1) if with_norm else None
    angles = random(rows, rotated // 2, seed=2)
    slots = torch.tensor([5, -1, 0, 17], device=device)
    cache = CacheLayer(
        *(torch.zeros(kv_heads, 32, channels, dtype=dtype, device=device) for _ in "kv")
    )
    query = fused.rope_and_write(
        parts, angles.cos(), angles.sin(), slots, cache, dtype,
        heads=heads, rotated=rotated, qk_norm=norm, eps=1e-6,
    )  # fmt: skip
    all_heads = parts.sum(0).view(rows, -1, channels)
    qk = all_heads[:, : heads + kv_heads]
    if norm is not None:
        qk = reference.rms_norm(qk, torch.ones(channels, device=device), 1e-6) * norm
    qk = _turned(qk, angles, rotated)
    assert relative_error(query, qk[:, :heads]) < TOLERANCE[dtype]
    for row, slot in enumerate(slots.tolist()):
        if slot >= 0:
            assert relative_error(cache.keys[:, slot], qk[row, heads:]) < TOLERANCE[dtype]
            value = all_heads[row, heads + kv_heads :]
            assert relative_error(cache.values[:, slot], value) < TOLERANCE[dtype]
    untouched = [slot for slot in range(32) if slot not in slots.tolist()]
    assert not cache.keys[:, untouched].any()
    assert not cache.values[:, untouched].any()


@pytest.mark.parametrize("kind", EIGHT_BITS)
def test_a_cache_in_8_bits(kind: torch.dtype, random: Random, device: torch.device) -> None:
    heads, kv_heads, rows, channels = 2, 2, 3, 64
    parts = random(1, rows, (heads + 2 * kv_heads) * channels)
    angles = torch.zeros(rows, channels // 2, device=device)
    slots = torch.tensor([3, 1, 2], device=device)

    def empty() -> CacheLayer:
        pools = [torch.zeros(kv_heads, 8, channels, device=device).to(kind) for _ in "kv"]
        scales = [torch.zeros(kv_heads, 8, device=device) for _ in "kv"]
        return CacheLayer(*pools, *scales) if kind == torch.int8 else CacheLayer(*pools)

    cache, plain = empty(), empty()
    fused.rope_and_write(
        parts,
        angles.cos(),
        angles.sin(),
        slots,
        cache,
        torch.float32,
        heads=heads,
        rotated=channels,
    )
    key, value = parts[0].view(rows, -1, channels)[:, heads:].split(kv_heads, dim=1)
    fused.write_cache(key, value, slots, plain)
    for new, pools, scales in (
        (key, (cache.keys, plain.keys), (cache.key_scales, plain.key_scales)),
        (value, (cache.values, plain.values), (cache.value_scales, plain.value_scales)),
    ):
        for pool, scale in zip(pools, scales, strict=True):
            found = pool[:, slots].transpose(0, 1)
            if scale is None:
                # Three bits after the point: half a unit in the last place.
                torch.testing.assert_close(found.float(), new, rtol=1 / 16, atol=2e-3)
            else:
                codes, steps = to_8_bits(new)
                assert torch.equal(found, codes)
                torch.testing.assert_close(scale[:, slots].t(), steps)


@pytest.mark.parametrize("kind", EIGHT_BITS)
@pytest.mark.parametrize("channels", [33, 512, 5000])
def test_rows_in_8_bits(kind: torch.dtype, channels: int, random: Random) -> None:
    x = random(3, channels)
    x[1] = 0.0
    codes, scales = fused.quantize_rows(x, kind)
    assert codes.dtype == kind
    back = codes.float() * scales[:, None]
    step = scales[:, None] / 2 if kind == torch.int8 else x.abs() / 16 + scales[:, None] * 2e-3
    assert bool(((back - x).abs() <= step * 1.001).all())
    assert not back[1].any()
    if kind == torch.int8:
        assert torch.equal(codes, to_8_bits(x)[0])
