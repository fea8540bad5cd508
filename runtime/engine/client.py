"""The seam between whoever serves text and whatever runs the model.

A server holds an `EngineClient` and cannot tell whether the model runs in a thread of the same
process, on several devices or on another machine. `runtime.engine.async_engine.AsyncEngine` is
the first of them.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from qtool.errors import QtoolError
from qtool.runtime.engine.embedding import Pooling
from qtool.runtime.engine.sequence import GenerationRequest, TokenOutput


class QueueFull(QtoolError):
    """As many requests wait as may; coming back later is worth it."""

    def __init__(self, num_inside: int, limit: int) -> None:
        super().__init__(
            f"the queue is full: {num_inside} sequences run or wait, and at most {limit} may",
            hint="come back later, or let more wait (--max-num-queued-reqs)",
        )
        self.num_inside = num_inside
        self.limit = limit


class EngineLost(QtoolError):
    """What the engine runs on is gone, and it cannot go on."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What was loaded and how much it can hold; fixed once the engine has started.

    weight_bytes, kv_cache_bytes  of all ranks together
    """

    name: str
    max_model_len: int
    dtype: str
    device: str
    format: str
    vocab_size: int
    num_kv_blocks: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    weight_bytes: int
    kv_cache_bytes: int
    lora_enabled: bool = False
    lora_names: tuple[str, ...] = ()
    num_ranks: int = 1


@dataclass(frozen=True, slots=True)
class EngineStats:
    """One instant of the engine, and its counters since the start; for operations, bytes and
    the sizes of steps see `runtime.engine.work`.
    """

    num_requests_running: int = 0
    num_requests_waiting: int = 0
    kv_cache_usage: float = 0.0
    num_preemptions: int = 0
    prefix_cache_queries_total: int = 0
    prefix_cache_hits_total: int = 0
    prompt_tokens_total: int = 0
    generation_tokens_total: int = 0
    operations_total: float = 0.0
    bytes_read_total: float = 0.0
    bytes_written_total: float = 0.0
    step_seconds_total: float = 0.0
    step_tokens_total: int = 0
    steps_by_size: tuple[int, ...] = ()
    steps_launched_ahead_total: int = 0
    spec_decode_num_drafts: int = 0
    spec_decode_num_draft_tokens: int = 0
    spec_decode_num_accepted_tokens: int = 0
    spec_decode_num_accepted_tokens_per_pos: tuple[int, ...] = ()
    running_lora_adapters: tuple[str, ...] = ()
    waiting_lora_adapters: tuple[str, ...] = ()


class EngineClient(Protocol):
    @property
    def info(self) -> ModelInfo: ...

    def generate(self, request: GenerationRequest) -> AsyncIterator[TokenOutput]:
        """Outputs of one request, ending with the one with which the last of its answers has a
        finish_reason.

        Raises PromptTooLong or QueueFull before the first output. Leaving the iteration early
        (break, a cancelled task, aclose) aborts the request.
        """
        ...

    async def embed(self, token_ids: tuple[int, ...], pooling: Pooling) -> list[float]:
        """One vector for a text, between two steps; see `runtime.engine.embedding`."""
        ...

    def abort(self, request_id: str, index: int | None = None) -> None:
        """End a request, or one of its answers, now; its iterator gets last outputs with
        finish_reason "abort".
        """
        ...

    def stats(self) -> EngineStats: ...

    async def start(self) -> None: ...

    async def stop(self, *, drain_seconds: float = 0.0) -> None:
        """Refuse new requests, give running ones this long to finish, abort the rest."""
        ...

    def healthy(self) -> bool: ...
