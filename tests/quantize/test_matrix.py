"""Every width, group size and symmetry in every format: written, loaded elsewhere, served here.

What a format cannot hold is refused before any work, with the reason.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from qtool.convert.formats import open_weights
from qtool.errors import UnsupportedModel
from qtool.quantize.job import WRITABLE_FORMATS, prepare
from qtool.quantize.pipeline import quantize_model
from qtool.recipe import GroupSize, Recipe, load_recipe
from qtool.runtime.loading import load_model
from qtool.source import Source

WIDTHS = (2, 3, 4, 5, 6, 7, 8)
GROUPS: tuple[GroupSize, ...] = (32, 64, 128, "row")


class Combination(NamedTuple):
    format: str
    bits: int
    group_size: GroupSize
    symmetric: bool

    @property
    def recipe(self) -> Recipe:
        """In one solve on a little data."""
        wanted = load_recipe("int4").with_options(
            effort="fast",
            bits=self.bits,
            group_size=self.group_size,
            num_samples=4,
            sequence_length=32,
        )
        return dataclasses.replace(wanted, symmetric=self.symmetric)

    @property
    def refusal(self) -> str | None:
        """As the formats' own readers have it."""
        if self.format == "gptq" and self.bits not in (2, 3, 4, 8):
            return f"GPTQ files hold 2, 3, 4 or 8 bits, not {self.bits}"
        if self.format == "gptq" and not self.symmetric:
            return "zero points less one, so readers differ"
        if self.format == "awq" and self.bits != 4:
            return f"AWQ files hold 4 bits, not {self.bits}"
        return None

    @property
    def is_quick(self) -> bool:
        """Each width once, each group size once, and each format's asymmetry."""
        if self.format != "compressed-tensors":
            return self.bits == 4 and self.group_size == 64
        if not self.symmetric:
            return self.bits == 4 and self.group_size == 32
        return self.group_size == {4: 64, 6: 32, 8: "row"}.get(self.bits, 128)


ALL = [
    Combination(format, bits, group_size, symmetric)
    for format in WRITABLE_FORMATS
    for bits in WIDTHS
    for group_size in GROUPS
    for symmetric in (True, False)
]


def held() -> list[Any]:
    found = []
    for wanted in ALL:
        if wanted.refusal is None:
            marks = () if wanted.is_quick else pytest.mark.slow
            symmetry = "sym" if wanted.symmetric else "asym"
            name = f"{wanted.format} {wanted.bits} {wanted.group_size} {symmetry}"
            found.append(pytest.param(wanted, marks=marks, id=name))
    return found


@pytest.fixture(scope="module")
def source(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("llama", num_hidden_layers=1, intermediate_size=256)


def test_the_matrix_is_whole() -> None:
    assert len(ALL) == 3 * 7 * 4 * 2
    assert sum(wanted.refusal is None for wanted in ALL) == 7 * 8 + 4 * 4 + 8


def test_what_a_format_cannot_hold_is_refused_with_the_reason(source: Path) -> None:
    for wanted in ALL:
        if wanted.refusal is not None and wanted.group_size == 64:
            with pytest.raises(UnsupportedModel, match=wanted.refusal):
                prepare(str(source), wanted.recipe, format=wanted.format)


@pytest.mark.parametrize("wanted", held())
def test_what_a_format_holds_is_written_loaded_and_served(
    wanted: Combination, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    manifest = quantize_model(str(source), wanted.recipe, format=wanted.format, out=out)
    assert manifest.format == wanted.format
    reader = open_weights(Source("out", out))
    group = "row" if wanted.group_size == "row" else f"g{wanted.group_size}"
    scheme = f"int{wanted.bits}-{group}-{'sym' if wanted.symmetric else 'asym'}"
    assert {layer.scheme for layer in manifest.layers} == {scheme}
    assert len(reader.modules()) == 7
    tokens = torch.randint(4096, (1, 24), generator=torch.Generator().manual_seed(0))
    expected = in_plain_transformers(source, out, tokens)
    served = load_model(str(out), dtype="float32")
    torch.testing.assert_close(served.logits(tokens), expected, rtol=0, atol=1e-4)
    if wanted.format == "compressed-tensors":
        theirs = in_transformers(out, tokens, symmetric=wanted.symmetric)
        torch.testing.assert_close(theirs, expected, rtol=0, atol=1e-5)


def in_plain_transformers(source: Path, artifact: Path, tokens: Tensor) -> Tensor:
    """Logits of the original's code with the artifact's weights as this project decodes them."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    reader = open_weights(Source("artifact", artifact))
    state = model.state_dict()
    with torch.no_grad():
        for module in reader.modules():
            state[f"{module}.weight"].copy_(reader.weight(module).dequantize())
        logits: Tensor = model(tokens).logits
    return logits


def in_transformers(artifact: Path, tokens: Tensor, *, symmetric: bool) -> Tensor:
    """Logits as compressed-tensors' own code decodes the file.

    From 0.18 on it loads zero points only where it decodes the weights at once.
    """
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    given = {} if symmetric else {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(artifact, dtype=torch.float32, **given).eval()
    with torch.no_grad():
        logits: Tensor = model(tokens).logits
    return logits
