"""`qtool serve`, from flags to exit: bind, load, show what was decided, serve, stop."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import orjson
import torch

from qtool.convert.formats import open_weights
from qtool.errors import UnsupportedModel
from qtool.json_files import read_json
from qtool.progress import bar, console
from qtool.runtime.config import EngineConfig
from qtool.runtime.engine.async_engine import AsyncEngine
from qtool.runtime.engine.client import ModelInfo
from qtool.runtime.loading import DTYPES, LoadedModel, load_for
from qtool.runtime.memory import NotEnoughMemory, least_weight_bytes
from qtool.runtime.server.app import create_app
from qtool.runtime.server.chat_templates import find_chat_template
from qtool.runtime.server.config import SamplingDefaults, ServerConfig
from qtool.runtime.server.launch_options import LaunchOptions
from qtool.runtime.server.pool import Hosted, ModelPool, PoolLimits
from qtool.runtime.server.serve import ServerRun, bind, bind_unix, stop_signals, url_of
from qtool.runtime.server.service import Service
from qtool.runtime.server.supervisor import Supervisor
from qtool.runtime.store import store
from qtool.runtime.tokenizer import import_transformers
from qtool.source import Source, resolve
from qtool.units import size_text

LOG_FORMAT = "%(asctime)s %(message)s"


def launch(
    engine_config: EngineConfig, server_config: ServerConfig, options: LaunchOptions
) -> None:
    """Serve until SIGTERM or Ctrl-C."""
    template = None if options.chat_template is None else find_chat_template(options.chat_template)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    bound = bind_unix(options.uds) if options.uds else bind(options.host, options.port)
    try:
        with bar(f"Loading {engine_config.model}"):
            loaded = load(engine_config)
        assert loaded.tokenizer is not None  # load() refuses models without one
        if template is not None:
            loaded.tokenizer.use_chat_template(template)
        engine_config = within_context(engine_config, loaded)
        note_format(options.quantization, loaded.format)
        recommended = generation_config(loaded.source) if options.use_generation_config else {}
        defaults = sampling_defaults({**recommended, **options.generation_overrides})
        server_config = replace(server_config, sampling=defaults)
        log_to_stderr(as_json=options.log_as_json)
        asyncio.run(_serve(loaded, engine_config, server_config, bound))
    finally:
        bound.close()
        if options.uds:
            Path(options.uds).unlink(missing_ok=True)


def within_context(config: EngineConfig, loaded: LoadedModel) -> EngineConfig:
    """A context longer than the model was made for is cut to what it was made for, and said so."""
    asked, trained = config.max_model_len, loaded.max_position_embeddings
    if asked is None or asked <= trained:
        return config
    say(f"--max-model-len {asked}: the model was made for {trained} tokens, which are used")
    return replace(config, max_model_len=trained)


def note_format(asked: str | None, found: str) -> None:
    """`--quantization` cannot change what the files are; where it says otherwise, say so."""
    if asked is None:
        return
    simple = asked.lower().removesuffix("_marlin").replace("auto_", "").replace("_", "-")
    if simple in found.lower().replace("_", "-"):
        return
    say(f"--quantization {asked}: the files are {found}, and served as that")


async def _serve(
    loaded: LoadedModel,
    engine_config: EngineConfig,
    server_config: ServerConfig,
    bound: socket.socket,
) -> None:
    client = AsyncEngine.from_loaded(loaded, engine_config)
    await client.start()
    try:
        assert loaded.tokenizer is not None  # load() refuses models without one
        service = Service.build(client, loaded.tokenizer, server_config)
        print_plan(loaded, client.info)
        pool = None
        if server_config.also_served:
            pool = model_pool(service, engine_config, server_config)
        run = ServerRun(service, bound, pool)
        supervisor = Supervisor.of_environment()

        def ready() -> None:
            print_ready(url_of(bound, server_config.tls), server_config)
            supervisor.tell("READY=1")

        watching = asyncio.create_task(supervisor.watch(client.healthy))
        ending = asyncio.create_task(_end_with_engine(client, run))
        with stop_signals(asyncio.get_running_loop(), run.request_stop):
            await run.serve(ready)
        watching.cancel()
        ending.cancel()
    finally:
        await client.stop()
    if client.failure is not None:
        raise client.failure


async def _end_with_engine(client: AsyncEngine, run: ServerRun) -> None:
    """A server whose engine has failed ends, so that whoever started it starts it again."""
    await client.wait_until_failed()
    run.request_stop()


def model_pool(
    service: Service, engine_config: EngineConfig, server_config: ServerConfig
) -> ModelPool:
    """The further models of a server, each with the flags of the first."""
    limits = PoolLimits(
        server_config.max_loaded_models,
        server_config.max_loaded_bytes,
        server_config.keep_alive or None,
    )
    names = store()
    made_of = {name: names.find(name) for name in server_config.also_served}
    bases = {name: made.base if made else name for name, made in made_of.items()}

    def model_for(name: str) -> str | None:
        """The further model behind a name, also behind one that was made since the start."""
        base = bases.get(name)
        if base is None and (made := names.find(name)) is not None:
            base = made.base if made.base in bases.values() else None
        return None if base == engine_config.model else base

    async def hosted(name: str, room: int | None) -> Hosted:
        adapters = [made.adapter for made in made_of.values() if made and made.base == name]
        config = replace(
            engine_config,
            model=name,
            max_model_len=None,
            revision=None,
            lora_modules=tuple((folder, folder) for folder in adapters if folder),
        )
        if room is not None:
            await asyncio.to_thread(check_room, config, room)
        loaded = await asyncio.to_thread(load_beside_others, config)
        assert loaded.tokenizer is not None
        if room is not None:
            config = within_bytes(config, loaded.nbytes, room)
        client = AsyncEngine.from_loaded(loaded, within_context(config, loaded))
        await client.start()
        own = replace(
            server_config,
            served_model_names=(name,),
            also_served=(),
            model_root=config.model,
            sampling=sampling_defaults(generation_config(loaded.source)),
            system=None,
            examples=(),
            stop=(),
            adapter=None,
        )
        other = Service.build(client, loaded.tokenizer, own, names)
        return Hosted(other, create_app(other), limits.keep_seconds)

    return ModelPool(Hosted(service, create_app(service), None), model_for, hosted, limits)


def check_room(config: EngineConfig, room: int) -> None:
    """Raise NotEnoughMemory for a model of which the headers say that it cannot fit."""
    reader = open_weights(resolve(config.model, config.revision))
    dtype = DTYPES.get(config.dtype, torch.bfloat16)
    within_bytes(config, least_weight_bytes(reader, dtype), room)


def within_bytes(config: EngineConfig, weight_bytes: int, room: int) -> EngineConfig:
    """The same with a KV cache that fits beside the weights into so many bytes: half of what is
    left, so that another model finds room, or what the operator said.
    """
    left = room - weight_bytes
    cache = config.kv_cache_memory_bytes or left // 2
    if left <= 0 or cache > left:
        raise NotEnoughMemory(
            f"{config.model} does not fit: its weights take {size_text(weight_bytes)}, and of "
            f"--max-loaded-bytes {size_text(max(room, 0))} are left",
            "raise --max-loaded-bytes, or serve a smaller model",
        )
    return replace(config, kv_cache_memory_bytes=cache)


def load(engine_config: EngineConfig) -> LoadedModel:
    loaded = load_for(engine_config)
    if loaded.tokenizer is None:
        raise UnsupportedModel(
            f"{engine_config.model} has no tokenizer, so text cannot be served from it",
            "put the tokenizer.json of the original model into the folder",
        )
    return loaded


def load_beside_others(engine_config: EngineConfig) -> LoadedModel:
    import_transformers()
    return load(engine_config)


def generation_config(source: Source) -> Mapping[str, Any]:
    """The makers' recommended sampling values; a GGUF file has none."""
    path = source.path / "generation_config.json"
    return read_json(path) if path.is_file() else {}


