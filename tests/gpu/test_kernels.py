"""All kernels on a GPU against float64, on numbers that are new each time: `pytest -m gpu`.

What interpreters cannot show is here: bfloat16, assembly, tensor cores, programs that run at the
same time. The seed is part of every failure's message.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from qtool.kernels import reference
from qtool.kernels.cpu.attention import to_8_bits
from qtool.kernels.cuda import experts, fused, marlin_linear, paged_attention, sampling
from qtool.kernels.cuda.paged_attention import AttentionShape
from qtool.kernels.cuda.sampling import Draw
from qtool.kernels.cuda.tuning import LinearTile
from qtool.kernels.reference import Span
from qtool.runtime.engine.sampler import candidates, pick
from qtool.runtime.engine.sampling_params import SamplingParams
from qtool.scheme import QuantScheme
from qtool.weights import QuantizedWeight

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
# Half a unit in the last place of an output is 2e-3 in bfloat16 and 2.4e-4 in float16.
TOLERANCE = {torch.bfloat16: 5e-3, torch.float16: 1e-3}


@pytest.fixture
def seed() -> int:
    chosen = secrets.randbits(31)
    torch.manual_seed(chosen)
    return chosen


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def weight_of(out: int, inputs: int, word: str) -> QuantizedWeight:
    """Codes and scales at random, on the GPU."""
    scheme = QuantScheme.parse(word)
    groups = scheme.num_groups(inputs)
    top = 1 << scheme.bits
    codes = torch.randint(0, top, (out, inputs), dtype=torch.uint8, device=CUDA)
    scales = (torch.rand(out, groups, device=CUDA) * 0.02 + 0.001).bfloat16()
    zeros = None
    if not scheme.symmetric:
        zeros = torch.randint(0, top, (out, groups), dtype=torch.uint8, device=CUDA)
    return QuantizedWeight(codes, scales, zeros, scheme)


def exact(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """In float64."""
    codes = weight.codes.double()
    width = weight.shape[1] // weight.scales.shape[1]
    zeros: Tensor | float = float(weight.scheme.midpoint)
    if weight.zeros is not None:
        zeros = weight.zeros.double().repeat_interleave(width, 1)
    values = (codes - zeros) * weight.scales.double().repeat_interleave(width, 1)
    return x.double() @ values.t()


# Of 8B and 0.5B models, and the narrowest that there can be.
SHAPES = [(6144, 4096), (4096, 14336), (1152, 896), (896, 4864), (64, 128)]
SCHEMES = ["int4-g128-sym", "int4-g32-asym", "int4-row-sym", "int8-g128-sym", "int8-row-sym"]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_linears_for_every_number_of_rows(
    scheme: str, shape: tuple[int, int], dtype: torch.dtype, seed: int
) -> None:
    weight = weight_of(*shape, scheme)
    packed = marlin_linear.pack(weight, dtype, CUDA)
    for rows in (1, 2, 3, 4, 8, 16, 17, 32, 63, 64, 128, 256, 257, 600):
        x = torch.randn(rows, shape[1], device=CUDA).to(dtype)
        bias = torch.randn(shape[0], device=CUDA).to(dtype)
        found = marlin_linear.matmul(x, packed, bias)
        error = relative_error(found, exact(x, weight) + bias.double())
        assert error < TOLERANCE[dtype], (rows, seed)
        assert torch.equal(found, marlin_linear.matmul(x, packed, bias)), (rows, seed)


@pytest.mark.parametrize("strips", [1, 2, 4])
@pytest.mark.parametrize(("height", "warps"), [(16, 4), (32, 8), (64, 8)])
@pytest.mark.parametrize("split", [1, 3, 16])
def test_every_tile_of_a_linear(
    strips: int, height: int, warps: int, split: int, seed: int
) -> None:
    weight = weight_of(512, 4096, "int4-g128-asym")
    packed = marlin_linear.pack(weight, torch.bfloat16, CUDA)
    x = torch.randn(70, 4096, device=CUDA).bfloat16()
    tile = LinearTile(strips, height, split, min(warps, 4 * strips), stages=3)
    found = marlin_linear.matmul_parts(x, packed, config=tile).double().sum(0)
    assert relative_error(found, exact(x, weight)) < TOLERANCE[torch.bfloat16], seed


@pytest.mark.parametrize("scheme", SCHEMES)
def test_unpacking_is_exact_before_it_is_rounded(scheme: str, seed: int) -> None:
    weight = weight_of(256, 512, scheme)
    packed = marlin_linear.pack(weight, torch.bfloat16, CUDA)
    expected = weight.dequantize(torch.float32)
    assert torch.equal(marlin_linear.unpack(packed, torch.float32), expected), seed
    assert torch.equal(marlin_linear.unpack(packed, torch.bfloat16), expected.bfloat16()), seed


STEPS: dict[str, Sequence[tuple[int, int]]] = {
    "decode": [(1, length) for length in (1, 16, 17, 255, 256, 257, 1000, 3000)],
    "verify": [(4, 300), (2, 2), (5, 1030)],
    "prefill": [(300, 300), (64, 400), (1, 77)],
}
LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "heads of 64": {"channels": 64},
    "heads of 80": {"channels": 80},
    "heads of 256": {"channels": 256, "heads": 4, "kv_heads": 2},
    "seven to one": {"heads": 14, "kv_heads": 2, "channels": 64},
    "window": {"window": 100},
    "softcap": {"softcap": 30.0},
    "sinks": {"sinks": True, "window": 128},
    "int8": {"cache": "int8"},
    "fp8": {"cache": "fp8"},
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("step", STEPS)
def test_attention(step: str, layer: str, dtype: torch.dtype, seed: int) -> None:
    options = dict(LAYERS[layer])
    heads, kv_heads = options.pop("heads", 8), options.pop("kv_heads", 2)
    channels, cache = options.pop("channels", 128), options.pop("cache", "same")
    sinks = torch.randn(heads, device=CUDA) if options.pop("sinks", False) else None
    block_size, num_blocks = 16, 400
    order = torch.randperm(num_blocks).tolist()
    spans = []
    for queries, length in STEPS[step]:
        held = -(-length // block_size)
        spans.append(Span(queries, length, order[:held]))
        order = order[held:]
    slots = num_blocks * block_size
    query = torch.randn(sum(s.num_queries for s in spans), heads, channels, device=CUDA).to(dtype)
    pools = [torch.randn(kv_heads, slots, channels, device=CUDA).to(dtype) for _ in "kv"]
    read, scales = [pool.float() for pool in pools], None
    if cache == "int8":
        coded = [to_8_bits(pool) for pool in pools]
        pools, scales = [codes for codes, _ in coded], (coded[0][1], coded[1][1])
        read = [codes.float() * steps[..., None] for codes, steps in coded]
    elif cache == "fp8":
        pools = [pool.to(torch.float8_e4m3fn) for pool in pools]
        read = [pool.float() for pool in pools]
    shape = AttentionShape(heads, kv_heads)
    tables = paged_attention.plan(spans, [shape], block_size=block_size, device=CUDA)
    rule = {"block_size": block_size, "scale": channels**-0.5, "sinks": sinks, **options}

    def attend() -> Tensor:
        return paged_attention.attend(query, *pools, tables, scales=scales, **rule)

    found = attend()
    expected = reference.paged_attention(query.float(), *read, spans, **rule)
    assert relative_error(found, expected.double()) < 2 * TOLERANCE[dtype], seed
    assert torch.equal(found, attend()), seed


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rows", [1, 7, 300])
@pytest.mark.parametrize("channels", [896, 4096, 8192])
def test_norms_and_gates(rows: int, channels: int, dtype: torch.dtype, seed: int) -> None:
    residual = torch.randn(rows, channels, device=CUDA).to(dtype)
    parts = torch.randn(5, rows, channels, device=CUDA)
    weight = torch.randn(channels, device=CUDA).to(dtype)
    total = residual.double() + parts.double().sum(0)
    found = fused.add_norm(residual, parts, weight, 1e-6, sum_block=128)
    assert relative_error(residual, total) < TOLERANCE[dtype], seed
    kept = residual.double()
    normed = kept * torch.rsqrt(kept.pow(2).mean(-1, keepdim=True) + 1e-6) * weight.double()
    assert relative_error(found.values, normed) < TOLERANCE[dtype], seed
    sums = found.values.double().view(rows, -1, 128).sum(-1).t()
    assert relative_error(found.sums, sums) < 1e-5, seed
    both = torch.randn(3, rows, 2 * channels, device=CUDA)
    gate, up = both.double().sum(0).chunk(2, dim=-1)
    gated = fused.gate_mul(both, "silu", dtype, sum_block=128)
    expected = torch.nn.functional.silu(gate) * up
    assert relative_error(gated.values, expected) < TOLERANCE[dtype], seed


@pytest.mark.parametrize(
    "rule",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
        {"temperature": 1.2, "top_p": 0.95},
        {"temperature": 1.0, "min_p": 0.05},
    ],
    ids=str,
)
def test_tokens_of_a_real_vocabulary(rule: dict[str, float], seed: int) -> None:
    rows, vocab = 64, 151_936
    logits = 3 * torch.randn(rows, vocab, device=CUDA)
    numbers = torch.rand(rows).tolist()
    given = {name: rule.get(name, default) for name, default in Draw()._asdict().items()}
    draws = [Draw(**{**given, "number": number}) for number in numbers]
    tokens, finite = sampling.draw_tokens(logits, sampling.on_device(draws, CUDA))
    assert bool(finite.all())
    params = SamplingParams(**rule)  # type: ignore[arg-type]
    differ = 0
    for row, number in enumerate(numbers):
        found = candidates(logits[row].cpu(), params)
        index = pick(torch.from_numpy(found.probabilities), sampling.shorten(number))
        expected = index if found.token_ids is None else int(found.token_ids[index])
        differ += expected != int(tokens[row])
        if found.token_ids is not None:
            assert int(tokens[row]) in found.token_ids, seed
    # Sums in another order put a number that lies on an edge into the next token.
    assert differ <= 1, seed
    again, _ = sampling.draw_tokens(logits, sampling.on_device(draws, CUDA))
    assert torch.equal(tokens, again)


@pytest.mark.parametrize("tokens", [1, 5, 200])
@pytest.mark.parametrize("scheme", ["int4-g128-sym", "int8-row-sym"])
def test_experts(scheme: str, tokens: int, seed: int) -> None:
    num, choices, hidden, inner = 16, 4, 512, 256
    ups = [weight_of(2 * inner, hidden, scheme) for _ in range(num)]
    downs = [weight_of(hidden, inner, scheme) for _ in range(num)]
    packed = [
        [marlin_linear.pack(weight, torch.bfloat16, CUDA) for weight in weights]
        for weights in (ups, downs)
    ]
    stacked = experts.stack(*packed, "silu")
    assert stacked is not None
    x = torch.randn(tokens, hidden, device=CUDA).bfloat16()
    weights, chosen = torch.rand(tokens, num, device=CUDA).softmax(-1).topk(choices)
    found = stacked(x, chosen, weights)
    expected = torch.zeros(tokens, hidden, dtype=torch.float64, device=CUDA)
    for expert in range(num):
        rows, places = (chosen == expert).nonzero(as_tuple=True)
        if len(rows):
            gate, up = exact(x[rows], ups[expert]).chunk(2, dim=-1)
            active = (torch.nn.functional.silu(gate) * up).bfloat16()
            shares = weights[rows, places].double()[:, None]
            expected.index_add_(0, rows, shares * exact(active, downs[expert]))
    assert relative_error(found, expected) < 2 * TOLERANCE[torch.bfloat16], seed
    assert torch.equal(found, stacked(x, chosen, weights)), seed
