"""Tables of each row's own: k-means solved exactly, and what the Hessian adds to it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from qtool.artifact import Manifest
from qtool.convert.formats import open_weights
from qtool.convert.run import convert_model
from qtool.errors import UsageError
from qtool.quantize import codebook, rtn
from qtool.quantize.pipeline import quantize_model
from qtool.quantize.solution import row_errors
from qtool.quantize.tables import best_tables, looked_up, nearest, table_dtype
from qtool.recipe import Gptq, Recipe, load_recipe
from qtool.runtime.loading import load_model
from qtool.scheme import QuantScheme, codebook_scheme
from qtool.source import resolve
from qtool.weights import TableWeight


def cost(weight: Tensor, importance: Tensor, tables: Tensor) -> Tensor:
    """[out] float64"""
    found = looked_up(nearest(weight, tables), tables).double()
    return ((found - weight.double()).square() * importance.double()).sum(1)


def least_cost(values: Sequence[float], weights: Sequence[float], count: int) -> float:
    """Of all ways of cutting the sorted values into `count` runs, tried one by one."""
    points = sorted(zip(values, weights, strict=True))
    best = float("inf")
    for inner in itertools.combinations(range(1, len(points)), count - 1):
        edges, total = [0, *inner, len(points)], 0.0
        for start, stop in itertools.pairwise(edges):
            mass = sum(weight for _, weight in points[start:stop])
            mean = sum(value * weight for value, weight in points[start:stop]) / mass
            total += sum(w * (value - mean) ** 2 for value, w in points[start:stop])
        best = min(best, total)
    return best


def test_a_row_by_hand() -> None:
    """0 1 | 10 10 14 | 20 | 31 with the weight of 14 doubled: means 0.5, 12, 20 and 31."""
    weight = torch.tensor([[10.0, 0.0, 31.0, 14.0, 20.0, 1.0, 10.0]])
    importance = torch.tensor([1.0, 1.0, 1.0, 2.0, 1.0, 1.0, 1.0])
    tables = best_tables(weight, importance, 4)
    assert tables.tolist() == [[0.5, 12.0, 20.0, 31.0]]
    assert nearest(weight, tables).tolist() == [[1, 0, 3, 1, 2, 0, 1]]


@given(seed=st.integers(0, 2**16), length=st.integers(5, 11))
@settings(max_examples=25, deadline=None)
def test_short_rows_are_solved_exactly(seed: int, length: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, length, generator=generator)
    importance = 0.05 + torch.rand(length, generator=generator)
    found = cost(weight, importance, best_tables(weight, importance, 4))
    for row, got in zip(weight.double().tolist(), found.tolist(), strict=True):
        # fp16 keeps eleven bits of an entry.
        assert got == pytest.approx(least_cost(row, importance.tolist(), 4), rel=1e-2, abs=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_tables_are_never_worse_than_rounding_of_as_many_bits(
    bits: int, make_layer: Callable[..., tuple[Tensor, Tensor, Tensor]]
) -> None:
    weight, _, hessian = make_layer(rows=40, columns=192)
    # One row that a table does not serve: all but one of its weights are multiples of a scale.
    weight[0] = torch.arange(192) % 2**bits - 2.0 ** (bits - 1)
    importance = hessian.diagonal().contiguous()
    plain = rtn.solve(weight, QuantScheme(bits, None)).dequantized
    rounding = ((plain - weight).double().square() * importance).sum(1)
    tables = cost(weight, importance, best_tables(weight, importance, 2**bits))
    assert bool((tables <= rounding).all())
    assert float(tables.sum()) < 0.7 * float(rounding.sum())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_hessian_lowers_every_rows_error(
    bits: int, make_layer: Callable[..., tuple[Tensor, Tensor, Tensor]]
) -> None:
    weight, _, hessian = make_layer(rows=40, columns=192)
    scheme = codebook_scheme(bits)

    def lost(found: Tensor) -> Tensor:
        return row_errors(weight, found, hessian)

    alone = lost(codebook.solve(weight, hessian, scheme, None).dequantized)
    swept = lost(codebook.solve(weight, hessian, scheme, Gptq()).dequantized)
    refined = lost(codebook.solve(weight, hessian, scheme, Gptq(refine_rounds=2)).dequantized)
    rounded = lost(rtn.solve(weight, QuantScheme(bits, None)).dequantized)
    assert bool((refined <= alone).all())
    assert bool((refined <= rounded).all())
    assert float(refined.sum()) < float(swept.sum()) < 0.8 * float(alone.sum())


def test_a_hessian_that_does_not_factor_leaves_k_means_and_says_so() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    hessian = torch.full((64, 64), float("nan"))
    hessian.fill_diagonal_(1.0)
    solved = codebook.solve(weight, hessian, codebook_scheme(4), Gptq())
    assert solved.fallbacks == (codebook.NOT_SWEPT,)
    assert bool(torch.isfinite(solved.dequantized).all())


def test_inputs_that_were_always_zero_move_nothing(
    make_layer: Callable[..., tuple[Tensor, Tensor, Tensor]],
) -> None:
    weight, _, hessian = make_layer(rows=16, columns=64)
    hessian[5] = hessian[:, 5] = 0
    solved = codebook.solve(weight, hessian, codebook_scheme(4), Gptq(refine_rounds=2))
    stored = solved.weight
    assert isinstance(stored, TableWeight)
    chosen = solved.dequantized[:, 5]
    nearest_entry = (stored.tables.float() - weight[:, 5:6]).abs().amin(1)
    assert torch.allclose((chosen - weight[:, 5]).abs(), nearest_entry, atol=1e-6)


@pytest.mark.parametrize(
    ("largest", "dtype"),
    [(1.0, torch.float16), (1e6, torch.float32), (1e-5, torch.float32), (0.0, torch.float16)],
)
def test_tables_are_as_wide_as_their_values_need(largest: float, dtype: torch.dtype) -> None:
    weight = largest * torch.linspace(-1, 1, 64).repeat(2, 1)
    assert table_dtype(weight) == dtype
    tables = best_tables(weight, torch.ones(64), 16)
    assert tables.dtype == dtype
    assert float((looked_up(nearest(weight, tables), tables) - weight).abs().max()) <= largest / 15


def small(name: str) -> Recipe:
    return load_recipe(name).with_options(num_samples=4, sequence_length=32)


def mean_error(manifest: Manifest) -> float:
    errors = [layer.error for layer in manifest.layers if layer.error is not None]
    return sum(errors) / len(errors)


def test_an_artifact_is_quantized_read_served_and_turned_back(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """It is served as transformers runs what it is converted to."""
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1}
    source = tiny_checkpoint("llama", dtype="bfloat16", **shape)
    recipe = small("codebook").with_options(bits=3)
    manifest = quantize_model(str(source), recipe, out=tmp_path / "out")
    assert {layer.scheme for layer in manifest.layers} == {"codebook3-row"}
    assert mean_error(manifest) < 0.5 * sum(x.rtn_error or 0 for x in manifest.layers) / 7
    reader = open_weights(resolve(str(tmp_path / "out")))
    assert (reader.format, len(reader.modules())) == ("codebook", 7)
    plain = convert_model(str(tmp_path / "out"), to="hf", type="f32", out=tmp_path / "plain")
    tokens = torch.randint(0, 4096, (1, 16), generator=torch.Generator().manual_seed(0))
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    with torch.no_grad():
        expected = model(tokens).logits
    found = load_model(str(tmp_path / "out"), dtype="float32").logits(tokens)
    torch.testing.assert_close(found.view_as(expected), expected, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_experts_have_tables_too(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    manifest = quantize_model(
        str(tiny_checkpoint("qwen3_moe")), small("codebook"), out=tmp_path / "out"
    )
    assert sum("experts" in layer.module for layer in manifest.layers) == 2 * 4 * 3
    assert {layer.scheme for layer in manifest.layers} == {"codebook4-row"}


def test_what_tables_cannot_be_is_refused() -> None:
    recipe = load_recipe("codebook")
    with pytest.raises(UsageError, match="codebook of 5 bits"):
        recipe.with_options(bits=5)
    with pytest.raises(UsageError, match="each row has one table"):
        recipe.with_options(group_size=64)
    with pytest.raises(UsageError, match="not made by gptq with these options"):
        recipe.with_effort("best")
