"""Recipes that combine methods, and sources that are rounded already."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qtool.artifact import Manifest
from qtool.checkpoint import Checkpoint
from qtool.convert.formats import open_weights
from qtool.errors import UnsupportedModel
from qtool.quantize.pipeline import quantize_model
from qtool.quantize.smoothing import smooth_scales
from qtool.recipe import Recipe, load_recipe
from qtool.source import Source


def small(name: str) -> Recipe:
    return load_recipe(name).with_options(num_samples=4, sequence_length=32)


def mean_error(manifest: Manifest) -> float:
    errors = [layer.error for layer in manifest.layers if layer.error is not None]
    return sum(errors) / len(errors)


def test_smooth_scales_share_loudness_between_inputs_and_weights() -> None:
    """At one half both come out equally loud: max|x| / s = max|w| s, up to one factor for all."""
    weight = torch.tensor([[0.5, -2.0, 0.1], [0.25, 1.0, 0.2]])
    peak = torch.tensor([8.0, 2.0, 40.0])
    scales = smooth_scales(weight, peak, 0.5)
    ratio = (peak / scales) / (weight.abs().amax(0) * scales)
    assert torch.allclose(ratio, ratio[0].expand(3))
    assert float(scales.log().sum()) == pytest.approx(0.0, abs=1e-5)
    assert smooth_scales(weight, peak, 1.0)[2] > smooth_scales(weight, peak, 0.5)[2]


def test_smoothquant_makes_loud_channels_quiet_and_keeps_the_model(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = tiny_checkpoint("llama")
    manifest = quantize_model(str(source), small("smoothquant"), out=tmp_path / "out")
    assert {layer.method for layer in manifest.layers} == {"smoothquant"}
    written, original = Checkpoint.open(tmp_path / "out"), Checkpoint.open(source)
    norm = "model.layers.0.input_layernorm.weight"
    assert not torch.equal(written.tensor(norm), original.tensor(norm))
    assert written.tensor("model.layers.0.mlp.up_proj.weight").dtype == torch.int8
    assert mean_error(manifest) < 1e-3


def test_awq_with_a_sweep_loses_less_than_awq(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = str(tiny_checkpoint("llama"))
    alone = quantize_model(source, small("awq"), out=tmp_path / "awq")
    both = quantize_model(source, small("awq-gptq"), out=tmp_path / "both")
    assert mean_error(both) < mean_error(alone)
    assert all("gptq" in layer.steps for layer in both.layers)


def test_a_model_of_small_floats_is_decoded_and_quantized(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """The result is that of the same values stored in 16 bit."""
    source = tiny_checkpoint("llama", dtype="bfloat16")
    quantize_model(str(source), "fp8", out=tmp_path / "fp8")
    manifest = quantize_model(str(tmp_path / "fp8"), small("int4"), out=tmp_path / "int4")
    reader = open_weights(Source("int4", tmp_path / "int4"))
    floats = open_weights(Source("fp8", tmp_path / "fp8"))
    assert sorted(reader.modules()) == sorted(floats.modules())
    for module in reader.modules():
        before, after = floats.weight(module).dequantize(), reader.weight(module).dequantize()
        assert float((after - before).square().sum() / before.square().sum()) < 0.03
    assert len(manifest.layers) == 14
    with pytest.raises(UnsupportedModel, match="already quantized"):
        quantize_model(str(tmp_path / "int4"), "rtn-int4", out=tmp_path / "again")
