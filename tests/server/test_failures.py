"""What clients see when the engine fails. The engine here fails on demand; the server is real."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from qtool.errors import QtoolError
from qtool.runtime.engine.client import EngineStats, ModelInfo
from qtool.runtime.engine.sequence import GenerationRequest, PromptTooLong, TokenOutput

INFO = ModelInfo(
    name="failing",
    max_model_len=512,
    dtype="float32",
    device="cpu",
    format="dense",
    vocab_size=4096,
    num_kv_blocks=64,
    block_size=32,
    max_num_seqs=8,
    max_num_batched_tokens=512,
    weight_bytes=1,
    kv_cache_bytes=1,
)
ONE_TOKEN_THEN_FAIL, FAIL_IN_A_STEP, STOPPED, TOO_LONG, SHORT = range(5, 10)


class FailingEngine:
    """Gives one token of text, then fails in the way that the prompt's first id asks for."""

    info = INFO

    def generate(self, request: GenerationRequest) -> AsyncIterator[TokenOutput]:
        kind = request.prompt_token_ids[0]
        if kind == STOPPED:
            raise QtoolError("the engine is not taking requests")
        return self._generate(kind, request.request_id)

    async def _generate(self, kind: int, request_id: str) -> AsyncIterator[TokenOutput]:
        if kind == TOO_LONG:
            raise PromptTooLong(600, 512)
        yield TokenOutput(request_id, (300,), None, 1, 1)
        if kind == ONE_TOKEN_THEN_FAIL:
            raise RuntimeError("secret detail")
        if kind == FAIL_IN_A_STEP:
            yield TokenOutput(request_id, (), "error", 1, 1, error="the logits are not finite")

    def abort(self, request_id: str) -> None: ...

    def stats(self) -> EngineStats:
        return EngineStats()

    async def start(self) -> None: ...

    async def stop(self, *, drain_seconds: float = 0.0) -> None: ...

    def healthy(self) -> bool:
        return False


@pytest.fixture(scope="module")
def failing(serve: Callable[..., Any]) -> Iterator[Any]:
    with serve(client=FailingEngine) as server:
        yield server


CASES = {
    ONE_TOKEN_THEN_FAIL: (500, "its log says why"),
    FAIL_IN_A_STEP: (500, "not finite"),
    STOPPED: (503, "not taking requests"),
    TOO_LONG: (400, "maximum context length"),
    SHORT: (500, "ended an answer early"),
}


@pytest.mark.parametrize(("kind", "expected"), CASES.items())
def test_a_failure_is_an_error_body_without_its_inside(
    failing: Any, kind: int, expected: tuple[int, str]
) -> None:
    response = failing.post("/v1/completions", {"prompt": [kind]})
    status, words = expected
    assert response.status_code == status
    error = response.json()["error"]
    assert words in error["message"]
    assert "secret" not in response.text
    assert ("retry-after" in response.headers) == (status == 503)


@pytest.mark.parametrize(("kind", "expected"), CASES.items())
def test_a_failure_in_a_stream_is_an_event_and_then_the_end(
    failing: Any, kind: int, expected: tuple[int, str]
) -> None:
    response = failing.post("/v1/completions", {"prompt": [kind], "stream": True})
    *_, failure, done, empty = response.text.split("\n\n")
    assert (done, empty) == ("data: [DONE]", "")
    assert expected[1] in json.loads(failure.removeprefix("data: "))["error"]["message"]
    assert "secret" not in response.text


def test_one_failing_prompt_fails_the_request_once(failing: Any) -> None:
    body = {"prompt": [[FAIL_IN_A_STEP], [SHORT], [ONE_TOKEN_THEN_FAIL]], "stream": True}
    events = failing.post("/v1/completions", body).text.split("\n\n")
    assert sum('"error"' in event for event in events) == 1
    assert failing.post("/v1/completions", {**body, "stream": False}).status_code == 500


def test_failures_are_counted_and_leave_no_place_taken(failing: Any) -> None:
    labels = '{engine="0",finished_reason="error"'
    before = failing.metric("vllm:request_success_total", labels)
    failing.post("/v1/completions", {"prompt": [FAIL_IN_A_STEP]})
    assert failing.metric("vllm:request_success_total", labels) == before + 1
    assert failing.service.admission.num_inside == 0


def test_a_dead_engine_is_not_healthy(failing: Any) -> None:
    response = failing.get("/health")
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "engine_failed"
