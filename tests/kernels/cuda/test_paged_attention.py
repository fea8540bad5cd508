"""Paged attention equals `reference.paged_attention` for every kind of step and of layer."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from qtool.kernels import reference
from qtool.kernels.cpu.attention import to_8_bits
from qtool.kernels.cuda import paged_attention
from qtool.kernels.cuda.paged_attention import AttentionShape
from qtool.kernels.reference import Span

Random = Callable[..., Tensor]
Error = Callable[[Tensor, Tensor], float]
NUM_BLOCKS = 48
TOLERANCE = {torch.float16: 1e-3, torch.float32: 2e-6}

# (new tokens, tokens) of each sequence.
DECODE = ((1, 1), (1, 17), (1, 130))
VERIFY = ((3, 40), (5, 5), (1, 90))
PREFILL = ((20, 20), (9, 70), (1, 129))


def spans_of(lengths: Sequence[tuple[int, int]], block_size: int) -> list[Span]:
    """Sequences whose blocks lie anywhere."""
    order = torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(1)).tolist()
    spans = []
    for num_queries, length in lengths:
        held = -(-length // block_size)
        spans.append(Span(num_queries, length, order[:held]))
        order = order[held:]
    return spans


def check(
    lengths: Sequence[tuple[int, int]],
    random: Random,
    relative_error: Error,
    device: torch.device,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    dims: tuple[int, int] = (64, 64),
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    cache: str = "same",
    sinks: bool = False,
    **rule: Any,
) -> None:
    spans = spans_of(lengths, block_size)
    slots = NUM_BLOCKS * block_size
    query = random(sum(span.num_queries for span in spans), heads, dims[0], seed=1).to(dtype)
    keys = random(kv_heads, slots, dims[0], seed=2).to(dtype)
    values = random(kv_heads, slots, dims[1], seed=3).to(dtype)
    scales = None
    read: tuple[Tensor, Tensor] = (keys, values)
    if cache == "int8":
        (keys, key_scales), (values, value_scales) = to_8_bits(keys), to_8_bits(values)
        scales = (key_scales, value_scales)
        read = (keys * key_scales[..., None], values * value_scales[..., None])
    elif cache == "fp8":
        keys, values = keys.to(torch.float8_e4m3fn), values.to(torch.float8_e4m3fn)
        read = (keys.float(), values.float())
    sink = random(heads, seed=4) if sinks else None
    shape = AttentionShape(heads, kv_heads)
    tables = paged_attention.plan(spans, [shape], block_size=block_size, device=device)
    found = paged_attention.attend(
        query, keys, values, tables,
        block_size=block_size, scale=0.2, sinks=sink, scales=scales, **rule,
    )  # fmt: skip
    expected = reference.paged_attention(
        query.float(), *(part.float() for part in read), spans,
        block_size=block_size, scale=0.2, sinks=sink, **rule,
    )  # fmt: skip
    assert found.dtype == dtype
    assert relative_error(found, expected) < TOLERANCE[dtype]


@pytest.fixture(autouse=True)
def _short_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys are cut at lengths that an interpreter can compute."""
    monkeypatch.setattr(paged_attention, "LEAST_KEYS", 32)


@pytest.mark.parametrize("lengths", [DECODE, VERIFY, PREFILL], ids=["decode", "verify", "prefill"])
@pytest.mark.parametrize(
    "dtype", [torch.float16, pytest.param(torch.float32, marks=pytest.mark.slow)]
)
def test_every_kind_of_step(
    lengths: Sequence[tuple[int, int]],
    dtype: torch.dtype,
    random: Random,
    relative_error: Error,
    device: torch.device,
) -> None:
    check(lengths, random, relative_error, device, dtype=dtype)


LAYERS: dict[str, dict[str, Any]] = {
    "one head a group": {"heads": 2},
    "three heads a group": {"heads": 6},
    "nine heads of one": {"heads": 9, "kv_heads": 1},
    "blocks of 32": {"block_size": 32},
    "window": {"window": 20},
    "window wider than all": {"window": 500},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": True},
    "window and sinks": {"window": 40, "sinks": True},
    "heads of 80": {"dims": (80, 80)},
    "heads of 96 and 64": {"dims": (96, 64)},
    "heads of 128": {"dims": (128, 128)},
    "heads of 256": {"dims": (256, 256), "heads": 2, "kv_heads": 1},
    "int8": {"cache": "int8"},
    "fp8": {"cache": "fp8"},
}


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [DECODE, PREFILL], ids=["decode", "prefill"])
@pytest.mark.parametrize("layer", LAYERS)
def test_every_kind_of_layer(
    layer: str,
    lengths: Sequence[tuple[int, int]],
    random: Random,
    relative_error: Error,
    device: torch.device,
) -> None:
    check(lengths, random, relative_error, device, **LAYERS[layer])


def test_a_sequence_without_tokens_is_zero_and_disturbs_nobody(
    device: torch.device, random: Random
) -> None:
    """What a recorded step has in the places that a smaller batch leaves."""
    shape = AttentionShape(4, 2)
    query, pools = random(3, 4, 64), [random(2, 64, 64, seed=seed) for seed in (1, 2)]
    spans = [Span(1, 5, [1]), Span(1, 20, [2, 3])]
    alone = paged_attention.plan(spans, [shape], block_size=16, device=device)
    expected = paged_attention.attend(query[:2], *pools, alone, block_size=16, scale=0.1)
    tiles = paged_attention.Tiles(
        sequences=torch.tensor([0, 1, 2], dtype=torch.int32, device=device),
        firsts=torch.zeros(3, dtype=torch.int32, device=device),
        rows=16,
        parts=1,
        tokens=1,
    )
    padded = paged_attention.StepTables(
        pages=torch.cat((alone.pages, alone.pages[:1])),
        first_rows=torch.arange(4, dtype=torch.int32, device=device),
        lengths=torch.tensor([5, 20, 0], dtype=torch.int32, device=device),
        slots=alone.slots,
        tiles={shape: (tiles,)},
    )
    found = paged_attention.attend(query, *pools, padded, block_size=16, scale=0.1)
    assert torch.equal(found[:2], expected)
    assert not found[2].any()


def test_keys_are_cut_where_tiles_are_few() -> None:
    shape = AttentionShape(32, 8)
    assert paged_attention.choose_parts(1, shape, 31, 132) == 1
    assert paged_attention.choose_parts(1, shape, 64, 132) == 2
    assert paged_attention.choose_parts(1, shape, 100_000, 132) == 32
    assert paged_attention.choose_parts(64, shape, 100_000, 132) == 1


def test_the_plan_tells_where_tokens_go(device: torch.device) -> None:
    spans = [Span(2, 18, [3, 1]), Span(1, 1, [0])]
    found = paged_attention.plan(spans, [AttentionShape(2, 2)], block_size=16, device=device)
    # Tokens 16 and 17 of the first are the first two of its second block.
    assert found.slots.tolist() == [16, 17, 0]
    assert found.first_rows.tolist() == [0, 2, 3]
    assert found.pages.tolist() == [[3, 1], [0, 0]]
