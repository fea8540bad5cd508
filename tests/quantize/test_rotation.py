"""Turned coordinates: orthogonal, cheap, and of no consequence for what the model computes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

from qtool.checkpoint import Checkpoint
from qtool.errors import UnknownName, UnsupportedModel
from qtool.quantize.job import prepare
from qtool.quantize.pipeline import quantize_model
from qtool.quantize.rotated import UNTIED, rotated
from qtool.quantize.rotation import hadamard, rotation
from qtool.recipe import load_recipe

Make = Callable[..., Path]


class Float64(TorchFunctionMode):
    """Families compute norms and softmax in float32 whatever they are given; here in float64."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()
        wide = [torch.float64 if value is torch.float32 else value for value in args]
        named = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*wide, **named)


def logits(folder: Path) -> Tensor:
    tokens = torch.randint(0, 4096, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), Float64():
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float64, experts_implementation="eager"
        )
        found: Tensor = model(tokens).logits
    assert found.dtype == torch.float64
    return found


def written(source: Path, rotations: Sequence[str], out: Path) -> Path:
    found = rotated(Checkpoint.open(source), rotations)
    out.mkdir()
    tensors = {name: found.tensor(name) for name in found.tensors}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps(found.config))
    return out


def test_hadamard_matrices_by_hand() -> None:
    assert hadamard(1) is not None
    four = hadamard(4)
    assert four is not None
    assert four.tolist() == [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    assert hadamard(6) is None
    assert hadamard(92) is None


@pytest.mark.parametrize("order", [2, 8, 12, 20, 24, 28, 36, 44, 60, 64])
def test_hadamard_matrices_have_entries_of_one_size_and_rows_at_right_angles(order: int) -> None:
    found = hadamard(order)
    assert found is not None
    assert bool((found.abs() == 1).all())
    assert bool((found[0] == 1).all())
    assert torch.equal(found @ found.t(), order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize("keeps_mean", [False, True])
@pytest.mark.parametrize("size", [1, 2, 7, 64, 96, 100, 172, 192, 896])
def test_a_rotation_is_the_product_that_it_stands_for(size: int, keeps_mean: bool) -> None:
    found = rotation(size, 3, keeps_mean=keeps_mean)
    dense = torch.ones(1, 1, dtype=torch.float64)
    for factor in found.factors:
        dense = torch.kron(dense, factor)
    signs = torch.diag(found.signs)
    meant = dense.t() @ signs @ dense if keeps_mean else signs @ dense
    identity = torch.eye(size, dtype=torch.float64)
    turned = found.turn(identity)
    torch.testing.assert_close(turned, meant, rtol=0, atol=1e-12)
    torch.testing.assert_close(turned @ turned.t(), identity, rtol=0, atol=1e-12)
    assert torch.equal(turned, rotation(size, 3, keeps_mean=keeps_mean).turn(identity))
    if size > 2:
        assert not torch.equal(turned, rotation(size, 4, keeps_mean=keeps_mean).turn(identity))
    if keeps_mean:
        ones = torch.ones(size, dtype=torch.float64)
        torch.testing.assert_close(found.turn(ones), ones, rtol=0, atol=1e-12)


def test_a_loud_channel_is_spread_over_all() -> None:
    x = torch.randn(64, 768, generator=torch.Generator().manual_seed(0))
    x[:, 5] *= 100

    def peak(values: Tensor) -> float:
        return float((values.abs().amax(1) / values.square().mean(1).sqrt()).mean())

    assert peak(x) > 20
    assert peak(rotation(768, 0).turn(x)) < 5
    assert peak(rotation(768, 0, keeps_mean=True).turn(x)) < 5


QUICK = ("llama", "gpt2", "gemma", "phi", "qwen3_moe")
SLOW = (
    "mistral", "qwen2", "qwen3", "phi3", "smollm3", "starcoder2", "granite", "mixtral", "qwen2_moe",
)  # fmt: skip


@pytest.mark.parametrize(
    "family", [*QUICK, *(pytest.param(family, marks=pytest.mark.slow) for family in SLOW)]
)
def test_a_turned_model_computes_the_same(
    family: str, tiny_checkpoint: Make, tmp_path: Path
) -> None:
    source = tiny_checkpoint(family, dtype="float64")
    expected = logits(source)
    for rotations in (["R1", "R2"], ["R2"]):
        found = logits(written(source, rotations, tmp_path / "-".join(rotations)))
        assert float((found - expected).abs().max()) < 1e-9 * float(expected.abs().max())
        assert not torch.equal(found, expected)


@pytest.mark.parametrize(
    ("family", "rotations"),
    [("deepseek_v3", ["R1"]), ("gemma2", ["R2"]), ("olmo2", ["R2"]), ("gemma3_text", ["R2"])],
)
@pytest.mark.slow
def test_a_family_that_takes_one_turn_takes_that(
    family: str, rotations: list[str], tiny_checkpoint: Make, tmp_path: Path
) -> None:
    source = tiny_checkpoint(family, dtype="float64")
    expected = logits(source)
    found = logits(written(source, rotations, tmp_path / "turned"))
    assert float((found - expected).abs().max()) < 1e-9 * float(expected.abs().max())


@pytest.mark.parametrize(
    ("family", "rotations", "reason"),
    [
        ("gemma2", ["R1"], "gemma2 has norms after its layers"),
        ("olmo2", ["R1", "R2"], "olmo2 has norms after its layers"),
        ("deepseek_v3", ["R2"], "keys and values in one latent projection"),
        ("bloom", ["R1"], "'bloom' is not in the table of families"),
    ],
)
def test_structures_that_let_no_turn_through_are_refused_by_name(
    family: str, rotations: list[str], reason: str, tiny_checkpoint: Make
) -> None:
    with pytest.raises(UnsupportedModel, match=reason):
        rotated(Checkpoint.open(tiny_checkpoint(family)), rotations)


def test_a_tensor_that_nobody_knows_is_not_left_unturned(
    tiny_checkpoint: Make, tmp_path: Path
) -> None:
    source = tiny_checkpoint("llama")
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    tensors = {name: Checkpoint.open(source).tensor(name) for name in ("model.norm.weight",)}
    save_file(tensors | {"model.extra.weight": torch.ones(4, 4)}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedModel, match=r"holds model\.extra\.weight"):
        rotated(Checkpoint.open(tmp_path), ["R1"])


def test_an_artifact_of_turned_weights_is_an_ordinary_model(
    tiny_checkpoint: Make, tmp_path: Path
) -> None:
    """The run itself reloads it in transformers and compares logits; tied embeddings come apart."""
    source = tiny_checkpoint("qwen3", dtype="bfloat16", tie_word_embeddings=True)
    recipe = load_recipe("rtn-int4").with_options(rotations=("R1", "R2"))
    manifest = quantize_model(str(source), recipe, out=tmp_path / "out")
    assert UNTIED in manifest.warnings
    assert manifest.recipe is not None
    assert manifest.recipe["rotations"] == ["R1", "R2"]
    assert not any("not reloaded" in warning for warning in manifest.warnings)
    out, original = Checkpoint.open(tmp_path / "out"), Checkpoint.open(source)
    assert out.config["tie_word_embeddings"] is False
    assert out.config["model_type"] == "qwen3"
    assert bool((out.tensor("model.norm.weight") == 1).all())
    turned = out.tensor("model.embed_tokens.weight").float()
    stored = original.tensor("model.embed_tokens.weight").float()
    assert not torch.equal(turned, stored)
    torch.testing.assert_close(turned.norm(dim=1), stored.norm(dim=1), rtol=1e-2, atol=0)


def test_a_turned_model_is_calibrated_and_goes_on_as_any_other(
    tiny_checkpoint: Make, tmp_path: Path
) -> None:
    recipe = load_recipe("int4").with_options(
        rotations=("R1",), num_samples=4, sequence_length=32, effort="fast"
    )
    source = str(tiny_checkpoint("llama", num_hidden_layers=1))
    job = prepare(source, recipe)
    assert UNTIED not in job.warnings
    first = quantize_model(source, recipe, out=tmp_path / "first")
    again = quantize_model(source, recipe, out=tmp_path / "again")
    assert [layer.error for layer in first.layers] == [layer.error for layer in again.layers]
    written = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "again")]
    assert written[0] == written[1]


def test_a_rotation_that_there_is_not_is_refused() -> None:
    with pytest.raises(UnknownName, match="R3"):
        load_recipe("int4").with_options(rotations=("R3",))
