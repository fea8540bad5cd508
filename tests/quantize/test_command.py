"""`qtool quantize` as a user types it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from qtool.artifact import Manifest
from qtool.cli import main
from qtool.quantize.summary import shortened

FEW = ["--num-samples", "4", "--sequence-length", "32"]


def run(*arguments: str) -> int:
    """The exit code."""
    try:
        main(["quantize", *arguments])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_a_run_shows_its_plan_its_blocks_and_what_was_lost(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(str(tiny_checkpoint("llama")), "--out", str(out), *FEW) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    for text in (
        "14 linears  int4-g128-sym",
        "lm_head: outside the decoder blocks",
        "4 samples of 32 tokens",
        "4 calibration samples are few",
        "model.layers.1  2/2  lost",
        "by rounding",
        "2 x down_proj",
    ):
        assert text in captured.err
    assert Manifest.load(out).recipe is not None


def test_json_on_stdout_is_the_manifest(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ("--recipe", "rtn-int8", "--out", str(out), "--json")
    assert run(str(tiny_checkpoint("llama")), *arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["out"] == str(out)
    assert result["files"] == dict(Manifest.load(out).files)
    assert {layer["scheme"] for layer in result["layers"]} == {"int8-g128-sym"}


def test_a_dry_run_shows_the_plan_and_writes_nothing(
    stories: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(str(stories), "--dry-run", "--json") == 0
    captured = capsys.readouterr()
    assert "model.layers.{0..4}.mlp.down_proj: its 172 inputs are not a multiple of" in captured.err
    plan = json.loads(captured.out)
    assert plan["quantized"]["model.layers.0.mlp.up_proj"] == "int4-g64-sym"
    assert "172 inputs" in plan["left_in_16_bit"]["model.layers.0.mlp.down_proj"]
    assert plan["output_bytes"] < plan["source_bytes"] < plan["disk_bytes_needed"] * 2
    assert not list(tmp_path.iterdir())


def test_the_plan_knows_the_size_of_what_will_be_written(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(tiny_checkpoint("llama", dtype="bfloat16"))
    arguments = (source, "--recipe", "rtn-int4", "--json")
    assert run(*arguments, "--dry-run") == 0
    planned = json.loads(capsys.readouterr().out)["output_bytes"]
    assert run(*arguments, "--out", str(tmp_path / "out")) == 0
    written = (tmp_path / "out/model.safetensors").stat().st_size
    assert written == pytest.approx(planned, rel=0.02)


def test_the_output_is_named_after_model_and_recipe(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_checkpoint("llama")
    monkeypatch.chdir(tmp_path)
    assert run(str(source), "--recipe", "rtn-int4") == 0
    assert [path.name for path in tmp_path.iterdir()] == [f"{source.name}-rtn-int4"]


def test_what_is_kept_stays_and_broken_sets_are_warned_about(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ("--recipe", "rtn-int4", "--keep", "*.0.*", "--keep", "*.v_proj", "--keep", "*.wow")
    assert run(str(tiny_checkpoint("llama")), "--out", str(out), *arguments) == 0
    text = capsys.readouterr().err
    assert "model.layers.1.self_attn.v_proj is kept but" in text
    assert "'*.wow' matches no layer" in text
    manifest = Manifest.load(out)
    assert {layer.module.split(".")[2] for layer in manifest.layers} == {"1"}
    assert len(manifest.layers) == 6
    assert manifest.unquantized["model.layers.0.mlp.up_proj"] == "kept by '*.0.*'"


@pytest.mark.parametrize(
    ("arguments", "code", "message", "hint"),
    [
        (["--recipe", "int5"], 2, "unknown recipe 'int5'", "did you mean int4?"),
        (["--recipe", "absent.yaml"], 2, "no recipe file absent.yaml", "int4"),
        (["--format", "gguf"], 2, "unknown format 'gguf'", "compressed-tensors"),
        (["--group-size", "96"], 2, "group size 96 does not divide the 256, 512 inputs", "--keep"),
        (["--group-size", "many"], 2, "--group-size 'many'", "auto"),
        (["--calibration", "absent.txt"], 2, "no calibration file absent.txt", "owner/name"),
        (["--num-samples", "0"], 2, "Invalid value for '--num-samples'", None),
        (["--num-samples", "999999"], 2, "999999 samples of 512 need 511999488", "--num-samples"),
        (["--device", "tpu"], 2, "--device 'tpu' is not a device", "auto, cpu, cuda"),
        (["--device", "cuda:99"], 2, "there is no CUDA device 99", "cpu"),
        (["--device", "cpu", "--device-map", "auto"], 2, "is one device", "one of the two"),
        (["--max-memory", "0=much"], 2, "'0=much' is not a device and a size", "0=10GiB"),
        (["--keep", "*"], 1, "nothing in", None),
        (["--recipe", "rtn-int8", "--format", "awq"], 1, "AWQ files hold 4 bits, not 8", None),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistakes_end_with_a_message_a_hint_and_nothing_written(
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
    hint: str | None,
) -> None:
    out = tmp_path / "out"
    assert run(str(tiny_checkpoint("llama")), "--out", str(out), *arguments) == code
    text = " ".join(capsys.readouterr().err.split())
    assert message in text
    assert "Traceback" not in text
    if hint is not None:
        assert f"hint: {hint}" in text or hint in text.split("hint:")[1]
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_model_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert run(str(tmp_path / "empty")) == 2
    assert "has no config.json" in capsys.readouterr().err


def test_names_that_differ_in_numbers_are_written_once() -> None:
    names = [f"layers.{i}.up" for i in (0, 1, 2, 5)] + ["layers.3.down", "lm_head"]
    assert shortened(names) == "layers.{0..2,5}.up, layers.3.down, lm_head"
