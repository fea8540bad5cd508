"""A client that measures: streams completions from any OpenAI server, notes when each piece came.

Nothing of qtool is asked for, so the same numbers can be had of vLLM, llama-server or a hosted API:
`POST /v1/completions` with `stream`, `ignore_eos` (which those that do not know it pass over) and
`stream_options.include_usage`, whose usage says how many tokens there were. Where a server sends no
usage, its pieces are counted.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from qtool.builtin import evaluation_text
from qtool.errors import QtoolError
from qtool.runtime.bench.timing import Answer

# Words of English take about so many tokens in the vocabularies of today.
TOKENS_PER_WORD = 1.3
CONNECT_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Work:
    """One request to make. `at`: seconds after the start."""

    at: float
    prompt: str
    max_tokens: int


def arrivals(rate: float, count: int, seed: int) -> list[float]:
    """When requests are sent: a Poisson process of `rate` a second; all at once if it is infinite.

    The first comes at 0, so that the time measured begins with work.
    """
    if rate == float("inf"):
        return [0.0] * count
    draw = random.Random(seed)
    times = [0.0]
    while len(times) < count:
        times.append(times[-1] + draw.expovariate(rate))
    return times


def prompts(
    count: int, input_len: int, seed: int, *, prefix_len: int = 0, num_prefixes: int = 1
) -> list[str]:
    """English of about input_len tokens each, from the text that ships, no two alike.

    prefix_len   tokens at the beginning that all requests of one of num_prefixes groups share
    """
    words = evaluation_text().read_text(encoding="utf-8").split()
    draw = random.Random(seed)

    def passage(length: int) -> str:
        wanted = max(1, round(length / TOKENS_PER_WORD))
        start = draw.randrange(len(words))
        doubled = words[start:] + words
        return " ".join(doubled[:wanted])

    prefixes = [passage(prefix_len) for _ in range(num_prefixes)] if prefix_len else [""]
    return [
        f"{prefixes[number % len(prefixes)]} ({number}) {passage(input_len)}".strip()
        for number in range(count)
    ]


async def send_all(
    url: str,
    model: str,
    work: Sequence[Work],
    *,
    api_key: str | None,
    max_concurrency: int | None,
    timeout: float,
    advance: Callable[[int], None],
) -> list[Answer]:
    """Each piece of work at its time, no more than max_concurrency of them at once."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    gate = asyncio.Semaphore(max_concurrency or len(work))
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(
        headers=headers, timeout=httpx.Timeout(timeout, connect=CONNECT_SECONDS), limits=limits
    ) as client:
        start = time.perf_counter()

        async def one(item: Work) -> Answer:
            await asyncio.sleep(max(0.0, start + item.at - time.perf_counter()))
            async with gate:
                answer = await _stream(client, url, model, item)
            advance(1)
            return answer

        return await asyncio.gather(*(one(item) for item in work))


async def _stream(client: httpx.AsyncClient, url: str, model: str, work: Work) -> Answer:
    body = {
        "model": model,
        "prompt": work.prompt,
        "max_tokens": work.max_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    sent = time.perf_counter()
    times: list[float] = []
    usage: dict[str, Any] = {}
    error = None
    try:
        async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
            if response.status_code != 200:
                text = (await response.aread()).decode("utf-8", errors="replace")
                error = f"HTTP {response.status_code}: {text[:200]}"
            else:
                async for line in response.aiter_lines():
                    if not line.startswith("data:") or line.endswith("[DONE]"):
                        continue
                    event = json.loads(line[5:])
                    if "error" in event:
                        error = str(event["error"])[:200]
                    elif event.get("usage"):
                        usage = event["usage"]
                    if any(choice.get("text") for choice in event.get("choices", ())):
                        times.append(time.perf_counter())
    except (httpx.HTTPError, ValueError) as failure:
        error = f"{type(failure).__name__}: {failure}"
    details = usage.get("prompt_tokens_details") or {}
    return Answer(
        sent=sent,
        token_times=tuple(times),
        end=times[-1] if times else time.perf_counter(),
        num_prompt_tokens=int(usage.get("prompt_tokens", 0)),
        num_output_tokens=int(usage.get("completion_tokens", len(times))),
        num_cached_tokens=int(details.get("cached_tokens") or 0),
        error=error if error or times else "the answer had no text",
    )


def served_model(url: str, api_key: str | None) -> str:
    """The first model that the server has."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        response = httpx.get(f"{url}/v1/models", headers=headers, timeout=CONNECT_SECONDS)
        if response.status_code == 401:
            raise QtoolError(f"{url} asks for a key, or for another", "pass it with --api-key")
        response.raise_for_status()
        return str(response.json()["data"][0]["id"])
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        raise QtoolError(
            f"no models could be had from {url}/v1/models: {error}",
            "is the server running? Name it with --url, its key with --api-key",
        ) from error
