"""The other dialects, spoken by their own official clients."""

from __future__ import annotations

import base64
import json
import math
import struct
from typing import Any

import anthropic
import ollama
import openai
import pytest
from huggingface_hub import InferenceClient

QUESTION = [{"role": "user", "content": "Tell me a story."}]
TOOL_SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 10}},
    "required": ["city"],
}


@pytest.fixture(scope="module")
def client(server: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="EMPTY", max_retries=0)


@pytest.fixture(scope="module")
def story(client: openai.OpenAI) -> str:
    """What the model answers, greedily, in 12 tokens."""
    answer = client.chat.completions.create(
        model="books-7m",
        messages=QUESTION,
        max_tokens=12,
        temperature=0,  # type: ignore[arg-type]
    )
    text = answer.choices[0].message.content
    assert text
    return text


# Responses


def test_a_response_has_its_text(client: openai.OpenAI, story: str) -> None:
    response = client.responses.create(
        model="books-7m", input="Tell me a story.", max_output_tokens=12, temperature=0
    )
    assert response.output_text == story
    assert response.status == "incomplete"
    assert response.usage is not None
    assert response.usage.output_tokens == 12
    assert client.responses.retrieve(response.id).output_text == story
    client.responses.delete(response.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)


def test_a_response_is_streamed_as_events(client: openai.OpenAI, story: str) -> None:
    events = list(
        client.responses.create(
            model="books-7m",
            input=QUESTION,
            max_output_tokens=12,
            temperature=0,
            stream=True,
        )
    )
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == story
    assert events[-1].response.output_text == story


def test_a_response_goes_on_from_an_earlier_one(client: openai.OpenAI) -> None:
    first = client.responses.create(model="books-7m", input="One", max_output_tokens=4)
    second = client.responses.create(
        model="books-7m", input="Two", previous_response_id=first.id, max_output_tokens=4
    )
    assert first.usage is not None
    assert second.usage is not None
    assert second.usage.input_tokens > first.usage.input_tokens + 4
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="books-7m", input="x", previous_response_id="resp_nope")


def test_a_response_calls_functions(client: openai.OpenAI) -> None:
    tool = {"type": "function", "name": "look", "parameters": TOOL_SCHEMA, "strict": True}
    with client.responses.stream(
        model="books-7m",
        input="Look at Rome.",
        tools=[tool],  # type: ignore[list-item]
        tool_choice={"type": "function", "name": "look"},
        max_output_tokens=200,
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_response()
    assert "response.function_call_arguments.delta" in kinds
    [call] = final.output
    assert call.type == "function_call"
    assert call.name == "look"
    assert set(json.loads(call.arguments)) == {"city"}


# Embeddings


def test_texts_become_vectors_of_length_one(client: openai.OpenAI) -> None:
    answer = client.embeddings.create(model="books-7m", input=["the sea", "the sea", "a hat"])
    vectors = [entry.embedding for entry in answer.data]
    assert vectors[0] == vectors[1] != vectors[2]
    assert math.isclose(sum(value**2 for value in vectors[0]), 1, rel_tol=1e-4)
    short = client.embeddings.create(model="books-7m", input="the sea", dimensions=16)
    assert len(short.data[0].embedding) == 16


def test_ways_of_pooling_and_of_writing_numbers(server: Any) -> None:
    def ask(**fields: Any) -> Any:
        return server.post("/v1/embeddings", {"input": "the sea", **fields}).json()["data"][0]

    mean, last = ask()["embedding"], ask(pooling="last")["embedding"]
    assert mean != last
    packed = base64.b64decode(ask(encoding_format="base64")["embedding"])
    assert struct.unpack(f"<{len(mean)}f", packed) == pytest.approx(mean, abs=1e-6)


def test_token_ids_embed_like_their_text(server: Any, tokenizer: Any) -> None:
    by_text = server.post("/v1/embeddings", {"input": "the sea"}).json()["data"]
    ids = list(tokenizer.encode("the sea"))
    assert server.post("/v1/embeddings", {"input": [ids]}).json()["data"] == by_text


# Anthropic


@pytest.fixture(scope="module")
def claude(server: Any) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key="any", max_retries=0)


