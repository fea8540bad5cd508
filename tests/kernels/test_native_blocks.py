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


def unpacked(
    out_features: int, in_features: int, seed: int, word: str = "int4-g32-sym"
) -> QuantizedWeight:
    scheme = QuantScheme.parse(word)
    weight = random(out_features, in_features, seed=seed) * 0.1
    found = grid.fit(weight, scheme)
    return QuantizedWeight(grid.codes(weight, found, scheme), found.scales, None, scheme)


def packed(
    native: Native, out_features: int, in_features: int, seed: int, word: str = "int4-g32-sym"
) -> NativePacked:
    return native_linear.pack_for(native, unpacked(out_features, in_features, seed, word))


def blocks(
    native: Native,
    dtype: torch.dtype,
    *,
    with_extras: bool,
    split: bool = False,
    small: bool = False,
) -> list[BlockParts]:
    def extra(*shape: int, seed: int) -> Tensor | None:
        return random(*shape, seed=seed) if with_extras else None

    def linears(sizes: tuple[int, ...], in_features: int, seed: int) -> NativeLinears:
        """One matrix, or one each of two forms of scales."""
        bias = random(sum(sizes), seed=seed + 50).to(dtype) if with_extras else None
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
            attn_norm=random(HIDDEN, seed=seed),
            qkv=linears(heads, HIDDEN, seed + 1),
            qk_norm=extra(HEADS + KV_HEADS, HEAD_DIM, seed=seed + 4),
            o=linears((HIDDEN,), HEADS * HEAD_DIM, seed + 5),
            post_attn_norm=extra(HIDDEN, seed=seed + 6),
            mlp_norm=random(HIDDEN, seed=seed + 7),
            gate_up=linears((FFN, FFN), HIDDEN, seed + 8),
            down=linears((HIDDEN,), FFN, seed + 10),
            post_mlp_norm=extra(HIDDEN, seed=seed + 11),
            cache=make_cache(pool(seed + 12), pool(seed + 13), scales(seed), scales(seed + 1)),
            rule=make_rule(heads=HEADS, scale=SCALE, window=13 if seed == 200 else None),
            rotation=1 if seed == 300 else 0,
            rotated=HEAD_DIM,
            residual_scale=0.5 if with_extras else 1.0,
        )
        for seed in (100, 200, 300)
    ]


def product(x: Tensor, linears: NativeLinears) -> Tensor:
    parts = [native_linear.matmul(x, part, None, torch.float32) for part in linears.parts]
    whole = torch.cat(parts, -1)
    return (whole if linears.bias is None else whole + linears.bias.float()).to(x.dtype)


def add(x: Tensor, more: Tensor, scale: float) -> Tensor:
    return (x.float() + more.float() * scale).to(x.dtype)


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
        x = add(x, more, block.residual_scale)
        gate_up = product(native.rms_norm(x, block.mlp_norm, EPS), block.gate_up)
        more = product(native.gate_mul(gate_up, activation), block.down)
        if block.post_mlp_norm is not None:
            more = native.rms_norm(more, block.post_mlp_norm, EPS)
        x = add(x, more, block.residual_scale)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_o_and_down_give_is_added_up_over_ranks(
    native: Native, threads: int, dtype: torch.dtype
) -> None:
    """Another rank that gives the same: doubled, as by twice the residual's scale."""
    spans, slots, cos, sin = step()
    table = plan_spans(spans, block_size=BLOCK_SIZE)
    x = random(15, HIDDEN, seed=6).to(dtype)
    parts = blocks(native, dtype, with_extras=False)
    twice = [dataclasses.replace(part, residual_scale=2 * part.residual_scale) for part in parts]
    expected = bind(twice, hidden=HIDDEN, eps=EPS, dtype=dtype)(x.clone(), cos, sin, slots, table)
    sizes: list[int] = []

    def add_up(values: Tensor) -> None:
        sizes.append(values.numel())
        values.mul_(2)

    bound = bind(parts, hidden=HIDDEN, eps=EPS, dtype=dtype, sum_over_ranks=add_up)
    assert torch.equal(bound(x.clone(), cos, sin, slots, table), expected)
    assert sizes == [15 * HIDDEN] * 2 * len(parts)


