"""The Ray Serve application: `build` is what the configuration's import_path names.

It runs where Ray runs, in the cluster's version of everything: the command line of `qtool serve`
in its arguments is parsed there again, and a version of qtool that differs from the one that wrote
the configuration is refused by name.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.config import RequestRouterConfig

from qtool import __version__
from qtool.errors import QtoolError, UsageError
from qtool.runtime.command import Asked
from qtool.runtime.deploy.deployment import given_to_serve, meaning
from qtool.runtime.deploy.ray import board as statistics
from qtool.runtime.deploy.ray.client import RayEngines
from qtool.runtime.deploy.ray.config import BOARD, ENGINE, SERVER
from qtool.runtime.deploy.ray.wire import Refusal, Routed, RoutedText
from qtool.runtime.engine.async_engine import AsyncEngine
from qtool.runtime.engine.client import ModelInfo
from qtool.runtime.engine.sequence import TokenOutput
from qtool.runtime.server.asgi import App, Message, Receive, Scope, Send

logger = logging.getLogger("qtool.deploy.ray")

# Ray's router by prefix, by its public name and by the one that does not import vLLM with it.
PREFIX_ROUTERS = (
    "ray.serve.llm.request_router:PrefixCacheAffinityRouter",
    "ray.llm._internal.serve.routing_policies.prefix_aware.prefix_aware_router:"
    "PrefixCacheAffinityRouter",
    "ray.llm._internal.serve.request_router.prefix_aware.prefix_aware_router:"
    "PrefixCacheAffinityRouter",
)
# Of prompts that the router remembers, one character a token: above the first it forgets the
# oldest down to the second.
ROUTER_TOKENS, ROUTER_TOKENS_KEPT = 4_000_000, 3_600_000


def build(args: Mapping[str, Any]) -> serve.Application:
    """What `serve deploy` and `serve run` call; the deployments' options come from the config."""
    return application(args, {})


def application(
    args: Mapping[str, Any], options: Mapping[str, Mapping[str, Any]]
) -> serve.Application:
    """
    args     `args` of the configuration
    options  of each deployment, as its entry in the configuration
    """
    check_version(str(args["qtool_version"]))
    arguments = tuple(args["arguments"])
    asked = asked_of(arguments)  # a mistake in it is found here, not by every replica
    board = serve.deployment(BoardReplica).options(
        name=BOARD,
        ray_actor_options={"num_cpus": 0},
        logging_config={"enable_access_log": False},
    )
    engine = serve.deployment(EngineReplica).options(
        name=ENGINE,
        request_router_config=router_config(str(args.get("router", "auto")), asked),
        **options.get(ENGINE, {}),
    )
    # A class of its own for each application: the app is made in the replica, from these values.
    server = serve.deployment(serve.ingress(app_builder(arguments))(ServerReplica)).options(
        name=SERVER, **options.get(SERVER, {})
    )
    board_node = board.bind()
    return server.bind(engine.bind(arguments, board_node), board_node)


def check_version(asked: str) -> None:
    if asked != __version__:
        raise UsageError(
            f"the deployment was written by qtool {asked}, and the cluster has {__version__}",
            f"install qtool {asked} on every node, or write the configuration anew with "
            f"{__version__}",
        )


def asked_of(arguments: Sequence[str]) -> Asked:
    return meaning(*given_to_serve(arguments))


