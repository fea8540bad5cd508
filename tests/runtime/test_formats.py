"""Every format that this tool writes is loaded, computes what it holds, and generates text.

What a file holds is told by a twin: the same model with each packed weight replaced by its
dequantized values, run by transformers in float32.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from qtool import grid
from qtool.checkpoint import Checkpoint
from qtool.convert.formats import FORMATS, WeightReader, open_weights
from qtool.convert.run import convert_model
from qtool.runtime.engine.sampling_params import SamplingParams
from qtool.runtime.llm import LLM
from qtool.runtime.loading import load_model
from qtool.scheme import QuantScheme
from qtool.source import resolve
from qtool.weights import QuantizedWeight

Logits = Callable[[Path, Tensor], Tensor]

# What runs plain and unpacked weights in bfloat16; oneDNN has no bfloat16 before AVX-512.
ONEDNN = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
PLAIN = "onednn" if ONEDNN else "dense"
UNPACKED = "onednn" if ONEDNN else "dequantized"


def round_to_nearest(values: Tensor, scheme: QuantScheme) -> QuantizedWeight:
    weight = values.float()
    found = grid.fit(weight, scheme)
    zeros = None if found.zeros is None else found.zeros.to(torch.uint8)
    return QuantizedWeight(grid.codes(weight, found, scheme), found.scales, zeros, scheme)


def quantize(folder: Path, format: str, scheme: str, out: Path) -> Path:
    """A checkpoint whose block linears are rounded to nearest and packed in one format."""
    source = Checkpoint.open(folder)
    parsed = QuantScheme.parse(scheme)
    tensors: dict[str, Tensor] = {}
    packed: dict[str, QuantScheme] = {}
    for name in source.tensors:
        values = source.tensor(name)
        module, _, suffix = name.rpartition(".")
        if suffix == "weight" and values.ndim == 2 and ".layers." in name:
            parts = FORMATS[format].pack(round_to_nearest(values, parsed), values.dtype)
            tensors |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
            packed[module] = parsed
        else:
            tensors[name] = values
    shutil.copytree(folder, out)
    (out / "model.safetensors").unlink()
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        str(out / "model.safetensors"),
    )
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] = FORMATS[format].quantization_config(packed, ["lm_head"])
    (out / "config.json").write_text(json.dumps(config))
    return out


def twin(reader: WeightReader, folder: Path, out: Path) -> Path:
    """The plain model of the same weights: `folder` has its config and tokenizer."""
    names = [*reader.tensor_names(), *(f"{module}.weight" for module in reader.modules())]
    shutil.copytree(folder, out)
    (out / "model.safetensors").unlink()
    tensors = {name: reader.tensor(name).float().contiguous() for name in names}
    save_file(tensors, str(out / "model.safetensors"), metadata={"format": "pt"})
    return out


def tokens(length: int = 60) -> Tensor:
    return torch.randint(0, 4096, (1, length), generator=torch.Generator().manual_seed(0))


def continuation(model: Path, **options: Any) -> str:
    llm = LLM(str(model), **options)
    (answer,) = llm.generate("It was a", SamplingParams(temperature=0, max_tokens=8))
    assert len(answer.outputs[0].token_ids) == 8
    return answer.outputs[0].text


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize(
    ("format", "scheme"),
    [
        ("compressed-tensors", "int4-g128-sym"),
        ("gptq", "int4-g64-sym"),
        ("awq", "int4-g128-asym"),
        ("marlin", "int4-g128-sym"),
    ],
)
def test_packed_folders_compute_what_they_hold(
    family: str,
    format: str,
    scheme: str,
    tiny_checkpoint: Callable[..., Path],
    transformers_logits: Logits,
    tmp_path: Path,
) -> None:
    plain = tiny_checkpoint(family)
    model = quantize(plain, format, scheme, tmp_path / "model")
    reader = open_weights(resolve(str(model)))
    assert reader.format == format
    expected = transformers_logits(twin(reader, plain, tmp_path / "twin"), tokens())
    wide = load_model(str(model), dtype="float32")
    torch.testing.assert_close(wide.logits(tokens()), expected, rtol=0, atol=1e-4)
    assert {use.kernel for use in wide.kernels} == {"dequantized", "dense"}
    narrow = load_model(str(model), dtype="bfloat16")
    assert {use.kernel for use in narrow.kernels} == {"int4pack", PLAIN}
    error = (narrow.logits(tokens()) - expected).norm() / expected.norm()
    assert float(error) < 0.03


@pytest.mark.parametrize(
    ("format", "scheme", "kernel"),
    [
        ("compressed-tensors", "int4-g128-sym", "int4pack"),
        ("compressed-tensors", "int4-g32-asym", "int4pack"),
        ("compressed-tensors", "int8-row-sym", "int8pack"),
        ("gptq", "int4-g128-sym", "int4pack"),
        ("gptq", "int8-g128-sym", UNPACKED),
        ("awq", "int4-g64-asym", "int4pack"),
        ("marlin", "int4-g128-sym", "int4pack"),
    ],
)
def test_packed_folders_generate(
    format: str, scheme: str, kernel: str, books_7m: Path, tmp_path: Path
) -> None:
    model = quantize(books_7m, format, scheme, tmp_path / "model")
    loaded = load_model(str(model))
    assert loaded.dtype == torch.bfloat16
    counts = {use.kernel: use.count for use in loaded.kernels if use.layer != "head"}
    assert {use.kernel for use in loaded.kernels if use.layer != "head"} == {kernel}
    assert counts == {kernel: 8}
    assert continuation(model).strip()


def test_logits_of_an_int4_artifact_are_those_that_transformers_computes(
    books_7m: Path, tmp_path: Path
) -> None:
    """transformers unpacks it with compressed-tensors' own code."""
    model = quantize(books_7m, "compressed-tensors", "int4-g128-sym", tmp_path / "model")
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = theirs(tokens(200)).logits
    found = load_model(str(model), dtype="float32").logits(tokens(200))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("type", ["F16", "Q4_K_M"])
