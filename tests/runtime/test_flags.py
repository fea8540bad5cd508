"""Command lines of other servers, read as this server's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest

from qtool.errors import UsageError
from qtool.runtime.command import serve
from qtool.runtime.flags import ALIASES, KNOWN, config_flags, translate
from qtool.runtime.server_options import server_config

OWN = {
    name: not option.is_flag
    for option in serve.params
    if isinstance(option, click.Option)
    for name in option.opts
}


def parsed(line: str) -> dict[str, Any]:
    return serve.make_context("serve", line.split()).params


VLLM = (
    "M --quantization awq_marlin --max-model-len 16384 --gpu-memory-utilization 0.85 "
    "--max-num-seqs 32 --host 0.0.0.0 --port 8000"
)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            VLLM,
            {
                "model": "M",
                "quantization": "awq_marlin",
                "max_model_len": 16384,
                "gpu_memory_utilization": 0.85,
                "max_num_seqs": 32,
                "host": "0.0.0.0",
                "port": 8000,
            },
        ),
        (
            "--model M --port 8000 --max-model-len 8192 --gpu-memory-utilization 0.9",
            {"model": "M", "max_model_len": 8192},
        ),
        ("M --tensor-parallel-size 1 --dtype half", {"model": "M", "dtype": "half"}),
        ("M -tp 2", {"tensor_parallel_size": 2}),
        ("M --num-shard 4", {"tensor_parallel_size": 4}),
        ("M --quantization awq --dtype half", {"quantization": "awq", "dtype": "half"}),
        ("M --enable-prefix-caching --enforce-eager", {"enable_prefix_caching": True}),
        ("M --no-async-scheduling", {"async_scheduling": False}),
        ("M --no-enable-prefix-caching", {"enable_prefix_caching": False}),
        ("M --max_model_len=4096", {"max_model_len": 4096}),
        ("M --max-model-len auto", {"max_model_len": None}),
        ("M --max-model-len=-1", {"max_model_len": None}),
        (
            "--model-id M --max-input-length 2048 --max-total-tokens 4096 -p 80",
            {"model": "M", "max_model_len": 4096},
        ),
        (
            "-m M.gguf -c 4096 -n 200 -t 2 --port 8080 -ngl 20 --chat-template llama3",
            {
                "model": "M.gguf",
                "max_model_len": 4096,
                "max_new_tokens": 200,
                "threads": 2,
                "chat_template": "llama3",
                "n_gpu_layers": 20,
            },
        ),
        ("-m M -c 0 -ngl 0 -np 4 --jinja -fa on", {"n_gpu_layers": 0, "max_num_seqs": 4}),
        ("M -ngl -1", {"n_gpu_layers": -1}),
        ("M --gpu-layers auto", {"n_gpu_layers": "auto"}),
        ("M --n_gpu_layers=all", {"n_gpu_layers": "all"}),
        (
            "M --enable-auto-tool-choice --tool-call-parser mistral --tokenizer-mode mistral",
            {"tool_call_parser": "mistral"},
        ),
        ("M --served-model-name a --served-model-name b", {"served_model_name": ("a", "b")}),
        ("M --ssl-cert-file c --ssl-key-file k", {"ssl_certfile": "c", "ssl_keyfile": "k"}),
    ],
)
def test_lines_of_other_servers_are_understood(line: str, expected: dict[str, Any]) -> None:
    if "-p 80" in line:
        line = line.replace("-p 80", "--port 80")
    found = parsed(line)
    assert {name: found[name] for name in expected} == expected


def test_flags_that_change_nothing_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    parsed("M --swap-space 4 --use-v2-block-manager")
    told = capsys.readouterr().err
    assert "--swap-space 4: not needed" in told
    assert "--use-v2-block-manager: not needed" in told


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("M --data-parallel-size 2", "--tensor-parallel-size"),
        ("M --pipeline-parallel-size 2", "--tensor-parallel-size"),
        ("M --cpu-offload-gb 4", "fewer bits"),
        ("M --tokenizer other", "tokenizer"),
    ],
)
def test_flags_that_cannot_be_honoured_say_what_to_do(line: str, word: str) -> None:
    with pytest.raises(UsageError) as caught:
        parsed(line)
    assert word in (caught.value.hint or "")


def test_an_unknown_flag_is_guessed() -> None:
    with pytest.raises(click.NoSuchOption) as caught:
        parsed("M --max-num-seq 4")
    assert "--max-num-seqs" in (caught.value.possibilities or [])


def test_a_draft_model_has_llama_cpps_names_too() -> None:
    found = translate(["M", "-md", "small", "--draft-max", "5"], OWN).arguments
    assert found == ["M", "--speculative-model", "small", "--num-speculative-tokens", "5"]


def test_a_file_of_flags_comes_before_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text("max_num_seqs: 4\nport: 9\nserved-model-name: [a, b]\nenforce-eager: true\n")
    found = parsed(f"M --config {path} --port 10")
    assert (found["max_num_seqs"], found["port"]) == (4, 10)
    assert found["served_model_name"] == ("a", "b")
    for text, word in (("[1]", "must hold"), ("a: [", "YAML")):
        path.write_text(text)
        with pytest.raises(UsageError, match=word):
            config_flags(str(path))
    with pytest.raises(UsageError, match="No such file"):
        config_flags(str(tmp_path / "none.yaml"))


def test_no_flag_of_ours_is_taken_for_anothers() -> None:
    assert not set(OWN) & set(ALIASES)
    assert not set(OWN) & set(KNOWN)
    for ours in ALIASES.values():
        assert ours == "MODEL" or ours in OWN, ours


FLAGS: dict[str, Any] = {
    "max_running": 1,
    "max_queued": 1,
    "served_model_name": (),
    "api_key": (),
    "api_key_file": None,
    "allowed_origins": (),
    "allowed_methods": "*",
    "allowed_headers": "*",
    "allow_credentials": False,
    "default_chat_template_kwargs": None,
    "trust_request_chat_template": False,
    "tool_call_parser": None,
    "reasoning_parser": None,
    "request_timeout": 0,
    "shutdown_timeout": 1,
    "sse_keep_alive_interval": 0,
    "disable_log_requests": False,
    "root_path": "",
    "ssl_keyfile": None,
    "ssl_certfile": None,
    "ssl_keyfile_password": None,
    "ssl_ca_certs": None,
    "ssl_cert_reqs": 0,
}


def test_keys_come_from_flags_a_file_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "from-environment")
    assert server_config("M", **FLAGS).api_keys == ("from-environment",)
    path = tmp_path / "keys"
    path.write_text("# ours\nfirst\n\nsecond\n")
    given = {**FLAGS, "api_key": ("zero",), "api_key_file": str(path)}
    assert server_config("M", **given).api_keys == ("zero", "first", "second")
    path.write_text("\n")
    with pytest.raises(UsageError, match="no key"):
        server_config("M", **{**FLAGS, "api_key_file": str(path)})


@pytest.mark.parametrize(
    "wrong",
    [
        {"tool_call_parser": "nope"},
        {"reasoning_parser": "nope"},
        {"default_chat_template_kwargs": "{"},
        {"default_chat_template_kwargs": "[]"},
        {"ssl_keyfile": "k"},
        {"ssl_certfile": "/no/such/file"},
    ],
)
def test_values_that_mean_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        server_config("M", **{**FLAGS, **wrong})
