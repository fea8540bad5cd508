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
from qtool.arch import ARCHITECTURES
from qtool.checkpoint import Checkpoint
from qtool.convert.formats import FORMATS, WeightReader, open_weights
from qtool.convert.gguf.blocks.codecs import BLOCK_CODECS
from qtool.convert.gguf.container import GgufFile
from qtool.convert.gguf.types import TENSOR_TYPES
from qtool.convert.gguf.writer import GgufLayout, GgufWriter, TensorInfo
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


# As small as every packing allows: its widths are multiples of 256.
TINY: dict[str, Any] = {"num_hidden_layers": 1}
# What a loaded weight is called where that is not GGUF's word.
STORED = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "Q4_0": "int4-g32-sym"}
# Of GGUF's architectures; the rest take part in the long run.
QUICK = ("gemma3_text", "phi", "deepseek_v2", "qwen2_moe")
# Of GGUF's types, likewise.
COMMON = ("BF16", "Q4_0", "Q8_0", "Q4_K", "Q6_K", "IQ4_XS", "MXFP4")
# What GGUF cannot leave to the config of a tiny checkpoint.
SAID: dict[str, dict[str, Any]] = {
    "gemma": {"tie_word_embeddings": True},
    "gemma2": {"tie_word_embeddings": True, "query_pre_attn_scalar": 64},
    "gemma3_text": {
        "tie_word_embeddings": True,
        "num_hidden_layers": 6,
        "query_pre_attn_scalar": 64,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
    },
    "smollm3": {
        "num_hidden_layers": 4,
        "no_rope_layers": [1, 1, 1, 0],
        "layer_types": ["full_attention"] * 4,
    },
    "phi": {"num_key_value_heads": 4},
    "gpt2": {"tie_word_embeddings": True},
    "qwen3_moe": {"norm_topk_prob": True},
}


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


@pytest.fixture(autouse=True)
def _by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's operators, which are there on every machine. What the compiled library computes is
    compared with them in tests/kernels and in test_native_decoder.py.
    """
    monkeypatch.setenv("QTOOL_ACTIVATIONS", "bf16")


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


def schemes_of(format: str) -> list[Any]:
    """Everything that the format can hold of TINY's linears; those with odd widths are slow."""
    found = []
    for bits in range(2, 9):
        for group in ("g32", "g64", "g128", "row"):
            for symmetric in ("sym", "asym"):
                scheme = f"int{bits}-{group}-{symmetric}"
                if FORMATS[format].refuses(QuantScheme.parse(scheme), 256, 128) is None:
                    common = bits in (4, 8) and group in ("g64", "row")
                    marks = () if common else pytest.mark.slow
                    found.append(pytest.param(format, scheme, marks=marks, id=f"{format} {scheme}"))
    return found


