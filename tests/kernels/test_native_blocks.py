"""A decoder's blocks in one call give the bits of the operations called one by one."""

import dataclasses

import pytest
import torch
from torch import Tensor

from qtool import grid
from qtool.kernels.cpu import native_linear
from qtool.kernels.cpu.native import Native, make_cache, make_rule, plan_spans
from qtool.kernels.cpu.native_blocks import BlockParts, NativeLinears, bind
from qtool.kernels.cpu.native_linear import NativePacked
from qtool.kernels.reference import Span
from qtool.scheme import QuantScheme
from qtool.weights import QuantizedWeight

HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM, SLOTS = 64, 160, 4, 2, 16, 256
EPS, SCALE, BLOCK_SIZE = 1e-6, 0.25, 16


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def packed(
    native: Native, out_features: int, in_features: int, seed: int, word: str = "int4-g32-sym"
) -> NativePacked:
    scheme = QuantScheme.parse(word)
    weight = random(out_features, in_features, seed=seed) * 0.1
    found = grid.fit(weight, scheme)
    codes = grid.codes(weight, found, scheme)
    return native_linear.pack_for(native, QuantizedWeight(codes, found.scales, None, scheme))


def blocks(
    native: Native,
    dtype: torch.dtype,
    *,
    with_extras: bool,
    split: bool = False,
    small: bool = False,
) -> list[BlockParts]:
    def extra(*shape: int, seed: int) -> Tensor | None:
        return random(*shape, seed=seed).to(dtype) if with_extras else None

    def linears(sizes: tuple[int, ...], in_features: int, seed: int) -> NativeLinears:
        """One matrix, or one each of two forms of scales."""
        bias = extra(sum(sizes), seed=seed + 50)
        if not split:
            return NativeLinears((packed(native, sum(sizes), in_features, seed),), bias)
        words = ["int4-g32-sym", "int8-row-sym", "int4-g32-sym"]
        parts = [
            packed(native, size, in_features, seed + index, word)
            for index, (size, word) in enumerate(zip(sizes, words, strict=False))
        ]
        return NativeLinears(tuple(parts), bias)

    def pool(seed: int) -> Tensor:
        values = random(KV_HEADS, SLOTS, HEAD_DIM, seed=seed)
        return (values * 30).to(torch.int8) if small else values.to(dtype)

    def scales(seed: int) -> Tensor | None:
        return random(KV_HEADS, SLOTS, seed=seed).abs() / 30 if small else None

    heads = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM)
    return [
        BlockParts(
            attn_norm=random(HIDDEN, seed=seed).to(dtype),
            qkv=linears(heads, HIDDEN, seed + 1),
            qk_norm=extra(HEADS + KV_HEADS, HEAD_DIM, seed=seed + 4),
            o=linears((HIDDEN,), HEADS * HEAD_DIM, seed + 5),
            post_attn_norm=extra(HIDDEN, seed=seed + 6),
            mlp_norm=random(HIDDEN, seed=seed + 7).to(dtype),
            gate_up=linears((FFN, FFN), HIDDEN, seed + 8),
            down=linears((HIDDEN,), FFN, seed + 10),
            post_mlp_norm=extra(HIDDEN, seed=seed + 11),
            cache=make_cache(pool(seed + 12), pool(seed + 13), scales(seed), scales(seed + 1)),
            rule=make_rule(heads=HEADS, scale=SCALE, window=13 if seed == 200 else None),
            rotation=1 if seed == 300 else 0,
        )
        for seed in (100, 200, 300)
    ]


def product(x: Tensor, linears: NativeLinears) -> Tensor:
    parts = [native_linear.matmul(x, part, None, torch.float32) for part in linears.parts]
    whole = torch.cat(parts, -1)
    return (whole if linears.bias is None else whole + linears.bias.float()).to(x.dtype)


def one_by_one(
    native: Native,
    parts: list[BlockParts],
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    spans: list[Span],
    activation: str = "silu",
) -> Tensor:
    table = plan_spans(spans, block_size=BLOCK_SIZE)
    for block in parts:
        qkv = product(native.rms_norm(x, block.attn_norm, EPS), block.qkv)
        query = native.rope_and_write(
            qkv.view(len(x), -1, HEAD_DIM),
            cos[block.rotation],
            sin[block.rotation],
            block.cache,
            slots,
            qk_norm=block.qk_norm,
            eps=EPS,
        )
        attended = native.paged_attention(query, block.cache, table, block.rule)
        more = product(attended.view(len(x), -1), block.o)
        if block.post_attn_norm is not None:
            more = native.rms_norm(more, block.post_attn_norm, EPS)
        x = x + more
        gate_up = product(native.rms_norm(x, block.mlp_norm, EPS), block.gate_up)
        more = product(native.gate_mul(gate_up, activation), block.down)
        if block.post_mlp_norm is not None:
            more = native.rms_norm(more, block.post_mlp_norm, EPS)
        x = x + more
    return x


