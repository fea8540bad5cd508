"""Paged attention equals the reference: any mix of spans, blocks in any order, windows, types."""

import pytest
import torch
from torch import Tensor

from qtool.kernels import reference
from qtool.kernels.cpu import attention
from qtool.kernels.cpu.native import load, make_cache
from qtool.kernels.reference import Span
from qtool.native_build import Missing

BLOCK = 4
HEAD_DIM = 8
NUM_BLOCKS = 96


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def spans_of(*parts: tuple[int, int], seed: int | None = 0) -> list[Span]:
    """(queries, length) of each sequence; blocks shuffled, or in order where seed is None."""
    order = list(range(NUM_BLOCKS))
    if seed is not None:
        order = torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(seed)).tolist()
    spans = []
    for queries, length in parts:
        blocks = -(-length // BLOCK)
        spans.append(Span(queries, length, order[:blocks]))
        order = order[blocks:]
    return spans


def run(
    spans: list[Span],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    window: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """(the kernel's output, the reference's)"""
    rows = sum(span.num_queries for span in spans)
    query = random(rows, heads, HEAD_DIM, seed=1).to(dtype)
    keys = random(kv_heads, NUM_BLOCKS * BLOCK, HEAD_DIM, seed=2).to(dtype)
    values = random(kv_heads, NUM_BLOCKS * BLOCK, HEAD_DIM, seed=3).to(dtype)
    plan = attention.plan(
        spans, block_size=BLOCK, window=window, dtype=dtype, device=torch.device("cpu")
    )
    found = attention.attend(query, keys, values, plan, block_size=BLOCK, scale=0.3)
    expected = reference.paged_attention(
        query, keys, values, spans, block_size=BLOCK, scale=0.3, window=window
    )
    return found, expected


MIXES: dict[str, list[tuple[int, int]]] = {
    "one token": [(1, 1)],
    "decode alone": [(1, 23)],
    "decode at a block's end": [(1, 16)],
    "decode of like lengths": [(1, 13), (1, 14), (1, 16)],
    "decode of unlike lengths": [(1, 3), (1, 90), (1, 40), (1, 1), (1, 88)],
    "prefill from the start": [(11, 11)],
    "a later chunk": [(5, 30)],
    "several prefills": [(6, 6), (3, 17), (2, 2)],
    "everything at once": [(1, 30), (7, 7), (1, 5), (4, 25), (1, 61)],
}


@pytest.mark.parametrize("window", [None, 1, 6, 1000])
@pytest.mark.parametrize("seed", [0, None], ids=["shuffled", "in order"])
@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_float32_equals_the_reference(
    mix: list[tuple[int, int]], seed: int | None, window: int | None
) -> None:
    found, expected = run(spans_of(*mix, seed=seed), window=window)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (8, 8), (8, 1), (14, 2)])
def test_heads_read_their_group_of_kv_heads(heads: int, kv_heads: int) -> None:
    mix = MIXES["everything at once"]
    found, expected = run(spans_of(*mix), heads=heads, kv_heads=kv_heads)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bmm_from", [1, 1 << 30], ids=["bmm", "sdpa"])
@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_bfloat16_equals_the_reference_both_ways(
    mix: list[tuple[int, int]], bmm_from: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "BMM_FROM_TOKENS", bmm_from)
    found, expected = run(spans_of(*mix), dtype=torch.bfloat16, window=20)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=3e-2)


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("with_sinks", [False, True], ids=["no sinks", "sinks"])
@pytest.mark.parametrize("softcap", [None, 0.5])
@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_capped_scores_and_sinks_equal_the_reference(
    mix: list[tuple[int, int]], softcap: float | None, with_sinks: bool, window: int | None
) -> None:
    spans = spans_of(*mix)
    rows = sum(span.num_queries for span in spans)
    query = random(rows, 4, HEAD_DIM, seed=1)
    keys = random(2, NUM_BLOCKS * BLOCK, HEAD_DIM, seed=2)
    values = random(2, NUM_BLOCKS * BLOCK, HEAD_DIM, seed=3)
    sinks = random(4, seed=4) if with_sinks else None
    plan = attention.plan(
        spans, block_size=BLOCK, window=window, dtype=torch.float32, device=torch.device("cpu")
    )
    found = attention.attend(
        query, keys, values, plan, block_size=BLOCK, scale=0.3, softcap=softcap, sinks=sinks
    )
    expected = reference.paged_attention(
        query,
        keys,
        values,
        spans,
        block_size=BLOCK,
        scale=0.3,
        window=window,
        softcap=softcap,
        sinks=sinks,
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shared", [False, True], ids=["apart", "in the keys"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_values_may_be_narrower_than_keys_or_be_their_first_channels(
    mix: list[tuple[int, int]], dtype: torch.dtype, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "BMM_FROM_TOKENS", 32)
    spans = spans_of(*mix)
    rows = sum(span.num_queries for span in spans)
    query = random(rows, 6, HEAD_DIM, seed=1).to(dtype)
    keys = random(2, NUM_BLOCKS * BLOCK, HEAD_DIM, seed=2).to(dtype)
    values = random(2, NUM_BLOCKS * BLOCK, 5, seed=3).to(dtype)
    if shared:
        values = keys[..., :5]
    plan = attention.plan(
        spans, block_size=BLOCK, window=None, dtype=dtype, device=torch.device("cpu")
    )
    key = random(rows, 2, HEAD_DIM, seed=4).to(dtype)
    attention.write(keys, values, key, key[..., :5], plan.slots)
    assert torch.equal(keys[:, plan.slots], key.transpose(0, 1))
    assert torch.equal(values[:, plan.slots], key[..., :5].transpose(0, 1))
    found = attention.attend(query, keys, values, plan, block_size=BLOCK, scale=0.3)
    expected = reference.paged_attention(query, keys, values, spans, block_size=BLOCK, scale=0.3)
    assert found.shape == (rows, 6, 5)
    exact = dtype == torch.float32
    torch.testing.assert_close(
        found, expected, rtol=1e-5 if exact else 2e-2, atol=1e-6 if exact else 3e-2
    )


