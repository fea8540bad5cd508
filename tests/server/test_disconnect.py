"""A client that leaves frees what its request held, at once and in every phase."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

import httpx
import pytest

from qtool.runtime.server.asgi import EventStream

LONG = {"prompt": "Once", "max_tokens": 500, "ignore_eos": True}
RUNNING = "vllm:num_requests_running"
WAITING = "vllm:num_requests_waiting"


def is_zero(value: float) -> bool:
    return value == 0


def is_all_free(server: Any) -> None:
    for name in (RUNNING, WAITING, "vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"):
        server.wait_for_metric(name, is_zero)
    deadline = time.monotonic() + 60
    while server.service.admission.num_inside:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_leaving_a_stream_frees_its_blocks(server: Any) -> None:
    with server.stream(LONG) as lines:
        next(lines)
        server.wait_for_metric("vllm:kv_cache_usage_perc", lambda used: used > 0)
    is_all_free(server)


def test_leaving_a_whole_answer_frees_its_blocks(server: Any) -> None:
    with pytest.raises(httpx.ReadTimeout):
        server.post("/v1/completions", LONG, timeout=httpx.Timeout(30, read=0.3))
    is_all_free(server)


def test_leaving_several_prompts_frees_all(server: Any) -> None:
    with server.stream({**LONG, "prompt": ["One", "Two", "Three"]}) as lines:
        next(lines)
        server.wait_for_metric(RUNNING, lambda value: value == 3)
    is_all_free(server)


def test_an_abort_is_counted_once(server: Any) -> None:
    aborted = "vllm:request_success_total"
    labels = '{engine="0",finished_reason="abort",model_name="builtin:books-7m"}'
    before = server.metric(aborted, labels)
    with server.stream(LONG) as lines:
        next(lines)
    is_all_free(server)
    assert server.metric(aborted, labels) == before + 1


def test_leaving_during_prefill_or_in_the_queue_frees_the_place(serve: Callable[..., Any]) -> None:
    # Four tokens a step: a prompt of 400 takes a hundred steps. One sequence at a time: the second
    # request waits.
    engine = {"max_num_seqs": 1, "max_num_batched_tokens": 4}
    with serve(max_running=1, max_queued=4, engine=engine) as server:
        long_prompt = {"prompt": [5] * 400, "max_tokens": 100}
        # Headers come at once, before there is a token.
        with server.stream(long_prompt), server.stream(long_prompt):
            server.wait_for_metric(WAITING, lambda value: value == 1)
            server.wait_for_metric(RUNNING, lambda value: value == 1)
        is_all_free(server)
        assert server.metric("vllm:generation_tokens_total") == 0
        assert server.complete("Once", max_tokens=2)


def test_many_clients_that_leave_leave_nothing(server: Any) -> None:
    for seconds in (0.01, 0.02, 0.05, 0.1):
        with pytest.raises(httpx.ReadTimeout):
            server.post("/v1/completions", LONG, timeout=httpx.Timeout(30, read=seconds))
        with server.stream(LONG) as lines:
            next(lines)
    is_all_free(server)
    assert server.complete("Once", max_tokens=2)


def test_a_client_that_does_not_read_holds_up_nobody(serve: Callable[..., Any]) -> None:
    """Others are answered meanwhile, and what it held comes free."""
    body = json.dumps(
        {
            "messages": [{"role": "user", "content": "Once"}],
            "max_tokens": 150,
            "ignore_eos": True,
            "stream": True,
            "n": 2,
            "logprobs": True,
            "top_logprobs": 20,
        }
    )
    with serve(write_timeout=1.0) as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.socket() as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.connect((host, int(port)))
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}"
            deaf.sendall(f"{head}\r\n\r\n{body}".encode())
            server.wait_for_metric(RUNNING, lambda value: value > 0)
            assert server.complete("Once", max_tokens=2)
            is_all_free(server)
            assert server.complete("Once", max_tokens=2)


def test_a_client_that_does_not_read_is_hung_up_on() -> None:
    closed: list[str] = []

    async def events() -> AsyncGenerator[bytes, None]:
        try:
            for number in range(1000):
                yield b"data: %d\n\n" % number
        finally:
            closed.append("closed")

    async def main() -> int:
        num_sent = 0

        async def receive() -> Any:
            await asyncio.Event().wait()

        async def send(message: Any) -> None:
            nonlocal num_sent
            num_sent += 1
            if num_sent > 10:  # the buffers are full, and nobody empties them
                await asyncio.Event().wait()

        async with asyncio.timeout(30):
            await EventStream(events(), write_seconds=0.01)({}, receive, send)
        return num_sent

    assert asyncio.run(main()) == 11
    assert closed == ["closed"]
