"""Inputs of quantized layers, rounded as the user asks: what is reported, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from qtool.convert.run import convert_model
from qtool.errors import UsageError
from qtool.runtime.evaluate.run import evaluate
from qtool.settings import Rounding


@pytest.fixture(scope="module")
def packed(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gguf") / "Q4_0.gguf"
    convert_model(str(original), to="gguf", type="Q4_0", out=out)
    return out


def test_each_rounding_is_named_and_gives_other_numbers(packed: Path, original: Path) -> None:
    found = {}
    roundings: dict[Rounding, str] = {
        "int8": "float32 with quantized layers on 8-bit activations",
        "bf16": "float32",
        "llama.cpp": "float32 with inputs rounded as llama.cpp rounds them on CPUs",
    }
    for rounding, said in roundings.items():
        report = evaluate(
            *(str(packed), str(original)),
            max_tokens=512,
            activations=rounding,
            papers=False,
            speed=False,
        )
        assert report.models[0].dtype == said
        assert report.reference is not None
        assert report.reference.dtype == "float32"
        assert f"--activations {rounding}" in report.command
        divergence = report.models[0].divergence
        assert divergence is not None
        found[rounding] = divergence.kld.value
    assert len(set(found.values())) == 3
    # Rounding of 8 bits beside weights of 4 moves little.
    assert max(found.values()) < 1.2 * min(found.values())


def test_what_llama_cpp_cannot_run_is_refused_with_the_conversion(
    packed: Path, original: Path, tmp_path: Path
) -> None:
    int4 = tmp_path / "int4"
    convert_model(str(packed), to="compressed-tensors", out=int4)
    with pytest.raises(UsageError, match=r"is compressed-tensors, and llama\.cpp runs") as caught:
        evaluate(str(int4), str(original), activations="llama.cpp")
    assert "qtool convert" in (caught.value.hint or "")


def test_llama_cpp_computes_in_float32(packed: Path, original: Path) -> None:
    with pytest.raises(UsageError, match=r"--dtype bfloat16: llama\.cpp computes in float32"):
        evaluate(str(packed), str(original), dtype="bfloat16", activations="llama.cpp")
