"""Guessing by a smaller model, which runs beside the large one on the same sequences.

It has a KV pool of its own with as many tokens of room, and follows the sequences that decode: what
their texts gained since it last looked is computed, then it writes on by itself, all sequences in
one batch, one token a round. What it cached of guesses that were not taken is simply written over.
It draws as the large model will: the same values of sampling, the same random number for the same
position, so two distributions that are alike give the same token most of the time.

Where its pool is full a sequence has no guesses until there is room; it loses nothing by that.
"""

from __future__ import annotations

from collections.abc import Sequence as Series
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qtool.errors import UsageError
from qtool.kernels.reference import Span
from qtool.runtime.engine.batch import Batch
from qtool.runtime.engine.blocks import BlockManager
from qtool.runtime.engine.runner import ModelRunner
from qtool.runtime.engine.sampler import draw
from qtool.runtime.engine.sequence import Sequence
from qtool.runtime.loading import LoadedModel


@dataclass(slots=True)
class _Followed:
    """What the pool holds of one sequence.

    cached         its tokens, the guesses included
    num_confirmed  of them the first, known to be the text's own
    """

    cached: list[int] = field(default_factory=list)
    num_confirmed: int = 0


class DraftProposer:
    """max_rows  tokens of texts that one call computes to catch up, before it guesses"""

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        max_model_len: int,
        num_blocks: int,
        block_size: int,
        vocab_size: int,
        max_rows: int,
    ) -> None:
        model = loaded.decoder.for_context(max_model_len)
        if loaded.max_position_embeddings < max_model_len:
            raise UsageError(
                f"the draft model was made for {loaded.max_position_embeddings} tokens, and the "
                f"context is {max_model_len}",
                hint=f"use --max-model-len {loaded.max_position_embeddings} or another draft model",
            )
        self._device = model.device
        self._vocab_size = vocab_size
        self._block_size = block_size
        self._max_rows = max_rows
        self._runner = ModelRunner(model, num_blocks=num_blocks, block_size=block_size)
        self._blocks = BlockManager(num_blocks, block_size, caching=False)
        self._followed: dict[str, _Followed] = {}
        # Sequences whose texts are cached but for the last token, with room for guesses.
        self._ready: set[str] = set()

    def prepare(self, sequences: Series[Sequence], counts: Series[int]) -> None:
        """Catch up with the texts, as far as a step's rows reach."""
        self._ready.clear()
        rows = self._max_rows
        for sequence, count in zip(sequences, counts, strict=True):
            if count < 1 or not self._make_room(sequence, count):
                continue
            rows = self._catch_up(sequence, rows)
            if len(self._followed[sequence.id].cached) == len(sequence.token_ids) - 1:
                self._ready.add(sequence.id)

    def propose(self, sequences: Series[Sequence], counts: Series[int]) -> list[list[int]]:
        """Up to count guesses for each sequence."""
        guesses: list[list[int]] = [[] for _ in sequences]
        active = [index for index, one in enumerate(sequences) if one.id in self._ready]
        for _ in range(max(counts, default=0)):
            active = [index for index in active if len(guesses[index]) < counts[index]]
            if not active:
                break
            texts = [[*sequences[i].token_ids[-1:], *guesses[i]][-1:] for i in active]
            logits = self._forward([sequences[i].id for i in active], texts)
            for index, row in zip(active, logits, strict=True):
                guesses[index].append(self._draw(row, sequences[index], len(guesses[index])))
        return guesses

    def forget(self, sequence_id: str) -> None:
        if self._followed.pop(sequence_id, None) is not None:
            self._blocks.free(sequence_id)

    def _make_room(self, sequence: Sequence, count: int) -> bool:
        length = len(sequence.token_ids) + count
        followed = self._followed.get(sequence.id)
        if followed is None:
            # Blocks for the whole text at once, as the scheduler's admission has it.
            if self._blocks.blocks_for(length) > self._blocks.num_free_blocks:
                return False
            self._blocks.admit(sequence.id, list(sequence.token_ids), reuse=False)
            self._followed[sequence.id] = _Followed()
            return self._blocks.allocate(sequence.id, length)
        kept, cached = followed.num_confirmed, followed.cached
        while kept < min(len(cached), len(sequence.token_ids)):
            if cached[kept] != sequence.token_ids[kept]:
                break
            kept += 1
        del cached[kept:]
        followed.num_confirmed = kept
        return self._blocks.allocate(sequence.id, length)

    def _catch_up(self, sequence: Sequence, rows: int) -> int:
        """Compute the text but for its last token, as far as the rows reach; the rows left."""
        cached = self._followed[sequence.id].cached
        missing = sequence.token_ids[len(cached) : len(sequence.token_ids) - 1][:rows]
        if missing:
            self._forward([sequence.id], [missing], wanted=False)
        return rows - len(missing)

    @torch.inference_mode()
    def _forward(
        self, sequence_ids: Series[str], texts: Series[Series[int]], *, wanted: bool = True
    ) -> Tensor:
        """Append texts to what is cached; logits [texts, vocab] of their last tokens, if wanted."""
        token_ids: list[int] = []
        positions: list[int] = []
        spans: list[Span] = []
        last: list[int] = []
        for name, text in zip(sequence_ids, texts, strict=True):
            cached = self._followed[name].cached
            start = len(cached)
            cached.extend(text)
            token_ids.extend(text)
            positions.extend(range(start, len(cached)))
            spans.append(Span(len(text), len(cached), self._blocks.table(name)))
            last.append(len(token_ids) - 1)
        return self._runner.run(
            Batch(
                token_ids=torch.tensor(token_ids, device=self._device),
                positions=torch.tensor(positions, device=self._device),
                spans=tuple(spans),
                sampled_rows=torch.tensor(
                    last if wanted else [], dtype=torch.int64, device=self._device
                ),
                row_ranges=(),
            )
        )

    def _draw(self, row: Tensor, sequence: Sequence, num_guessed: int) -> int:
        row = row[: self._vocab_size]
        sampling = sequence.request.sampling
        if sampling.greedy:
            return int(row.argmax())
        return draw(row, sampling, sequence.seed, len(sequence.token_ids) + num_guessed)
