"""`qtool convert` to GGUF and from it: codes kept where they can be, a warning where not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch

from qtool.cli import main
from qtool.convert.float4 import E2M1
from qtool.convert.formats import WeightReader, open_weights
from qtool.convert.gguf.options import GgufOptions
from qtool.convert.gguf.repack import repack
from qtool.convert.run import convert_model
from qtool.errors import OutputExists, QtoolError, UsageError
from qtool.scheme import FloatScheme
from qtool.source import resolve
from qtool.weights import CodebookWeight, QuantizedWeight

PackedCheckpoint = Callable[..., Path]
FORMAT_NAMES = ("compressed-tensors", "gptq", "awq", "marlin")


def opened(path: Path) -> WeightReader:
    return open_weights(resolve(str(path)))


@pytest.mark.parametrize("format_name", FORMAT_NAMES)
def test_symmetric_int4_becomes_q4_0_with_the_same_weights(
    format_name: str, packed_checkpoint: PackedCheckpoint, tmp_path: Path
) -> None:
    folder = packed_checkpoint(format_name, "int4-g128-sym")
    out = convert_model(str(folder), to="gguf", out=tmp_path / "model.gguf")
    before, after = opened(folder), opened(out)
    assert after.format == "gguf"
    for module in before.modules():
        assert after.describe(module).kind == "Q4_0"
        assert torch.equal(before.weight(module).dequantize(), after.weight(module).dequantize())


@pytest.mark.parametrize("target", FORMAT_NAMES)
def test_q4_0_goes_back_to_every_packed_format(
    target: str, packed_checkpoint: PackedCheckpoint, tmp_path: Path
) -> None:
    folder = packed_checkpoint("compressed-tensors", "int4-g64-sym", "llama")
    file = convert_model(str(folder), to="gguf", out=tmp_path / "model.gguf")
    back = convert_model(str(file), to=target, out=tmp_path / "back")
    before, after = opened(folder), opened(back)
    assert sorted(after.modules()) == sorted(before.modules())
    for module in before.modules():
        weight = after.weight(module)
        assert isinstance(weight, QuantizedWeight)
        assert str(weight.scheme) == "int4-g32-sym"
        assert torch.equal(before.weight(module).dequantize(), weight.dequantize())


def test_a_gguf_file_becomes_a_folder_that_transformers_loads(
    books_7m: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = convert_model(str(books_7m), to="gguf", type="BF16", out=tmp_path / "books.gguf")
    out = convert_model(str(file), to="hf", out=tmp_path / "books")
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    original = AutoModelForCausalLM.from_pretrained(books_7m)
    for name, parameter in original.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name
    text = "It was the best of times, it was the worst of times."
    ids = AutoTokenizer.from_pretrained(books_7m)(text)["input_ids"]
    assert AutoTokenizer.from_pretrained(out)(text)["input_ids"] == ids


def test_rounding_a_second_time_is_warned_of(
    packed_checkpoint: PackedCheckpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = packed_checkpoint("gptq", "int4-g64-sym")
    monkeypatch.chdir(tmp_path)
    main(["convert", str(folder), "--to", "gguf", "--type", "Q4_K_M", "--json"])
    captured = capsys.readouterr()
    assert "warning: 14 tensors are quantized already" in captured.err
    facts = json.loads(captured.out)
    assert facts["tensors"]["requantize"] == 14
    assert Path(facts["out"]).name == f"{folder.name}-Q4_K_M.gguf"
    main(["convert", str(folder), "--to", "gguf"])
    captured = capsys.readouterr()
    assert "warning" not in captured.err
    assert "14 layers hold the source's weights bit for bit" in captured.out
    assert (tmp_path / f"{folder.name}-Q4_0.gguf").is_file()


def test_k_quants_are_not_squeezed_into_integer_formats(books_7m: Path, tmp_path: Path) -> None:
    file = convert_model(str(books_7m), to="gguf", type="Q4_K_M", out=tmp_path / "books.gguf")
    with pytest.raises(QtoolError, match=r"marlin cannot hold Q\d_K without requantizing"):
        convert_model(str(file), to="marlin", out=tmp_path / "marlin")


def test_an_output_that_is_taken_or_misnamed_is_refused(books_7m: Path, tmp_path: Path) -> None:
    out = tmp_path / "books.gguf"
    convert_model(str(books_7m), to="gguf", type="F16", out=out)
    with pytest.raises(OutputExists):
        convert_model(str(books_7m), to="gguf", type="F16", out=out)
    convert_model(str(books_7m), to="gguf", type="F16", out=out, force=True)
    with pytest.raises(UsageError, match=r"does not end in \.gguf"):
        convert_model(str(books_7m), to="gguf", out=tmp_path / "books")
    with pytest.raises(UsageError, match="is the source itself"):
        convert_model(str(out), to="gguf", out=out, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["books.gguf"]


def test_awq_becomes_q4_1_and_its_change_is_measured(
    packed_checkpoint: PackedCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = packed_checkpoint("awq", "int4-g128-asym")
    out = tmp_path / "model.gguf"
    main(["convert", str(folder), "--to", "gguf", "--out", str(out), "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert (facts["type"], facts["near_layers"], facts["exact_layers"]) == ("Q4_1", 14, 0)
    assert 0 < facts["max_rms_error"] < 2.6e-4
    before, after = opened(folder), opened(out)
    for module in before.modules():
        meant, found = before.weight(module).dequantize(), after.weight(module).dequantize()
        assert float((found - meant).norm() / meant.norm()) <= facts["max_rms_error"]


def test_types_by_hand_win_over_codes_that_could_be_kept(
    packed_checkpoint: PackedCheckpoint, tmp_path: Path
) -> None:
    folder = packed_checkpoint("compressed-tensors", "int4-g128-sym")
    options = GgufOptions(tensor_types=(r"ffn_up=Q6_K",))
    out = convert_model(str(folder), to="gguf", out=tmp_path / "model.gguf", gguf=options)
    after = opened(out)
    assert after.describe("model.layers.0.mlp.up_proj").kind == "Q6_K"
    assert after.describe("model.layers.0.mlp.down_proj").kind == "Q4_0"


def test_mxfp4_keeps_its_codes(
    foreign_checkpoint: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = foreign_checkpoint("mxfp4")
    out = tmp_path / "model.gguf"
    main(["convert", str(folder), "--to", "gguf", "--out", str(out), "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert (facts["type"], facts["tensors"]["repack"]) == ("MXFP4_MOE", facts["exact_layers"])
    before, file = opened(folder), gguf.GGUFReader(out)
    stored = {tensor.name: tensor for tensor in file.tensors}
    for block in range(2):
        for theirs, ours in (("ffn_up", "mlp.up_proj"), ("attn_v", "self_attn.v_proj")):
            tensor = stored[f"blk.{block}.{theirs}.weight"]
            assert tensor.tensor_type.name == "MXFP4"
            read = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            meant = before.weight(f"model.layers.{block}.{ours}").dequantize()
            assert torch.equal(torch.from_numpy(read), meant)


def test_a_scale_that_is_no_power_of_two_is_no_mxfp4s() -> None:
    codes = torch.arange(64, dtype=torch.uint8).view(2, 32) % 16
    scheme = FloatScheme("mxfp4", (1, 32))
    table = torch.tensor([*E2M1, *(-value for value in E2M1)])
    for scales, exponents in (([2.0**-3, 1.0], [124, 127]), ([2.0**-127, 2.0**127], [0, 254])):
        weight = CodebookWeight(codes, table, torch.tensor(scales), scheme)
        assert repack(weight, "MXFP4")[:, 0].tolist() == exponents
    with pytest.raises(QtoolError, match="no power of two"):
        repack(CodebookWeight(codes, table, torch.tensor([1.0, 1.5]), scheme), "MXFP4")