def test_a_sum_that_cannot_be_had_ends_the_call(native: Native, threads: int) -> None:
    spans, slots, cos, sin = step()
    table = plan_spans(spans, block_size=BLOCK_SIZE)
    calls: list[int] = []

    def fail(values: Tensor) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise ConnectionError("a rank is gone")

    parts = blocks(native, torch.float32, with_extras=True)
    bound = bind(parts, hidden=HIDDEN, eps=EPS, dtype=torch.float32, sum_over_ranks=fail)
    with pytest.raises(ConnectionError, match="a rank is gone"):
        bound(random(15, HIDDEN, seed=6), cos, sin, slots, table)
    assert len(calls) == 2
    # And the next one is a call like any other.
    bound(random(15, HIDDEN, seed=6), cos, sin, slots, table)
    assert len(calls) == 2 + 2 * len(parts)


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


@pytest.mark.parametrize("rotated", [0, 6])
def test_heads_may_be_turned_in_part_or_not_at_all(native: Native, rotated: int) -> None:
    """As heads that are turned whole, by angles of zero for the rest."""
    spans, slots, _, _ = step()
    x = random(15, HIDDEN, seed=6)
    angles = random(2, 15, rotated // 2, seed=5)
    table = plan_spans(spans, block_size=BLOCK_SIZE)
    parts = [
        dataclasses.replace(block, rotated=rotated)
        for block in blocks(native, torch.float32, with_extras=True)
    ]
    bound = bind(parts, hidden=HIDDEN, eps=EPS, dtype=torch.float32)
    found = bound(x.clone(), angles.cos(), angles.sin(), slots, table)

    # The pairs of a part lie half of the part apart, those of a whole head half a head.
    first, half = torch.arange(rotated // 2), HEAD_DIM // 2
    order = torch.full((HEAD_DIM,), -1)
    order[first], order[half + first] = first, rotated // 2 + first
    rest = iter(range(rotated, HEAD_DIM))
    order = torch.tensor([next(rest) if place < 0 else int(place) for place in order])
    heads = torch.arange(HEADS + KV_HEADS)[:, None] * HEAD_DIM + order
    values = torch.arange(KV_HEADS * HEAD_DIM) + (HEADS + KV_HEADS) * HEAD_DIM
    whole = []
    for block in blocks(native, torch.float32, with_extras=True):
        rows = torch.cat((heads.flatten(), values))
        seed = 101 if not whole else 201 if len(whole) == 1 else 301
        weight = unpacked(len(rows), HIDDEN, seed).rows(rows)
        assert block.qkv.bias is not None
        assert block.qk_norm is not None
        keys, *others = block.cache.tensors
        qkv = NativeLinears((native_linear.pack_for(native, weight),), block.qkv.bias[rows])
        cache = make_cache(keys[..., order].contiguous(), *others)
        norm = block.qk_norm[:, order].contiguous()
        whole.append(dataclasses.replace(block, qkv=qkv, cache=cache, qk_norm=norm))
    bound = bind(whole, hidden=HIDDEN, eps=EPS, dtype=torch.float32)
    padded = torch.cat((angles, torch.zeros(2, 15, half - rotated // 2)), -1)
    expected = bound(x.clone(), padded.cos(), padded.sin(), slots, table)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_linears_that_do_not_fit_each_other_are_refused(native: Native) -> None:
    parts = blocks(native, torch.float32, with_extras=False)
    down = NativeLinears((packed(native, HIDDEN, 128, 1),))
    parts[1] = dataclasses.replace(parts[1], down=down)
    with pytest.raises(AssertionError):
        bind(parts, hidden=HIDDEN, eps=EPS, dtype=torch.float32)
