"""How a server starts: the part of its command line that is about neither engine nor server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class LaunchOptions:
    """How a server starts, beside what it and its engine are.

    uds                    a Unix socket to listen on in place of host and port
    generation_overrides   sampling defaults of the operator's, above the model's own
    chat_template          a file, a template or a built-in name; None: the model's
    quantization           what the command line says of the model's format
    """

    host: str = "127.0.0.1"
    port: int = 8000
    uds: str | None = None
    use_generation_config: bool = True
    generation_overrides: Mapping[str, Any] = field(default_factory=dict)
    chat_template: str | None = None
    quantization: str | None = None
    threads: int | None = None
    log_as_json: bool = False
