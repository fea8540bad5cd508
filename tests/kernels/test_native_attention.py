"""Compiled paged attention equals the reference, and a token's bits depend on its own past only."""

import pytest
import torch
from torch import Tensor

from qtool.kernels import reference
from qtool.kernels.cpu.native import Native, make_cache, make_rule, plan_spans
from qtool.kernels.reference import Span

SLOTS = 2048


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def spans_of(parts: list[tuple[int, int]], block_size: int, seed: int = 0) -> list[Span]:
    """(queries, length) of each sequence over shuffled blocks."""
    order = torch.randperm(
        SLOTS // block_size, generator=torch.Generator().manual_seed(seed)
    ).tolist()
    spans = []
    for queries, length in parts:
        held = -(-length // block_size)
        spans.append(Span(queries, length, order[:held]))
        order = order[held:]
    return spans


def inputs(
    spans: list[Span], heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    tokens = sum(span.num_queries for span in spans)
    query = random(tokens, heads, head_dim, seed=1).to(dtype)
    keys = random(kv_heads, SLOTS, head_dim, seed=2).to(dtype)
    values = random(kv_heads, SLOTS, head_dim, seed=3).to(dtype)
    return query, keys, values


def attend(
    native: Native,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    spans: list[Span],
    *,
    block_size: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    rule = make_rule(heads=query.shape[1], scale=scale, window=window, softcap=softcap, sinks=sinks)
    table = plan_spans(spans, block_size=block_size)
    return native.paged_attention(query, make_cache(keys, values), table, rule)


def check(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype
    tolerance = 5e-6 if found.dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


MIXES: dict[str, list[tuple[int, int]]] = {
    "one token": [(1, 1)],
    "decode": [(1, 77)],
    "decode at the end of a chunk": [(1, 64)],
    "decode in the second part": [(1, 700)],
    "prompt from the start": [(40, 40)],
    "a later chunk of a prompt": [(9, 530)],
    "everything at once": [(1, 30), (35, 35), (1, 600), (3, 33), (1, 1)],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 1, 40, 1000])
@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_any_mix_equals_the_reference(
    natives: list[Native], mix: list[tuple[int, int]], window: int | None, dtype: torch.dtype
) -> None:
    spans = spans_of(mix, 16)
    query, keys, values = inputs(spans, 4, 2, 24, dtype)
    expected = reference.paged_attention(
        query, keys, values, spans, block_size=16, scale=0.3, window=window
    )
    for native in natives:
        found = attend(native, query, keys, values, spans, block_size=16, scale=0.3, window=window)
        check(found, expected)


@pytest.mark.parametrize("block_size", [1, 4, 16, 32, 50, 128])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"),
    [(1, 1, 64), (14, 2, 64), (6, 3, 80), (40, 1, 6), (4, 4, 256)],
)
def test_blocks_and_heads_of_any_size(
    natives: list[Native], block_size: int, heads: int, kv_heads: int, head_dim: int
) -> None:
    spans = spans_of([(1, 45), (3, 70)], block_size)
    query, keys, values = inputs(spans, heads, kv_heads, head_dim, torch.float32)
    expected = reference.paged_attention(
        query, keys, values, spans, block_size=block_size, scale=0.1
    )
    for native in natives:
        found = attend(native, query, keys, values, spans, block_size=block_size, scale=0.1)
        check(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 70])
def test_a_token_has_the_same_bits_however_its_prompt_is_cut(
    native: Native, window: int | None, dtype: torch.dtype
) -> None:
    """One whole prompt against decode steps, chunks, and company, on either number of threads."""
    length = 600
    whole = spans_of([(length, length)], 16)
    query, keys, values = inputs(whole, 6, 2, 32, dtype)

    def part(start: int, stop: int, threads: int, company: bool = False) -> Tensor:
        spans = [Span(stop - start, stop, whole[0].block_ids)]
        rows = query[start:stop]
        if company:
            other = [block for block in range(SLOTS // 16) if block not in whole[0].block_ids]
            spans = [Span(3, 520, other), *spans, Span(1, 80, other[40:])]
            rows = torch.cat((query[:3], rows, query[:1]))
        torch.set_num_threads(threads)
        found = attend(
            native, rows.contiguous(), keys, values, spans, block_size=16, scale=0.2, window=window
        )
        return found[3:-1] if company else found

    before = torch.get_num_threads()
    try:
        expected = part(0, length, 1)
        assert torch.equal(part(0, length, 2), expected)
        for start, stop in ((0, 7), (7, 200), (200, 513), (513, 600), (599, 600)):
            assert torch.equal(part(start, stop, 2), expected[start:stop])
            assert torch.equal(part(start, stop, 1, company=True), expected[start:stop])
        for position in (0, 31, 32, 69, 511, 512, 599):
            for threads in (1, 2):
                found = part(position, position + 1, threads)
                assert torch.equal(found[0], expected[position]), position
    finally:
        torch.set_num_threads(before)


def test_the_size_of_blocks_does_not_change_a_bit(native: Native) -> None:
    query, keys, values = inputs([Span(5, 300, ())], 4, 2, 64, torch.float32)
    results = []
    for block_size in (1, 16, 32, 300):
        spans = [Span(5, 300, range(-(-300 // block_size)))]
        results.append(attend(native, query, keys, values, spans, block_size=block_size, scale=0.2))
    for found in results[1:]:
        assert torch.equal(found, results[0])


def test_what_lies_past_the_end_of_a_sequence_is_never_read(native: Native) -> None:
    spans = [Span(2, 21, [3, 5])]
    query, keys, values = inputs(spans, 4, 2, 32, torch.float32)
    expected = attend(native, query, keys, values, spans, block_size=16, scale=0.2)
    seen = torch.zeros(SLOTS, dtype=torch.bool)
    seen[48:64] = seen[80:85] = True
    keys[:, ~seen] = float("nan")
    values[:, ~seen] = float("nan")
    found = attend(native, query, keys, values, spans, block_size=16, scale=0.2)
    assert torch.equal(found, expected)


def test_scores_of_any_size_stay_finite(native: Native) -> None:
    spans = spans_of([(1, 100)], 16)
    query, keys, values = inputs(spans, 2, 1, 32, torch.float32)
    found = attend(native, query * 1e4, keys, values, spans, block_size=16, scale=1.0)
    expected = reference.paged_attention(query * 1e4, keys, values, spans, block_size=16, scale=1.0)
    check(found, expected)


def test_a_nan_in_a_query_reaches_its_own_head_only(native: Native) -> None:
    spans = spans_of([(3, 40)], 16)
    query, keys, values = inputs(spans, 2, 1, 32, torch.float32)
    expected = attend(native, query, keys, values, spans, block_size=16, scale=0.2)
    query[1, 1, 5] = float("nan")
    found = attend(native, query, keys, values, spans, block_size=16, scale=0.2)
    assert bool(found[1, 1].isnan().all())
    found[1, 1] = expected[1, 1]
    assert torch.equal(found, expected)


def test_a_plan_serves_every_layer_of_a_step(native: Native) -> None:
    spans = spans_of([(1, 40), (6, 90)], 32)
    query, keys, values = inputs(spans, 4, 2, 64, torch.bfloat16)
    table, cache = plan_spans(spans, block_size=32), make_cache(keys, values)
    for window in (None, 20):
        rule = make_rule(heads=4, scale=0.2, window=window)
        planned = native.paged_attention(query, cache, table, rule)
        expected = attend(
            native, query, keys, values, spans, block_size=32, scale=0.2, window=window
        )
        assert torch.equal(planned, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 2.0, 50.0])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_capped_scores_and_sinks_equal_the_reference(
    natives: list[Native], softcap: float | None, with_sinks: bool, dtype: torch.dtype
) -> None:
    spans = spans_of([(1, 600), (9, 40)], 16)
    query, keys, values = inputs(spans, 4, 2, 32, dtype)
    sinks = random(4, seed=8) * 3 if with_sinks else None
    options = {"block_size": 16, "scale": 0.7, "window": 50, "softcap": softcap, "sinks": sinks}
    expected = reference.paged_attention(query, keys, values, spans, **options)
    for native in natives:
        check(attend(native, query, keys, values, spans, **options), expected)


def test_a_sink_that_outweighs_everything_leaves_nothing(native: Native) -> None:
    spans = spans_of([(1, 40)], 16)
    query, keys, values = inputs(spans, 2, 1, 32, torch.float32)
    sinks = torch.tensor([0.0, 1e4])
    found = attend(native, query, keys, values, spans, block_size=16, scale=0.2, sinks=sinks)
    assert bool((found[0, 1] == 0).all())
    assert bool((found[0, 0] != 0).any())


@pytest.mark.parametrize(("key_dim", "value_dim"), [(48, 32), (24, 64), (576, 512)])
def test_values_narrower_or_wider_than_keys(
    natives: list[Native], key_dim: int, value_dim: int
) -> None:
    spans = spans_of([(1, 45), (3, 70)], 16)
    query, keys, _ = inputs(spans, 4, 1, key_dim, torch.bfloat16)
    values = random(1, SLOTS, value_dim, seed=3).bfloat16()
    expected = reference.paged_attention(query, keys, values, spans, block_size=16, scale=0.1)
    for native in natives:
        found = attend(native, query, keys, values, spans, block_size=16, scale=0.1)
        check(found, expected)


def test_values_may_be_the_first_channels_of_the_keys(natives: list[Native]) -> None:
    spans = spans_of([(1, 45), (3, 70)], 16)
    query, keys, _ = inputs(spans, 4, 1, 48, torch.bfloat16)
    values = keys[..., :32]
    expected = reference.paged_attention(query, keys, values, spans, block_size=16, scale=0.1)
    for native in natives:
        check(attend(native, query, keys, values, spans, block_size=16, scale=0.1), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cache_of_8_bits_computes_what_it_holds(
    natives: list[Native], dtype: torch.dtype
) -> None:
    """Written by the library, and read as the numbers that were written."""
    spans = spans_of([(70, 70)], 16)
    query, key, value = (random(70, heads, 40, seed=heads).to(dtype) for heads in (4, 2, 1))
    value = value.expand(70, 2, 40).contiguous()
    blocks = spans[0].block_ids
    slots = torch.tensor([blocks[t // 16] * 16 + t % 16 for t in range(70)])
    for native in natives:
        pools = [torch.zeros(2, SLOTS, 40, dtype=torch.int8) for _ in range(2)]
        scales = [torch.zeros(2, SLOTS) for _ in range(2)]
        cache = make_cache(*pools, *scales)
        native.write_cache(key, value, cache, slots)
        wide = [pool.float() * scale[..., None] for pool, scale in zip(pools, scales, strict=True)]
        for written, held in zip((key, value), wide, strict=True):
            step = written.float().abs().amax(-1, keepdim=True) / 127
            error = held[:, slots].transpose(0, 1) - written.float()
            assert bool((error.abs() <= 0.5001 * step).all())
        expected = reference.paged_attention(
            query.float(), *wide, spans, block_size=16, scale=0.3, window=33
        )
        rule = make_rule(heads=4, scale=0.3, window=33)
        found = native.paged_attention(query, cache, plan_spans(spans, block_size=16), rule)
        check(found, expected.to(dtype))
