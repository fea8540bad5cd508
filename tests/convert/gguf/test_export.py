"""Exporting to GGUF and reading back: plans, bytes, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from qtool.convert.formats import WeightReader, open_weights
from qtool.convert.gguf.blocks.codecs import BLOCK_CODECS, quantize
from qtool.convert.gguf.container import GgufFile
from qtool.convert.gguf.export import write_gguf
from qtool.convert.gguf.import_ import GgufWeights
from qtool.convert.gguf.metadata import size_label
from qtool.convert.gguf.mix import MixOverrides
from qtool.convert.gguf.names import interleave_rows
from qtool.convert.gguf.plan import ExportPlan, plan_export
from qtool.errors import FormatError, OutputExists, QtoolError, UnknownName, UnsupportedModel
from qtool.scheme import QuantScheme
from qtool.source import Source
from qtool.weights import BlockWeight, DenseWeight, QuantizedWeight

TinyCheckpoint = Callable[..., Path]
PackedCheckpoint = Callable[..., Path]
ATTENTION = "model.layers.0.self_attn"


def opened(path: Path) -> WeightReader:
    return open_weights(Source(str(path), path))


def export(
    reader: WeightReader, out: Path, type: str | None = None
) -> tuple[ExportPlan, GgufWeights]:
    plan = plan_export(reader, type)
    write_gguf(plan, out, progress=lambda size: None)
    assert out.stat().st_size == plan.nbytes
    return plan, GgufWeights(Source(str(out), out))


def assert_same_values(one: WeightReader, other: WeightReader) -> None:
    ours = {*(f"{module}.weight" for module in one.modules()), *one.tensor_names()}
    theirs = {*(f"{module}.weight" for module in other.modules()), *other.tensor_names()}
    assert ours == theirs
    for name in ours:
        assert one.tensor(name).float().equal(other.tensor(name).float()), name


CASES = {
    "llama": ("llama", {}),
    "llama with biases": ("llama", {"attention_bias": True, "head_dim": 32}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 128}),
    "llama 3": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            }
        },
    ),
    "linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_config_come_back_from_floating_types(
    case: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    family, overrides = CASES[case]
    source = opened(tiny_checkpoint(family, dtype="bfloat16", **overrides))
    plan, back = export(source, tmp_path / "model.gguf", "BF16")
    assert plan.warnings == ()
    assert_same_values(source, back)
    for key in (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
        *("num_attention_heads", "num_key_value_heads", "tie_word_embeddings"),
        *("max_position_embeddings", "rms_norm_eps", "rope_parameters", "bos_token_id", "dtype"),
    ):
        assert back.config[key] == source.config[key], key
    assert back.config["model_type"] == ("llama" if family == "mistral" else family)
    assert back.config["head_dim"] == source.config.get("head_dim", 64)


def test_half_precision_keeps_values_that_it_can_hold(books_7m: Path, tmp_path: Path) -> None:
    source = opened(books_7m)
    _, back = export(source, tmp_path / "model.gguf", "F16")
    for name in source.tensor_names():
        assert back.tensor(name).float().equal(source.tensor(name).half().float()), name


def test_q_and_k_are_stored_in_llama_cpps_order(books_7m: Path, tmp_path: Path) -> None:
    source = opened(books_7m)
    export(source, tmp_path / "model.gguf", "F32")
    file = GgufFile.open(tmp_path / "model.gguf")
    q = source.tensor(f"{ATTENTION}.q_proj.weight").float()
    stored = file.data("blk.0.attn_q.weight").clone().view(torch.float32)
    assert stored.equal(q[interleave_rows(4, 64)])
    v = source.tensor(f"{ATTENTION}.v_proj.weight").float()
    assert file.data("blk.0.attn_v.weight").clone().view(torch.float32).equal(v)


@pytest.fixture(scope="module")
def quantized(books_7m: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model as Q4_K_M."""
    path = tmp_path_factory.mktemp("quantized") / "model.gguf"
    export(opened(books_7m), path, "Q4_K_M")
    return path


