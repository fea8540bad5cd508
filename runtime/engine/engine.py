"""The engine: requests in, one step at a time, token ids out.

    add, abort -> Scheduler.schedule -> make_batch -> ModelRunner.run -> sample -> outputs

It is synchronous and single-threaded; `runtime.engine.async_engine.AsyncEngine` gives it a thread
and `runtime.llm.LLM` calls it in a loop. A request that fails (the model computes no numbers for
it, an operator raises) gets the error as its last output; the step is repeated for the others one
by one, which is safe because a step only writes cache slots of its own sequences.
"""

import logging
import random
import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Series

from torch import Tensor

from qtool.errors import UsageError
from qtool.runtime.config import EngineConfig
from qtool.runtime.engine.batch import Batch, make_batch
from qtool.runtime.engine.blocks import BlockManager
from qtool.runtime.engine.client import EngineStats, ModelInfo
from qtool.runtime.engine.embedding import Pooling, embed
from qtool.runtime.engine.pace import Pace
from qtool.runtime.engine.runner import ModelRunner, block_bytes, choose_num_blocks
from qtool.runtime.engine.sampler import Sampled, sample
from qtool.runtime.engine.scheduler import Scheduled, Scheduler
from qtool.runtime.engine.sequence import (
    FinishReason,
    GenerationRequest,
    PromptTooLong,
    Sequence,
    TokenOutput,
)
from qtool.runtime.loading import LoadedModel

logger = logging.getLogger(__name__)


class Engine:
    """clock  monotonic seconds, for deadlines and for what steps cost"""

    def __init__(
        self,
        loaded: LoadedModel,
        config: EngineConfig,
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        decoder = loaded.decoder
        num_blocks, max_model_len = choose_num_blocks(
            config, decoder, loaded.max_position_embeddings
        )
        decoder = decoder.for_context(max_model_len)
        self.info = ModelInfo(
            name=loaded.source.name,
            max_model_len=max_model_len,
            dtype=str(loaded.dtype).removeprefix("torch."),
            device=loaded.device.type,
            format=loaded.format,
            vocab_size=decoder.vocab_size,
            num_kv_blocks=num_blocks,
            block_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            weight_bytes=loaded.nbytes,
            kv_cache_bytes=num_blocks * block_bytes(decoder, config.block_size),
        )
        self.blocks = BlockManager(
            num_blocks,
            config.block_size,
            caching=config.enable_prefix_caching,
            window=widest_window(spec.window for spec in decoder.attention),
        )
        self._model = decoder
        self._runner = ModelRunner(decoder, num_blocks=num_blocks, block_size=config.block_size)
        self._scheduler = Scheduler(
            self.blocks,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            by_priority=config.scheduling_policy == "priority",
            pace=Pace(config.target_step_seconds(loaded.device.type)),
        )
        self._clock = clock
        self._device = loaded.device
        self._eos_token_ids = loaded.eos_token_ids
        self._seeds = random.Random(config.seed)
        self._sequences: dict[str, Sequence] = {}
        self._prompt_tokens = 0
        self._generation_tokens = 0

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work

    def stats(self) -> EngineStats:
        return EngineStats(
            num_requests_running=self._scheduler.num_running,
            num_requests_waiting=self._scheduler.num_waiting,
            kv_cache_usage=self.blocks.usage,
            num_preemptions=self._scheduler.num_preemptions,
            prefix_cache_queries_total=self._scheduler.num_prefix_queries,
            prefix_cache_hits_total=self._scheduler.num_prefix_hits,
            prompt_tokens_total=self._prompt_tokens,
            generation_tokens_total=self._generation_tokens,
        )

    def add(self, request: GenerationRequest) -> None:
        """Queue a request; raises PromptTooLong or UsageError if it can never run."""
        validate(request, self.info)
        if request.request_id in self._sequences:
            raise UsageError(f"request {request.request_id} is already running")
        sampling = request.sampling
        room = self.info.max_model_len - len(request.prompt_token_ids)
        new_tokens = room if sampling.max_tokens is None else min(room, sampling.max_tokens)
        eos = () if sampling.ignore_eos else self._eos_token_ids
        now = self._clock()
        sequence = Sequence(
            request=request,
            seed=self._seeds.getrandbits(64) if sampling.seed is None else sampling.seed,
            stop_token_ids=frozenset((*eos, *sampling.stop_token_ids)),
            max_total_tokens=len(request.prompt_token_ids) + new_tokens,
            arrival=now,
            deadline=None if request.timeout is None else now + request.timeout,
        )
        self._sequences[request.request_id] = sequence
        self._scheduler.add(sequence)

    def embed(self, token_ids: tuple[int, ...], pooling: Pooling) -> list[float]:
        """A vector for a text, now; see `runtime.engine.embedding`."""
        return embed(self._model, token_ids, pooling)

    def abort(self, request_id: str) -> TokenOutput | None:
        """End a request and free its blocks now; None if it is not here (any more)."""
        sequence = self._sequences.get(request_id)
        return None if sequence is None else self._finish(sequence, "abort")

    def abort_all(self, error: str | None = None) -> list[TokenOutput]:
        """End every request, with an error if one is given."""
        reason: FinishReason = "abort" if error is None else "error"
        return [
            self._finish(sequence, reason, error=error)
            for sequence in list(self._sequences.values())
        ]

    def step(self) -> list[TokenOutput]:
        """Compute what the scheduler chose; one output for each sequence that got a token."""
        started = self._clock()
        outputs = [self._expire(sequence) for sequence in self._scheduler.expired(started)]
        scheduled = self._scheduler.schedule()
        if not scheduled:
            return outputs
        # In this order: what is copied may go where there was something to clear.
        self._runner.clear(self.blocks.take_dirty())
        self._runner.copy(self.blocks.take_copies())
        try:
            results = self._compute(scheduled)
        except Exception:
            logger.exception("a step of %d sequences failed; trying each alone", len(scheduled))
            results = [self._compute_alone(work) for work in scheduled]
        self._observe(scheduled, self._clock() - started)
        for work, result in zip(scheduled, results, strict=True):
            output = self._advance(work, result)
            if output is not None:
                outputs.append(output)
        return outputs

    def _observe(self, scheduled: Series[Scheduled], seconds: float) -> None:
        """Learn from a step what prompt tokens cost."""
        num_decoding = sum(work.is_decoding for work in scheduled)
        num_prompt_tokens = sum(work.num_tokens for work in scheduled if not work.is_decoding)
        self._scheduler.pace.observe(
            seconds, num_prompt_tokens=num_prompt_tokens, num_decoding=num_decoding
        )

    def _compute(self, scheduled: Series[Scheduled]) -> list[Sampled | Exception | None]:
        """For each sequence what it drew, its own failure, or None if it draws nothing yet."""
        batch = make_batch(scheduled, self.blocks.table, self._device)
        logits = self._runner.run(batch)
        return _draw(logits, batch, scheduled)

    def _compute_alone(self, work: Scheduled) -> Sampled | Exception | None:
        try:
            return self._compute([work])[0]
        except Exception as error:
            logger.exception("request %s failed", work.sequence.id)
            return error

    def _advance(self, work: Scheduled, result: Sampled | Exception | None) -> TokenOutput | None:
        sequence = work.sequence
        if isinstance(result, Exception):
            return self._finish(sequence, "error", error=str(result) or type(result).__name__)
        num_computed = sequence.num_computed_tokens + work.num_tokens - work.num_draft_tokens
        if result is None:
            self._scheduler.computed(sequence, num_computed)
            return None
        if sequence.num_generated_tokens == 0:
            self._prompt_tokens += sequence.num_prompt_tokens
        sequence.draft_token_ids.clear()
        taken: list[int] = []
        reason: FinishReason | None = None
        for token in result.token_ids:
            taken.append(token)
            reason = sequence.append(token)
            if reason is not None:
                break
        self._generation_tokens += len(taken)
        # Of the drafts, the cache keeps those that were drawn; behind them it is written anew.
        self._scheduler.computed(sequence, num_computed + len(taken) - 1)
        if reason is not None:
            return self._finish(sequence, reason, tuple(taken))
        return sequence.output(tuple(taken))

    def _expire(self, sequence: Sequence) -> TokenOutput:
        timeout = sequence.request.timeout
        return self._finish(
            sequence, "timeout", error=f"the request's timeout of {timeout:g} s has passed"
        )

    def _finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        new_token_ids: tuple[int, ...] = (),
        error: str | None = None,
    ) -> TokenOutput:
        self._scheduler.remove(sequence, failed=reason == "error")
        del self._sequences[sequence.id]
        return sequence.output(new_token_ids, reason, error)