def test_every_row_is_planned_once() -> None:
    spans = spans_of(*MIXES["everything at once"])
    plan = attention.plan(
        spans, block_size=BLOCK, window=None, dtype=torch.float32, device=torch.device("cpu")
    )
    rows = [row for call in plan.prefill for row in range(call.start, call.stop)]
    for call in plan.decode:
        assert call.rows is not None
        rows += call.rows.tolist()
    assert sorted(rows) == list(range(sum(span.num_queries for span in spans)))


def test_unlike_lengths_do_not_pad_each_other() -> None:
    plan = attention.plan(
        spans_of((1, 90), (1, 3), (1, 88), (1, 5)),
        block_size=BLOCK,
        window=None,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    assert [call.gather.sequences for call in plan.decode] == [2, 2]


def test_blocks_in_order_are_read_without_a_copy() -> None:
    (call,) = attention.plan(
        [Span(1, 10, [5, 6, 7])],
        block_size=BLOCK,
        window=None,
        dtype=torch.float32,
        device=torch.device("cpu"),
    ).decode
    assert call.gather.block_ids is None
    assert call.gather.first_slot == 20


def test_writing_goes_to_the_slots_of_the_blocks() -> None:
    spans = [Span(3, 6, [2, 9]), Span(1, 1, [4])]
    plan = attention.plan(
        spans, block_size=BLOCK, window=None, dtype=torch.float32, device=torch.device("cpu")
    )
    # Tokens 3, 4, 5 of the first: the last of block 2, then the first two of block 9.
    assert plan.slots.tolist() == [11, 36, 37, 16]
    keys = torch.zeros(2, NUM_BLOCKS * BLOCK, HEAD_DIM)
    values = torch.zeros_like(keys)
    key, value = random(4, 2, HEAD_DIM, seed=1), random(4, 2, HEAD_DIM, seed=2)
    attention.write(keys, values, key, value, plan.slots)
    assert torch.equal(keys[:, plan.slots], key.transpose(0, 1))
    assert torch.equal(values[:, plan.slots], value.transpose(0, 1))
    assert int((keys != 0).any(-1).sum()) == 8


@pytest.mark.parametrize("batch", [1, 3])
def test_attention_without_a_cache_is_each_sequence_alone(batch: int) -> None:
    tokens, heads, kv_heads = 9, 4, 2
    query = random(batch, tokens, heads, HEAD_DIM, seed=1)
    key = random(batch, kv_heads, tokens, HEAD_DIM, seed=2)
    value = random(batch, kv_heads, tokens, HEAD_DIM, seed=3)
    found = attention.causal_attention(query, key, value, scale=0.3)
    for index in range(batch):
        expected = reference.paged_attention(
            query[index],
            key[index],
            value[index],
            [Span(tokens, tokens, range(3))],
            block_size=BLOCK,
            scale=0.3,
        )
        torch.testing.assert_close(found[index], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shared", [False, True], ids=["apart", "values inside keys"])
def test_a_cache_of_8_bits_computes_what_it_holds(shared: bool, dtype: torch.dtype) -> None:
    """A prompt and a decoding token over pools that were written in 8 bits."""
    spans = [Span(30, 30, [3, 0]), Span(1, 1, [5])]
    plan = attention.plan(
        spans, block_size=16, window=None, dtype=dtype, device=torch.device("cpu")
    )
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(31, 2, 24, generator=generator).to(dtype) for _ in range(2))
    query = torch.randn(31, 4, 24, generator=generator).to(dtype)
    keys = torch.zeros(2, 96, 24, dtype=torch.int8)
    values = keys[..., :8] if shared else torch.zeros(2, 96, 24, dtype=torch.int8)
    key_scales = torch.zeros(2, 96)
    scales = (key_scales, key_scales if shared else torch.zeros(2, 96))
    attention.write(keys, values, key, value, plan.slots, scales=scales)
    wide = [
        pool.float() * steps[..., None] for pool, steps in zip((keys, values), scales, strict=True)
    ]
    error = wide[0][:, plan.slots].transpose(0, 1) - key.float()
    assert bool((error.abs() <= 0.5001 * key.float().abs().amax(-1, keepdim=True) / 127).all())
    expected = reference.paged_attention(query.float(), *wide, spans, block_size=16, scale=0.3)
    found = attention.attend(query, keys, values, plan, block_size=16, scale=0.3, scales=scales)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance)


def test_both_ways_to_8_bits_give_the_same_bits() -> None:
    """PyTorch's and the compiled library's."""
    native = load()
    if isinstance(native, Missing):
        pytest.skip(f"native {native.reason}")
    key = torch.randn(7, 2, 40, generator=torch.Generator().manual_seed(1)).bfloat16()
    pools = [torch.zeros(2, 16, 40, dtype=torch.int8) for _ in range(2)]
    steps = [torch.zeros(2, 16) for _ in range(2)]
    native.write_cache(key, key, make_cache(*pools, *steps), torch.arange(7))
    codes, scales = attention.to_8_bits(key.transpose(0, 1))
    assert torch.equal(pools[0][:, :7], codes)
    assert torch.equal(steps[0][:, :7], scales)