def test_gguf_files_compute_what_they_hold(
    family: str,
    type: str,
    tiny_checkpoint: Callable[..., Path],
    transformers_logits: Logits,
    tmp_path: Path,
) -> None:
    plain = tiny_checkpoint(family)
    model = convert_model(str(plain), to="gguf", type=type, out=tmp_path / "model.gguf")
    reader = open_weights(resolve(str(model)))
    expected = transformers_logits(twin(reader, plain, tmp_path / "twin"), tokens())
    loaded = load_model(str(model), dtype="float32")
    torch.testing.assert_close(loaded.logits(tokens()), expected, rtol=0, atol=1e-4)
    original = transformers_logits(plain, tokens())
    error = (expected - original).norm() / original.norm()
    assert float(error) < (0.01 if type == "F16" else 0.3)


@pytest.mark.parametrize(
    ("type", "kernels"),
    [
        ("F16", {PLAIN}),
        ("BF16", {PLAIN}),
        ("Q8_0", {UNPACKED}),
        ("Q4_0", {"int4pack"}),
        ("Q4_K_M", {UNPACKED}),
    ],
)
def test_gguf_files_generate_with_their_own_tokenizer(
    type: str, kernels: set[str], books_7m: Path, tmp_path: Path
) -> None:
    model = convert_model(str(books_7m), to="gguf", type=type, out=tmp_path / "model.gguf")
    loaded = load_model(str(model))
    assert loaded.format == "gguf"
    assert {use.kernel for use in loaded.kernels if use.layer != "head"} == kernels
    original = load_model(str(books_7m))
    assert loaded.tokenizer is not None
    assert original.tokenizer is not None
    text = 'He said: "42 ships, and no wind!"  Über\n\nthe sea'
    assert loaded.tokenizer.encode(text) == original.tokenizer.encode(text)
    # llama.cpp also ends at <|im_end|>, wherever it is in the vocabulary.
    assert set(loaded.eos_token_ids) >= set(original.eos_token_ids)
    assert continuation(model).strip()


def test_codes_survive_every_conversion(books_7m: Path, tmp_path: Path) -> None:
    """int4 to Marlin, GPTQ, AWQ and Q4_0: one text, since all hold the same weights."""
    model = quantize(books_7m, "compressed-tensors", "int4-g128-sym", tmp_path / "int4")
    expected = continuation(model, dtype="float32")
    for target in ("marlin", "gptq", "awq", "gguf"):
        converted = convert_model(str(model), to=target, out=tmp_path / f"to.{target}")
        assert continuation(converted, dtype="float32") == expected, target


def test_layers_that_are_packed_apart_are_called_one_by_one(
    tiny_checkpoint: Callable[..., Path], transformers_logits: Logits, tmp_path: Path
) -> None:
    """Only up_proj and v_proj packed: q, k and gate stay dense beside them."""
    plain = tiny_checkpoint("qwen2")
    model = tmp_path / "model"
    shutil.copytree(plain, model)
    tensors = load_file(str(model / "model.safetensors"))
    scheme = QuantScheme.parse("int4-g64-sym")
    packed = {}
    for name in [n for n in tensors if n.endswith(("up_proj.weight", "v_proj.weight"))]:
        module = name.removesuffix(".weight")
        weight = round_to_nearest(tensors.pop(name), scheme)
        parts = FORMATS["compressed-tensors"].pack(weight, torch.float32)
        tensors |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
        packed[module] = scheme
    save_file(tensors, str(model / "model.safetensors"))
    config = json.loads((model / "config.json").read_text())
    dense = [n.removesuffix(".weight") for n in tensors if n.endswith("proj.weight")]
    config["quantization_config"] = FORMATS["compressed-tensors"].quantization_config(
        packed, [*dense, "lm_head"]
    )
    (model / "config.json").write_text(json.dumps(config))
    reader = open_weights(resolve(str(model)))
    expected = transformers_logits(twin(reader, plain, tmp_path / "twin"), tokens())
    narrow = load_model(str(model), dtype="bfloat16")
    by_layer = {use.layer: use.kernel for use in narrow.kernels}
    assert (by_layer["v"], by_layer["up"]) == ("int4pack", "int4pack")
    assert (by_layer["q"], by_layer["gate"]) == (PLAIN, PLAIN)
    error = (narrow.logits(tokens()) - expected).norm() / expected.norm()
    assert float(error) < 0.03
    wide = load_model(str(model), dtype="float32")
    torch.testing.assert_close(wide.logits(tokens()), expected, rtol=0, atol=1e-4)
