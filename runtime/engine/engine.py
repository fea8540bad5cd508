"""The engine: requests in, one step at a time, token ids out.

    add, abort -> Scheduler.schedule -> Steps.begin -> ModelRunner -> Step.read -> outputs

Where tokens are drawn on a device, a step runs while the one before it is read (`engine.steps`).

It is synchronous and single-threaded; `runtime.engine.async_engine.AsyncEngine` gives it a thread
and `runtime.llm.LLM` calls it in a loop. A request that fails (the model computes no numbers for
it, an operator raises) gets the error as its last output; the step is repeated for the others one
by one, which is safe because a step only writes cache slots of its own sequences.
"""

import logging
import random
import time
from collections.abc import Callable
from collections.abc import Sequence as Series
from contextlib import nullcontext
from pathlib import Path

import torch

from qtool.errors import UsageError
from qtool.runtime.config import EngineConfig
from qtool.runtime.engine.adapters import Adapters
from qtool.runtime.engine.answers import make_answers, validate
from qtool.runtime.engine.assembly import describe, make_runner, plan, widest_window
from qtool.runtime.engine.blocks import BlockManager
from qtool.runtime.engine.client import EngineLost, EngineStats
from qtool.runtime.engine.draw import Drawn
from qtool.runtime.engine.embedding import Pooling, embed
from qtool.runtime.engine.grammar import GrammarCompiler
from qtool.runtime.engine.logprobs import TokenLogprobs
from qtool.runtime.engine.pace import Pace
from qtool.runtime.engine.sampler import Sampled
from qtool.runtime.engine.scheduler import PROMPT_ROWS, Scheduled, Scheduler
from qtool.runtime.engine.sequence import (
    FinishReason,
    GenerationRequest,
    Sequence,
    TokenOutput,
)
from qtool.runtime.engine.speculation import SpeculationCounts
from qtool.runtime.engine.speculators import load_draft, make_speculation
from qtool.runtime.engine.steps import Step, Steps
from qtool.runtime.engine.work import WorkMeter
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
        draft = load_draft(config, loaded)
        pool = plan(config, loaded, draft)
        num_blocks = pool.num_blocks
        decoder = decoder.for_context(pool.max_model_len)
        self._adapters: Adapters | None = None
        if config.uses_lora:
            self._adapters = Adapters(decoder, loaded.source)
            for name, folder in config.lora_modules:
                self._adapters.load(name, Path(folder))
            decoder = self._adapters.model
        self.info = describe(config, loaded, decoder, pool)
        self.blocks = BlockManager(
            num_blocks,
            config.block_size,
            caching=config.enable_prefix_caching,
            window=widest_window(spec.window for spec in decoder.attention),
        )
        self._model = decoder
        self._loaded = loaded
        self._runner = make_runner(loaded, decoder, config, pool, self._adapters)
        self._scheduler = Scheduler(
            self.blocks,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_prompt_rows=PROMPT_ROWS[loaded.device.type],
            by_priority=config.scheduling_policy == "priority",
            pace=Pace(config.target_step_seconds(loaded.device.type)),
        )
        self._steps = Steps(self._runner, self.blocks, self._adapters, loaded.device)
        # What has been launched and not read.
        self._unread_step: Step | None = None
        self._clock = clock
        self._last_read = 0.0
        self._eos_token_ids = loaded.eos_token_ids
        self._seeds = random.Random(config.seed)
        self._sequences: dict[str, Sequence] = {}
        # Of the answers that wait for their prompt: who computes it.
        self._prompted_by: dict[str, Sequence] = {}
        backend = None if loaded.tokenizer is None else loaded.tokenizer.backend
        self.grammars = GrammarCompiler(
            None if backend is None else backend.to_str, decoder.vocab_size, loaded.eos_token_ids
        )
        self._speculation = make_speculation(config, draft, self.info)
        self._work = WorkMeter(
            loaded.decoder,
            weight_bytes=loaded.nbytes,
            cache_bytes_per_token=self.info.kv_cache_bytes / (num_blocks * config.block_size),
        )
        self._leaves_running = config.async_scheduling and self._speculation is None
        self._num_launched_ahead = 0
        self._prompt_tokens = 0
        self._generation_tokens = 0

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work or self._unread_step is not None

    def stats(self) -> EngineStats:
        guessed = SpeculationCounts() if self._speculation is None else self._speculation.counts
        return EngineStats(
            num_requests_running=self._scheduler.num_running,
            num_requests_waiting=self._scheduler.num_waiting,
            kv_cache_usage=self.blocks.usage,
            num_preemptions=self._scheduler.num_preemptions,
            prefix_cache_queries_total=self._scheduler.num_prefix_queries,
            prefix_cache_hits_total=self._scheduler.num_prefix_hits,
            prompt_tokens_total=self._prompt_tokens,
            generation_tokens_total=self._generation_tokens,
            operations_total=self._work.counts.operations,
            bytes_read_total=self._work.counts.bytes_read,
            bytes_written_total=self._work.counts.bytes_written,
            step_seconds_total=self._work.counts.seconds,
            step_tokens_total=self._work.counts.tokens,
            steps_by_size=tuple(self._work.counts.steps_by_size),
            steps_launched_ahead_total=self._num_launched_ahead,
            spec_decode_num_drafts=guessed.num_drafts,
            spec_decode_num_draft_tokens=guessed.num_draft_tokens,
            spec_decode_num_accepted_tokens=guessed.num_accepted_tokens,
            spec_decode_num_accepted_tokens_per_pos=tuple(guessed.by_position),
            running_lora_adapters=self._scheduler.running_adapters if self._adapters else (),
            waiting_lora_adapters=self._scheduler.waiting_adapters if self._adapters else (),
        )

    def add(self, request: GenerationRequest) -> None:
        """Queue a request; raises PromptTooLong or UsageError if it can never run."""
        validate(request, self.info)
        if request.request_id in self._sequences:
            raise UsageError(f"request {request.request_id} is already running")
        if request.lora is not None and self._adapters is not None:
            if request.lora.lora_path is not None:
                self._adapters.load(request.lora.lora_name, Path(request.lora.lora_path))
            self._adapters.check(request.lora.lora_name)
        first, *others = answers = make_answers(
            request,
            self.info,
            eos_token_ids=self._eos_token_ids,
            seeds=self._seeds,
            grammars=self.grammars,
            now=self._clock(),
        )
        self._sequences.update({sequence.id: sequence for sequence in answers})
        self._start(first, others)

    def _start(self, first: Sequence, others: list[Sequence]) -> None:
        """Queue a request's first answer, which computes the prompt for the others."""
        first.siblings = others
        self._prompted_by.update({sibling.id: first for sibling in others})
        self._scheduler.add(first)

    def embed(self, token_ids: tuple[int, ...], pooling: Pooling) -> list[float]:
        """A vector for a text, now; see `runtime.engine.embedding`."""
        if self._adapters is not None:
            self._adapters.select(())
        team = self._loaded.team
        tokens = torch.tensor([token_ids])
        with nullcontext() if team is None else team.full_pass(tokens, logits=False):
            return embed(self._model, token_ids, pooling)

    def close(self) -> None:
        """End the other ranks, if there are any; the engine is of no use afterwards."""
        self._loaded.close()

    def abort(self, request_id: str, index: int | None = None) -> list[TokenOutput]:
        """End a request, or one of its answers, and free its blocks now; nothing if it is not here
        (any more).
        """
        return self._end(
            [
                sequence
                for sequence in self._sequences.values()
                if sequence.request.request_id == request_id and index in (None, sequence.index)
            ],
            "abort",
        )

    def abort_all(self, error: str | None = None) -> list[TokenOutput]:
        """End every request, with an error if one is given."""
        return self._end(
            list(self._sequences.values()), "abort" if error is None else "error", error
        )

    def _end(
        self, sequences: Series[Sequence], reason: FinishReason, error: str | None = None
    ) -> list[TokenOutput]:
        # The last answers of a request first: none is left to compute the prompt for the others.
        ended = [self._finish(sequence, reason, error=error) for sequence in reversed(sequences)]
        return ended[::-1]

    def step(self) -> list[TokenOutput]:
        """Compute what the scheduler chose; one output for each sequence that got a token, which
        may be a token of the step before.
        """
        if self._speculation is not None:
            self._speculation.propose(self._scheduler.decoding)
        started = self._clock()
        outputs = [self._expire(sequence) for sequence in self._scheduler.expired(started)]
        before, self._unread_step = self._unread_step, None
        scheduled = self._scheduler.schedule(started)
        if scheduled:
            # In this order: what is copied may go where there was something to clear. And before
            # anything is read, as a sequence that fails makes more to clear.
            self._runner.clear(self.blocks.take_dirty())
            self._runner.copy(self.blocks.take_copies())
        if before is not None and not (scheduled and self._steps.can_follow(scheduled)):
            outputs.extend(self._read(before))
            scheduled, before = self._still_here(scheduled), None
        step: Step | None = None
        try:
            if scheduled:
                step = self._steps.begin(scheduled, started, before)
                self._scheduler.launched(scheduled)
        except EngineLost:
            raise
        except Exception:
            logger.exception("a step of %d sequences failed; trying each alone", len(scheduled))
        if before is not None:
            self._num_launched_ahead += step is not None
            outputs.extend(self._read(before))
        if step is None and (scheduled := self._still_here(scheduled)):
            step = Step(scheduled, started, [self._compute_alone(work) for work in scheduled])
            self._scheduler.launched(scheduled)
        if step is not None and step.is_running and self._leaves_running:
            self._unread_step = step
        elif step is not None:
            outputs.extend(self._read(step))
        return outputs

    def _is_here(self, work: Scheduled) -> bool:
        return self._sequences.get(work.sequence.id) is work.sequence

    def _still_here(self, scheduled: Series[Scheduled]) -> list[Scheduled]:
        """Without sequences that have ended since they were scheduled."""
        return [work for work in scheduled if self._is_here(work)]

    def _read(self, step: Step) -> list[TokenOutput]:
        """Take up what a step has drawn."""
        results: Series[Drawn | Exception]
        try:
            results = step.read()
        except EngineLost:
            raise
        except Exception as error:
            logger.exception("what a step of %d sequences drew is lost", len(step.scheduled))
            results = [error] * len(step.scheduled)
        now = self._clock()
        # A step that was launched ahead has begun when the one before it was over.
        self._observe(step.scheduled, now - max(step.started, self._last_read))
        self._last_read = now
        outputs: list[TokenOutput] = []
        for work, result in zip(step.scheduled, results, strict=True):
            if self._is_here(work):
                outputs.extend(self._advance(work, result))
        return outputs

    def _observe(self, scheduled: Series[Scheduled], seconds: float) -> None:
        """Learn from a step what prompt tokens cost, and guesses; count its work by arithmetic."""
        self._work.observe(scheduled, seconds)
        if self._speculation is not None:
            self._speculation.observe(scheduled, seconds)
        num_decoding = sum(work.is_decoding for work in scheduled)
        num_prompt_tokens = sum(work.num_tokens for work in scheduled if not work.is_decoding)
        self._scheduler.pace.observe(
            seconds, num_prompt_tokens=num_prompt_tokens, num_decoding=num_decoding
        )

    def _compute_alone(self, work: Scheduled) -> Drawn | Exception:
        try:
            return self._steps.begin([work], 0.0).read()[0]
        except EngineLost:
            raise
        except Exception as error:
            logger.exception("request %s failed", work.sequence.id)
            return error

    def _advance(self, work: Scheduled, result: Drawn | Exception) -> list[TokenOutput]:
        sequence = work.sequence
        sequence.num_unread_tokens -= work.samples
        if isinstance(result, Exception):
            return self._end([sequence, *sequence.siblings], "error", _text_of(result))
        # Of one that was preempted while the step ran, the cache holds nothing.
        num_computed = work.num_kept_tokens if work.keeps_blocks else None
        sampled = result.sampled
        if sampled is None:
            if num_computed is not None:
                self._scheduler.computed(sequence, num_computed)
            return []
        if sequence.num_generated_tokens == 0:
            self._prompt_tokens += sequence.num_prompt_tokens
        if self._speculation is not None:
            self._speculation.judge(work, len(sampled.token_ids) - 1)
        sequence.draft_token_ids.clear()
        if sequence.siblings and num_computed is not None:
            # First of all, as they share the blocks that this one gives back if it ends here.
            self._scheduler.computed(sequence, num_computed)
        others = [
            self._begin(sequence, sibling, drawn)
            for sibling, drawn in zip(list(sequence.siblings), result.siblings, strict=True)
        ]
        return [self._take(sequence, sampled, num_computed), *others]

    def _begin(
        self, parent: Sequence, sibling: Sequence, drawn: Sampled | Exception
    ) -> TokenOutput:
        """Take up a further answer, whose first token has been drawn."""
        if isinstance(drawn, Exception):
            return self._finish(sibling, "error", error=_text_of(drawn))
        output = self._take(sibling, drawn, num_computed=None)
        if output.finish_reason is None:
            self._leave(sibling)
            self._scheduler.fork(parent, sibling)
        return output

    def _leave(self, sibling: Sequence) -> bool:
        """Wait no longer for another's prompt; False if it did not."""
        parent = self._prompted_by.pop(sibling.id, None)
        if parent is not None:
            parent.siblings.remove(sibling)
        return parent is not None

    def _take(self, sequence: Sequence, sampled: Sampled, num_computed: int | None) -> TokenOutput:
        """Append what was drawn, as far as the answer goes.

        num_computed  tokens that the cache holds, drafts not counted; None: none of its own yet
        """
        num_taken = 0
        reason: FinishReason | None = None
        for token_id in sampled.token_ids:
            num_taken += 1
            reason = sequence.append(token_id)
            if reason is not None:
                break
        self._generation_tokens += num_taken
        if num_computed is not None:
            # Of the drafts, the cache keeps those that were drawn; behind them it is written anew.
            self._scheduler.computed(sequence, num_computed + num_taken - 1)
        logprobs = None if sampled.logprobs is None else sampled.logprobs[:num_taken]
        new_token_ids = sampled.token_ids[:num_taken]
        if reason is not None:
            return self._finish(sequence, reason, new_token_ids, logprobs=logprobs)
        return sequence.output(new_token_ids, logprobs=logprobs)

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
        logprobs: tuple[TokenLogprobs, ...] | None = None,
    ) -> TokenOutput:
        if not self._leave(sequence):
            self._scheduler.remove(sequence, failed=reason == "error")
        if sequence.siblings:
            # Somebody has to compute the prompt for them.
            heir, *others = sequence.siblings
            self._leave(heir)
            self._start(heir, others)
        del self._sequences[sequence.id]
        if self._speculation is not None:
            self._speculation.forget(sequence.id)
        return sequence.output(new_token_ids, reason, error, logprobs)


def _text_of(error: Exception) -> str:
    return str(error) or type(error).__name__
