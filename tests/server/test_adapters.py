"""Adapters over HTTP: they go by a name like models, and write what LLM writes with them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qtool import LLM, LoRARequest, SamplingParams


@pytest.fixture(scope="module")
def server(serve: Callable[..., Any], lora_folder: Path) -> Iterator[Any]:
    with serve(engine={"lora_modules": {"sailor": str(lora_folder)}}) as running:
        yield running


def test_an_adapter_is_listed_as_a_child_of_the_model(server: Any) -> None:
    listed = {card["id"]: card["parent"] for card in server.get("/v1/models").json()["data"]}
    assert listed == {"builtin:books-7m": None, "sailor": "builtin:books-7m"}
    assert server.get("/v1/models/sailor").json()["id"] == "sailor"


def test_the_dashboard_is_told_of_adapters(server: Any) -> None:
    """That names come and go with sequences is tested on the engine."""
    (line,) = (
        line
        for line in server.get("/metrics").text.splitlines()
        if line.startswith("vllm:lora_requests_info{")
    )
    for label in ('max_lora="', 'running_lora_adapters=""', 'waiting_lora_adapters=""'):
        assert label in line
    assert float(line.rpartition(" ")[2]) > 1.7e9


def test_its_name_as_the_model_makes_it_write(server: Any, lora_folder: Path) -> None:
    llm = LLM("builtin:books-7m", dtype="float32", lora_modules={"sailor": str(lora_folder)})
    greedy = SamplingParams(temperature=0, max_tokens=12)
    texts = {}
    for model, lora in (("sailor", LoRARequest("sailor")), ("builtin:books-7m", None)):
        (expected,) = llm.generate("The sea", greedy, lora_request=lora)
        answer = server.complete("The sea", model=model, max_tokens=12)
        assert answer["model"] == model
        texts[model] = answer["choices"][0]["text"]
        assert texts[model] == expected.outputs[0].text
    assert texts["sailor"] != texts["builtin:books-7m"]
    chat = server.post(
        "/v1/chat/completions",
        {"model": "sailor", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4},
    )
    assert chat.status_code == 200
    wrong = server.post("/v1/completions", {"model": "sailer", "prompt": "x"})
    assert wrong.status_code == 404
    assert "sailor" in wrong.json()["error"]["message"]
