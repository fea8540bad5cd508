"""`qtool convert` between checkpoints: what is carried over, what is named, what is refused."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtool.artifact import Manifest, verify_checksums
from qtool.cli import main
from qtool.convert.formats import FORMATS, WeightReader, open_weights
from qtool.convert.plan import plan_conversion
from qtool.convert.run import convert_model, write_checkpoint
from qtool.errors import QtoolError, UnknownName, UsageError, VerificationFailed
from qtool.json_files import read_json
from qtool.scheme import QuantScheme
from qtool.source import Source, resolve
from qtool.weights import DenseWeight, QuantizedWeight

PackedCheckpoint = Callable[..., Path]
WritePacked = Callable[..., Path]


def opened(folder: Path) -> WeightReader:
    return open_weights(Source(str(folder), folder))


def assert_same_model(one: Path, other: Path) -> None:
    """Every weight and tensor equal as float32, whatever the packing."""
    first, second = opened(one), opened(other)
    assert sorted(first.modules()) == sorted(second.modules())
    assert sorted(first.tensor_names()) == sorted(second.tensor_names())
    for module in first.modules():
        weight = second.weight(module)
        assert isinstance(weight, QuantizedWeight)
        assert torch.equal(first.weight(module).dequantize(), weight.dequantize()), module
    for name in first.tensor_names():
        assert torch.equal(first.tensor(name), second.tensor(name)), name


@pytest.mark.parametrize(("source", "target"), list(itertools.permutations(FORMATS, 2)))
def test_symmetric_int4_is_the_same_model_in_every_format(
    source: str, target: str, packed_checkpoint: PackedCheckpoint, tmp_path: Path
) -> None:
    folder = packed_checkpoint(source, "int4-g64-sym", "qwen2")
    out = convert_model(str(folder), to=target, out=tmp_path / "out")
    assert opened(out).format == target
    assert_same_model(folder, out)
    manifest = verify_checksums(out)
    assert (manifest.format, manifest.source) == (target, str(folder))
    assert "tokenizer.json" in manifest.files


def test_weights_are_as_readable_as_the_files_beside_them(
    packed_checkpoint: PackedCheckpoint, tmp_path: Path
) -> None:
    folder = packed_checkpoint("compressed-tensors", "int4-g64-sym")
    out = convert_model(str(folder), to="marlin", out=tmp_path / "out")
    modes = {file.name: file.stat().st_mode for file in out.iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]


def test_int8_rows_go_to_marlin_and_gptq_and_back(
    packed_checkpoint: PackedCheckpoint, tmp_path: Path
) -> None:
    folder = packed_checkpoint("compressed-tensors", "int8-row-sym")
    marlin = convert_model(str(folder), to="marlin", out=tmp_path / "marlin")
    gptq = convert_model(str(marlin), to="gptq", out=tmp_path / "gptq")
    back = convert_model(str(gptq), to="compressed-tensors", out=tmp_path / "back")
    assert_same_model(folder, back)
    entry = read_json(gptq / "config.json")["quantization_config"]
    assert entry["group_size"] == -1
    assert read_json(gptq / "quantize_config.json") == entry


def test_asymmetric_int4_moves_between_the_formats_that_hold_it(
    packed_checkpoint: PackedCheckpoint, tmp_path: Path
) -> None:
    folder = packed_checkpoint("awq", "int4-g32-asym")
    marlin = convert_model(str(folder), to="marlin", out=tmp_path / "marlin")
    packed = convert_model(str(marlin), to="compressed-tensors", out=tmp_path / "ct")
    assert_same_model(folder, packed)
    with pytest.raises(QtoolError, match="zero points less one"):
        convert_model(str(folder), to="gptq", out=tmp_path / "gptq")


def test_dequantizing_writes_a_plain_checkpoint_of_the_type_asked_for(
    packed_checkpoint: PackedCheckpoint, tmp_path: Path
) -> None:
    folder = packed_checkpoint("awq", "int4-g64-sym", tie_word_embeddings=True)
    out = convert_model(str(folder), to="hf", type="f32", out=tmp_path / "dense")
    config = read_json(out / "config.json")
    assert config["dtype"] == "float32"
    assert "quantization_config" not in config
    before, after = opened(folder), opened(out)
    assert after.modules() == []
    for module in before.modules():
        weight = after.weight(module)
        assert isinstance(weight, DenseWeight)
        assert torch.equal(weight.values, before.weight(module).dequantize())
    assert {after.describe(name).kind for name in after.tensor_names()} == {"float32"}

    from transformers import AutoModelForCausalLM

    _, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_a_plain_checkpoint_can_be_cast(books_7m: Path, tmp_path: Path) -> None:
    out = convert_model(str(books_7m), to="hf", type="fp16", out=tmp_path / "half")
    name = "model.layers.3.mlp.up_proj.weight"
    assert torch.equal(opened(out).tensor(name), opened(books_7m).tensor(name).half())


def odd_shapes(module: str) -> QuantScheme | None:
    return QuantScheme(4, 64) if ".layers." in module else None


def test_a_linear_that_marlin_has_no_tiles_for_stays_dense_and_is_named(
    tiny_checkpoint: Callable[..., Path],
    write_packed: WritePacked,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = tiny_checkpoint("llama", dtype="bfloat16", intermediate_size=320)
    folder = write_packed(source, tmp_path / "int4", "compressed-tensors", odd_shapes)
    out = tmp_path / "marlin"
    main(["convert", str(folder), "--to", "marlin", "--out", str(out)])
    captured = capsys.readouterr()
    down = [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    assert "inputs a multiple of 128" in captured.err
    assert all(name in captured.err and name in captured.out for name in down)
    reader, before = opened(out), opened(folder)
    assert not set(down) & set(reader.modules())
    for name in down:
        dense = before.weight(name).dequantize(torch.bfloat16)
        assert torch.equal(reader.tensor(f"{name}.weight"), dense)
    assert set(Manifest.load(out).unquantized) == set(down)


def test_linears_left_dense_are_told_to_the_loaders_of_each_format(
    tiny_checkpoint: Callable[..., Path], write_packed: WritePacked, tmp_path: Path
) -> None:
    def without_down(module: str) -> QuantScheme | None:
        return None if module.endswith("down_proj") else odd_shapes(module)

    source = tiny_checkpoint("llama", dtype="bfloat16")
    folder = write_packed(source, tmp_path / "int4", "compressed-tensors", without_down)
    down = {f"model.layers.{i}.mlp.down_proj" for i in range(2)}
    entries = {}
    for target in ("gptq", "awq", "compressed-tensors"):
        out = convert_model(str(folder), to=target, out=tmp_path / target)
        entries[target] = read_json(out / "config.json")["quantization_config"]
        assert_same_model(folder, out)
    in_blocks = entries["gptq"]["modules_in_block_to_quantize"][0]
    assert "mlp.up_proj" in in_blocks
    assert "mlp.down_proj" not in in_blocks
    assert set(entries["awq"]["modules_to_not_convert"]) == down | {"lm_head"}
    assert set(entries["compressed-tensors"]["ignore"]) == down | {"lm_head"}


def test_layers_of_two_schemes_do_not_fit_a_format_of_one(
    tiny_checkpoint: Callable[..., Path], write_packed: WritePacked, tmp_path: Path
) -> None:
    def two(module: str) -> QuantScheme | None:
        return QuantScheme(4, 32) if module.endswith("up_proj") else odd_shapes(module)

    source = tiny_checkpoint("llama", dtype="bfloat16")
    folder = write_packed(source, tmp_path / "int4", "compressed-tensors", two)
    with pytest.raises(UsageError, match=r"gptq files hold one scheme.*int4-g64-sym.*int4-g32-sym"):
        convert_model(str(folder), to="gptq", out=tmp_path / "gptq")
    assert not (tmp_path / "gptq").exists()
    assert_same_model(folder, convert_model(str(folder), to="marlin", out=tmp_path / "marlin"))


def test_a_packed_head_stays_dense_where_loaders_lose_it(
    tiny_checkpoint: Callable[..., Path], write_packed: WritePacked, tmp_path: Path
) -> None:
    source = tiny_checkpoint("llama", dtype="bfloat16")
    folder = write_packed(
        source, tmp_path / "int4", "compressed-tensors", lambda module: QuantScheme(4, 64)
    )
    assert "lm_head" in opened(folder).modules()
    gptq = opened(convert_model(str(folder), to="gptq", out=tmp_path / "gptq"))
    assert gptq.describe("lm_head.weight").kind == "bfloat16"
    marlin = opened(convert_model(str(folder), to="marlin", out=tmp_path / "marlin"))
    assert marlin.describe("lm_head").kind == "int4-g64-sym"


def test_act_order_layers_become_dense_with_the_reason(
    packed_checkpoint: PackedCheckpoint, tmp_path: Path
) -> None:
    folder = tmp_path / "act-order"
    convert_model(str(packed_checkpoint("gptq", "int4-g64-sym")), to="gptq", out=folder)
    tensors = load_file(folder / "model.safetensors")
    module = "model.layers.0.mlp.up_proj"
    tensors[f"{module}.g_idx"] = tensors[f"{module}.g_idx"].flip(0).contiguous()
    save_file(tensors, folder / "model.safetensors")
    reader = opened(folder)
    plan = plan_conversion(reader, target="compressed-tensors", type=None)
    assert plan.left_dense == {
        module: "its groups are out of order (act-order), and compressed-tensors groups neighbours"
    }
    outcome = write_checkpoint(reader, plan, tmp_path / "out")
    assert outcome.exact_layers == 13


def test_scales_that_bfloat16_rounds_are_counted_and_measured(
    packed_checkpoint: PackedCheckpoint, tmp_path: Path
) -> None:
    folder = tmp_path / "fp16-scales"
    convert_model(str(packed_checkpoint("gptq", "int4-g64-sym")), to="gptq", out=folder)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.scales"
    tensors[name] = (tensors[name].float() * (1 + 2**-9)).half()
    save_file(tensors, folder / "model.safetensors")
    reader = opened(folder)
    plan = plan_conversion(reader, target="compressed-tensors", type=None)
    outcome = write_checkpoint(reader, plan, tmp_path / "out")
    assert (outcome.exact_layers, outcome.rounded_layers) == (13, 1)
    assert 0 < outcome.max_scale_error <= 2**-8
    assert "scales of 1 layers rounded" in Manifest.load(tmp_path / "out").warnings[0]


def test_scales_lost_in_fp16_fail_the_check_and_nothing_is_left(
    packed_checkpoint: PackedCheckpoint, tmp_path: Path
) -> None:
    folder = tmp_path / "tiny-scales"
    convert_model(
        str(packed_checkpoint("compressed-tensors", "int4-g64-sym")),
        to="compressed-tensors",
        out=folder,
    )
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight_scale"] *= 2.0**-40
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(VerificationFailed, match=r"layers\.1\.mlp\.up_proj: a scale changes by"):
        convert_model(str(folder), to="awq", out=tmp_path / "awq")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny-scales"]


def test_values_that_are_not_finite_are_refused_by_name(
    packed_checkpoint: PackedCheckpoint, tmp_path: Path
) -> None:
    folder = tmp_path / "broken"
    convert_model(
        str(packed_checkpoint("compressed-tensors", "int4-g64-sym")),
        to="compressed-tensors",
        out=folder,
    )
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(QtoolError, match=r"model\.norm\.weight would be written with NaN"):
        convert_model(str(folder), to="marlin", out=tmp_path / "marlin")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken"]


def test_a_stored_head_that_is_tied_is_not_written(
    packed_checkpoint: PackedCheckpoint, tmp_path: Path
) -> None:
    folder = tmp_path / "tied"
    plain = packed_checkpoint("gptq", "int4-g64-sym", tie_word_embeddings=True)
    convert_model(str(plain), to="gptq", out=folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    out = convert_model(str(folder), to="compressed-tensors", out=tmp_path / "out")
    assert not opened(out).has("lm_head.weight")
    assert read_json(out / "config.json")["quantization_config"]["ignore"] == ["lm_head"]


def test_a_manifest_keeps_what_the_source_says_of_itself(
    packed_checkpoint: PackedCheckpoint, tmp_path: Path
) -> None:
    first = tmp_path / "first"
    convert_model(str(packed_checkpoint("awq", "int4-g64-sym")), to="compressed-tensors", out=first)
    manifest = read_json(first / "qtool.json")
    manifest["recipe"] = {"name": "int4"}
    manifest["unquantized"] = {"lm_head": "kept by the recipe"}
    (first / "qtool.json").write_text(json.dumps(manifest))
    second = convert_model(str(first), to="marlin", out=tmp_path / "second")
    kept = Manifest.load(second)
    assert kept.recipe == {"name": "int4"}
    assert kept.unquantized == {"lm_head": "kept by the recipe"}


def main_fails(arguments: list[str], code: int) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == code


def test_the_command_prints_a_plan_and_closing_lines(
    packed_checkpoint: PackedCheckpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = packed_checkpoint("compressed-tensors", "int4-g64-sym")
    monkeypatch.chdir(tmp_path)
    main(["convert", str(folder), "--to", "gptq"])
    captured = capsys.readouterr()
    assert "codes kept" in captured.err
    assert f"{folder.name}-gptq: " in captured.out
    assert "14 layers hold the source's weights bit for bit" in captured.out
    assert (tmp_path / f"{folder.name}-gptq" / "qtool.json").is_file()

    main_fails(["convert", str(folder), "--to", "gptq"], 2)
    assert "already exists" in capsys.readouterr().err
    main(["convert", str(folder), "--to", "gptq", "--force", "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["exact_layers"] == facts["tensors"]["repack"] == 14


def test_a_dry_run_writes_nothing(
    packed_checkpoint: PackedCheckpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = packed_checkpoint("compressed-tensors", "int4-g64-sym")
    monkeypatch.chdir(tmp_path)
    main(["convert", str(folder), "--to", "marlin", "--dry-run", "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["tensors"] == {"repack": 14, "copy": 7}
    plan = {row["name"]: row for row in facts["tensor_plan"]}
    assert len(plan) == 21
    up = plan["model.layers.1.mlp.up_proj"]
    assert (up["has"], up["type"], up["why"]) == ("int4-g64-sym", "int4-g64-sym", "codes kept")
    assert plan["model.norm.weight"]["how"] == "copy"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--to", "gptqq"], 2, "did you mean gptq?"),
        (["--to", "marlin"], 1, "qtool quantize builtin:books-7m --recipe int4"),
        (["--to", "awq", "--type", "Q4_0"], 2, "--type Q4_0 does not go with --to awq"),
        (["--to", "hf", "--type", "fp61"], 2, "unknown type for --to hf 'fp61'"),
        ([], 2, "needs --to FORMAT"),
    ],
)
def test_wrong_requests_are_answered_with_a_next_step(
    arguments: list[str],
    code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    main_fails(["convert", "builtin:books-7m", *arguments], code)
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_source_is_never_replaced_by_its_conversion(
    packed_checkpoint: PackedCheckpoint,
) -> None:
    folder = packed_checkpoint("gptq", "int4-g64-sym")
    with pytest.raises(UsageError, match="is the source itself"):
        convert_model(str(folder), to="awq", out=folder, force=True)
    with pytest.raises(UnknownName, match="conversion target"):
        convert_model(str(folder), to="onnx")


def act_order_model(folder: Path, out: Path) -> Path:
    convert_model(str(folder), to="gptq", out=out)
    tensors = load_file(out / "model.safetensors")
    for name in [name for name in tensors if name.endswith(".g_idx")]:
        tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, out / "model.safetensors")
    return out


def test_act_order_is_refused_with_the_reason_and_rounded_again_when_asked(
    packed_checkpoint: PackedCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = packed_checkpoint("gptq", "int4-g64-sym", num_hidden_layers=1, intermediate_size=256)
    folder = act_order_model(source, tmp_path / "act-order")
    arguments = ["convert", str(folder), "--to", "marlin", "--out", str(tmp_path / "marlin")]
    main_fails(arguments, 1)
    said = capsys.readouterr().err
    assert "out of order (act-order), and marlin groups neighbours" in said
    assert "add --requantize" in said

    main([*arguments, "--requantize", "--json"])
    captured = capsys.readouterr()
    warning = "7 linears are quantized already (int4-g64-sym act-order) and are rounded a second"
    assert f"warning: {warning}" in captured.err
    facts = json.loads(captured.out)
    assert (facts["again_layers"], facts["exact_layers"]) == (7, 0)
    assert 0.01 < facts["max_again_error"] < 0.15
    before, after = opened(folder), opened(tmp_path / "marlin")
    for module in before.modules():
        assert after.describe(module).kind == "int4-g128-sym"
        meant, found = before.weight(module).dequantize(), after.weight(module).dequantize()
        assert float((found - meant).norm() / meant.norm()) <= facts["max_again_error"] + 1e-6
    assert any(warning in text for text in Manifest.load(tmp_path / "marlin").warnings)


def test_what_fits_keeps_its_codes_when_the_rest_is_rounded_again(
    tiny_checkpoint: Callable[..., Path], write_packed: WritePacked, tmp_path: Path
) -> None:
    def mixed(module: str) -> QuantScheme | None:
        if "self_attn" in module:
            return QuantScheme(8, 64, symmetric=False)
        return odd_shapes(module)

    source = tiny_checkpoint("llama", dtype="bfloat16", num_hidden_layers=1, intermediate_size=256)
    folder = write_packed(source, tmp_path / "mixed", "compressed-tensors", mixed)
    reader = opened(folder)
    plan = plan_conversion(reader, target="gptq", type=None, requantize=True)
    actions = {step.name.split(".")[-1]: (step.action, step.writes) for step in plan.steps}
    assert actions["up_proj"] == ("repack", "int4-g64-sym")
    assert actions["q_proj"] == ("requantize", "int4-g64-sym")  # gptq files hold one scheme
    plan = plan_conversion(reader, target="marlin", type=None, requantize=True)
    actions = {step.name.split(".")[-1]: (step.action, step.writes) for step in plan.steps}
    assert actions["up_proj"] == ("repack", "int4-g64-sym")
    assert actions["q_proj"] == ("requantize", "int8-g128-sym")
    with pytest.raises(UsageError, match="does not go with --to hf"):
        plan_conversion(reader, target="hf", type=None, requantize=True)


def test_codes_that_a_format_has_no_width_for_take_the_next_wider_one(
    tiny_checkpoint: Callable[..., Path], write_packed: WritePacked, tmp_path: Path
) -> None:
    def mixed(module: str) -> QuantScheme | None:
        bits = 6 if "self_attn" in module else 3
        return QuantScheme(bits, 64) if ".layers." in module else None

    source = tiny_checkpoint("llama", dtype="bfloat16", num_hidden_layers=1, intermediate_size=256)
    folder = write_packed(source, tmp_path / "mixed", "compressed-tensors", mixed)
    before = opened(folder)
    kinds = {"gptq": {"int8-g64-sym"}, "marlin": {"int4-g64-sym", "int8-g64-sym"}}
    for target, expected in kinds.items():
        after = opened(convert_model(str(folder), to=target, out=tmp_path / target))
        assert {after.describe(module).kind for module in after.modules()} == expected
        for module in before.modules():
            meant = before.weight(module).dequantize()
            assert torch.equal(after.weight(module).dequantize(), meant)
    gguf = open_weights(
        resolve(str(convert_model(str(folder), to="gguf", out=tmp_path / "m.gguf")))
    )
    for module in before.modules():
        assert gguf.describe(module).kind == ("Q8_0" if "self_attn" in module else "Q4_0")
        assert torch.equal(gguf.weight(module).dequantize(), before.weight(module).dequantize())
