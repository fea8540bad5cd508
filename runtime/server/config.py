"""What an operator decides about a server, apart from the engine behind it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from qtool.errors import UsageError

# What clients send for a model that they do not know: huggingface_hub and TGI's own examples.
PLACEHOLDER_NAMES = ("dummy", "tgi", "default")
# Pages served from this machine may call the server from a browser; others only when the operator
# names them.
LOCAL_ORIGINS = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """For requests that give none: the model's generation_config.json, else OpenAI's defaults."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int | None = None
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Tls:
    """Files, and whether clients must have certificates: ssl.CERT_NONE, _OPTIONAL or _REQUIRED."""

    certificate: str
    key: str | None = None
    password: str | None = None
    client_authorities: str | None = None
    client_certificates: int = 0


@dataclass(frozen=True, slots=True)
class ServerConfig:
    served_model_names: tuple[str, ...]
    """The first is the one answers are signed with; all of them are accepted and listed."""
    also_served: tuple[str, ...] = ()
    """Further models, loaded on their first use (pool.py)."""
    max_loaded_models: int = 3
    max_loaded_bytes: int | None = None
    """For weights and KV caches of all loaded models; None: what the machine has."""
    keep_alive: float = 300.0
    """Seconds that one of those stays loaded unused; 0: for ever."""
    model_root: str = ""
    """Where the model came from, as the user named it."""
    sampling: SamplingDefaults = field(default_factory=SamplingDefaults)
    api_keys: tuple[str, ...] = ()
    """Empty: any key, or none, is accepted."""
    allowed_origins: tuple[str, ...] = ()
    """Browser origins for CORS; empty: pages on this machine only; "*": all."""
    allowed_methods: tuple[str, ...] = ("*",)
    allowed_headers: tuple[str, ...] = ("*",)
    allow_credentials: bool = False
    root_path: str = ""
    """The path under which a proxy shows this server."""
    tls: Tls | None = None
    max_running: int = 32
    """How many sequences the engine runs at once; what is above it waits."""
    max_queued: int = 512
    """How many sequences may wait before requests are refused with 429."""
    max_per_client: int | None = None
    """How many sequences of one client (limits.py) may run or wait; None: as many as fit."""
    max_body_bytes: int = 32 * 2**20
    shutdown_timeout: float = 25.0
    """Seconds that running answers get after SIGTERM; below the 30 after which Kubernetes kills."""
    write_timeout: float = 60.0
    """Seconds that a client of a stream may take to read what is ready for it, before it is hung
    up on: it holds a place in the queue."""
    sse_keep_alive_seconds: float = 0.0
    """Comment on streams silent for so long, as in a long prefill behind a proxy; 0: never."""
    request_timeout: float = 0.0
    """Seconds that an answer may take, waiting included; 0: any time. Requests may ask for less."""
    tool_call_parser: str | None = None
    """The syntax of tool calls (tool_formats.py); None: by the model's chat template."""
    reasoning_parser: str | None = None
    """How thoughts are marked (reasoning.py); None: by the model's chat template."""
    enable_tools: bool = True
    """False: tool calls in an answer are left as text unless a call is required."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Variables for the chat template, below what a request gives."""
    system: str | None = None
    """For conversations without a system prompt of their own."""
    examples: tuple[Mapping[str, str], ...] = ()
    """Messages that stand before every conversation."""
    stop: tuple[str, ...] = ()
    """Strings that end every chat answer."""
    adapter: str | None = None
    """Folder of the LoRA adapter that writes every answer; the engine must take adapters."""
    trust_request_template: bool = False
    """Requests may bring a chat template of their own, which can run for ever."""
    log_requests: bool = True

    def __post_init__(self) -> None:
        if not self.served_model_names or not all(self.served_model_names):
            raise UsageError("a served model needs a name", "pass --served-model-name NAME")
        if any(not key for key in self.api_keys):
            raise UsageError("an API key is empty", "leave --api-key out to accept any key")
        for name, value, least in (
            ("--max-num-seqs", self.max_running, 1),
            ("--max-num-queued-reqs", self.max_queued, 0),
            ("--shutdown-timeout", self.shutdown_timeout, 0),
            ("--sse-keep-alive-interval", self.sse_keep_alive_seconds, 0),
            ("--request-timeout", self.request_timeout, 0),
        ):
            if value < least:
                raise UsageError(f"{name} is {value}, it must be at least {least}")

    @property
    def accepted_model_names(self) -> tuple[str, ...]:
        """Also the last part of a path or of `builtin:NAME`: a folder need not be typed in full."""
        short = tuple(PurePath(name.rpartition(":")[2]).name for name in self.served_model_names)
        return tuple(dict.fromkeys(name for name in (*self.served_model_names, *short) if name))
