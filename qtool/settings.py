"""The environment variables that qtool reads, all of them, in one place.

HF_HUB_OFFLINE     1: use only what the local Hub cache holds (read by huggingface_hub as well)
HF_ENDPOINT        address of the Hub (read by huggingface_hub as well)
HF_TOKEN           access token for gated models (read by huggingface_hub; here only to word a hint)
QTOOL_API_KEY      key that `qtool serve` asks for and `qtool chat URL` sends, where --api-key gives
                   none; VLLM_API_KEY is read as well
QTOOL_MAX_MEMORY   bytes of RAM that quantization may use for activations before it spills to disk
QTOOL_NATIVE       0: do not compile or use C++ code: kernels for CPUs, quantizers of GGUF blocks
QTOOL_ACTIVATIONS  int8: quantized linears on CPUs round their inputs to 8 bits and use VNNI or
                   AVX2; bf16: they do not
GOMP_SPINCOUNT     read by torch's OpenMP; made small where neither it nor OMP_WAIT_POLICY is set
RANK, WORLD_SIZE   which of how many processes this is, on the machine and in all, and where they
LOCAL_RANK         meet: set by torchrun, and read by torch.distributed as well
MASTER_ADDR, MASTER_PORT
XDG_DATA_HOME      folder whose qtool/ keeps the names of models made with `qtool create`
                   (~/.local/share)
XDG_STATE_HOME     folder whose qtool/ keeps what was typed at `qtool chat` (~/.local/state)
XDG_CACHE_HOME     folder whose qtool/ keeps compiled C++ code and tokenizers (~/.cache)
NO_COLOR           any value: plain output
NOTIFY_SOCKET      where systemd hears that `qtool serve` is ready and alive (sd_notify(3))
WATCHDOG_USEC      microseconds within which systemd wants a sign of life
"""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from qtool.errors import UsageError

_TRUE = {"1", "on", "yes", "true"}
_FALSE = {"0", "off", "no", "false"}

Activations = Literal["int8", "bf16"]
# What evaluation can ask for beside: inputs rounded as llama.cpp's CPU backend rounds them.
Rounding = Literal["int8", "bf16", "llama.cpp"]


@dataclass(frozen=True, slots=True)
class Settings:
    hub_offline: bool = False
    hub_endpoint: str | None = None
    has_hub_token: bool = False
    api_key: str | None = None
    max_activation_bytes: int | None = None
    native: bool = True
    activations: Activations | None = None
    cache_dir: Path = Path(os.path.expanduser("~/.cache/qtool"))
    data_dir: Path = Path(os.path.expanduser("~/.local/share/qtool"))
    state_dir: Path = Path(os.path.expanduser("~/.local/state/qtool"))
    no_color: bool = False
    notify_socket: str | None = None
    watchdog_seconds: float | None = None


# How often a waiting OpenMP thread of torch's looks again before it sleeps; libgomp's own default
# is 300,000 times, milliseconds. Where another process wants a core, the threads of one product
# then wait for each other for whole slices of time: 256 x 768 took 24 ms, and 12 us with this.
SPIN_COUNT = "1000"


def share_the_machine(environment: MutableMapping[str, str] | None = None) -> None:
    """Let the OpenMP threads of this process and its children sleep while they wait.

    Has an effect only before torch is imported. What the user has set stays.
    """
    env = os.environ if environment is None else environment
    if "OMP_WAIT_POLICY" not in env:
        env.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)


def settings(environment: Mapping[str, str] | None = None) -> Settings:
    """Read the environment (the process's own unless one is given)."""
    env = os.environ if environment is None else environment
    memory = env.get("QTOOL_MAX_MEMORY")
    if memory is not None and not memory.isdigit():
        raise UsageError(
            f"QTOOL_MAX_MEMORY is {memory!r}, not a whole number of bytes",
            "for example QTOOL_MAX_MEMORY=4000000000",
        )
    cache = env.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    data = env.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
    watchdog = env.get("WATCHDOG_USEC", "")
    state = env.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Settings(
        hub_offline=env.get("HF_HUB_OFFLINE", "").lower() in _TRUE,
        hub_endpoint=env.get("HF_ENDPOINT") or None,
        has_hub_token=bool(env.get("HF_TOKEN")),
        api_key=env.get("QTOOL_API_KEY") or env.get("VLLM_API_KEY") or None,
        max_activation_bytes=int(memory) if memory else None,
        native=env.get("QTOOL_NATIVE", "").lower() not in _FALSE,
        activations=_activations(env.get("QTOOL_ACTIVATIONS") or None),
        cache_dir=Path(cache) / "qtool",
        data_dir=Path(data) / "qtool",
        state_dir=Path(state) / "qtool",
        no_color="NO_COLOR" in env,
        notify_socket=env.get("NOTIFY_SOCKET") or None,
        watchdog_seconds=int(watchdog) / 1e6 if watchdog.isdigit() else None,
    )


class Launched(NamedTuple):
    """This process as torchrun has started it; local_rank: its number on this machine, meeting:
    where it meets the others."""

    rank: int
    size: int
    local_rank: int
    meeting: str


def launched(environment: Mapping[str, str] | None = None) -> Launched | None:
    """None for a process that was started alone."""
    env = os.environ if environment is None else environment
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= set(env):
        return None
    rank, size = env["RANK"], env["WORLD_SIZE"]
    if not rank.isdigit() or not size.isdigit() or int(rank) >= int(size):
        raise UsageError(
            f"RANK is {rank!r} and WORLD_SIZE {size!r}, which is no rank of so many",
            "they are set by torchrun; unset them to run one process",
        )
    if int(size) == 1:
        return None
    local_rank = env.get("LOCAL_RANK", rank)
    if not local_rank.isdigit():
        raise UsageError(f"LOCAL_RANK is {local_rank!r}, not a number", "it is set by torchrun")
    return Launched(
        int(rank), int(size), int(local_rank), f"{env['MASTER_ADDR']}:{env['MASTER_PORT']}"
    )


def _activations(value: str | None) -> Activations | None:
    match value:
        case None | "int8" | "bf16":
            return value
    raise UsageError(f"QTOOL_ACTIVATIONS is {value!r}, must be int8 or bf16")


def child_environment(**overrides: str) -> dict[str, str]:
    """The environment for a process started by qtool: this one's, with ``overrides``."""
    return {**os.environ, **overrides}
