"""No body makes the server fail: whatever is sent gets an answer or a 4xx."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qtool.runtime.server.anthropic import MessagesBody
from qtool.runtime.server.chat_protocol import ChatBody
from qtool.runtime.server.embeddings import EmbeddingBody
from qtool.runtime.server.ollama import OllamaChatBody, OllamaEmbedBody, OllamaGenerateBody
from qtool.runtime.server.ollama_names import OllamaCopyBody, OllamaCreateBody
from qtool.runtime.server.plain import PlainBody
from qtool.runtime.server.protocol import CompletionBody
from qtool.runtime.server.responses_protocol import ResponsesBody
from qtool.runtime.server.tgi import TgiBody, TgiParameters
from qtool.runtime.server.tokens import DetokenizeBody, TokenizeBody

SETTINGS = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=True, allow_infinity=True)
    | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
near_misses = st.sampled_from(
    [
        0,
        1,
        -1,
        0.0,
        1.0,
        2,
        511,
        512,
        1e308,
        "",
        "a",
        "\x00",
        "\ud83d",
        [],
        [0],
        [""],
        [[]],
        {},
        True,
    ]
)
contents = (
    st.text(max_size=40)
    | anything
    | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": anything}), max_size=3)
)
messages = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["system", "user", "assistant", "tool", "x", 5]),
            "content": contents,
        }
    )
    | anything,
    max_size=4,
)


def bodies(known: Any, **required: Any) -> Any:
    """Objects with the required fields mostly right and any other known fields mostly wrong."""
    others = st.dictionaries(st.sampled_from(sorted(known)), near_misses | anything, max_size=4)
    cheap = st.fixed_dictionaries({"max_tokens": st.just(2), **required})
    return st.builds(lambda right, wrong: {**right, **wrong}, cheap, others) | anything


def post(server: Any, path: str, body: Any) -> httpx.Response:
    raw = json.dumps(body).encode("utf-8", "surrogatepass")
    response: httpx.Response = server.http.post(path, content=raw)
    return response


def check(response: httpx.Response) -> None:
    if response.status_code == 200:
        return
    assert 400 <= response.status_code < 500, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert "Traceback" not in error["message"]


@SETTINGS
@given(body=bodies({*ChatBody.model_fields, *ChatBody.unsupported}, messages=messages))
def test_no_chat_body_makes_the_server_fail(server: Any, body: Any) -> None:
    check(post(server, "/v1/chat/completions", body))


@SETTINGS
@given(
    body=bodies(
        {*CompletionBody.model_fields, *CompletionBody.unsupported},
        prompt=st.text(max_size=40) | st.lists(st.integers(-1, 4100), max_size=8) | anything,
    )
)
def test_no_completion_body_makes_the_server_fail(server: Any, body: Any) -> None:
    check(post(server, "/v1/completions", body))


# Every other route: its body, and the fields that are given mostly right.
ROUTES: dict[str, tuple[set[str], dict[str, Any]]] = {
    "/v1/responses": (
        {*ResponsesBody.model_fields},
        {"input": messages | st.text(max_size=20), "max_output_tokens": st.just(2)},
    ),
    "/v1/messages": ({*MessagesBody.model_fields}, {"messages": messages}),
    "/v1/embeddings": ({*EmbeddingBody.model_fields}, {"input": st.text(max_size=20) | anything}),
    "/api/chat": (
        {*OllamaChatBody.model_fields},
        {"messages": messages, "options": st.just({"num_predict": 2})},
    ),
    "/api/generate": (
        {*OllamaGenerateBody.model_fields},
        {"prompt": st.text(max_size=9), "options": st.just({"num_predict": 2})},
    ),
    "/api/embed": ({*OllamaEmbedBody.model_fields}, {"input": st.text(max_size=20)}),
    "/api/create": (
        {"from", *OllamaCreateBody.model_fields},
        {"model": st.text(max_size=9), "from": st.sampled_from(["builtin:books-7m", "x", ""])},
    ),
    "/api/copy": (
        {*OllamaCopyBody.model_fields},
        {"source": st.just("builtin:books-7m"), "destination": st.text(max_size=9)},
    ),
    "/generate": (
        {*TgiBody.model_fields, *TgiParameters.model_fields},
        {"inputs": st.text(max_size=20), "parameters": st.just({"max_new_tokens": 2})},
    ),
    "/chat": ({*PlainBody.model_fields}, {"message": contents, "max_new_tokens": st.just(2)}),
    "/tokenize": ({*TokenizeBody.model_fields}, {"prompt": contents}),
    "/detokenize": ({*DetokenizeBody.model_fields}, {"tokens": st.lists(st.integers(-1, 5000))}),
}


@pytest.mark.parametrize("path", ROUTES)
def test_no_body_of_another_dialect_makes_the_server_fail(server: Any, path: str) -> None:
    known, required = ROUTES[path]

    @settings(SETTINGS, max_examples=12)
    @given(body=bodies(known, **required))
    def send(body: Any) -> None:
        response = post(server, path, body)
        assert response.status_code < 500, response.text
        if response.status_code >= 400:
            assert "Traceback" not in response.text
            assert response.json()

    send()


@SETTINGS
@given(raw=st.binary(max_size=200))
def test_no_bytes_make_the_server_fail(server: Any, raw: bytes) -> None:
    response = server.http.post("/v1/completions", content=raw)
    assert 400 <= response.status_code < 500


@pytest.mark.parametrize(
    "path", ["/v1/models/%00", "/v1/models/" + "a" * 5000, "/%ff%fe", "//", "/v1//models"]
)
def test_no_path_makes_the_server_fail(server: Any, path: str) -> None:
    assert server.get(path).status_code < 500


def test_after_all_that_the_server_still_answers(server: Any) -> None:
    server.wait_for_metric("vllm:num_requests_running", lambda value: value == 0)
    assert (
        server.complete("Once upon a time", max_tokens=4, ignore_eos=True)["usage"][
            "completion_tokens"
        ]
        == 4
    )
    assert server.service.admission.num_inside == 0