def test_the_gguf_package_opens_what_is_written(quantized: Path) -> None:
    path, back = quantized, GgufWeights(Source("quantized", quantized))
    theirs = gguf.GGUFReader(path)
    ours = GgufFile.open(path)
    assert [tensor.name for tensor in theirs.tensors] == list(ours.tensors)
    for tensor in theirs.tensors:
        entry = ours.tensors[tensor.name]
        assert tensor.tensor_type.name == entry.type.name
        assert tensor.data_offset == entry.offset
        assert tuple(reversed(tensor.shape.tolist())) == entry.shape
        assert tensor.data.tobytes() == bytes(ours.data(tensor.name).flatten().tolist())
    for entry in ours.entries[:20]:
        assert theirs.fields[entry.key].contents() == entry.value
    module = "model.layers.7.mlp.down_proj"
    weight = back.weight(module)
    stored = next(t for t in theirs.tensors if t.name == "blk.7.ffn_down.weight")
    expected = gguf.quants.dequantize(stored.data, stored.tensor_type)
    assert weight.dequantize().tolist() == expected.tolist()
    assert stored.tensor_type.name == back.describe(module).kind == "Q6_K"


def test_blocks_are_the_quantizers_of_the_reordered_rows(books_7m: Path, quantized: Path) -> None:
    source, back = opened(books_7m), GgufWeights(Source("quantized", quantized))
    plan = plan_export(source, "Q4_K_M")
    assert plan.counts() == {"Q4_K": 48, "F32": 17, "Q6_K": 9}
    assert 5.0 < plan.bits_per_weight < 5.1
    file = GgufFile.open(quantized)
    rows = source.tensor(f"{ATTENTION}.q_proj.weight").float()[interleave_rows(4, 64)]
    assert file.data("blk.0.attn_q.weight").equal(quantize("Q4_K", rows))
    weight = back.weight(f"{ATTENTION}.q_proj")
    assert isinstance(weight, BlockWeight)
    restored = weight.dequantize()[interleave_rows(4, 64)]
    assert restored.equal(BLOCK_CODECS["Q4_K"].dequantize(quantize("Q4_K", rows)))
    embedding = back.weight("model.embed_tokens")
    assert isinstance(embedding, BlockWeight)
    assert embedding.codec.name == "Q6_K"
    assert back.tensor("model.embed_tokens.weight").equal(embedding.dequantize())


def test_tensors_and_keys_are_in_llama_quantizes_order(
    books_7m: Path, quantized: Path, tmp_path: Path
) -> None:
    export(opened(books_7m), tmp_path / "f.gguf", "F16")
    file = GgufFile.open(quantized)
    names = list(file.tensors)
    assert names[:4] == [
        "output_norm.weight",
        "token_embd.weight",
        "blk.0.attn_k.weight",
        "blk.0.attn_norm.weight",
    ]
    assert names[-1] == "blk.7.ffn_up.weight"
    keys = [entry.key for entry in file.entries]
    assert keys[:4] == [
        "general.architecture",
        "general.type",
        "general.name",
        "general.size_label",
    ]
    assert keys[-2:] == ["general.quantization_version", "general.file_type"]
    assert (file.metadata["general.file_type"], file.metadata["general.name"]) == (15, "books-7m")
    floating = GgufFile.open(tmp_path / "f.gguf")
    assert list(floating.tensors) == names
    keys = [entry.key for entry in floating.entries]
    assert keys.index("general.file_type") + 1 == keys.index("llama.vocab_size")
    assert keys.index("general.quantization_version") + 1 == keys.index("tokenizer.ggml.model")


def test_threads_do_not_change_the_file(books_7m: Path, tmp_path: Path) -> None:
    export(opened(books_7m), tmp_path / "one.gguf", "Q4_0")
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        export(opened(books_7m), tmp_path / "three.gguf", "Q4_0")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "three.gguf").read_bytes()


