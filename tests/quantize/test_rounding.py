"""Small floats and tables: nearest by brute force, packed as their libraries unpack."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qtool.convert.float4 import E2M1
from qtool.convert.formats import open_weights
from qtool.errors import UsageError
from qtool.quantize.layouts import FLOAT_LAYOUTS, spec_of
from qtool.quantize.pipeline import quantize_model
from qtool.quantize.rounding import NF4, nearest_e2m1, round_float
from qtool.quantize.verify import decompress_as
from qtool.recipe import FLOAT_WEIGHTS, Recipe, Rtn, load_recipe
from qtool.source import Source
from qtool.weights import CodebookWeight


@pytest.fixture
def weight() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    values = 0.02 * torch.randn(160, 192, generator=generator)
    values[3, 7] = 0.9
    values[5] = 0.0
    return values


@pytest.mark.parametrize("kind", list(FLOAT_WEIGHTS))
def test_what_is_packed_unpacks_to_what_was_rounded(weight: torch.Tensor, kind: str) -> None:
    layout, scheme = FLOAT_LAYOUTS[kind], FLOAT_WEIGHTS[kind]
    rounded = round_float(weight, scheme)
    packed = layout.pack(rounded, torch.bfloat16)  # type: ignore[arg-type]
    again = layout.unpack(packed, spec_of("x", scheme))
    assert torch.equal(again.dequantize(), rounded.dequantize())
    assert torch.equal(rounded.dequantize()[5], torch.zeros(192))
    error = (rounded.dequantize() - weight).square().sum() / weight.square().sum()
    assert float(error) < (0.001 if kind.startswith("fp8") else 0.03)


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp4"])
def test_four_bit_codes_are_the_nearest_for_their_scale(weight: torch.Tensor, kind: str) -> None:
    rounded = round_float(weight, FLOAT_WEIGHTS[kind])
    assert isinstance(rounded, CodebookWeight)
    width = FLOAT_WEIGHTS[kind].block[1]
    scales = rounded.scales.view(160, -1).repeat_interleave(width, 1)
    values = torch.tensor([*E2M1, *(-value for value in E2M1)])
    distances = (weight.unsqueeze(-1) - scales.unsqueeze(-1) * values).abs()
    ours = (weight - rounded.dequantize()).abs()
    assert torch.allclose(ours, distances.amin(-1), atol=1e-7)


def test_nf4_codes_are_the_nearest(weight: torch.Tensor) -> None:
    rounded = round_float(weight, FLOAT_WEIGHTS["nf4"])
    scales = rounded.scales.view(160, -1).repeat_interleave(64, 1)
    distances = (weight.unsqueeze(-1) - scales.unsqueeze(-1) * torch.tensor(NF4)).abs()
    assert torch.allclose((weight - rounded.dequantize()).abs(), distances.amin(-1), atol=1e-7)


def test_a_tie_goes_to_the_even_code() -> None:
    """Half way between 0 and 0.5, 0.5 and 1, 1 and 1.5, ..., 4 and 6."""
    halves = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert nearest_e2m1(halves).tolist() == [0, 2, 2, 4, 4, 6, 6]
    assert nearest_e2m1(-halves).tolist() == [0, 10, 10, 12, 12, 14, 14]
    assert nearest_e2m1(torch.tensor([9.0, -9.0])).tolist() == [7, 15]


@pytest.mark.parametrize("recipe", ["fp8", "nvfp4", "w8a8"])
def test_artifacts_load_in_transformers_and_here(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, recipe: str
) -> None:
    """The pipeline compares compressed-tensors' decoding bit for bit and the reload's logits."""
    source = tiny_checkpoint("llama", dtype="bfloat16")
    manifest = quantize_model(str(source), recipe, out=tmp_path / "out")
    reader = open_weights(Source("out", tmp_path / "out"))
    assert reader.format == "compressed-tensors"
    module = "model.layers.1.mlp.down_proj"
    assert module in reader.modules()
    assert {layer.scheme for layer in manifest.layers} == {reader.describe(module).kind}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["fp8-block", "mxfp4", "nf4"])
def test_other_artifacts_load_in_transformers_and_here(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, recipe: str
) -> None:
    test_artifacts = tiny_checkpoint("qwen3_moe" if recipe == "mxfp4" else "qwen2")
    manifest = quantize_model(str(test_artifacts), recipe, out=tmp_path / "out")
    reader = open_weights(Source("out", tmp_path / "out"))
    for layer in manifest.layers:
        assert reader.describe(layer.module).kind == layer.scheme


def test_nf4_is_what_bitsandbytes_makes(weight: torch.Tensor) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    rounded = round_float(weight, FLOAT_WEIGHTS["nf4"])
    ours = FLOAT_LAYOUTS["nf4"].pack(rounded, torch.float32)  # type: ignore[arg-type]
    assert torch.equal(ours["weight"], packed)
    assert torch.equal(ours["weight.absmax"], state.absmax)


def test_compressed_tensors_decodes_its_floats_alike(weight: torch.Tensor) -> None:
    from qtool.quantize.layouts import compressed_format

    for kind in ("fp8", "fp8-block", "nvfp4", "mxfp4"):
        layout = FLOAT_LAYOUTS[kind]
        rounded = round_float(weight, FLOAT_WEIGHTS[kind])
        packed = layout.pack(rounded, torch.float32)  # type: ignore[arg-type]
        theirs = decompress_as(packed, *compressed_format(layout))
        assert torch.equal(theirs, rounded.dequantize()), kind


def test_recipes_that_cannot_be_are_refused() -> None:
    with pytest.raises(UsageError, match="made by rounding, not by gptq"):
        Recipe("x", "", load_recipe("int4").method, weights="nf4")
    with pytest.raises(UsageError, match="one scale a row"):
        Recipe("x", "", Rtn(), bits=8, activations="int8")
    with pytest.raises(UsageError, match="unknown weights 'nvfp5'"):
        Recipe("x", "", Rtn(), weights="nvfp5")