def _draw(
    logits: Tensor, batch: Batch, scheduled: Series[Scheduled]
) -> list[Sampled | Exception | None]:
    """What each sequence's rows of the logits [sampled, vocab] give; None where it has none."""
    drawing = [index for index, work in enumerate(scheduled) if work.samples]
    results: list[Sampled | Exception | None] = [None] * len(scheduled)
    if not drawing:
        return results
    counts = [scheduled[index].num_draw_rows for index in drawing]
    if logits.shape[0] != sum(counts):
        ranges = [batch.row_ranges[index] for index in drawing]
        logits = logits[[row for of, n in zip(ranges, counts, strict=True) for row in of[-n:]]]
    drawn = sample(logits, [scheduled[index].sequence for index in drawing], counts)
    for index, result in zip(drawing, drawn, strict=True):
        results[index] = result
    return results


def widest_window(windows: Iterable[int | None]) -> int | None:
    """Tokens that the layer sees that sees most; None: some layer sees all."""
    widths = list(windows)
    return None if None in widths else max((width for width in widths if width), default=None)


def validate(request: GenerationRequest, info: ModelInfo) -> None:
    """Raise unless the model can run the request: it fits, and every id is in the vocabulary."""
    prompt = request.prompt_token_ids
    if len(prompt) >= info.max_model_len:
        raise PromptTooLong(len(prompt), info.max_model_len)
    for token_id in (min(prompt), max(prompt)):
        if not 0 <= token_id < info.vocab_size:
            raise UsageError(
                f"token id {token_id} is outside the vocabulary of {info.vocab_size} tokens"
            )
    request.sampling.check_vocabulary(info.vocab_size)