@pytest.mark.parametrize(
    ("scheme", "family"),
    [("int4-g128-sym", "qwen2"), ("int4-g32-sym", "llama"), ("int4-row-sym", "llama")],
)
def test_symmetric_int4_becomes_q4_0_with_every_weight_as_it_was(
    scheme: str, family: str, packed_checkpoint: PackedCheckpoint, tmp_path: Path
) -> None:
    source = opened(packed_checkpoint("compressed-tensors", scheme, family))
    plan, back = export(source, tmp_path / "model.gguf")
    assert plan.file_type == "Q4_0"
    assert plan.warnings == ()
    how = {tensor.info.name: tensor.how for tensor in plan.tensors}
    assert {how[f"blk.1.{part}.weight"] for part in ("attn_q", "attn_v", "ffn_down")} == {"repack"}
    for module in source.modules():
        weight = back.weight(module)
        assert isinstance(weight, QuantizedWeight)
        assert weight.scheme == QuantScheme(4, 32)
        assert weight.dequantize().equal(source.weight(module).dequantize()), module
    types = {tensor.info.name: tensor.info.type.name for tensor in plan.tensors}
    assert types["output.weight"] == "Q6_K"
    assert types["token_embd.weight"] == "Q4_0"
    assert types["blk.0.attn_norm.weight"] == "F32"


def test_linears_left_in_16_bit_in_an_int4_model_get_8_bits_not_4(
    tiny_checkpoint: TinyCheckpoint,
    write_packed: Callable[..., Path],
    tmp_path: Path,
) -> None:
    scheme = QuantScheme.parse("int4-g32-sym")
    folder = write_packed(
        tiny_checkpoint("llama", dtype="bfloat16"),
        tmp_path / "packed",
        "compressed-tensors",
        lambda module: scheme if "mlp" in module else None,
    )
    plan, _ = export(opened(folder), tmp_path / "model.gguf")
    types = {tensor.info.name: tensor.info.type.name for tensor in plan.tensors}
    assert (types["blk.0.ffn_up.weight"], types["blk.0.attn_q.weight"]) == ("Q4_0", "Q8_0")


@pytest.mark.parametrize("type", [None, "Q8_0"])
def test_symmetric_int8_is_kept(
    type: str | None, packed_checkpoint: PackedCheckpoint, tmp_path: Path
) -> None:
    source = opened(packed_checkpoint("compressed-tensors", "int8-row-sym"))
    plan, back = export(source, tmp_path / "model.gguf", type)
    assert (plan.file_type, plan.warnings) == ("Q8_0", ())
    for module in source.modules():
        assert back.weight(module).dequantize().equal(source.weight(module).dequantize())


def test_asymmetric_int4_is_kept_as_q4_1(
    packed_checkpoint: PackedCheckpoint, tmp_path: Path
) -> None:
    source = opened(packed_checkpoint("awq", "int4-g64-asym"))
    plan, back = export(source, tmp_path / "model.gguf")
    assert (plan.file_type, plan.warnings) == ("Q4_1", ())
    assert sum(tensor.how == "repack" for tensor in plan.tensors) == 14
    for module in source.modules():
        meant, found = source.weight(module).dequantize(), back.weight(module).dequantize()
        assert float((found - meant).norm() / meant.norm()) < 4.5e-4


@pytest.mark.parametrize(
    ("scheme", "type"),
    [("int4-g32-asym", "Q4_K_M"), ("int4-g32-sym", "Q4_K_M"), ("int8-row-asym", None)],
)
def test_rounding_a_second_time_warns(
    scheme: str, type: str | None, packed_checkpoint: PackedCheckpoint
) -> None:
    plan = plan_export(opened(packed_checkpoint("compressed-tensors", scheme)), type)
    assert plan.file_type == "Q4_K_M"
    assert any("second time" in warning and scheme in warning for warning in plan.warnings)
    assert sum(tensor.how == "requantize" for tensor in plan.tensors) == 14


