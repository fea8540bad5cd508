"""A real server for the tests: the bundled model in float32 and uvicorn on a loopback port.

The model is loaded once for all; each server has an engine of its own on it.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import save_file

from qtool.runtime.config import EngineConfig
from qtool.runtime.engine.async_engine import AsyncEngine
from qtool.runtime.engine.client import EngineClient
from qtool.runtime.loading import LoadedModel
from qtool.runtime.server.config import ServerConfig
from qtool.runtime.server.launch import load
from qtool.runtime.server.serve import ServerRun, bind, url_of
from qtool.runtime.server.service import Service
from qtool.runtime.store import Store
from qtool.runtime.tokenizer import Tokenizer

MODEL = "builtin:books-7m"
DEADLINE_SECONDS = 60
ADAPTED = {"self_attn.q_proj": (256, 256), "mlp.up_proj": (768, 256)}


@dataclass(frozen=True)
class LiveServer:
    url: str
    service: Service
    http: httpx.Client

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.http.get(path, **options)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return self.http.post(path, json=body, **options)

    @contextmanager
    def stream(self, body: Any) -> Iterator[Iterator[str]]:
        """The lines of a streamed completion; leaving the block hangs up."""
        url = f"{self.url}/v1/completions"
        with httpx.stream("POST", url, json={**body, "stream": True}, timeout=60) as response:
            assert response.status_code == 200
            # Kept in a name: dropping the iterator would close the connection.
            lines = response.iter_lines()
            yield lines

    def complete(self, prompt: Any, **fields: Any) -> dict[str, Any]:
        response = self.post("/v1/completions", {"prompt": prompt, "temperature": 0, **fields})
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def metric(self, name: str, labels: str = "{") -> float:
        """The value of a metric; the sum of them where the labels fit several."""
        lines = self.get("/metrics").text.splitlines()
        values = [
            float(line.rpartition(" ")[2]) for line in lines if line.startswith(name + labels)
        ]
        assert values, name
        return sum(values)

    def wait_for_metric(self, name: str, expected: Callable[[float], bool]) -> None:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not expected(value := self.metric(name)):
            assert time.monotonic() < deadline, f"{name} stays at {value}"
            time.sleep(0.02)


@contextmanager
def live_server(
    make_client: Callable[[], EngineClient],
    tokenizer: Tokenizer,
    config: ServerConfig,
    names: Store,
) -> Iterator[LiveServer]:
    """`qtool serve` without its command line, in a thread."""
    bound = bind("127.0.0.1", 0)
    url = url_of(bound)
    started: list[tuple[Service, ServerRun, asyncio.AbstractEventLoop]] = []
    ready = threading.Event()

    async def main() -> None:
        client = make_client()
        await client.start()
        service = Service.build(client, tokenizer, config, names)
        run = ServerRun(service, bound)
        started.append((service, run, asyncio.get_running_loop()))
        await run.serve(ready.set)
        await client.stop()

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    try:
        assert ready.wait(DEADLINE_SECONDS)
        service, run, loop = started[0]
        try:
            with httpx.Client(base_url=url, timeout=DEADLINE_SECONDS) as http:
                yield LiveServer(url, service, http)
        finally:
            loop.call_soon_threadsafe(run.request_stop)
    finally:
        thread.join(DEADLINE_SECONDS)
    assert not thread.is_alive()


@pytest.fixture(scope="session")
def loaded_model() -> LoadedModel:
    return load(EngineConfig(MODEL, dtype="float32"))


@pytest.fixture(scope="session")
def server_config() -> ServerConfig:
    return ServerConfig((MODEL,), model_root=MODEL, max_running=8, shutdown_timeout=5)


@pytest.fixture(scope="session")
def tokenizer(loaded_model: LoadedModel) -> Tokenizer:
    assert loaded_model.tokenizer is not None
    return loaded_model.tokenizer


@pytest.fixture(scope="session")
def serve(
    loaded_model: LoadedModel,
    tokenizer: Tokenizer,
    server_config: ServerConfig,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Any]:
    """``with serve(max_queued=1) as server``: a server with some of its settings changed, and names
    of its own.

    ``engine``: changes of the engine's settings; ``client``: another engine altogether, and
    ``tokenizer`` its own.
    """
    usual = {"max_num_seqs": 8, "kv_cache_memory_bytes": 64 * 2**20}

    def start(
        *,
        engine: dict[str, Any] | None = None,
        client: Callable[[], EngineClient] | None = None,
        tokenizer: Tokenizer = tokenizer,
        **changes: Any,
    ) -> Any:
        config = EngineConfig(MODEL, dtype="float32", **{**usual, **(engine or {})})
        make_client = client or partial(AsyncEngine.from_loaded, loaded_model, config)
        names = Store(tmp_path_factory.mktemp("names"))
        return live_server(make_client, tokenizer, replace(server_config, **changes), names)

    return start


@pytest.fixture(scope="module")
def server(serve: Callable[..., Any]) -> Iterator[LiveServer]:
    with serve() as running:
        yield running


@pytest.fixture(scope="session")
def lora_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter for the bundled model."""
    path = tmp_path_factory.mktemp("adapter")
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for index in range(8):
        for module, (out, inner) in ADAPTED.items():
            prefix = f"base_model.model.model.layers.{index}.{module}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(4, inner, generator=generator)
            up = torch.randn(out, 4, generator=generator)
            tensors[f"{prefix}.lora_B.weight"] = 0.02 * up
    save_file(tensors, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8})
    )
    return path