def router_config(router: str, asked: Asked) -> RequestRouterConfig:
    """Ray's router by prefix where there is one and its use is not ruled out."""
    if router == "load" or not asked.engine.enable_prefix_caching:
        return RequestRouterConfig()
    found = prefix_router()
    if found is None:
        if router == "prefix":
            raise UsageError(
                "this version of Ray has no router by prefix",
                "pip install -U 'ray[serve]', or --router load",
            )
        logger.warning("this version of Ray has no router by prefix: requests go by load")
        return RequestRouterConfig()
    return RequestRouterConfig(
        request_router_class=found,
        request_router_kwargs={
            # Beyond it the shorter queue counts for more than what a cache holds.
            "imbalanced_threshold": max(asked.engine.max_num_seqs // 4, 2),
            "do_eviction": True,
            "eviction_threshold_chars": ROUTER_TOKENS,
            "eviction_target_chars": ROUTER_TOKENS_KEPT,
        },
    )


def prefix_router() -> type | None:
    for path in PREFIX_ROUTERS:
        module, _, name = path.partition(":")
        try:
            found = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            continue
        assert isinstance(found, type)
        return found
    return None


class BoardReplica:
    """See `board.Board`."""

    def __init__(self) -> None:
        self._board = statistics.Board(time.monotonic)

    def report(self, engine: str, stats: Any) -> None:
        self._board.report(engine, stats)

    def snapshot(self) -> statistics.Snapshot:
        return self._board.snapshot()


class EngineReplica:
    """One engine with its model, in a process of Ray's."""

    # Ray awaits it: the engine belongs to the event loop that starts it.
    async def __init__(  # type: ignore[misc]
        self, arguments: Sequence[str], board: serve.handle.DeploymentHandle
    ) -> None:
        import torch

        from qtool.runtime.server.launch import load, log_to_stderr, within_context

        log_to_stderr()
        asked = asked_of(arguments)
        if asked.options.threads is not None:
            torch.set_num_threads(asked.options.threads)
        loaded = await asyncio.to_thread(load, asked.engine)
        self._engine = AsyncEngine.from_loaded(loaded, within_context(asked.engine, loaded))
        await self._engine.start()
        self._board = board
        self._name = serve.get_replica_context().replica_id.unique_id
        self._reporting = asyncio.create_task(self._report())

    async def _report(self) -> None:
        while True:
            if self._engine.healthy():
                try:
                    await self._board.report.remote(self._name, self._engine.stats())
                except Exception as error:
                    logger.warning("the board does not answer: %s", error)
            await asyncio.sleep(statistics.REPORT_SECONDS)

    async def info(self) -> ModelInfo:
        return self._engine.info

    async def generate(self, routed: Routed) -> AsyncIterator[TokenOutput | Refusal]:
        """The outputs of a request; Ray closes this generator when its caller has gone."""
        outputs = None
        try:
            outputs = self._engine.generate(routed.request)
            async for output in outputs:
                yield output
        except QtoolError as error:
            yield Refusal.of(error)
        finally:
            if isinstance(outputs, AsyncGenerator):
                await outputs.aclose()  # aborts what is not complete

    async def embed(self, routed: RoutedText) -> list[float] | Refusal:
        try:
            return await self._engine.embed(routed.token_ids, routed.pooling)
        except QtoolError as error:
            return Refusal.of(error)

    async def check_health(self) -> None:
        """Ray replaces a replica for which this raises."""
        if not self._engine.healthy():
            raise RuntimeError("the engine has ended; see this replica's log")

    async def __del__(self) -> None:
        """Ray calls this after the replica's requests have had their time."""
        if not hasattr(self, "_reporting"):
            return  # loading failed
        self._reporting.cancel()
        await self._engine.stop()


class ServerReplica:
    """What Ray's proxy sends requests to: the app made by `app_builder`."""

    def __init__(
        self, engines: serve.handle.DeploymentHandle, board: serve.handle.DeploymentHandle
    ) -> None:
        """The handles make Ray start both before; the app gets its own by name."""


def app_builder(arguments: tuple[str, ...]) -> Callable[[], App]:
    """A function that makes the HTTP app in the replica; Ray wants it without parameters."""

    def make() -> App:
        return LateApp(arguments)

    return make


class LateApp:
    """The HTTP app, made when the server asks for the start of its lifespan: until then there is
    no event loop, and no engine to ask what model it has.
    """

    def __init__(self, arguments: tuple[str, ...]) -> None:
        self._arguments = arguments
        self._app: App | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        else:
            assert self._app is not None  # Ray sends nothing before the lifespan has begun

            async def send_without_id(message: Message) -> None:
                if message["type"] == "http.response.start":
                    # Ray's proxy adds the same header; two of them read as "id, id".
                    kept = [entry for entry in message["headers"] if entry[0] != b"x-request-id"]
                    message["headers"] = kept
                await send(message)

            await self._app(scope, receive, send_without_id)

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()  # lifespan.startup
        name = serve.get_replica_context().app_name
        engines = RayEngines(
            serve.get_deployment_handle(ENGINE, name), serve.get_deployment_handle(BOARD, name)
        )
        try:
            await engines.start()
            self._app = http_app(asked_of(self._arguments), engines)
        except Exception as error:
            logger.exception("the server could not start")
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            return
        await send({"type": "lifespan.startup.complete"})
        await receive()  # lifespan.shutdown
        await engines.stop()
        await send({"type": "lifespan.shutdown.complete"})


def http_app(asked: Asked, engines: RayEngines) -> FastAPI:
    """The app of `qtool serve`, over engines elsewhere."""
    from qtool.convert.formats import open_weights
    from qtool.runtime.server.app import create_app
    from qtool.runtime.server.chat_templates import find_chat_template
    from qtool.runtime.server.launch import (
        generation_config,
        log_to_stderr,
        sampling_defaults,
    )
    from qtool.runtime.server.service import Service
    from qtool.runtime.tokenizer import Tokenizer
    from qtool.source import resolve

    log_to_stderr(as_json=asked.options.log_as_json)
    source = resolve(asked.engine.model, asked.engine.revision)
    tokenizer = Tokenizer.load(source, open_weights(source))
    assert tokenizer is not None  # the engines refuse models without one
    if asked.options.chat_template is not None:
        tokenizer.use_chat_template(find_chat_template(asked.options.chat_template))
    recommended = generation_config(source) if asked.options.use_generation_config else {}
    defaults = sampling_defaults({**recommended, **asked.options.generation_overrides})
    config = replace(asked.server, sampling=defaults, root_path="")
    return create_app(Service.build(engines, tokenizer, config))
