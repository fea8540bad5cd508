"""What an operator can set: keys, origins, names, limits, defaults."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

from qtool.errors import UsageError
from qtool.runtime.server.config import SamplingDefaults, ServerConfig
from qtool.runtime.server.launch import sampling_defaults
from qtool.runtime.server_options import json_list


def test_keys_guard_the_api_and_nothing_else(serve: Callable[..., Any]) -> None:
    with serve(api_keys=("first", "second"), allowed_origins=("https://app.example",)) as server:
        refused = server.get("/v1/models")
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"] == "Bearer"
        assert refused.json()["error"]["code"] == "invalid_api_key"
        for header in ("Bearer third", "Basic first", "first", "Bearer", "Bearer é"):
            response = server.get("/v1/models", headers={"Authorization": header.encode()})
            assert response.status_code == 401, header
        assert server.get("/v1/models", headers={"Authorization": "bearer  first"}).is_success
        for key in ("first", "second"):
            assert openai.OpenAI(base_url=f"{server.url}/v1", api_key=key).models.list().data
        for path in ("/health", "/metrics", "/version"):
            assert server.get(path).status_code == 200
        # A browser asks without the key whether it may call.
        asking = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
        assert server.http.options("/v1/models", headers=asking).status_code == 200


@pytest.mark.parametrize(
    ("given", "read"), [("*", ["*"]), ('["*"]', ["*"]), ("https://a.b", ["https://a.b"])]
)
def test_origins_are_given_one_by_one_or_as_json(given: str, read: list[str]) -> None:
    assert json_list(given, "--allowed-origins") == read


def test_a_model_can_have_several_names(serve: Callable[..., Any]) -> None:
    with serve(served_model_names=("books", "gpt-4o")) as server:
        listed = server.get("/v1/models").json()["data"]
        assert [model["id"] for model in listed] == ["books", "gpt-4o"]
        assert server.complete("Once", model="gpt-4o", max_tokens=1)["model"] == "gpt-4o"
        assert server.complete("Once", max_tokens=1)["model"] == "books"
        assert server.post("/v1/completions", {"prompt": "a", "model": "x"}).status_code == 404


def test_each_key_has_its_own_share(serve: Callable[..., Any]) -> None:
    keys = [{"Authorization": f"Bearer {key}"} for key in ("first", "second")]
    # Many long answers: they are not done before the next request comes, however slow that is.
    body = {"prompt": "Once", "max_tokens": 500, "ignore_eos": True, "stream": True, "n": 4}
    with serve(api_keys=("first", "second"), max_per_client=4) as server:
        url = f"{server.url}/v1/completions"
        with httpx.stream("POST", url, json=body, headers=keys[0], timeout=60) as running:
            lines = running.iter_lines()  # held: where it is let go, httpx hangs up
            next(lines)
            refused = server.post("/v1/completions", {"prompt": "a"}, headers=keys[0])
            assert refused.status_code == 429
            assert refused.json()["error"]["code"] == "client_limit"
            assert int(refused.headers["retry-after"]) >= 1
            other = server.post("/v1/completions", {"prompt": "a"}, headers=keys[1])
            assert other.status_code == 200
        assert server.metric("vllm:admission_rejections_total", "{") == 1


def test_a_full_queue_is_a_429_that_says_when_to_return(serve: Callable[..., Any]) -> None:
    with serve(max_running=1, max_queued=0) as server:
        with server.stream({"prompt": "Once", "max_tokens": 500, "ignore_eos": True}) as running:
            next(running)
            refused = server.post("/v1/completions", {"prompt": "a"})
            assert refused.status_code == 429
            assert int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error"]["code"] == "queue_full"
            # The status of a stream is decided before its headers go out.
            assert (
                server.post("/v1/completions", {"prompt": "a", "stream": True}).status_code == 429
            )
        server.wait_for_metric("vllm:num_requests_running", lambda value: value == 0)
        assert server.complete("Once", max_tokens=1)


def test_a_cache_smaller_than_the_context_is_the_limit(serve: Callable[..., Any]) -> None:
    with serve(engine={"max_model_len": 64}) as server:
        error = server.post("/v1/completions", {"prompt": [5] * 60, "max_tokens": 5}).json()[
            "error"
        ]
        assert error["code"] == "context_length_exceeded"
        assert "64 tokens" in error["message"]
        assert server.complete([5] * 60, max_tokens=4)


def test_silent_streams_get_comments_when_asked_for(serve: Callable[..., Any]) -> None:
    with serve(sse_keep_alive_seconds=0.001) as server:
        body = {"prompt": "Once", "max_tokens": 50, "stream": True, "ignore_eos": True}
        text = server.post("/v1/completions", body).text
        assert ": keep-alive\n\n" in text
        data = [line for line in text.splitlines() if line.startswith("data: ")]
        assert len(data) == 51
        assert text.endswith("data: [DONE]\n\n")


def test_the_models_own_sampling_values_are_the_defaults(serve: Callable[..., Any]) -> None:
    with serve(sampling=SamplingDefaults(temperature=0.0, max_new_tokens=5)) as server:
        texts = {
            server.post("/v1/completions", {"prompt": "Once"}).json()["choices"][0]["text"]
            for _ in range(3)
        }
        assert len(texts) == 1, "temperature 0"
        body = {"messages": [{"role": "user", "content": "Hi"}], "ignore_eos": True}
        usage = server.post("/v1/chat/completions", body).json()["usage"]
        assert usage["completion_tokens"] <= 5


def test_sampling_values_are_read_from_the_generation_config() -> None:
    given = {
        "temperature": 0.6,
        "top_p": 0.95,
        "top_k": 20,
        "max_new_tokens": 2048,
        "do_sample": True,
    }
    assert sampling_defaults(given) == SamplingDefaults(0.6, 0.95, 20, 0.0, max_new_tokens=2048)


@pytest.mark.parametrize(
    "given", [{}, {"temperature": None, "top_k": "many", "top_p": [], "max_new_tokens": -1}]
)
def test_values_of_a_wrong_type_leave_openais_defaults(given: dict[str, Any]) -> None:
    assert sampling_defaults(given) == SamplingDefaults()


@pytest.mark.parametrize(
    "fields",
    [{"api_keys": ("",)}, {"max_running": 0}, {"max_queued": -1}, {"shutdown_timeout": -1}],
)
def test_settings_that_make_no_sense_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        ServerConfig(("model",), **fields)


def test_a_client_cannot_fake_lines_of_the_log(
    serve: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    with serve() as server, caplog.at_level("INFO", "qtool.server"):
        server.post("/v1/completions", {"prompt": "a", "model": "x\nfake \x1b[2J"})
    [record] = [record for record in caplog.records if "404" in record.getMessage()]
    assert "x?fake ?[2J" in record.getMessage()


def test_two_servers_in_one_process_count_for_themselves(serve: Callable[..., Any]) -> None:
    with serve() as first, serve(served_model_names=("other",)) as second:
        first.complete("Once", max_tokens=2)
        assert first.metric("vllm:generation_tokens_total") == 2
        assert second.metric("vllm:generation_tokens_total") == 0
        assert threading.active_count() >= 4