def sampling_defaults(generation_config: Mapping[str, Any]) -> SamplingDefaults:
    """What the model's makers recommend; values of a wrong type are passed over."""
    fallback = SamplingDefaults()

    def number(name: str, default: float, *, zero: bool = False) -> float:
        value = generation_config.get(name)
        if not isinstance(value, int | float) or value < 0 or (value == 0 and not zero):
            return default
        return float(value)

    def count(name: str) -> int | None:
        value = generation_config.get(name)
        return value if isinstance(value, int) and value > 0 else None

    seed = generation_config.get("seed")
    return SamplingDefaults(
        temperature=number("temperature", fallback.temperature, zero=True),
        top_p=min(number("top_p", fallback.top_p), 1.0),
        top_k=count("top_k") or fallback.top_k,
        min_p=min(number("min_p", fallback.min_p), 1.0),
        repetition_penalty=number("repetition_penalty", fallback.repetition_penalty),
        max_new_tokens=count("max_new_tokens"),
        seed=seed if isinstance(seed, int) else None,
    )


def print_plan(loaded: LoadedModel, info: ModelInfo) -> None:
    """What was decided, and why, on stderr."""
    assert loaded.tokenizer is not None
    num_tokens = info.num_kv_blocks * info.block_size
    facts = {
        "context": f"{info.max_model_len} tokens",
        "KV cache": f"{info.num_kv_blocks} blocks of {info.block_size} = {num_tokens} tokens, "
        f"{size_text(info.kv_cache_bytes)}",
        "speed": loaded.expected_speed(),
        **_ranks(loaded, info),
        "batch": f"{info.max_num_seqs} sequences, {info.max_num_batched_tokens} tokens a step",
        "chat template": loaded.tokenizer.chat_template_origin,
    }
    announce_template(loaded)
    console.print(loaded.kernel_table())
    for name, value in facts.items():
        console.print(f"{name + ':':<15}{value}", highlight=False, soft_wrap=True)


