"""The flags of `qtool serve` that are about the server and not the engine, and what they become.

vLLM's names. Other servers' names for the same are understood too (`runtime/flags.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from qtool.errors import UsageError
from qtool.runtime.modelfile import Modelfile
from qtool.settings import settings

if TYPE_CHECKING:
    from qtool.runtime.server.config import ServerConfig, Tls

F = TypeVar("F", bound=Callable[..., Any])

SERVER_OPTIONS = (
    click.option("--uds", metavar="FILE", help="Listen on this Unix socket, not on a port."),
    click.option("--root-path", default="", help="Path under which a proxy shows this server."),
    click.option("--ssl-keyfile", metavar="FILE", help="TLS: the key."),
    click.option("--ssl-certfile", metavar="FILE", help="TLS: the certificate."),
    click.option("--ssl-keyfile-password", metavar="TEXT", help="TLS: the key's password."),
    click.option("--ssl-ca-certs", metavar="FILE", help="TLS: who signs clients' certificates."),
    click.option(
        "--ssl-cert-reqs",
        type=click.IntRange(0, 2),
        default=0,
        help="TLS: clients' certificates are not asked for (0), optional (1), required (2).",
    ),
    click.option(
        "--served-model-name",
        multiple=True,
        metavar="NAME",
        help="What clients call the model; repeat for several.  [default: MODEL as given]",
    ),
    click.option(
        "--also-serve",
        multiple=True,
        metavar="MODEL",
        help="A further model, loaded on its first use; repeat for several.",
    ),
    click.option(
        "--max-loaded-models",
        type=click.IntRange(min=2),
        default=3,
        show_default=True,
        help="Models loaded at once; the one unused longest makes room.",
    ),
    click.option(
        "--max-loaded-bytes",
        type=click.IntRange(min=1),
        metavar="BYTES",
        help="Weights and KV caches of all loaded models; those unused longest make room.  "
        "[default: what the machine has]",
    ),
    click.option(
        "--keep-alive",
        type=click.FloatRange(min=0),
        default=300.0,
        show_default=True,
        metavar="SECONDS",
        help="How long a further model stays loaded unused; 0: for ever.",
    ),
    click.option(
        "--api-key",
        multiple=True,
        metavar="KEY",
        help="Ask clients for this key; repeat for several.  [default: $QTOOL_API_KEY, or any]",
    ),
    click.option("--api-key-file", metavar="FILE", help="Keys to ask for, one a line."),
    click.option(
        "--allowed-origins",
        multiple=True,
        metavar="ORIGIN",
        help="Web pages that may call from a browser (CORS); '*': all.  [default: this machine's]",
    ),
    click.option("--allowed-methods", default='["*"]', hidden=True),
    click.option("--allowed-headers", default='["*"]', hidden=True),
    click.option("--allow-credentials", is_flag=True, help="CORS: pages may send cookies."),
    click.option(
        "--chat-template",
        metavar="TEMPLATE",
        help="A file, a template, or a name such as chatml or llama3.  [default: the model's]",
    ),
    click.option(
        "--default-chat-template-kwargs",
        metavar="JSON",
        help='Variables for the template, as {"enable_thinking": false}.',
    ),
    click.option(
        "--trust-request-chat-template",
        is_flag=True,
        help="Requests may bring a template of their own, which can run for ever.",
    ),
    click.option(
        "--tool-call-parser", metavar="NAME", help="Syntax of tool calls.  [default: the model's]"
    ),
    click.option(
        "--reasoning-parser", metavar="NAME", help="Marks of thoughts.  [default: the model's]"
    ),
    click.option(
        "--generation-config",
        type=click.Choice(["auto", "vllm"]),
        default="auto",
        show_default=True,
        help="auto: sampling defaults of the model's generation_config.json; vllm: OpenAI's.",
    ),
    click.option(
        "--override-generation-config",
        metavar="JSON",
        help='Sampling defaults of your own, as {"temperature": 0.6}.',
    ),
    click.option(
        "--max-new-tokens",
        type=click.IntRange(min=-2),
        metavar="TOKENS",
        help="Length of answers that are not told one.  [default: what the context holds]",
    ),
    click.option(
        "--max-client-reqs",
        type=click.IntRange(min=1),
        metavar="COUNT",
        help="Running and waiting sequences of one client, which is a key or an address; above it "
        "429.  [default: as many as fit]",
    ),
    click.option(
        "--request-timeout",
        type=click.FloatRange(min=0),
        default=0.0,
        show_default=True,
        metavar="SECONDS",
        help="End answers that take longer, waiting included; 0: never.",
    ),
    click.option(
        "--shutdown-timeout",
        type=click.FloatRange(min=0),
        default=25.0,
        show_default=True,
        metavar="SECONDS",
        help="How long running answers get after SIGTERM.",
    ),
    click.option(
        "--sse-keep-alive-interval",
        type=click.FloatRange(min=0),
        default=0.0,
        show_default=True,
        metavar="SECONDS",
        help="Send a comment on streams silent for so long; 0: never.",
    ),
    click.option("--disable-log-requests", is_flag=True, help="No line for each request."),
    click.option(
        "--log-format",
        type=click.Choice(["text", "json"]),
        default="text",
        show_default=True,
        help="json: each line of the log is an object.",
    ),
    click.option(
        "--threads",
        type=click.IntRange(min=1),
        metavar="COUNT",
        help="Threads that compute on a CPU.  [default: one a core]",
    ),
)


# The parameters of `server_config` among them; the others are about the start.
SERVER_FLAGS = (
    "served_model_name", "api_key", "api_key_file", "allowed_origins", "allowed_methods",
    "allowed_headers", "allow_credentials", "default_chat_template_kwargs",
    "trust_request_chat_template", "tool_call_parser", "reasoning_parser", "request_timeout",
    "shutdown_timeout", "sse_keep_alive_interval", "disable_log_requests", "root_path",
    "also_serve", "max_loaded_models", "keep_alive", "max_client_reqs",
    "max_loaded_bytes",
    "ssl_keyfile", "ssl_certfile", "ssl_keyfile_password", "ssl_ca_certs", "ssl_cert_reqs",
)  # fmt: skip


def server_options(command: F) -> F:
    for option in reversed(SERVER_OPTIONS):
        command = option(command)
    return command


def server_config(
    model: str,
    made: Modelfile | None = None,
    *,
    max_running: int,
    max_queued: int,
    served_model_name: tuple[str, ...],
    api_key: tuple[str, ...],
    api_key_file: str | None,
    allowed_origins: tuple[str, ...],
    allowed_methods: str,
    allowed_headers: str,
    allow_credentials: bool,
    default_chat_template_kwargs: str | None,
    trust_request_chat_template: bool,
    tool_call_parser: str | None,
    reasoning_parser: str | None,
    request_timeout: float,
    shutdown_timeout: float,
    sse_keep_alive_interval: float,
    disable_log_requests: bool,
    root_path: str,
    also_serve: tuple[str, ...] = (),
    max_loaded_models: int = 3,
    keep_alive: float = 300.0,
    max_client_reqs: int | None = None,
    max_loaded_bytes: int | None = None,
    **tls: Any,
) -> ServerConfig:
    from qtool.runtime.server.config import ServerConfig
    from qtool.runtime.server.reasoning import reasoning_format
    from qtool.runtime.server.tool_formats import tool_format

    if tool_call_parser is not None:
        tool_format(tool_call_parser)
    if reasoning_parser is not None:
        reasoning_format(reasoning_parser)
    names = tuple(name for text in served_model_name for name in text.split(",") if name)
    return ServerConfig(
        served_model_names=names or (model.rstrip("/") or model,),
        model_root=made.base if made else model,
        api_keys=_keys(api_key, api_key_file),
        allowed_origins=tuple(
            origin for text in allowed_origins for origin in json_list(text, "--allowed-origins")
        ),
        allowed_methods=tuple(json_list(allowed_methods, "--allowed-methods")),
        allowed_headers=tuple(json_list(allowed_headers, "--allowed-headers")),
        allow_credentials=allow_credentials,
        max_running=max_running,
        max_queued=max_queued,
        max_per_client=max_client_reqs,
        request_timeout=request_timeout,
        shutdown_timeout=shutdown_timeout,
        sse_keep_alive_seconds=sse_keep_alive_interval,
        tool_call_parser=tool_call_parser,
        reasoning_parser=reasoning_parser,
        template_kwargs=json_object(default_chat_template_kwargs, "--default-chat-template-kwargs"),
        trust_request_template=trust_request_chat_template,
        system=made.system if made else None,
        examples=made.messages if made else (),
        stop=made.stop if made else (),
        adapter=made.adapter if made else None,
        log_requests=not disable_log_requests,
        root_path=root_path,
        also_served=also_serve,
        max_loaded_models=max_loaded_models,
        max_loaded_bytes=max_loaded_bytes,
        keep_alive=keep_alive,
        tls=_tls(**tls),
    )


def _tls(
    *,
    ssl_keyfile: str | None,
    ssl_certfile: str | None,
    ssl_keyfile_password: str | None,
    ssl_ca_certs: str | None,
    ssl_cert_reqs: int,
) -> Tls | None:
    from qtool.runtime.server.config import Tls

    if ssl_keyfile is None and ssl_certfile is None:
        return None
    if ssl_certfile is None:
        raise UsageError("--ssl-keyfile is given and --ssl-certfile is not", "TLS needs both")
    for path in (ssl_keyfile, ssl_certfile, ssl_ca_certs):
        if path is not None and not Path(path).is_file():
            raise UsageError(f"TLS: there is no file {path}")
    return Tls(ssl_certfile, ssl_keyfile, ssl_keyfile_password, ssl_ca_certs, ssl_cert_reqs)


def _keys(given: tuple[str, ...], path: str | None) -> tuple[str, ...]:
    keys = list(given)
    if path is not None:
        try:
            lines = Path(path).read_text().splitlines()
        except OSError as error:
            raise UsageError(f"--api-key-file {path}: {error.strerror}") from None
        keys += [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not keys:
            raise UsageError(f"--api-key-file {path} holds no key", "write one a line")
    from_environment = settings().api_key
    if not keys and from_environment is not None:
        keys = [from_environment]
    return tuple(keys)


def json_list(text: str, flag: str) -> list[str]:
    """One value, or vLLM's form: a JSON list of them."""
    if not text.startswith("["):
        return [text]
    try:
        values = json.loads(text)
    except json.JSONDecodeError:
        values = None
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise UsageError(
            f"{flag} is {text!r}, neither a value nor a JSON list of strings",
            f"for example {flag} '[\"*\"]'",
        )
    return values


def json_object(text: str | None, flag: str) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"{flag} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UsageError(f"{flag} is {text}, must be a JSON object")
    return value