def step(seed: int = 5) -> tuple[list[Span], Tensor, Tensor, Tensor]:
    """Spans over the pool, where their tokens go, and cos and sin [2, tokens, head_dim / 2]."""
    spans = [Span(1, 20, [3, 1]), Span(9, 25, [7, 0]), Span(5, 5, [4])]
    slots = torch.tensor([1 * 16 + 3, *range(16, 25), *range(64, 69)])
    slots[1:10] = torch.tensor([0 + position - 16 for position in range(16, 25)])
    angles = random(2, 15, HEAD_DIM // 2, seed=seed)
    return spans, slots, angles.cos(), angles.sin()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("small", [False, True], ids=["wide cache", "cache of 8 bits"])
@pytest.mark.parametrize("split", [False, True], ids=["fused", "in parts"])
@pytest.mark.parametrize("with_extras", [False, True], ids=["plain", "biases and more norms"])
def test_all_blocks_in_one_call_give_the_same_bits(
    native: Native, threads: int, with_extras: bool, split: bool, small: bool, dtype: torch.dtype
) -> None:
    spans, slots, cos, sin = step()
    x = random(15, HIDDEN, seed=6).to(dtype)
    activation = "gelu_tanh" if with_extras else "silu"
    apart, together = (
        blocks(native, dtype, with_extras=with_extras, split=split, small=small) for _ in range(2)
    )
    expected = one_by_one(native, apart, x.clone(), cos, sin, slots, spans, activation)
    bound = bind(together, hidden=HIDDEN, eps=EPS, dtype=dtype, activation=activation)
    found = bound(x.clone(), cos, sin, slots, plan_spans(spans, block_size=BLOCK_SIZE))

    assert torch.equal(found, expected)
    for one, other in zip(apart, together, strict=True):
        for kept, also in zip(one.cache.tensors, other.cache.tensors, strict=True):
            assert torch.equal(kept, also)


def test_a_token_has_the_same_bits_at_any_batch_size_and_in_any_chunks(native: Native) -> None:
    """40 tokens of one sequence: at once, in chunks, one by one, and beside 31 other sequences."""
    angles = random(2, 40, HEAD_DIM // 2, seed=5)
    x = random(40, HIDDEN, seed=6).bfloat16()

    def run(chunks: list[int], company: int = 0) -> Tensor:
        parts = blocks(native, torch.bfloat16, with_extras=True)
        bound = bind(parts, hidden=HIDDEN, eps=EPS, dtype=torch.bfloat16)
        outputs, start = [], 0
        for size in chunks:
            rows = slice(start, start + size)
            spans = [Span(1, 1, [8])] * company + [Span(size, start + size, [2, 9, 5])]
            places = [[2, 9, 5][t // 16] * 16 + t % 16 for t in range(start, start + size)]
            slots = torch.tensor([8 * 16] * company + places)
            others = random(company, HIDDEN, seed=9).bfloat16()
            turns = torch.cat((angles[:, :1].expand(-1, company, -1), angles[:, rows]), 1)
            out = bound(
                torch.cat((others, x[rows])),
                turns.cos().contiguous(),
                turns.sin().contiguous(),
                slots,
                plan_spans(spans, block_size=BLOCK_SIZE),
            )
            outputs.append(out[company:])
            start += size
        return torch.cat(outputs)

    expected = run([40])
    assert torch.equal(run([8, 32]), expected)
    assert torch.equal(run([1] * 40), expected)
    assert torch.equal(run([20, *[1] * 20], company=7), expected)
    assert torch.equal(run([39, 1], company=31), expected)


def test_linears_that_do_not_fit_each_other_are_refused(native: Native) -> None:
    parts = blocks(native, torch.float32, with_extras=False)
    down = NativeLinears((packed(native, HIDDEN, 128, 1),))
    parts[1] = dataclasses.replace(parts[1], down=down)
    with pytest.raises(AssertionError):
        bind(parts, hidden=HIDDEN, eps=EPS, dtype=torch.float32)