def test_a_quantized_model_is_decoded_into_floating_types(
    packed_checkpoint: PackedCheckpoint, tmp_path: Path
) -> None:
    source = opened(packed_checkpoint("gptq", "int4-g32-sym"))
    plan, back = export(source, tmp_path / "model.gguf", "F32")
    assert {tensor.how for tensor in plan.tensors} == {"decode", "cast"}
    assert_same_values(source, back)


def test_a_gguf_file_exports_to_itself(books_7m: Path, quantized: Path, tmp_path: Path) -> None:
    q4_0 = tmp_path / "Q4_0.gguf"
    export(opened(books_7m), q4_0, "Q4_0")
    for first, type in ((quantized, "Q4_K_M"), (q4_0, "Q4_0")):
        again = tmp_path / f"again-{type}.gguf"
        plan, _ = export(GgufWeights(Source("first", first)), again, type)
        assert plan.warnings == ()
        assert again.read_bytes() == first.read_bytes()


def test_a_bf16_gguf_file_quantizes_as_the_model_does(books_7m: Path, tmp_path: Path) -> None:
    _, half_way = export(opened(books_7m), tmp_path / "bf16.gguf", "BF16")
    export(half_way, tmp_path / "two-steps.gguf", "Q5_0")
    export(opened(books_7m), tmp_path / "one-step.gguf", "Q5_0")
    one, two = (tmp_path / f"{name}.gguf" for name in ("one-step", "two-steps"))
    assert one.read_bytes() == two.read_bytes()


def test_rows_that_fit_no_block_are_named_in_the_plan(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    source = opened(tiny_checkpoint("llama", hidden_size=96, head_dim=24, intermediate_size=172))
    plan, back = export(source, tmp_path / "model.gguf", "Q4_K_M")
    by_name = {tensor.info.name: tensor for tensor in plan.fallbacks}
    down, up = by_name["blk.0.ffn_down.weight"], by_name["blk.0.ffn_up.weight"]
    assert down.info.type.name == "F16"
    assert up.info.type.name == "Q5_0"
    assert up.reason == "rows of 96 are not whole blocks of 256 for Q4_K"
    assert any("rows of 172" in warning for warning in plan.warnings)
    assert back.describe("model.layers.0.mlp.down_proj.weight").kind == "float16"
    assert back.describe("model.layers.0.mlp.up_proj").kind == "Q5_0"


def test_a_sliding_window_is_said_to_be_lost(tiny_checkpoint: TinyCheckpoint) -> None:
    plan = plan_export(opened(tiny_checkpoint("mistral", sliding_window=64)), "F16")
    assert any("sliding window (64 here)" in warning for warning in plan.warnings)


def test_overrides_reach_the_plan(books_7m: Path) -> None:
    plan = plan_export(
        opened(books_7m), "Q4_K_M", overrides=MixOverrides(embedding="Q8_0", pure=True)
    )
    assert plan.counts() == {"Q4_K": 56, "F32": 17, "Q8_0": 1}


@pytest.fixture
def editable(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> Path:
    folder = tmp_path / "edited"
    shutil.copytree(tiny_checkpoint("llama", dtype="bfloat16"), folder)
    return folder


def edit(folder: Path, name: str, value: torch.Tensor | None) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(name, None)
    if value is not None:
        tensors[name] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("type", ["Q4_K_M", "Q8_0", "IQ4_NL", "BF16"])
def test_values_that_are_not_finite_leave_no_file(
    value: float, type: str, editable: Path, tmp_path: Path
) -> None:
    weight = torch.zeros(256, 512, dtype=torch.bfloat16)
    weight[3, 5] = value
    edit(editable, "model.layers.1.mlp.down_proj.weight", weight)
    plan = plan_export(opened(editable), type)
    with pytest.raises(QtoolError, match=r"blk\.1\.ffn_down\.weight has NaN"):
        write_gguf(plan, tmp_path / "model.gguf")
    assert not list(tmp_path.glob("*.gguf*"))
    assert not list(tmp_path.glob(".*"))


def test_values_too_large_for_half_precision_are_refused(editable: Path, tmp_path: Path) -> None:
    edit(editable, "lm_head.weight", torch.full((4096, 256), 1e5, dtype=torch.bfloat16))
    with pytest.raises(QtoolError, match="too large for F16") as caught:
        write_gguf(plan_export(opened(editable), "F16"), tmp_path / "model.gguf")
    assert "BF16" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model.norm.weight", None, r"no tensor model\.norm\.weight"),
        ("model.norm.weight", torch.zeros(3), r"model\.norm\.weight has shape \[3\]"),
        ("model.layers.0.gate.weight", torch.zeros(3), r"model\.layers\.0\.gate\.weight"),
    ],
)
def test_a_model_that_is_not_what_its_config_says_is_refused(
    name: str, value: torch.Tensor | None, message: str, editable: Path
) -> None:
    edit(editable, name, value)
    with pytest.raises((FormatError, UnsupportedModel), match=message):
        plan_export(opened(editable), "F16")


