"""A model in a process of its own, run by the bare engine or served over HTTP; see serve.py.

    python serve_host.py MODEL STREAMS

The first line that it writes has the server's URL. A line of JSON then is one order, and the answer
is one line:

    {"do": "engine", "work": [[PROMPT, TOKENS], ...]}   all at once by Engine.step, nothing else
    {"do": "first", "work": [[PROMPT, TOKENS], ...]}    one after the other by AsyncEngine
    {"do": "cpu"}                                       CPU seconds of this process so far
    {"do": "idle", "seconds": S}                        CPU seconds that waiting so long took
    {"do": "pool"}                                      the server's KV pool

MODEL is `random-0.5b` (Qwen2.5-0.5B's shape in int4, words for tokens) or any model.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers.decoders import WordPiece
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from qtool.runtime.config import EngineConfig
from qtool.runtime.engine.async_engine import AsyncEngine
from qtool.runtime.engine.engine import Engine
from qtool.runtime.engine.sampling_params import SamplingParams
from qtool.runtime.engine.sequence import GenerationRequest
from qtool.runtime.loading import LoadedModel, load_for
from qtool.runtime.random_model import QWEN_05B, random_model
from qtool.runtime.server.config import ServerConfig
from qtool.runtime.server.serve import ServerRun, bind, url_of
from qtool.runtime.server.service import Service
from qtool.runtime.tokenizer import Tokenizer
from qtool.runtime.tokenizer_parts import TokenizerParts

RANDOM = "random-0.5b"
CONTEXT = 1024
Work = Sequence[tuple[str, int]]


def load(config: EngineConfig) -> LoadedModel:
    if config.model != RANDOM:
        return load_for(config)
    return replace(random_model(), tokenizer=words(int(QWEN_05B["vocab_size"])))


def words(count: int) -> Tokenizer:
    """The words t0, t1, ... for tokens: any token is a text, and any such text a prompt."""
    backend = Backend(WordLevel({f"t{token}": token for token in range(count)}, unk_token="t0"))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.decoder = WordPiece(prefix="##")
    return Tokenizer(TokenizerParts(backend, {}, None, None, None))


@dataclass(slots=True)
class Host:
    """One model, an engine of its own for each of the two ways."""

    loaded: LoadedModel
    tokenizer: Tokenizer
    config: EngineConfig
    client: AsyncEngine
    count: int = 0

    def request(self, prompt: str, tokens: int) -> GenerationRequest:
        self.count += 1
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        ids = tuple(self.tokenizer.encode(prompt))
        return GenerationRequest(f"bench-{self.count}", ids, sampling)

    def engine(self, engine: Engine, work: Work) -> dict[str, float]:
        for prompt, tokens in work:
            engine.add(self.request(prompt, tokens))
        started, cpu, count = time.perf_counter(), time.process_time(), 0
        while engine.has_work:
            count += sum(len(output.new_token_ids) for output in engine.step())
        return {
            "seconds": time.perf_counter() - started,
            "cpu_seconds": time.process_time() - cpu,
            "tokens": count,
        }

    async def first(self, work: Work) -> list[float]:
        """Seconds to the first token, one request at a time."""
        seconds = []
        for prompt, tokens in work:
            started = time.perf_counter()
            async for _ in self.client.generate(self.request(prompt, tokens)):
                seconds.append(time.perf_counter() - started)
                break
            while self.client.stats().num_requests_running:
                await asyncio.sleep(0.001)
        return seconds

    async def obey(self, order: dict[str, Any], engine: Engine) -> Any:
        match order["do"]:
            case "engine":
                return await asyncio.to_thread(self.engine, engine, order["work"])
            case "first":
                return await self.first(order["work"])
            case "idle":
                before = time.process_time()
                await asyncio.sleep(order["seconds"])
                return time.process_time() - before
            case "pool":
                stats = self.client.stats()
                return {
                    "num_blocks": self.client.info.num_kv_blocks,
                    "usage": stats.kv_cache_usage,
                    "num_requests_running": stats.num_requests_running,
                    "num_requests_waiting": stats.num_requests_waiting,
                    "num_preemptions": stats.num_preemptions,
                }
        return time.process_time()


async def main(model: str, streams: int) -> None:
    config = EngineConfig(
        model,
        max_model_len=CONTEXT if model == RANDOM else None,
        max_num_seqs=streams,
        enable_prefix_caching=False,
        kv_cache_memory_bytes=600 << 20,
    )
    loaded = load(config)
    assert loaded.tokenizer is not None
    client = AsyncEngine.from_loaded(loaded, config)
    await client.start()
    host = Host(loaded, loaded.tokenizer, config, client)
    bound = bind("127.0.0.1", 0)
    server = ServerConfig((model,), max_running=streams, max_queued=1024)
    service = Service.build(client, loaded.tokenizer, server)
    run = ServerRun(service, bound)
    # As `qtool serve` logs, to a file of the caller's: a line a request is part of the work.
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    ready = asyncio.Event()
    serving = asyncio.create_task(run.serve(ready.set))
    await ready.wait()
    print(url_of(bound), flush=True)
    bare = Engine(loaded, config)
    orders: asyncio.Queue[str] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def read() -> None:
        for line in sys.stdin:
            loop.call_soon_threadsafe(orders.put_nowait, line)
        loop.call_soon_threadsafe(orders.put_nowait, "")

    threading.Thread(target=read, daemon=True).start()
    while line := await orders.get():
        print(json.dumps(await host.obey(json.loads(line), bare)), flush=True)
    run.request_stop()
    await serving
    await client.stop()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
