"""`qtool run-batch`: a file of OpenAI batch requests in, a file of responses out.

    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {...}}
    {"custom_id": "b", "method": "POST", "url": "/v1/embeddings", "body": {...}}

The requests go through the very routes of the server, in this process and side by side, so an
answer is what the server would have given. A request that fails has its error in its line.
Reference: the OpenAI API reference, "Batch".
"""

from __future__ import annotations

import asyncio
import uuid
from pathlib import Path
from typing import Any

import click

from qtool.errors import UsageError
from qtool.runtime.command import engine_config, engine_options
from qtool.runtime.config import EngineConfig
from qtool.runtime.store import store

ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")


@click.command("run-batch")
@click.argument("model")
@click.option(
    "-i", "--input-file", "source", required=True, metavar="FILE", help="Requests, one a line."
)
@click.option(
    "-o", "--output-file", "target", required=True, metavar="FILE", help="Responses, one a line."
)
@click.option("--force", is_flag=True, help="Replace the output file.")
@engine_options
def run_batch(model: str, source: str, target: str, force: bool, **flags: Any) -> None:
    """Answer a file of OpenAI batch requests with MODEL.

    \b
    Example:
      qtool run-batch ./Qwen3-0.6B-int4 -i requests.jsonl -o responses.jsonl
    """
    requests = read_requests(Path(source))
    if Path(target).exists() and not force:
        raise UsageError(f"{target} already exists", "pass --force to replace it")
    import orjson

    from qtool.runtime.server.made_models import with_adapter

    made = store().find(model)
    config = with_adapter(engine_config(made.base if made else model, **flags), made)
    answers = asyncio.run(answer_all(config, requests, model))
    lines = b"".join(orjson.dumps(answer) + b"\n" for answer in answers)
    Path(target).write_bytes(lines)
    failed = sum(answer["error"] is not None for answer in answers)
    click.echo(f"{len(answers)} answers in {target}" + (f", {failed} failed" if failed else ""))


def read_requests(path: Path) -> list[dict[str, Any]]:
    import orjson

    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    requests: list[dict[str, Any]] = []
    seen: set[str] = set()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            request = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise UsageError(f"{where} is not valid JSON: {error}") from None
        if not isinstance(request, dict) or not isinstance(request.get("body"), dict):
            raise UsageError(f"{where} has no `body`, which must be an object")
        if request.get("url") not in ROUTES:
            raise UsageError(f"{where}: url is {request.get('url')!r}, known: {', '.join(ROUTES)}")
        custom_id = request.get("custom_id")
        if not isinstance(custom_id, str) or custom_id in seen:
            raise UsageError(f"{where}: custom_id is {custom_id!r}, must be a text of its own")
        if request["body"].get("stream"):
            raise UsageError(f"{where} asks for a stream, and a file holds whole answers")
        seen.add(custom_id)
        requests.append(request)
    return requests


async def answer_all(
    config: EngineConfig, requests: list[dict[str, Any]], model: str
) -> list[dict[str, Any]]:
    """The responses, in the order of the requests.

    model  what config's goes by: itself, or a name made from it
    """
    import httpx

    from qtool.progress import bar
    from qtool.runtime.engine.async_engine import AsyncEngine
    from qtool.runtime.server.app import create_app
    from qtool.runtime.server.config import ServerConfig
    from qtool.runtime.server.launch import generation_config, load, sampling_defaults
    from qtool.runtime.server.service import Service

    with bar(f"Loading {config.model}"):
        loaded = load(config)
    assert loaded.tokenizer is not None
    client = AsyncEngine.from_loaded(loaded, config)
    await client.start()
    server = ServerConfig(
        (config.model,),
        sampling=sampling_defaults(generation_config(loaded.source)),
        max_running=config.max_num_seqs,
        max_queued=config.num_waiting_limit,
        log_requests=False,
    )
    app = create_app(Service.build(client, loaded.tokenizer, server))
    # As many at once as the engine runs; the file may be longer than the queue.
    places = asyncio.Semaphore(config.max_num_seqs)
    transport = httpx.ASGITransport(app)
    try:
        async with httpx.AsyncClient(
            transport=transport, base_url="http://batch", timeout=None
        ) as http:

            async def answer(request: dict[str, Any]) -> dict[str, Any]:
                body = {**request["body"], "model": model}
                async with places:
                    response = await http.post(request["url"], json=body)
                shown.advance(1)
                return _line(request["custom_id"], response.status_code, response.json())

            with bar("Answering", total=len(requests)) as shown:
                return list(await asyncio.gather(*map(answer, requests)))
    finally:
        await client.stop()


def _line(custom_id: str, status: int, body: dict[str, Any]) -> dict[str, Any]:
    failed = status >= 400
    return {
        "id": f"batch_req_{uuid.uuid4().hex}",
        "custom_id": custom_id,
        "response": {"status_code": status, "request_id": uuid.uuid4().hex, "body": body},
        "error": body.get("error", {"message": str(body)}) if failed else None,
    }