@pytest.mark.parametrize(
    ("format", "scheme"), [case for format in FORMATS for case in schemes_of(format)]
)
def test_every_scheme_of_every_format_is_served(
    format: str, scheme: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    plain = tiny_checkpoint("llama", **TINY)
    model = quantize(plain, format, scheme, tmp_path / "model")
    reader = open_weights(resolve(str(model)))
    assert len(reader.modules()) == 7
    expected = load_model(str(twin(reader, plain, tmp_path / "twin"))).logits(tokens())
    for dtype, most in (("float32", 1e-5), ("bfloat16", 0.03)):
        found = load_model(str(model), dtype=dtype).logits(tokens())  # type: ignore[arg-type]
        assert float((found - expected).norm() / expected.norm()) < most


def scrambled(plain: Path, type: str, out: Path) -> Path:
    """A GGUF file of the model whose linears are blocks of random bytes.

    Bytes are below 0x3c, so that every 16-bit scale among them is finite and less than one;
    MXFP4's scales are powers of two, 0x7f being one.
    """
    lowest, above = (0x70, 0x80) if type == "MXFP4" else (0, 0x3C)
    whole = convert_model(str(plain), to="gguf", type="F32", out=out.with_suffix(".f32.gguf"))
    file = GgufFile.open(whole)
    linears = {name for name in file.tensors if ".weight" in name and "norm" not in name}
    infos = [
        TensorInfo(name, tuple(entry.shape), TENSOR_TYPES[type] if name in linears else entry.type)
        for name, entry in file.tensors.items()
    ]
    generator = torch.Generator().manual_seed(0)
    with GgufWriter(out, GgufLayout.of(file.entries, infos)) as writer:
        for info in infos:
            data = file.data(info.name).contiguous().view(torch.uint8).flatten()
            if info.name in linears:
                data = torch.randint(lowest, above, (info.nbytes,), generator=generator)
                data = data.to(torch.uint8)
            writer.write(info, data.view(info.rows, -1))
    return out


@pytest.mark.parametrize(
    "type",
    [pytest.param(type, marks=() if type in COMMON else pytest.mark.slow) for type in BLOCK_CODECS],
)
def test_every_gguf_type_is_served(
    type: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    plain = tiny_checkpoint("llama", **TINY)
    model = scrambled(plain, type, tmp_path / "model.gguf")
    reader = open_weights(resolve(str(model)))
    expected = load_model(str(twin(reader, plain, tmp_path / "twin"))).logits(tokens())
    assert expected.isfinite().all()
    found = load_model(str(model), dtype="float32")
    kinds = {use.weight for use in found.kernels}
    assert kinds == {STORED.get(type, type)}
    error = (found.logits(tokens()) - expected).norm() / expected.norm()
    assert float(error) < 1e-4


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=() if family in QUICK else pytest.mark.slow)
        for family in ARCHITECTURES
    ],
)
def test_every_gguf_architecture_is_served(
    family: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Its text is that of the checkpoint it was made from, or of a twin where it lost bits."""
    plain = tiny_checkpoint(family, **SAID.get(family, {}))
    expected = load_model(str(plain), dtype="float32")
    model = convert_model(str(plain), to="gguf", type="F32", out=tmp_path / "model.gguf")
    found = load_model(str(model), dtype="float32")
    assert found.code == expected.code == ("native" if ARCHITECTURES[family].native else found.code)
    torch.testing.assert_close(found.logits(tokens()), expected.logits(tokens()), rtol=0, atol=1e-4)


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


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v2"])
def test_quantized_experts_run_packed(
    family: str, tiny_checkpoint: Callable[..., Path], transformers_logits: Logits, tmp_path: Path
) -> None:
    plain = tiny_checkpoint(family)
    model = quantize(plain, "compressed-tensors", "int4-g32-sym", tmp_path / "model")
    reader = open_weights(resolve(str(model)))
    expected = transformers_logits(twin(reader, plain, tmp_path / "twin"), tokens())
    loaded = load_model(str(model), dtype="bfloat16")
    experts = {use for use in loaded.kernels if use.layer.startswith(("experts", "shared"))}
    assert {use.weight for use in experts if use.layer != "shared_router"} == {"int4-g32-sym"}
    assert all(use.kernel in ("int4pack", "native_w4a8") for use in experts)
    assert sum(use.count for use in experts if use.layer == "experts_down") in (4, 8)
    error = (loaded.logits(tokens()) - expected).norm() / expected.norm()
    assert float(error) < 0.05


@pytest.mark.parametrize("format", FORMATS)
def test_packed_folders_of_other_families_run_packed(
    format: str, tiny_checkpoint: Callable[..., Path], transformers_logits: Logits, tmp_path: Path
) -> None:
    """By transformers' code, which calls our kernels."""
    plain = tiny_checkpoint("gpt_neox")
    model = quantize(plain, format, "int4-g64-sym", tmp_path / "model")
    reader = open_weights(resolve(str(model)))
    expected = transformers_logits(twin(reader, plain, tmp_path / "twin"), tokens())
    for dtype, most in (("float32", 1e-5), ("bfloat16", 0.05)):
        loaded = load_model(str(model), dtype=dtype)  # type: ignore[arg-type]
        assert loaded.code == "transformers"
        error = (loaded.logits(tokens()) - expected).norm() / expected.norm()
        assert float(error) < most
    packed = {use.layer for use in loaded.kernels if use.kernel in ("int4pack", "native_w4a8")}
    assert packed == {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}
    wide = load_model(str(plain), dtype="bfloat16")
    assert loaded.nbytes < 0.8 * wide.nbytes


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