def test_types_that_cannot_be_written_are_refused_with_those_that_can(books_7m: Path) -> None:
    for type in ("IQ2_XXS", "NVFP4", "nonsense"):
        with pytest.raises(UnknownName) as caught:
            plan_export(opened(books_7m), type)
        assert "Q4_K_M" in str(caught.value.hint)
    assert plan_export(opened(books_7m), "q4_k").file_type == "Q4_K_M"
    with pytest.raises(QtoolError, match="importance matrix"):
        plan_export(opened(books_7m), "Q2_K_S")


def test_an_existing_file_is_kept_unless_forced(books_7m: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.gguf"
    out.write_text("mine")
    plan = plan_export(opened(books_7m), "Q8_0")
    with pytest.raises(OutputExists):
        write_gguf(plan, out)
    assert out.read_text() == "mine"
    write_gguf(plan, out, force=True)
    assert out.stat().st_size == plan.nbytes


def test_progress_counts_every_byte_of_data(books_7m: Path, tmp_path: Path) -> None:
    plan = plan_export(opened(books_7m), "Q4_0")
    sizes: list[int] = []
    write_gguf(plan, tmp_path / "model.gguf", progress=sizes.append)
    assert sum(sizes) == sum(tensor.info.nbytes for tensor in plan.tensors)


@pytest.mark.parametrize(
    ("weights", "label"),
    [(7_343_360, "7.3M"), (494_032_768, "494M"), (1_235_814_400, "1.2B"), (260_032, "260K")],
)
def test_sizes_are_labelled_as_in_file_names(weights: int, label: str) -> None:
    assert size_label(weights) == label


def test_an_unrecognized_tokenizer_is_refused_before_anything_is_written(
    editable: Path,
) -> None:
    path = editable / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["pre_tokenizer"] = {"type": "Whitespace"}
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(UnsupportedModel, match="none that llama"):
        plan_export(opened(editable), "Q8_0")


def test_a_tokenizer_at_which_the_library_panics_is_refused(editable: Path) -> None:
    """A panic of Rust is no Exception of Python's."""
    path = editable / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["continuing_subword_prefix"] = "longer than any token"
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(FormatError, match=r"tokenizer\.json cannot be loaded"):
        plan_export(opened(editable), "Q8_0")


def test_stories_goes_through_with_its_sentencepiece_tokenizer(
    stories: Path, tmp_path: Path
) -> None:
    source = opened(stories)
    _, back = export(source, tmp_path / "model.gguf", "F32")
    assert_same_values(source, back)
    weight = back.weight("model.layers.0.mlp.down_proj")
    assert isinstance(weight, DenseWeight)
