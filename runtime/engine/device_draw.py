"""Steps whose tokens are drawn where the logits are, and read later.

    logits -> rules (bias, masks, penalties) -> a token for each row -> host, when it is asked

A step copies a few numbers to the host and not a vocabulary, and the next step can be launched
before that: what it draws from is on the device (`batch.Unread`). Sequences whose logits the host
has to read (log-probabilities, drafts to judge, several answers that begin) take all of a batch to
the host. Masks that depend on what was just written (grammars, words that are ruled out) are made
on the host while the model computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Series
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from qtool.kernels.cuda import sampling, sampling_rules
from qtool.kernels.cuda.launch import on_its_way, to_device
from qtool.kernels.cuda.sampling import Draw, Draws
from qtool.kernels.cuda.sampling_rules import Biases, Masks, Penalized, Rules
from qtool.runtime.engine.batch import Batch, Unread
from qtool.runtime.engine.draw import Drawn
from qtool.runtime.engine.logit_rules import Bits
from qtool.runtime.engine.sampler import NotFinite, NothingAllowed, Sampled, uniform
from qtool.runtime.engine.scheduler import Scheduled
from qtool.runtime.engine.sequence import Sequence
from qtool.runtime.engine.token_counts import Text, TokenCounts

# What came of a row.
NOT_FINITE, NOTHING_ALLOWED, DRAWN = range(3)


class Computes(Protocol):
    """The steps of a model on a device."""

    def logits(self, batch: Batch) -> Tensor:
        """Of the sampled rows, [sampled, vocab] float32, good until the next step, and free to be
        changed.
        """
        ...

    def draw(self, batch: Batch, draws: Series[Draw]) -> tuple[Tensor, Tensor]:
        """A token for each sampled row: [sampled] int64, and whether its logits are finite; good
        until the next step.
        """
        ...


class Kernels(NamedTuple):
    """Change logits by rules; draw tokens, and say which rows are finite."""

    apply_rules: Callable[[Tensor, Rules], None]
    draw_tokens: Callable[[Tensor, Draws], tuple[Tensor, Tensor]]


TRITON = Kernels(sampling_rules.apply_rules, sampling.draw_tokens)


def draws_on_device(scheduled: Series[Scheduled]) -> bool:
    """Whether the host has to read none of the step's logits."""
    return not any(
        work.num_prompt_rows
        or work.num_draft_tokens
        or (work.samples and work.sequence.siblings)
        or (work.samples and work.sequence.request.sampling.num_logprobs is not None)
        for work in scheduled
    )


def needs_unread(scheduled: Series[Scheduled]) -> bool:
    """Whether the host has to know a token that it has not read yet before the step can begin."""
    return any(
        work.sequence.num_unread_tokens
        and work.sequence.rules is not None
        and work.sequence.rules.reads_last_token
        for work in scheduled
    )


@dataclass(frozen=True, slots=True, eq=False)
class Launched:
    """A step that a device computes.

    unread    what it draws, for the step after it
    failures  of sequences, found on the host
    found     [2, drawn] int64: tokens, and what came of each row; on the host once `arrived`
    """

    unread: Unread
    failures: Mapping[Sequence, Exception]
    found: Tensor
    arrived: torch.cuda.Event | None

    def read(self, scheduled: Series[Scheduled]) -> list[Drawn | Exception]:
        """What `draw` would have given; waits for the device."""
        if self.arrived is not None:
            self.arrived.synchronize()
        tokens, outcomes = self.found.tolist()
        return [self._result(work, tokens, outcomes) for work in scheduled]

    def _result(self, work: Scheduled, tokens: list[int], outcomes: list[int]) -> Drawn | Exception:
        if not work.samples:
            return Drawn()
        place = self.unread.places[work.sequence]
        if outcomes[place] == NOT_FINITE:
            return NotFinite("the model's output is not finite")
        if work.sequence in self.failures:
            return self.failures[work.sequence]
        if outcomes[place] == NOTHING_ALLOWED:
            return NothingAllowed("the request's rules leave no token that could be written")
        return Drawn(Sampled((tokens[place],)))


