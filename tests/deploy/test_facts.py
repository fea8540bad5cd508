"""What is known of a model before a weight is read, and names and sizes on the command line."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from qtool.errors import QtoolError, UsageError
from qtool.runtime.deploy.deployment import (
    GIB,
    PROCESS_BYTES,
    check_name,
    default_name,
    meaning,
    needed_memory,
    parse_memory,
)
from qtool.runtime.deploy.facts import look_at, parts_of
from qtool.runtime.deploy.sizes import group_size

MODEL = "builtin:books-7m"


def test_a_folder_tells_sizes_and_format(folder_of: Callable[..., Path]) -> None:
    weights = {"num_bits": 4, "group_size": 64}
    groups = {"group_0": {"weights": weights}, "group_1": {"weights": {"group_size": 128}}}
    quantization = {"quant_method": "compressed-tensors", "config_groups": groups}
    folder = folder_of(quantization=quantization, num_experts=8)
    (folder / "model.safetensors").write_bytes(b"x" * 1000)
    facts = look_at(str(folder))
    assert (facts.kind, facts.quant_method, facts.weight_bytes) == (
        "folder",
        "compressed-tensors",
        1000,
    )
    assert facts.size("num_attention_heads") == 6
    assert facts.has_experts
    assert group_size(facts) == 128  # what both divide into


def test_a_multimodal_config_is_read_for_its_text(folder_of: Callable[..., Path]) -> None:
    facts = look_at(str(folder_of(text_config={"num_attention_heads": 12})))
    assert facts.size("num_attention_heads") == 12


def test_memory_is_process_weights_and_cache() -> None:
    facts = look_at(MODEL)
    assert facts.weight_bytes is not None
    weights = int(1.1 * facts.weight_bytes)
    # A quarter of 14.7 MB is less than the least cache.
    assert needed_memory(facts, meaning(MODEL, {})) == PROCESS_BYTES + weights + GIB
    asked = meaning(MODEL, {"kv_cache_memory_bytes": 3 * GIB})
    assert needed_memory(facts, asked) == PROCESS_BYTES + weights + 3 * GIB


def test_a_model_of_the_hub_that_cannot_be_reached_needs_its_size(
    refusal: Callable[[str], QtoolError],
    deploy: Callable[[str], str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    error = refusal("--to k8s some/model --dry-run")
    assert "--memory" in (error.hint or "")
    documents = deploy("--to k8s some/model --memory 24Gi --dry-run")
    assert "24Gi" in documents


@pytest.mark.parametrize(
    ("text", "number"),
    [("24G", 24 * 10**9), ("24Gi", 24 * GIB), ("1.5g", 1_500_000_000), ("512MiB", 2**29), ("7", 7)],
)
def test_sizes_are_read_as_kubernetes_writes_them(text: str, number: int) -> None:
    assert parse_memory(text) == number


@pytest.mark.parametrize("text", ["", "G", "12X", "-1G", "1 G", "3i"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_memory(text)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("Qwen/Qwen3-0.6B", "qwen3-0-6b"),
        ("./my_model/", "my-model"),
        (MODEL, "books-7m"),
        ("/x/Model.Q4_K_M.gguf", "model-q4-k-m"),
        ("/x/___", "model"),
        ("a/" + "x" * 90, "x" * 40),
    ],
)
def test_names_are_dns_labels(model: str, name: str) -> None:
    assert default_name(model) == name
    check_name(name)


@pytest.mark.parametrize("name", ["", "-a", "a-", "A", "a.b", "a" * 41])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(UsageError):
        check_name(name)


def test_a_model_in_several_files_is_counted_and_mounted_whole(
    tmp_path: Path, written: Callable[[str, Path], dict[str, str]]
) -> None:
    folder = tmp_path / "split"
    folder.mkdir()
    command = [sys.executable, "-m", "qtool", "convert", MODEL, "--to", "gguf", "--type", "Q8_0"]
    split = ["--split-max-size", "2M", "--out", str(folder / "m.gguf")]
    subprocess.run([*command, *split], check=True, capture_output=True)
    parts = sorted(folder.glob("*.gguf"))
    assert len(parts) > 1
    assert parts_of(parts[0]) == parts
    assert look_at(str(parts[0])).weight_bytes == sum(part.stat().st_size for part in parts)

    text = written(f"--to compose {parts[0]}", tmp_path / "out")["compose.yaml"]
    server = yaml.safe_load(text)["services"]["qtool"]
    (mount,) = (volume for volume in server["volumes"] if isinstance(volume, dict))
    assert mount["source"] == str(folder)
    assert server["command"][1] == f"{mount['target']}/{parts[0].name}"


def test_a_name_of_this_machine_is_not_for_others(
    refusal: Callable[[str], QtoolError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    modelfile = tmp_path / "Modelfile"
    modelfile.write_text(f"FROM {MODEL}\nSYSTEM You are a sea captain.\n")
    command = [sys.executable, "-m", "qtool", "create", "captain", "-f", str(modelfile)]
    subprocess.run(command, check=True, capture_output=True)
    error = refusal("--to compose captain --dry-run")
    assert "captain" in error.message
    assert MODEL in (error.hint or "")
