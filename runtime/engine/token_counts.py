"""How often texts hold each token, on the device: what penalties are computed from there.

A text has a row of counts, a slot, from its first draw on. Each further draw counts one token, the
one before the draw, which only the device may know yet. A text whose row is not one token behind
(it was put aside while others needed the slots, or its step failed and is repeated) is counted
anew from what the host knows of it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as Series
from typing import NamedTuple

import numpy as np
import torch

from qtool.kernels.cuda.launch import on_its_way
from qtool.kernels.cuda.sampling_rules import IN_PROMPT
from qtool.runtime.engine.sequence import Sequence


class Text(NamedTuple):
    """num_tokens: of the sequence's text at this draw, its last token read or not"""

    sequence: Sequence
    num_tokens: int


class _Held(NamedTuple):
    slot: int
    num_tokens: int


def num_slots(num_texts: int) -> int:
    """A power of two, so that there are seldom more."""
    return 1 << (num_texts - 1).bit_length()


class TokenCounts:
    """As many slots as texts of one step have needed so far."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.counts = torch.zeros((0, vocab_size), dtype=torch.int32, device=device)
        # The longest unused first.
        self._held: OrderedDict[Sequence, _Held] = OrderedDict()

    def place(self, texts: Series[Text]) -> list[tuple[int, bool]]:
        """A slot for each text, and whether the last token of the text is still to be counted."""
        self._make_room(len(texts))
        for sequence, _ in texts:
            if sequence in self._held:
                self._held.move_to_end(sequence)
        return [self._place(text) for text in texts]

    def forget(self) -> None:
        """Of every text: count it anew."""
        self._held.clear()

    def _place(self, text: Text) -> tuple[int, bool]:
        sequence, num_tokens = text
        held = self._held.pop(sequence, None)
        slot = self._free_slot() if held is None else held.slot
        self._held[sequence] = _Held(slot, num_tokens)
        num_before = num_tokens - 1
        if held is not None and held.num_tokens == num_before >= sequence.num_prompt_tokens:
            return slot, True
        self._count(slot, sequence, num_tokens)
        return slot, len(sequence.token_ids) < num_tokens

    def _count(self, slot: int, sequence: Sequence, num_tokens: int) -> None:
        """All of a text that the host knows."""
        prompt = np.unique(np.array(sequence.token_ids[: sequence.num_prompt_tokens]))
        answer = np.array(sequence.token_ids[sequence.num_prompt_tokens : num_tokens], dtype=int)
        token_ids, times = np.unique(answer, return_counts=True)
        self.counts[slot].zero_()
        for ids, values in ((prompt, np.full_like(prompt, IN_PROMPT)), (token_ids, times)):
            there = on_its_way(torch.from_numpy(ids.astype(np.int64)), self.counts.device)
            added = on_its_way(torch.from_numpy(values.astype(np.int32)), self.counts.device)
            self.counts[slot].index_add_(0, there, added)

    def _free_slot(self) -> int:
        if len(self._held) == len(self.counts):
            _, longest_unused = self._held.popitem(last=False)
            return longest_unused.slot
        used = {held.slot for held in self._held.values()}
        return next(slot for slot in range(len(self.counts)) if slot not in used)

    def _make_room(self, num_texts: int) -> None:
        missing = num_slots(num_texts) - len(self.counts)
        if missing > 0:
            more = self.counts.new_zeros(missing, self.counts.shape[1])
            self.counts = torch.cat((self.counts, more))
