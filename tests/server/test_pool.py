"""Several models behind one server: which are loaded, when they go, and that none disturbs another.

The models are copies of the bundled one, which are loaded for real.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from qtool.runtime.config import EngineConfig
from qtool.runtime.engine.async_engine import AsyncEngine
from qtool.runtime.loading import LoadedModel
from qtool.runtime.modelfile import Modelfile
from qtool.runtime.server.config import ServerConfig
from qtool.runtime.server.launch import model_pool
from qtool.runtime.server.pool import Hosted, ModelPool, PoolLimits, keep_alive_seconds
from qtool.runtime.server.serve import ServerRun, bind, url_of
from qtool.runtime.server.service import Service
from qtool.runtime.store import store

FIRST = "builtin:books-7m"
CACHE_BYTES = 16 * 2**20


@pytest.mark.parametrize(
    ("value", "seconds"),
    [(5, 5.0), ("5m", 300.0), ("1.5h", 5400.0), ("0", 0.0), (-1, None), ("-1s", None), ({}, 7.0)],
)
def test_keep_alive_is_read_as_ollama_writes_it(value: Any, seconds: float | None) -> None:
    assert keep_alive_seconds(value, 7.0) == seconds


@pytest.fixture
def models(tmp_path: Path, books_7m: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two models beside the first, and a name made from each."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    made = []
    for number in ("second", "third"):
        (tmp_path / number).symlink_to(books_7m)
        made.append(str(tmp_path / number))
    store().keep("poet", Modelfile(made[1], system="A poet.", parameters={"num_predict": 3}))
    store().keep("captain", Modelfile(made[0], parameters={"num_predict": 2}))
    return made


@pytest.fixture
def several(
    models: list[str], loaded_model: LoadedModel, server_config: ServerConfig
) -> Iterator[tuple[httpx.Client, ModelPool, list[str]]]:
    """A server of three models, of which two may be loaded at once."""
    config = replace(server_config, max_loaded_models=2, keep_alive=0)
    with pool_server([models[0], "poet"], loaded_model, config) as (http, pool):
        yield http, pool, models


@contextmanager
def pool_server(
    others: list[str], loaded_model: LoadedModel, config: ServerConfig
) -> Iterator[tuple[httpx.Client, ModelPool]]:
    engine = EngineConfig(FIRST, dtype="float32", kv_cache_memory_bytes=CACHE_BYTES)
    config = replace(config, also_served=tuple(others))
    bound = bind("127.0.0.1", 0)
    ready = threading.Event()
    running: list[Any] = []

    async def main() -> None:
        client = AsyncEngine.from_loaded(loaded_model, engine)
        await client.start()
        assert loaded_model.tokenizer is not None
        service = Service.build(client, loaded_model.tokenizer, config)
        pool = model_pool(service, engine, config)
        run = ServerRun(service, bound, pool)
        running.extend([pool, run, asyncio.get_running_loop()])
        await run.serve(ready.set)
        await client.stop()

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    assert ready.wait(60)
    pool, run, loop = running
    try:
        with httpx.Client(base_url=url_of(bound), timeout=60) as http:
            yield http, pool
    finally:
        loop.call_soon_threadsafe(run.request_stop)
        thread.join(60)
    assert not thread.is_alive()
    assert pool.loaded_names == []


def test_models_come_and_go_as_they_are_asked_for(
    several: tuple[httpx.Client, ModelPool, list[str]],
) -> None:
    http, pool, (second, third) = several
    poet = "poet"

    def complete(model: str | None) -> dict[str, Any]:
        body = {"model": model, "prompt": "Once", "max_tokens": 2, "temperature": 0}
        response = http.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    assert [entry["id"] for entry in http.get("/v1/models").json()["data"]] == [
        FIRST,
        second,
        poet,
    ]
    own = complete(None)
    assert pool.loaded_names == []
    other = complete(second)
    assert other["model"] == second
    assert other["choices"][0]["text"] == own["choices"][0]["text"]
    assert pool.loaded_names == [second]

    # There is room for one beside the first: the poet's model takes it, and its name says how.
    messages = [{"role": "user", "content": "Hello"}]
    chat = http.post("/v1/chat/completions", json={"model": poet, "messages": messages}).json()
    assert chat["usage"]["completion_tokens"] == 3
    plain = http.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 1}).json()
    assert chat["usage"]["prompt_tokens"] > plain["usage"]["prompt_tokens"]
    assert pool.loaded_names == [third]
    running = http.get("/api/ps").json()["models"]
    assert [model["name"] for model in running] == [FIRST, third]

    metrics = http.get("/metrics").text
    for name in (FIRST, third):
        assert f'vllm:num_requests_running{{engine="0",model_name="{name}"}} 0.0' in metrics
    assert metrics.count("# TYPE http_requests_total ") == 1

    # A name that was made since the start, from a model that is served.
    store().keep("late", Modelfile("captain", system="Late."))
    assert complete("late")["usage"]["completion_tokens"] == 2
    assert pool.loaded_names == [second]

    # As Ollama's clients unload a model.
    body = {"model": "captain:latest", "prompt": "", "keep_alive": 0}
    assert http.post("/api/generate", json=body).json()["done_reason"] == "unload"
    deadline = threading.Event()
    for _ in range(200):
        if not pool.loaded_names:
            break
        deadline.wait(0.05)
    assert pool.loaded_names == []
    assert http.post("/v1/completions", json={"model": "x", "prompt": "a"}).status_code == 404
    assert http.post("/v1/completions", content=b"{").status_code == 400
    (store().folder / "torn.json").write_text("{")
    torn = http.post("/v1/completions", json={"model": "torn", "prompt": "a"})
    assert torn.status_code == 400
    assert "qtool rm torn" in torn.text
    (store().folder / "torn.json").unlink()
    assert complete(None)["choices"] == own["choices"]


def test_a_model_in_use_is_not_unloaded(
    several: tuple[httpx.Client, ModelPool, list[str]],
) -> None:
    http, pool, (second, third) = several
    body = {"model": second, "prompt": "Once", "max_tokens": 300, "ignore_eos": True}
    with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
        lines = response.iter_lines()
        next(lines)
        answered: list[int] = []

        def ask_for_the_other() -> None:
            asked = {"model": "poet", "prompt": "Once", "max_tokens": 1}
            answered.append(
                httpx.post(f"{http.base_url}/v1/completions", json=asked, timeout=120).status_code
            )

        asking = threading.Thread(target=ask_for_the_other)
        asking.start()
        rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert len(rest) == 300
    asking.join(120)
    assert answered == [200]
    assert pool.loaded_names == [third]


def test_models_make_room_for_each_other_by_bytes(
    models: list[str], loaded_model: LoadedModel, server_config: ServerConfig
) -> None:
    second, third = models
    each = loaded_model.nbytes + CACHE_BYTES
    config = replace(server_config, max_loaded_models=5, max_loaded_bytes=2 * each + each // 2)
    with pool_server(models, loaded_model, config) as (http, pool):
        for model in (second, third, second):
            asked = {"model": model, "prompt": "Once", "max_tokens": 1}
            assert http.post("/v1/completions", json=asked).status_code == 200
            assert pool.loaded_names == [model]


def test_nothing_is_loaded_for_a_request_without_its_key(
    models: list[str], loaded_model: LoadedModel, server_config: ServerConfig
) -> None:
    config = replace(server_config, api_keys=("secret",))
    with pool_server(models, loaded_model, config) as (http, pool):
        asked = {"model": models[0], "prompt": "Once", "max_tokens": 1}
        refused = http.post("/v1/completions", json=asked)
        assert (refused.status_code, pool.loaded_names) == (401, [])
        for path in ("/health", "/docs", "/web/page"):
            assert http.post(path, json=asked).status_code in (404, 405)
            assert pool.loaded_names == []
        assert http.get("/api/ps").status_code == 401
        assert http.get("/metrics").status_code == 200
        key = {"Authorization": "Bearer secret"}
        assert http.post("/v1/completions", json=asked, headers=key).status_code == 200
        assert len(http.get("/api/ps", headers=key).json()["models"]) == 2


class Stub:
    """Of a loaded model what a pool looks at. slow: seconds that its end takes"""

    def __init__(self, slow: float = 0.0) -> None:
        self.client = self
        self.slow = slow
        self.failed = self.stopped = False

    def healthy(self) -> bool:
        return not self.failed

    async def stop(self) -> None:
        await asyncio.sleep(self.slow)
        self.stopped = True


def stub_pool(keep_seconds: float | None, slow: float = 0.0) -> ModelPool:
    def hosted() -> Hosted:
        service: Any = Stub(slow)
        app: Any = None
        return Hosted(service, app, keep_seconds)

    async def load(name: str, room: int | None) -> Hosted:
        return hosted()

    return ModelPool(hosted(), lambda name: name, load, PoolLimits(models=9))


def test_models_that_expire_together_may_be_unloaded_by_somebody_else() -> None:
    async def work() -> None:
        pool = stub_pool(0.0, slow=0.05)
        taken = [await pool.take(name) for name in ("a", "b", "c")]
        for hosted in taken:
            pool.give_back(hosted)
        expiring = asyncio.create_task(pool.unload_expired())
        await asyncio.sleep(0)  # a is being unloaded
        assert pool.loaded_names == ["b", "c"]
        await pool._unload("b")
        await pool._unload("c")
        again = await pool.take("c")  # loaded anew, and in use
        await expiring
        assert pool.loaded_names == ["c"]
        assert not again.service.client.stopped  # type: ignore[attr-defined]

    asyncio.run(work())


def test_a_model_whose_engine_has_failed_is_loaded_anew() -> None:
    async def work() -> None:
        pool = stub_pool(None)
        first = await pool.take("a")
        pool.give_back(first)
        assert await pool.take("a") is first
        first.service.client.failed = True  # type: ignore[attr-defined]
        second = await pool.take("a")
        assert second is not first
        assert first.service.client.stopped  # type: ignore[attr-defined]
        assert await pool.take("a") is second

    asyncio.run(work())


def test_a_model_that_can_never_fit_is_refused_with_the_numbers(
    models: list[str], loaded_model: LoadedModel, server_config: ServerConfig
) -> None:
    each = loaded_model.nbytes + CACHE_BYTES
    config = replace(server_config, max_loaded_bytes=each + each // 2)
    with pool_server(models, loaded_model, config) as (http, pool):
        asked = {"model": models[0], "prompt": "Once", "max_tokens": 1}
        refused = http.post("/v1/completions", json=asked)
        assert refused.status_code == 400
        assert "--max-loaded-bytes" in refused.json()["error"]["message"]
        assert pool.loaded_names == []
        assert http.post("/v1/completions", json={"prompt": "a"}).status_code == 200