class DeviceDraw:
    def __init__(
        self, steps: Computes, vocab_size: int, device: torch.device, kernels: Kernels = TRITON
    ) -> None:
        self._steps = steps
        self._kernels = kernels
        self._vocab_size = vocab_size
        self._device = device
        self._counts = TokenCounts(vocab_size, device)

    @torch.inference_mode()
    def launch(self, batch: Batch, scheduled: Series[Scheduled]) -> Launched:
        """scheduled: the batch's, of which `draws_on_device` holds"""
        drawing = [work for work in scheduled if work.samples]
        draws = [draw_of(work) for work in drawing]
        failures: dict[Sequence, Exception] = {}
        if not drawing:
            self._steps.logits(batch)
            tokens = outcomes = batch.token_ids.new_empty(0)
        elif all(work.sequence.rules is None for work in drawing):
            tokens, finite = self._steps.draw(batch, draws)
            outcomes = torch.where(finite == 1, DRAWN, NOT_FINITE)
        else:
            logits = self._steps.logits(batch)
            finite = logits.amax(dim=-1).isfinite()
            try:
                rules = self._rules(batch, drawing, failures)
                self._kernels.apply_rules(logits, rules)
            except Exception:
                # Some counts may hold tokens of this step and some not: they are made anew from the
                # sequences. The engine tries each of them alone.
                self._counts.forget()
                raise
            tokens, allowed = self._kernels.draw_tokens(
                logits, sampling.on_device(draws, self._device)
            )
            outcomes = torch.where(
                finite, torch.where(allowed == 1, DRAWN, NOTHING_ALLOWED), NOT_FINITE
            )
        # Of the device's own: what the steps give is theirs.
        found = torch.stack((tokens, outcomes.to(torch.int64)))
        places = {work.sequence: place for place, work in enumerate(drawing)}
        host, arrived = _on_its_way_back(found)
        return Launched(Unread(found[0], places), failures, host, arrived)

    def _rules(
        self, batch: Batch, drawing: Series[Scheduled], failures: dict[Sequence, Exception]
    ) -> Rules:
        return Rules(
            self._biases(drawing),
            self._masks(drawing, failures),
            self._penalized(batch, drawing),
        )

    def _biases(self, drawing: Series[Scheduled]) -> Biases | None:
        asked = [
            (row, token_id, value)
            for row, work in enumerate(drawing)
            for token_id, value in (work.sequence.request.sampling.logit_bias or {}).items()
        ]
        if not asked:
            return None
        rows, token_ids, values = zip(*asked, strict=True)
        places = to_device((rows, token_ids), torch.int64, self._device)
        return Biases(places[0], places[1], to_device(values, torch.float32, self._device))

    def _masks(
        self, drawing: Series[Scheduled], failures: dict[Sequence, Exception]
    ) -> Masks | None:
        masks: list[Bits] = []
        rows = [-1] * len(drawing)
        for row, work in enumerate(drawing):
            sequence = work.sequence
            if sequence.rules is None or not sequence.rules.masks:
                continue
            try:
                mask = sequence.rules.mask(
                    sequence.token_ids, sequence.num_tokens, self._vocab_size
                )
            except Exception as error:
                failures[sequence] = error
                continue
            rows[row] = len(masks)
            masks.append(mask)
        if not masks:
            return None
        bits = torch.from_numpy(np.stack(masks).view(np.int32))
        return Masks(on_its_way(bits, self._device), to_device(rows, torch.int32, self._device))

    def _penalized(self, batch: Batch, drawing: Series[Scheduled]) -> Penalized | None:
        rows = [row for row, work in enumerate(drawing) if _is_penalized(work.sequence)]
        if not rows:
            return None
        slots = [-1] * len(drawing)
        counts_last = [False] * len(drawing)
        texts = [Text(drawing[row].sequence, drawing[row].sequence.num_tokens) for row in rows]
        for row, place in zip(rows, self._counts.place(texts), strict=True):
            slots[row], counts_last[row] = place
        asked = [work.sequence.request.sampling for work in drawing]
        penalties = [
            [sampling.repetition_penalty for sampling in asked],
            [sampling.frequency_penalty for sampling in asked],
            [sampling.presence_penalty for sampling in asked],
        ]
        last = batch.token_ids.index_select(0, batch.sampled_rows)
        return Penalized(
            self._counts.counts,
            to_device(slots, torch.int32, self._device),
            torch.where(to_device(counts_last, torch.bool, self._device), last, -1),
            to_device(penalties, torch.float32, self._device),
        )


def draw_of(work: Scheduled) -> Draw:
    """How the sequence asks its next token to be drawn."""
    sequence = work.sequence
    sampling = sequence.request.sampling
    if sampling.greedy:
        return Draw()
    return Draw(
        temperature=sampling.temperature,
        top_k=max(0, sampling.top_k),
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        typical_p=sampling.typical_p,
        number=uniform(sequence.seed, sequence.num_tokens),
    )


def _is_penalized(sequence: Sequence) -> bool:
    return sequence.rules is not None and sequence.rules.penalties is not None


def _on_its_way_back(found: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """On the host, once the event is there."""
    if found.device.type != "cuda":
        return found, None
    host = torch.empty(found.shape, dtype=found.dtype, pin_memory=True)
    host.copy_(found, non_blocking=True)
    arrived: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrived.record()
    return host, arrived
