"""The OpenAI API over the bundled model, as real clients use it."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

PROMPTS = [
    "The ship sailed",
    "My dear Watson,",
    "It was a dark night and",
    "She said that",
    "In the garden there was",
    "The old man looked",
    "There is no",
    "When the morning came, the",
]
CONTEXT = 128  # a short one, so that filling it is quick
QUESTION = [{"role": "user", "content": "Tell me a story."}]


def events(response: httpx.Response) -> list[str]:
    """The data of each event of a stream; checks the framing on the way."""
    lines = response.text.split("\n")
    assert lines[-1] == ""
    assert all(line == "" for line in lines[1::2]), "an event ends with an empty line"
    assert all(line.startswith("data: ") for line in lines[:-1:2])
    return [line.removeprefix("data: ") for line in lines[:-1:2]]


def chunks(response: httpx.Response) -> list[dict[str, Any]]:
    *data, done = events(response)
    assert done == "[DONE]"
    return [json.loads(item) for item in data]


@pytest.fixture(scope="module")
def server(serve: Callable[..., Any]) -> Iterator[Any]:
    with serve(engine={"max_model_len": CONTEXT}) as running:
        yield running


@pytest.fixture
def client(server: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="EMPTY", max_retries=0)


def test_models_are_listed_as_clients_expect(server: Any, client: openai.OpenAI) -> None:
    [model] = client.models.list().data
    assert model.id == "builtin:books-7m"
    assert client.models.retrieve("builtin:books-7m").id == "builtin:books-7m"
    card = server.get("/v1/models").json()["data"][0]
    assert card["max_model_len"] == CONTEXT
    assert card["qtool"]["chat_template"] == "plain (announced)"


def test_the_last_part_of_a_models_name_is_enough(server: Any) -> None:
    answer = server.complete("Once", model="books-7m", max_tokens=1)
    assert answer["model"] == "books-7m"


def test_an_unknown_model_is_a_404_with_a_guess(server: Any, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="book-7m", prompt="Once")
    assert caught.value.code == "model_not_found"
    assert "did you mean `books-7m`" in caught.value.message
    assert server.get("/v1/models/nope").status_code == 404


def test_a_chat_answer_has_every_field(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="books-7m",
        messages=QUESTION,
        max_tokens=8,
        temperature=0,  # type: ignore[arg-type]
    )
    [choice] = answer.choices
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.message.tool_calls is None
    assert choice.finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 8
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


def test_a_stream_adds_up_to_the_whole_answer(client: openai.OpenAI) -> None:
    def ask(**more: Any) -> Any:
        return client.chat.completions.create(
            model="books-7m", messages=QUESTION, max_tokens=12, temperature=0, **more
        )

    whole = ask().choices[0].message.content
    streamed = [chunk.choices[0].delta.content or "" for chunk in ask(stream=True)]
    assert "".join(streamed) == whole


def test_async_clients_stream_side_by_side(server: Any) -> None:
    async def ask(client: openai.AsyncOpenAI, prompt: str) -> str:
        stream = await client.completions.create(
            model="books-7m", prompt=prompt, max_tokens=16, temperature=0, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def all_at_once() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any") as client:
            return await asyncio.gather(*(ask(client, prompt) for prompt in PROMPTS))

    together = asyncio.run(all_at_once())
    alone = [server.complete(prompt, max_tokens=16)["choices"][0]["text"] for prompt in PROMPTS]
    assert together == alone
    assert len(set(alone)) > 1


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs the curl program")
@pytest.mark.parametrize("headers", [[], ["-H", "Content-Type: text/plain"]])
def test_curl_without_a_json_header_streams(server: Any, headers: list[str]) -> None:
    body = json.dumps({"messages": QUESTION, "max_tokens": 4, "stream": True})
    command = ["curl", "-sN", f"{server.url}/v1/chat/completions", *headers, "-d", body]
    output = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert output.startswith("data: {")
    assert output.endswith("data: [DONE]\n\n")


def test_a_chat_stream_keeps_every_rule(server: Any) -> None:
    body = {"messages": QUESTION, "max_tokens": 6, "temperature": 0, "stream": True}
    response = server.post("/v1/chat/completions", body)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    received = chunks(response)
    assert len({chunk["id"] for chunk in received}) == 1
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in received)
    assert all(len(chunk["choices"]) == 1 for chunk in received), "readers take choices[0]"
    assert not any("usage" in chunk for chunk in received)
    first, *middle, last = [chunk["choices"][0] for chunk in received]
    assert first["delta"] == {"role": "assistant", "content": ""}
    assert len(middle) == 6, "one chunk for each token"
    assert all(list(choice["delta"]) == ["content"] for choice in middle)
    assert all(isinstance(choice["delta"]["content"], str) for choice in middle)
    assert all(choice["finish_reason"] is None for choice in (first, *middle))
    assert last["delta"] == {}
    assert last["finish_reason"] == "length"


def test_usage_comes_last_and_only_when_asked_for(server: Any) -> None:
    body = {
        "prompt": "Once",
        "max_tokens": 3,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    *received, last = chunks(server.post("/v1/completions", body))
    assert all(chunk["usage"] is None for chunk in received)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 3


def test_continuous_usage_counts_up(server: Any) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"prompt": "Once", "max_tokens": 3, "stream": True, "stream_options": options}
    received = chunks(server.post("/v1/completions", body))
    assert [chunk["usage"]["completion_tokens"] for chunk in received] == [1, 2, 3, 3]


def test_several_prompts_are_answered_in_order(server: Any) -> None:
    together = server.complete(PROMPTS[:3], max_tokens=8)
    assert [choice["index"] for choice in together["choices"]] == [0, 1, 2]
    alone = [server.complete(prompt, max_tokens=8) for prompt in PROMPTS[:3]]
    assert [choice["text"] for choice in together["choices"]] == [
        answer["choices"][0]["text"] for answer in alone
    ]
    assert together["usage"]["prompt_tokens"] == sum(a["usage"]["prompt_tokens"] for a in alone)


def test_several_streamed_prompts_end_once_each(server: Any) -> None:
    fields = {"max_tokens": 8, "temperature": 0, "stream": True}
    received = chunks(server.post("/v1/completions", {"prompt": PROMPTS[:3], **fields}))
    choices = [chunk["choices"][0] for chunk in received]
    ended = [choice["index"] for choice in choices if choice["finish_reason"]]
    assert sorted(ended) == [0, 1, 2]
    texts = ["".join(c["text"] for c in choices if c["index"] == index) for index in range(3)]
    whole = server.complete(PROMPTS[:3], max_tokens=8)
    assert texts == [choice["text"] for choice in whole["choices"]]


def test_token_ids_are_taken_as_they_are(server: Any) -> None:
    ids = server.service.tokenizer.encode(PROMPTS[0])
    by_text = server.complete(PROMPTS[0], max_tokens=8)
    by_ids = server.complete(ids, max_tokens=8)
    by_list_of_ids = server.complete([ids], max_tokens=8)
    assert by_ids["choices"] == by_text["choices"] == by_list_of_ids["choices"]
    assert by_ids["usage"] == by_text["usage"]


def test_a_token_id_outside_the_vocabulary_is_refused(server: Any) -> None:
    for ids in ([4096], [-1], [5, 2**40]):
        response = server.post("/v1/completions", {"prompt": ids})
        assert response.status_code == 400
        assert "0 to 4095" in response.json()["error"]["message"]


def test_a_completion_has_16_tokens_unless_told(server: Any) -> None:
    assert server.complete("Once upon a time", ignore_eos=True)["usage"]["completion_tokens"] == 16


def test_a_chat_answer_may_fill_the_context(server: Any) -> None:
    body = {"messages": QUESTION, "temperature": 0, "ignore_eos": True, "seed": 1}
    answer = server.post("/v1/chat/completions", body).json()
    # The plain template's own stop strings may end it; else it ends with the context.
    if answer["choices"][0]["finish_reason"] == "length":
        assert answer["usage"]["total_tokens"] == CONTEXT
    else:
        assert answer["choices"][0]["finish_reason"] == "stop"


def test_stop_strings_end_the_text_and_are_left_out(server: Any) -> None:
    text = server.complete(PROMPTS[0], max_tokens=24)["choices"][0]["text"]
    stop = text[12:15]
    [choice] = server.complete(PROMPTS[0], max_tokens=24, stop=["@never@", stop])["choices"]
    assert choice["text"] == text[: text.index(stop)]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
    kept = server.complete(PROMPTS[0], max_tokens=24, stop=stop, include_stop_str_in_output=True)
    assert kept["choices"][0]["text"] == text[: text.index(stop) + len(stop)]


def test_a_streamed_stop_string_never_shows(server: Any) -> None:
    text = server.complete(PROMPTS[0], max_tokens=24)["choices"][0]["text"]
    stop = text[12:18]
    fields = {"max_tokens": 24, "temperature": 0, "stream": True, "stop": stop}
    received = chunks(server.post("/v1/completions", {"prompt": PROMPTS[0], **fields}))
    assert "".join(c["choices"][0]["text"] for c in received) == text[: text.index(stop)]
    assert received[-1]["choices"][0]["finish_reason"] == "stop"


def test_stop_token_ids_end_the_text(server: Any) -> None:
    ids = server.service.tokenizer.encode(
        PROMPTS[0] + server.complete(PROMPTS[0], max_tokens=8)["choices"][0]["text"]
    )
    [choice] = server.complete(PROMPTS[0], max_tokens=8, stop_token_ids=[ids[-1]])["choices"]
    assert choice["finish_reason"] == "stop"


def test_a_seed_repeats_the_text_whatever_runs_beside_it(server: Any) -> None:
    def sample(seed: int) -> str:
        fields = {"temperature": 1.0, "max_tokens": 16}
        text: str = server.complete(PROMPTS[0], seed=seed, **fields)["choices"][0]["text"]
        return text

    alone = sample(7)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(sample, [7, 8, 7, 9]))[::2] == [alone, alone]
    assert sample(8) != alone


def test_eight_streams_at_once_equal_one_at_a_time(server: Any) -> None:
    def stream(prompt: str) -> str:
        body = {"prompt": prompt, "max_tokens": 32, "temperature": 0, "stream": True}
        received = chunks(server.post("/v1/completions", body))
        return "".join(chunk["choices"][0]["text"] for chunk in received)

    alone = [stream(prompt) for prompt in PROMPTS]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(stream, PROMPTS)) == alone


def test_a_bad_request_does_not_disturb_a_good_one(server: Any) -> None:
    alone = server.complete(PROMPTS[1], max_tokens=32)["choices"]
    bad = [{"prompt": [99999]}, {"prompt": "a", "max_tokens": 600}, {"prompt": 5}, {"prompt": []}]
    with ThreadPoolExecutor(5) as pool:
        good = pool.submit(server.complete, PROMPTS[1], max_tokens=32)
        refused = list(pool.map(lambda body: server.post("/v1/completions", body), bad * 4))
        assert good.result()["choices"] == alone
    assert {response.status_code for response in refused} == {400}


@pytest.mark.parametrize(
    ("num_tokens", "max_tokens"), [(128, None), (600, None), (120, 9), (5, 124)]
)
def test_what_does_not_fit_the_context_is_refused_and_not_cut(
    server: Any, num_tokens: int, max_tokens: int | None
) -> None:
    body = {"prompt": [5] * num_tokens, "max_tokens": max_tokens}
    error = server.post("/v1/completions", body).json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert str(CONTEXT) in error["message"]
    assert str(num_tokens) in error["message"]


def test_what_just_fits_the_context_is_answered(server: Any) -> None:
    for body in ({"max_tokens": 12}, {}):
        answer = server.complete([5] * 116, ignore_eos=True, **body)
        assert answer["usage"]["total_tokens"] == CONTEXT


def test_a_chat_that_does_not_fit_is_refused_before_the_stream_begins(
    client: openai.OpenAI,
) -> None:
    long = [{"role": "user", "content": "word " * 2000}]
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="books-7m", messages=long, stream=True)  # type: ignore[call-overload]
    assert caught.value.code == "context_length_exceeded"


def test_a_prompt_is_not_padded_with_a_beginning_of_text_token_given_ids(server: Any) -> None:
    assert server.complete([5, 6, 7], max_tokens=1)["usage"]["prompt_tokens"] == 3


def test_request_ids_are_given_back(server: Any) -> None:
    body = {"prompt": "Once", "max_tokens": 1}
    ours = server.post("/v1/completions", body).headers["x-request-id"]
    assert len(ours) == 32
    theirs = server.post("/v1/completions", body, headers={"x-request-id": "job-17"})
    assert theirs.headers["x-request-id"] == "job-17"
    refused = server.post("/v1/completions", {}, headers={"x-request-id": "job-18"})
    assert refused.headers["x-request-id"] == "job-18"


def test_two_requests_with_the_same_id_do_not_mix(server: Any) -> None:
    def ask(prompt: str) -> str:
        body = {"prompt": prompt, "max_tokens": 16, "temperature": 0}
        response = server.post("/v1/completions", body, headers={"x-request-id": "same"})
        text: str = response.json()["choices"][0]["text"]
        return text

    alone = [ask(prompt) for prompt in PROMPTS[:2]]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(ask, PROMPTS[:2])) == alone


@pytest.mark.parametrize(
    ("method", "path", "status", "words"),
    [
        ("POST", "/v1/chat/completion", 404, "did you mean /v1/chat/completions"),
        ("GET", "/nope", 404, "There is no /nope"),
        ("GET", "/v1/completions", 405, "use POST"),
    ],
)
def test_a_wrong_path_or_method_says_what_is_right(
    server: Any, method: str, path: str, status: int, words: str
) -> None:
    response = server.http.request(method, path)
    assert response.status_code == status
    assert words in response.json()["error"]["message"]


def test_a_body_above_the_limit_is_refused(serve: Callable[..., Any]) -> None:
    with serve(max_body_bytes=1000) as server:
        assert server.post("/v1/completions", {"prompt": "a" * 2000}).status_code == 413
        parts = iter([b"a" * 400] * 10)  # chunked: no length is declared
        response = server.http.post("/v1/completions", content=parts)
        assert response.status_code == 413
        assert server.complete("Once", max_tokens=1)


def test_probes_need_no_body(server: Any) -> None:
    for path in ("/health", "/ping", "/version", "/", "/docs", "/openapi.json"):
        assert server.get(path).status_code == 200, path
    assert server.http.head("/health").status_code == 200


def test_pages_of_this_machine_may_call_from_a_browser(server: Any) -> None:
    def allowed(origin: str) -> str | None:
        headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        response = server.http.options("/v1/chat/completions", headers=headers)
        return response.headers.get("access-control-allow-origin")

    assert allowed("http://localhost:3000") == "http://localhost:3000"
    assert allowed("https://example.org") is None


def test_the_documentation_describes_the_bodies(server: Any) -> None:
    document = server.get("/openapi.json").json()
    schema = document["components"]["schemas"]["ChatBody"]
    assert "max_completion_tokens" in schema["properties"]