def _ranks(loaded: LoadedModel, info: ModelInfo) -> dict[str, str]:
    team = loaded.team
    if team is None:
        return {}
    weights = " + ".join(size_text(num_bytes) for num_bytes in team.weight_bytes)
    return {
        "ranks": f"{team.size} processes, weights {weights}, KV cache "
        f"{size_text(info.kv_cache_bytes // team.size)} each"
    }


def announce_template(loaded: LoadedModel) -> None:
    """Say so where a model brings no chat template: answers are then only as good as a guess."""
    assert loaded.tokenizer is not None
    if loaded.tokenizer.chat_template_origin.startswith("plain"):
        console.print(
            f"{loaded.source.name} has no chat template: messages are written as lines of "
            '"User: ..." and "Assistant: ..."',
            highlight=False,
            soft_wrap=True,
        )


def say(text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True)


def print_ready(url: str, config: ServerConfig) -> None:
    """The address and a first request, on stdout: this is what a caller waits for."""
    body = orjson.dumps(
        {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 64, "stream": True}
    ).decode()
    key = " -H 'Authorization: Bearer KEY'" if config.api_keys else ""
    if url.startswith("unix:"):
        click.echo(f"Serving {config.served_model_names[0]} at {url}")
        return
    click.echo(f"Serving {config.served_model_names[0]} at {url}/v1")
    click.echo(f"try: curl -N {url}/v1/chat/completions{key} -d '{body}'")


class JsonFormatter(logging.Formatter):
    """One object a line, for collectors of logs."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(line).decode()


def log_to_stderr(*, as_json: bool = False) -> None:
    """qtool's own lines, and uvicorn's tracebacks, on stderr; other libraries are left alone."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if as_json else logging.Formatter(LOG_FORMAT))
    for name, level in (("qtool", logging.INFO), ("uvicorn.error", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel(level)
        logger.propagate = False
