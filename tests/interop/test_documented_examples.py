"""Programs as tutorials on other servers print them, with nothing changed but URL and model.

They are what people paste: unguarded `choices[0]`, loops that wait for `[DONE]`, `.get("content",
"")` printed as it is, any API key.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import statistics
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from huggingface_hub import InferenceClient
from openai import AsyncOpenAI, OpenAI

from qtool.runtime.server.process import running_server

MODEL = "builtin:books-7m"
MESSAGES = [{"role": "user", "content": "Tell me a story."}]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    flags = "--dtype float32 --max-model-len 512 --gpu-memory-utilization 0.85 --max-num-seqs 8"
    with running_server(MODEL, *flags.split()) as server:
        yield server.url


@pytest.mark.parametrize("key", ["EMPTY", "vllm", "dummy", "ollama"])
def test_a_client_with_any_key(url: str, key: str) -> None:
    client = OpenAI(base_url=f"{url}/v1", api_key=key)
    model = client.models.list().data[0].id
    response = client.chat.completions.create(
        model=model,
        messages=MESSAGES,  # type: ignore[arg-type]
        temperature=0.7,
        max_tokens=8,
    )
    assert response.choices[0].message.content
    assert response.usage is not None
    assert response.usage.completion_tokens <= 8


def test_an_async_stream(url: str) -> None:
    async def main() -> str:
        client = AsyncOpenAI(base_url=f"{url}/v1", api_key="EMPTY")
        stream = await client.chat.completions.create(
            model=MODEL,
            messages=MESSAGES,  # type: ignore[arg-type]
            stream=True,
            max_tokens=8,
        )
        text = ""
        async for chunk in stream:
            if chunk.choices[0].delta.content:  # type: ignore[attr-defined]
                text += chunk.choices[0].delta.content  # type: ignore[attr-defined]
        return text

    assert asyncio.run(main())


def test_a_reader_of_raw_events(url: str) -> None:
    """`choices[0]` unguarded, and what `.get` gives is printed: no chunk may say null."""
    body = {"model": MODEL, "messages": MESSAGES, "stream": True, "max_tokens": 8}
    printed = []
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as response:
        for line in response.iter_lines():
            if line.startswith("data: "):
                data = line[6:]
                if data == "[DONE]":
                    break
                chunk = json.loads(data)
                printed.append(str(chunk["choices"][0]["delta"].get("content", "")))
    assert "None" not in printed
    assert "".join(printed)


def test_a_completion_over_plain_http(url: str) -> None:
    body = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 10, "temperature": 0.7}
    request = urllib.request.Request(
        f"{url}/v1/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        assert json.load(response)["choices"][0]["text"]


JAVASCRIPT = """
const response = await fetch(process.argv[1] + "/v1/chat/completions", {
  method: "POST",
  headers: { "Content-Type": "application/json" },
  body: JSON.stringify({
    model: "builtin:books-7m",
    messages: [{ role: "user", content: "Tell me a story." }],
    stream: true, max_tokens: 8,
  }),
});
const reader = response.body.getReader();
const decoder = new TextDecoder();
let held = "", text = "";
for (;;) {
  const { done, value } = await reader.read();
  if (done) break;
  held += decoder.decode(value, { stream: true });
  const lines = held.split("\\n");
  held = lines.pop();
  for (const line of lines) {
    if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
    text += JSON.parse(line.slice(6)).choices[0].delta.content ?? "";
  }
}
console.log(text);
"""


# node and curl are the system's, not the registry's: the same routes are asked in Python above.
@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_a_reader_in_javascript(url: str) -> None:
    command = ["node", "--input-type=module", "-e", JAVASCRIPT, url]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl_as_a_health_check_and_for_metrics(url: str) -> None:
    def curl(*words: str) -> str:
        command = ["curl", "-sS", "--fail", *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert json.loads(curl(f"{url}/v1/models"))["data"][0]["id"] == MODEL
    metrics = curl(f"{url}/metrics")
    for name in (
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:gpu_cache_usage_perc",
        "vllm:time_to_first_token_seconds_bucket",
        "vllm:time_per_output_token_seconds_bucket",
    ):
        assert re.search(f"^{name}", metrics, re.MULTILINE), name


def test_text_generation_inference(url: str) -> None:
    client = InferenceClient(url)
    assert client.text_generation("Once upon a time", max_new_tokens=10)


def test_ollamas_api(url: str) -> None:
    chat = httpx.post(
        f"{url}/api/chat",
        json={"model": MODEL, "messages": MESSAGES, "options": {"num_predict": 5}, "stream": False},
        timeout=60,
    ).json()
    assert chat["message"]["content"]
    generate = httpx.post(
        f"{url}/api/generate",
        json={"model": MODEL, "prompt": "Hi", "stream": False, "options": {"num_predict": 5}},
        timeout=60,
    ).json()
    assert generate["response"]


def test_the_simple_chat_of_a_tutorial(url: str) -> None:
    with httpx.stream("POST", f"{url}/chat", params={"message": "Hi"}, timeout=60) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        first = next(line for line in response.iter_lines() if line)
    assert first.startswith("data: ")


def test_a_benchmark_of_latency(url: str) -> None:
    def benchmark_latency(prompt: str, model: str, n_runs: int, max_tokens: int) -> dict[str, Any]:
        client = OpenAI(base_url=f"{url}/v1", api_key="vllm")
        latencies, speeds = [], []
        for _ in range(n_runs):
            start = time.time()
            response = client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": prompt}], max_tokens=max_tokens
            )
            elapsed = time.time() - start
            latencies.append(elapsed * 1000)
            assert response.usage is not None
            speeds.append(response.usage.completion_tokens / elapsed)
        latencies.sort()
        return {
            "p50_latency_ms": round(statistics.median(latencies), 1),
            "p95_latency_ms": round(latencies[int(0.95 * len(latencies))], 1),
            "avg_tokens_per_sec": round(statistics.mean(speeds), 1),
            "n_runs": n_runs,
        }

    found = benchmark_latency("Explain the sea.", MODEL, n_runs=3, max_tokens=5)
    assert found["p50_latency_ms"] > 0
    assert found["avg_tokens_per_sec"] > 0


def test_several_agents_at_once(url: str) -> None:
    """Answers come side by side, and leaving one early disturbs no other."""

    async def main() -> list[int]:
        client = AsyncOpenAI(base_url=f"{url}/v1", api_key="dummy", max_retries=0)

        async def ask(number: int) -> int:
            stream = await client.completions.create(
                model=MODEL, prompt=f"{number}. Once", max_tokens=20, stream=True
            )
            count = 0
            async for _ in stream:
                count += 1
                if number == 0 and count == 3:
                    await stream.close()
                    break
            return count

        return await asyncio.gather(*map(ask, range(6)))

    counts = asyncio.run(main())
    assert counts[0] == 3
    assert all(count > 3 for count in counts[1:])


def test_the_asynchronous_engine_in_python() -> None:
    from qtool import AsyncEngineArgs, AsyncLLMEngine, SamplingParams

    async def generate(prompt: str) -> str:
        args = AsyncEngineArgs(model=MODEL, max_model_len=512, gpu_memory_utilization=0.90)
        engine = AsyncLLMEngine.from_engine_args(args)
        sampling = SamplingParams(temperature=0.7, max_tokens=16)
        text = ""
        async for output in engine.generate(prompt, sampling, request_id="req1"):
            assert output.outputs[0].text.startswith(text), "each output has all of the text"
            text = output.outputs[0].text
        return text

    assert asyncio.run(generate("Explain the sea."))


def test_the_engine_in_python() -> None:
    from qtool import LLM, SamplingParams

    llm = LLM(model=MODEL, max_model_len=512)
    outputs = llm.generate(["The sea", "The fire"], SamplingParams(temperature=0.8, max_tokens=8))
    assert [bool(output.outputs[0].text) for output in outputs] == [True, True]


def test_llama_cpps_python(as_gguf: Callable[[Path, str], Path], books_7m: Path) -> None:
    from qtool import Llama

    path = as_gguf(books_7m, "Q4_K_M")
    llm = Llama(model_path=str(path), n_ctx=512, n_gpu_layers=-1, n_threads=2)
    response = llm.create_chat_completion(
        messages=[{"role": "user", "content": "Tell me a story."}], max_tokens=8
    )
    assert response["choices"][0]["message"]["content"]


def test_an_agent_calls_a_tool_and_reads_its_result(url: str) -> None:
    client = OpenAI(base_url=f"{url}/v1", api_key="EMPTY")
    tool: Any = {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "enum": ["Oslo", "Rome"]}},
                "required": ["city"],
            },
        },
    }
    messages: list[Any] = [{"role": "user", "content": "How is the weather in Oslo?"}]
    response = client.chat.completions.create(
        model=MODEL, messages=messages, tools=[tool], tool_choice="required", max_tokens=64
    )
    [call, *_] = response.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert json.loads(call.function.arguments)["city"] in ("Oslo", "Rome")
    messages += [
        response.choices[0].message,
        {"role": "tool", "tool_call_id": call.id, "content": "Sunny, 21 degrees"},
    ]
    response = client.chat.completions.create(
        model=MODEL, messages=messages, tools=[tool], tool_choice="none", max_tokens=8
    )
    assert response.choices[0].message.content
