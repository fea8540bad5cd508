"""Command lines as tutorials on other programs print them, started as processes: only the program's
name, the model and the port are changed.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest

from qtool.runtime.server.process import started_server
from qtool.settings import child_environment

MODEL = "builtin:books-7m"
PATIENCE_SECONDS = 300


class Line(NamedTuple):
    """said: words in what the server prints at its start; the context that it then has."""

    line: str
    said: tuple[str, ...] = ()
    context: int = 512


SERVE = "-m qtool serve"
LINES = {
    "vllm serve": Line(
        f"{SERVE} MODEL --quantization awq_marlin --max-model-len 16384 "
        "--gpu-memory-utilization 0.85 --max-num-seqs 32 --host 0.0.0.0 --port 0",
        ("--quantization awq_marlin: the files are", "--max-model-len 16384", "512 tokens"),
    ),
    "a quantization of the table": Line(
        f"{SERVE} MODEL --quantization gptq --port 0", ("--quantization gptq: the files are",)
    ),
    "a GGUF file": Line(f"{SERVE} GGUF --port 0", ("Q4_K",)),
    "vLLM's module": Line(
        "-m qtool.runtime.server --model MODEL --port 0 --max-model-len 8192 "
        "--gpu-memory-utilization 0.9",
        ("--max-model-len 8192",),
    ),
    "vLLM's module, quantized": Line(
        "-m qtool.runtime.server --model MODEL --quantization awq --port 0",
        ("--quantization awq: the files are",),
    ),
    "vLLM with one device": Line(
        f"{SERVE} MODEL --port 0 --max-model-len 256 --gpu-memory-utilization 0.90 "
        "--tensor-parallel-size 1",
        context=256,
    ),
    "vLLM in half precision": Line(
        f"{SERVE} MODEL --quantization awq --dtype half --port 0", ("float16 on cpu",)
    ),
    "vLLM on two devices": Line(f"{SERVE} MODEL --tensor-parallel-size 2 --port 0"),
    "prefix caching": Line(f"{SERVE} MODEL --enable-prefix-caching --port 0"),
    "a draft model": Line(
        f"{SERVE} MODEL --speculative-model MODEL --num-speculative-tokens 5 --port 0"
    ),
    "a draft model, newer": Line(
        f"{SERVE} MODEL --port 0 --speculative-config "
        """'{"method": "ngram", "num_speculative_tokens": 4}'"""
    ),
    "eager": Line(f"{SERVE} MODEL --enforce-eager --port 0"),
    "llama-server": Line(f"{SERVE} -m GGUF --port 0", ("Q4_K",)),
    "llama-server with layers on a GPU": Line(
        f"{SERVE} -m GGUF -ngl 20 -c 256 -n 64 -t 2 --chat-template llama3 --port 0",
        ("--n-gpu-layers 20: there is no GPU", "given"),
        context=256,
    ),
    "Text Generation Inference": Line(
        f"{SERVE} --model-id MODEL --max-input-length 2048 --max-total-tokens 4096 --port 0",
        ("--max-input-length 2048", "512 tokens"),
    ),
}


@pytest.fixture(scope="module")
def gguf(as_gguf: Callable[[Path, str], Path], books_7m: Path) -> Path:
    return as_gguf(books_7m, "Q4_K_M")


@pytest.mark.slow
@pytest.mark.parametrize("name", LINES)
def test_a_line_of_another_server_serves(name: str, gguf: Path) -> None:
    line, said, context = LINES[name]
    command = [{"MODEL": MODEL, "GGUF": str(gguf)}.get(word, word) for word in shlex.split(line)]
    with started_server(command, start_seconds=PATIENCE_SECONDS) as server:
        (card,) = httpx.get(f"{server.url}/v1/models", timeout=PATIENCE_SECONDS).json()["data"]
        assert card["max_model_len"] == context
        body = {
            "model": card["id"],
            "messages": [{"role": "user", "content": "Hello"}],
            "max_tokens": 2,
        }
        answer = httpx.post(
            f"{server.url}/v1/chat/completions", json=body, timeout=PATIENCE_SECONDS
        )
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] in (1, 2)
        log = server.log()
    for words in said:
        assert words in " ".join(log.split()), words
    assert "Traceback" not in log


@pytest.mark.slow
def test_ollamas_commands_one_after_the_other(tmp_path: Path) -> None:
    environment = child_environment(
        PYTHONSAFEPATH="1", XDG_DATA_HOME=str(tmp_path), HF_HUB_CACHE=str(tmp_path / "none")
    )
    (tmp_path / "Modelfile").write_text(
        f'FROM {MODEL}\nSYSTEM """You are a helpful assistant."""\n'
        "PARAMETER temperature 0.3\nPARAMETER top_p 0.9\nPARAMETER num_ctx 256\n"
    )

    def qtool(line: str) -> str:
        command = [sys.executable, "-m", "qtool", *shlex.split(line)]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            cwd=tmp_path,
            env=environment,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "books-7m" in qtool(f"pull {MODEL}")
    assert "my-model" in qtool("create my-model -f Modelfile")
    assert "my-model" in qtool("list")
    assert qtool("run my-model -n 4 'Hello there'").strip()


@pytest.mark.slow
def test_a_line_of_llama_cli_answers(gguf: Path) -> None:
    line = ["run", "-m", str(gguf), "--chat-template", "llama3", "-n", "5", "-p", "Hello there"]
    done = subprocess.run(
        [sys.executable, "-m", "qtool", *line],
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        stdin=subprocess.DEVNULL,
        env=child_environment(PYTHONSAFEPATH="1"),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