def test_anthropics_client_gets_a_message(claude: anthropic.Anthropic, story: str) -> None:
    message = claude.messages.create(
        model="books-7m",
        max_tokens=12,
        extra_body={"temperature": 0},
        messages=QUESTION,  # type: ignore[arg-type]
    )
    [block] = message.content
    assert block.type == "text"
    assert block.text == story
    assert message.stop_reason == "max_tokens"
    assert message.usage.output_tokens == 12


def test_anthropics_client_streams(claude: anthropic.Anthropic, story: str) -> None:
    with claude.messages.stream(
        model="books-7m",
        max_tokens=12,
        extra_body={"temperature": 0},
        system="",
        messages=QUESTION,  # type: ignore[arg-type]
    ) as stream:
        assert "".join(stream.text_stream) == story
        assert stream.get_final_message().usage.output_tokens == 12


def test_anthropics_client_calls_tools(claude: anthropic.Anthropic) -> None:
    tool = {"name": "look", "description": "Look", "input_schema": TOOL_SCHEMA}
    with claude.messages.stream(
        model="books-7m",
        max_tokens=200,
        messages=QUESTION,  # type: ignore[arg-type]
        tools=[tool],  # type: ignore[list-item]
        tool_choice={"type": "tool", "name": "look"},
    ) as stream:
        message = stream.get_final_message()
    [block] = message.content
    assert block.type == "tool_use"
    assert set(block.input) == {"city"}  # type: ignore[call-overload]
    assert message.stop_reason == "tool_use"
    result = {"type": "tool_result", "tool_use_id": block.id, "content": "sunny"}
    answer = claude.messages.create(
        model="books-7m",
        max_tokens=4,
        messages=[
            *QUESTION,  # type: ignore[list-item]
            {"role": "assistant", "content": message.content},
            {"role": "user", "content": [result]},  # type: ignore[typeddict-item]
        ],
    )
    assert answer.role == "assistant"


def test_anthropics_client_counts_tokens_and_reads_errors(claude: anthropic.Anthropic) -> None:
    counted = claude.messages.count_tokens(model="books-7m", messages=QUESTION)  # type: ignore[arg-type]
    assert counted.input_tokens > 4
    with pytest.raises(anthropic.NotFoundError) as caught:
        claude.messages.create(model="nope", max_tokens=1, messages=QUESTION)  # type: ignore[arg-type]
    assert caught.value.body["error"]["type"] == "not_found_error"  # type: ignore[index]


# Ollama


@pytest.fixture(scope="module")
def llama(server: Any) -> ollama.Client:
    return ollama.Client(host=server.url)


GREEDY = {"temperature": 0, "num_predict": 12, "num_ctx": 4096}


def test_ollamas_client_chats(llama: ollama.Client, story: str) -> None:
    answer = llama.chat(model="books-7m:latest", messages=QUESTION, options=GREEDY)
    assert answer.message.content == story
    assert answer.done_reason == "length"
    assert answer.eval_count == 12
    assert answer.total_duration
    assert answer.prompt_eval_count
    parts = list(llama.chat(model="books-7m", messages=QUESTION, options=GREEDY, stream=True))
    assert "".join(part.message.content or "" for part in parts) == story
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]


def test_ollamas_client_generates(llama: ollama.Client, server: Any, story: str) -> None:
    answer = llama.generate(model="books-7m", prompt="Tell me a story.", options=GREEDY)
    assert answer.response == story
    raw = llama.generate(model="books-7m", prompt="Once", raw=True, options=GREEDY)
    assert raw.response == server.complete("Once", max_tokens=12)["choices"][0]["text"]
    assert llama.generate(model="books-7m", prompt="").done_reason == "load"


def test_ollamas_client_asks_for_a_form_and_for_calls(llama: ollama.Client) -> None:
    tool = {"type": "function", "function": {"name": "look", "parameters": TOOL_SCHEMA}}
    answer = llama.chat(model="books-7m", messages=QUESTION, tools=[tool], options=GREEDY)
    assert answer.message.content
    schema = {"enum": ["red", "green"]}
    formed = llama.chat(model="books-7m", messages=QUESTION, format=schema, options=GREEDY)
    assert json.loads(formed.message.content or "") in ("red", "green")


