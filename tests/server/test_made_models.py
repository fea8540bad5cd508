"""Names made from the model that is served: by Ollama's routes, and answered by the same engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ollama
import pytest

from qtool.errors import UsageError
from qtool.runtime.modelfile import Modelfile, parse_modelfile, read_parameters

MODEL = "builtin:books-7m"
QUESTION = [{"role": "user", "content": "Hello"}]
EXAMPLE = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho."}]


@pytest.fixture(scope="module")
def client(server: Any) -> ollama.Client:
    return ollama.Client(server.url)


def chat(server: Any, model: str, **fields: Any) -> dict[str, Any]:
    body = {"model": model, "messages": QUESTION, "temperature": 0, "max_tokens": 4, **fields}
    answer = server.post("/v1/chat/completions", body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_a_name_is_made_used_copied_and_deleted(server: Any, client: ollama.Client) -> None:
    before = server.metric("vllm:generation_tokens_total")
    made = client.create(
        model="poet",
        from_=MODEL,
        system="You are a poet.",
        parameters={"temperature": 0, "num_predict": 3, "seed": 7},
        messages=EXAMPLE,
    )
    assert made.status == "success"
    poet = chat(server, "poet", max_tokens=None, temperature=None)
    assert poet["model"] == "poet"
    assert poet["usage"]["completion_tokens"] == 3
    system = {"role": "system", "content": "You are a poet."}
    messages = [system, *EXAMPLE, *QUESTION]
    same = chat(server, MODEL, messages=messages, max_tokens=3)
    assert poet["choices"][0]["message"] == same["choices"][0]["message"]
    assert server.metric("vllm:generation_tokens_total") == before + 6, "one engine for both"

    client.copy("poet", "bard")
    listed = [model.model for model in client.list().models]
    assert listed == [MODEL, "bard", "poet"]
    cards = {card["id"]: card["parent"] for card in server.get("/v1/models").json()["data"]}
    assert cards == {MODEL: None, "bard": MODEL, "poet": MODEL}
    shown = client.show("bard")
    assert "SYSTEM You are a poet." in (shown.modelfile or "")
    assert "num_predict 3" in (shown.parameters or "")
    assert client.chat("bard", QUESTION).message.content
    assert client.generate("bard:latest", "Hello").response

    client.create(model="poet", from_="bard", system="You are another.")
    other = chat(server, "poet", max_tokens=3)
    assert other["usage"]["prompt_tokens"] != poet["usage"]["prompt_tokens"], "made anew"
    for name in ("poet", "bard"):
        client.delete(name)
    assert server.post("/v1/completions", {"model": "poet", "prompt": "a"}).status_code == 404
    assert [model.model for model in client.list().models] == [MODEL]


def test_creating_streams_lines_and_takes_a_modelfile(server: Any) -> None:
    text = f"FROM {MODEL}\nPARAMETER num_predict 2\nTEMPLATE alpaca\n"
    response = server.post("/api/create", {"name": "older", "modelfile": text})
    assert [json.loads(line)["status"] for line in response.text.splitlines()] == [
        "writing manifest",
        "success",
    ]
    made = chat(server, "older", max_tokens=None)
    assert made["usage"]["completion_tokens"] <= 2
    assert made["usage"]["prompt_tokens"] != chat(server, MODEL)["usage"]["prompt_tokens"]
    assert server.http.request("DELETE", "/api/delete", json={"name": "older"}).status_code == 200


@pytest.mark.parametrize(
    ("fields", "status", "words"),
    [
        ({"from": MODEL}, 400, "`model` is required"),
        ({"model": "x"}, 400, "`from` is required"),
        ({"model": MODEL, "from": MODEL}, 400, "is served"),
        ({"model": "../x", "from": MODEL}, 400, "cannot be a name"),
        ({"model": "x", "from": "/etc"}, 404, "not served"),
        ({"model": "x", "modelfile": "FROM /etc"}, 404, "not served"),
        ({"model": "x", "modelfile": f"FROM {MODEL}\nADAPTER /etc"}, 400, "ADAPTER"),
        ({"model": "x", "from": MODEL, "adapters": {"a": "sha256:0"}}, 400, "adapters"),
        ({"model": "x", "from": MODEL, "files": {"a": "sha256:0"}}, 400, "files"),
        ({"model": "x", "from": MODEL, "quantize": "q4_K_M"}, 400, "quantize"),
        ({"model": "x", "from": MODEL, "template": "/etc/passwd"}, 400, "template"),
        ({"model": "x", "from": MODEL, "template": "{% for a in b %}"}, 400, "template"),
        ({"model": "x", "from": MODEL, "template": "{{ .Prompt }}"}, 400, "Go"),
        ({"model": "x", "from": MODEL, "parameters": {"top_k": "many"}}, 400, "top_k"),
        ({"model": "x", "from": MODEL, "parameters": {"tok_p": 1}}, 400, "top_p"),
        ({"model": "x", "from": MODEL, "messages": [{"role": "robot"}]}, 400, "role"),
    ],
)
def test_what_cannot_be_made_is_refused(
    server: Any, fields: dict[str, Any], status: int, words: str
) -> None:
    response = server.post("/api/create", fields)
    assert response.status_code == status, response.text
    assert words in response.json()["error"]
    assert len(server.get("/api/tags").json()["models"]) == 1


def test_what_is_served_cannot_be_deleted_and_nothing_is_pushed(server: Any) -> None:
    def delete(name: str) -> Any:
        return server.http.request("DELETE", "/api/delete", json={"model": name})

    assert delete(MODEL).status_code == 400
    assert delete("nobody").status_code == 404
    assert server.post("/api/copy", {"source": "nobody", "destination": "x"}).status_code == 404
    for path in ("/api/push", "/api/blobs/sha256:0"):
        refused = server.post(path, {"model": MODEL})
        assert refused.status_code == 400
        assert "qtool" in refused.json()["error"]


def test_a_name_with_an_adapter_writes_as_the_adapter(serve: Any, lora_folder: Path) -> None:
    folder = str(lora_folder)
    with serve(engine={"lora_modules": {folder: folder}}, adapter=folder) as whole:
        # As `qtool serve captain` starts it: the adapter is the model's, and no model of its own.
        assert [card["id"] for card in whole.get("/v1/models").json()["data"]] == [MODEL]
        served = whole.complete("The sea", max_tokens=12)["choices"][0]["text"]
    with serve(engine={"lora_modules": {"sailor": folder}}) as server:
        server.service.made.store.keep("captain", Modelfile(MODEL, adapter=folder))
        texts = {
            model: server.complete("The sea", model=model, max_tokens=12)["choices"][0]["text"]
            for model in ("captain", "sailor", MODEL)
        }
    assert served == texts["captain"] == texts["sailor"] != texts[MODEL]


def test_a_name_with_an_adapter_needs_an_engine_that_takes_them(
    server: Any, lora_folder: Path
) -> None:
    names = server.service.made.store
    names.keep("captain", Modelfile(MODEL, adapter=str(lora_folder)))
    refused = server.post("/v1/completions", {"model": "captain", "prompt": "The sea"})
    names.remove("captain")
    assert refused.status_code == 400
    assert "--enable-lora" in refused.json()["error"]["message"]


def test_a_torn_name_is_told_to_who_asks_for_it_and_to_nobody_else(server: Any) -> None:
    torn = server.service.made.store.folder / "torn.json"
    torn.write_text("{")
    try:
        assert [card["id"] for card in server.get("/v1/models").json()["data"]] == [MODEL]
        asked = server.post("/v1/completions", {"model": "torn", "prompt": "a"})
        assert asked.status_code == 400
        assert "qtool rm torn" in asked.text
        unknown = server.post("/v1/completions", {"model": "nobody", "prompt": "a"})
        assert unknown.status_code == 404
    finally:
        torn.unlink()


def test_a_name_is_not_made_from_an_adapter_without_it(serve: Any, lora_folder: Path) -> None:
    with serve(engine={"lora_modules": {"sailor": str(lora_folder)}}) as server:
        made = server.post("/api/create", {"model": "captain", "from": "sailor"})
        copied = server.post("/api/copy", {"source": "sailor", "destination": "captain"})
        assert server.service.made.store.names() == []
    for refused in (made, copied):
        assert refused.status_code == 400
        assert "ADAPTER" in refused.json()["error"]


@pytest.mark.parametrize(
    ("origin", "settings", "status"),
    [
        ("https://evil.example", {}, 403),
        ("null", {}, 403),
        ("http://localhost:5173", {}, 200),
        ("http://localhost:5173", {"allowed_origins": ("https://good.example",)}, 403),
        ("https://good.example", {"allowed_origins": ("https://good.example",)}, 200),
        ("https://evil.example", {"allowed_origins": ("*",)}, 200),
        (None, {}, 200),
    ],
)
def test_pages_of_strangers_make_no_names(
    serve: Any, origin: str | None, settings: dict[str, Any], status: int
) -> None:
    """As a browser sends it without asking the server first."""
    headers = {"Content-Type": "text/plain"} | ({} if origin is None else {"Origin": origin})
    with serve(**settings) as server:
        body = json.dumps({"model": "poet", "from": MODEL, "system": "Lie."})
        made = server.http.post("/api/create", content=body, headers=headers)
        assert made.status_code == status, made.text
        body = json.dumps({"source": MODEL, "destination": "bard"})
        assert server.http.post("/api/copy", content=body, headers=headers).status_code == status
        expected = ["bard", "poet"] if status == 200 else []
        assert server.service.made.store.names() == expected


def test_parameters_of_the_api_are_those_of_a_modelfile() -> None:
    given = {"temperature": 0.5, "stop": ["a", "b"], "num_gpu": 99}
    assert read_parameters(given) == {"temperature": 0.5, "stop": ["a", "b"]}


def test_stops_of_the_api_are_taken_as_they_are_and_written_down_so() -> None:
    stops = ["\n", "\n\n", " User:", '"', "a\nb"]
    assert read_parameters({"stop": stops}) == {"stop": stops}
    made = Modelfile(MODEL, parameters={"stop": ["\n", "a\nb", "END"], "num_predict": 3})
    assert parse_modelfile(made.text()) == made
    with pytest.raises(UsageError, match="stop is empty"):
        read_parameters({"stop": [""]})
