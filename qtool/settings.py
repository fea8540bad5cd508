"""The environment variables that qtool reads, all of them, in one place.

HF_HUB_OFFLINE     1: use only what the local Hub cache holds (read by huggingface_hub as well)
HF_TOKEN           access token for gated models (read by huggingface_hub; here only to word a hint)
QTOOL_MAX_MEMORY   bytes of RAM that quantization may use for activations before it spills to disk
NO_COLOR           any value: plain output
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from qtool.errors import UsageError

_TRUE = {"1", "on", "yes", "true"}


@dataclass(frozen=True, slots=True)
class Settings:
    hub_offline: bool = False
    has_hub_token: bool = False
    max_activation_bytes: int | None = None
    no_color: bool = False


def settings(environment: Mapping[str, str] | None = None) -> Settings:
    """Read the environment (the process's own unless one is given)."""
    env = os.environ if environment is None else environment
    memory = env.get("QTOOL_MAX_MEMORY")
    if memory is not None and not memory.isdigit():
        raise UsageError(
            f"QTOOL_MAX_MEMORY is {memory!r}, not a whole number of bytes",
            "for example QTOOL_MAX_MEMORY=4000000000",
        )
    return Settings(
        hub_offline=env.get("HF_HUB_OFFLINE", "").lower() in _TRUE,
        has_hub_token=bool(env.get("HF_TOKEN")),
        max_activation_bytes=int(memory) if memory else None,
        no_color="NO_COLOR" in env,
    )


def child_environment(**overrides: str) -> dict[str, str]:
    """The environment for a process started by qtool: this one's, with ``overrides``."""
    return {**os.environ, **overrides}