def test_ollamas_client_looks_around(llama: ollama.Client) -> None:
    [model] = llama.list().models
    assert model.model == "builtin:books-7m"
    assert llama.show("books-7m").modelinfo
    assert llama.ps().models[0].context_length
    assert llama.pull("books-7m").status == "success"
    [vector] = llama.embed(model="books-7m", input="the sea").embeddings
    assert len(vector) == len(llama.embeddings(model="books-7m", prompt="the sea").embedding)
    with pytest.raises(ollama.ResponseError) as caught:
        llama.chat(model="nope", messages=QUESTION)
    assert caught.value.status_code == 404
    assert "does not exist" in caught.value.error


def test_lines_of_ollama_are_json(server: Any) -> None:
    body = {"messages": QUESTION, "options": {"num_predict": 3}}
    response = server.post("/api/chat", body)
    assert response.headers["content-type"].startswith("application/x-ndjson")
    assert [json.loads(text)["done"] for text in response.text.splitlines()][-1] is True
    assert server.get("/api/version").json()["version"]


# Text Generation Inference


@pytest.fixture(scope="module")
def hugging_face(server: Any) -> InferenceClient:
    return InferenceClient(server.url)


def test_hugging_faces_client_generates(hugging_face: InferenceClient, server: Any) -> None:
    expected = server.complete("Once upon", max_tokens=12)["choices"][0]["text"]
    assert hugging_face.text_generation("Once upon", max_new_tokens=12) == expected
    detailed = hugging_face.text_generation(
        "Once upon", max_new_tokens=12, details=True, decoder_input_details=True
    )
    assert detailed.generated_text == expected
    assert detailed.details is not None
    assert len(detailed.details.tokens) == 12
    assert detailed.details.finish_reason == "length"
    streamed = list(hugging_face.text_generation("Once upon", max_new_tokens=12, stream=True))
    assert "".join(streamed) == expected
    whole = hugging_face.text_generation("Once upon", max_new_tokens=12, return_full_text=True)
    assert whole == f"Once upon{expected}"


def test_hugging_faces_client_chats(hugging_face: InferenceClient, story: str) -> None:
    answer = hugging_face.chat_completion(QUESTION, max_tokens=12, temperature=0)
    assert answer.choices[0].message.content == story


def test_the_routes_of_tgi(server: Any) -> None:
    body = {"inputs": "Once upon", "parameters": {"max_new_tokens": 5}}
    text = server.post("/generate", body).json()["generated_text"]
    events = server.post("/generate_stream", body).text.split("\n\n")[:-1]
    last = json.loads(events[-1].removeprefix("data:"))
    assert last["generated_text"] == text
    assert last["details"]["generated_tokens"] == 5
    assert server.get("/info").json()["max_total_tokens"] > 0
    refused = server.post("/generate", {"inputs": "x", "parameters": {"top_p": 5}})
    assert refused.status_code == 400
    assert refused.json()["error_type"] == "validation"


# Plain


def test_the_plain_chat_streams_data_lines(server: Any, story: str) -> None:
    response = server.post(
        "/chat?message=Tell me a story.", {"max_new_tokens": 12, "temperature": 0}
    )
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")[:-1]
    texts = ["\n".join(row.removeprefix("data: ") for row in event.split("\n")) for event in events]
    assert "".join(texts) == story
    assert server.post("/chat?message=Hello", {"max_new_tokens": 2}).status_code == 200
    assert server.http.post("/chat").status_code == 400


# The tokenizer


def test_the_tokenizer_is_reached_over_http(server: Any, tokenizer: Any) -> None:
    text = "The ship sailed."
    told = server.post("/tokenize", {"prompt": text, "return_token_strs": True}).json()
    assert told["tokens"] == list(tokenizer.encode(text))
    assert told["count"] == len(told["tokens"])
    assert "".join(told["token_strs"]) == text
    assert server.post("/detokenize", {"tokens": told["tokens"]}).json()["prompt"] == text
    chat = server.post("/tokenize", {"messages": QUESTION}).json()
    assert chat["count"] > 4
    info = server.get("/tokenizer_info").json()
    assert info["eos_token"]
    assert server.post("/tokenize", {}).status_code == 400
    assert server.post("/detokenize", {"tokens": [10**9]}).status_code == 400
