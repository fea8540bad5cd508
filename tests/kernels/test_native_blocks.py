"""A decoder's blocks in one call give the bits of the operations called one by one."""

import dataclasses

import pytest
import torch
from torch import Tensor

from qtool import grid
from qtool.kernels.cpu import native_linear
from qtool.kernels.cpu.native import Native, plan_spans
from qtool.kernels.cpu.native_blocks import BlockParts, bind
from qtool.kernels.cpu.native_linear import NativePacked
from qtool.kernels.reference import Span
from qtool.scheme import QuantScheme
from qtool.weights import QuantizedWeight

HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM, SLOTS = 64, 160, 4, 2, 16, 256
EPS, SCALE, BLOCK_SIZE = 1e-6, 0.25, 16


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def packed(native: Native, out_features: int, in_features: int, seed: int) -> NativePacked:
    scheme = QuantScheme.parse("int4-g32-sym")
    weight = random(out_features, in_features, seed=seed) * 0.1
    found = grid.fit(weight, scheme)
    codes = grid.codes(weight, found, scheme)
    return native_linear.pack_for(native, QuantizedWeight(codes, found.scales, None, scheme))


def blocks(native: Native, dtype: torch.dtype, *, with_extras: bool) -> list[BlockParts]:
    def extra(*shape: int, seed: int) -> Tensor | None:
        return random(*shape, seed=seed).to(dtype) if with_extras else None

    qkv_rows = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    return [
        BlockParts(
            attn_norm=random(HIDDEN, seed=seed).to(dtype),
            qkv=packed(native, qkv_rows, HIDDEN, seed + 1),
            qkv_bias=extra(qkv_rows, seed=seed + 2),
            qk_norm=extra(HEADS + KV_HEADS, HEAD_DIM, seed=seed + 3),
            o=packed(native, HIDDEN, HEADS * HEAD_DIM, seed + 4),
            o_bias=extra(HIDDEN, seed=seed + 5),
            mlp_norm=random(HIDDEN, seed=seed + 6).to(dtype),
            gate_up=packed(native, 2 * FFN, HIDDEN, seed + 7),
            gate_up_bias=extra(2 * FFN, seed=seed + 8),
            down=packed(native, HIDDEN, FFN, seed + 9),
            down_bias=extra(HIDDEN, seed=seed + 10),
            keys=random(KV_HEADS, SLOTS, HEAD_DIM, seed=seed + 11).to(dtype),
            values=random(KV_HEADS, SLOTS, HEAD_DIM, seed=seed + 12).to(dtype),
        )
        for seed in (100, 200, 300)
    ]


def one_by_one(
    native: Native,
    parts: list[BlockParts],
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    spans: list[Span],
) -> Tensor:
    for block in parts:
        normed = native.rms_norm(x, block.attn_norm, EPS)
        qkv = native_linear.matmul(normed, block.qkv, block.qkv_bias)
        query = native.rope_and_write(
            qkv.view(len(x), -1, HEAD_DIM),
            cos,
            sin,
            block.keys,
            block.values,
            slots,
            qk_norm=block.qk_norm,
            eps=EPS,
        )
        attended = native.paged_attention(
            query, block.keys, block.values, spans, block_size=BLOCK_SIZE, scale=SCALE
        )
        x = x + native_linear.matmul(attended.view(len(x), -1), block.o, block.o_bias)
        normed = native.rms_norm(x, block.mlp_norm, EPS)
        gate_up = native_linear.matmul(normed, block.gate_up, block.gate_up_bias)
        x = x + native_linear.matmul(native.silu_mul(gate_up), block.down, block.down_bias)
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_extras", [False, True], ids=["plain", "biases and head norms"])
def test_all_blocks_in_one_call_give_the_same_bits(
    native: Native, threads: int, with_extras: bool, dtype: torch.dtype
) -> None:
    spans = [Span(1, 20, [3, 1]), Span(9, 25, [7, 0]), Span(5, 5, [4])]
    slots = torch.tensor([1 * 16 + 3, *range(16, 25), *range(64, 69)])
    slots[1:10] = torch.tensor([0 + position - 16 for position in range(16, 25)])
    angles = random(15, HEAD_DIM // 2, seed=5)
    cos, sin = angles.cos(), angles.sin()
    x = random(15, HIDDEN, seed=6).to(dtype)

    apart = blocks(native, dtype, with_extras=with_extras)
    expected = one_by_one(native, apart, x.clone(), cos, sin, slots, spans)
    together = blocks(native, dtype, with_extras=with_extras)
    bound = bind(together, heads=HEADS, eps=EPS, scale=SCALE)
    table = plan_spans(spans, block_size=BLOCK_SIZE, window=None)
    found = bound(x.clone(), cos, sin, slots, table)

    assert torch.equal(found, expected)
    for one, other in zip(apart, together, strict=True):
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(one.values, other.values)


def test_linears_that_do_not_fit_each_other_are_refused(native: Native) -> None:
    parts = blocks(native, torch.float32, with_extras=False)
    parts[1] = dataclasses.replace(parts[1], down=packed(native, HIDDEN, 128, 1))
    with pytest.raises(AssertionError):
        bind(parts, heads=HEADS, eps=EPS, scale=SCALE)
