"""Penalties on tokens that the text already holds.

    repetition   logit / r if positive, else logit * r     tokens of the prompt or of the answer
    frequency    logit - f * times                         tokens of the answer
    presence     logit - p                                 tokens of the answer

Repetition as transformers has it (CTRL, arXiv:1909.05858), the other two as OpenAI's API defines
them; applied in this order, which is vLLM's.

The distinct tokens and their counts are kept in arrays that grow with the text: a new token is one
look-up, and a step is one gather and one scatter of the distinct tokens, whatever their number.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from qtool.runtime.engine.sampling_params import SamplingParams


class Penalties:
    """The tokens of one text, and what they cost."""

    def __init__(self, sampling: SamplingParams, prompt_token_ids: Iterable[int]) -> None:
        self._repetition = sampling.repetition_penalty
        self._frequency = sampling.frequency_penalty
        self._presence = sampling.presence_penalty
        # Only repetition looks at the prompt.
        seen = list(dict.fromkeys(prompt_token_ids)) if self._repetition != 1 else []
        self._places = {token_id: place for place, token_id in enumerate(seen)}
        # [capacity]: the distinct tokens, and how often the answer holds each
        self._ids = np.zeros(len(seen) + 64, dtype=np.int64)
        self._ids[: len(seen)] = seen
        self._counts = np.zeros(len(self._ids), dtype=np.float32)

    @classmethod
    def for_request(
        cls, sampling: SamplingParams, prompt_token_ids: Iterable[int]
    ) -> "Penalties | None":
        """None where the request asks for no penalty."""
        asked = (
            sampling.repetition_penalty != 1,
            sampling.frequency_penalty != 0,
            sampling.presence_penalty != 0,
        )
        return cls(sampling, prompt_token_ids) if any(asked) else None

    def count(self, token_id: int) -> None:
        """Take one token of the answer."""
        place = self._places.setdefault(token_id, len(self._places))
        if place == len(self._ids):
            self._ids = np.concatenate((self._ids, np.zeros_like(self._ids)))
            self._counts = np.concatenate((self._counts, np.zeros_like(self._counts)))
        self._ids[place] = token_id
        self._counts[place] += 1

    def apply(self, logits: Tensor) -> None:
        """logits [vocab] float32, changed in place."""
        distinct = len(self._places)
        if distinct == 0:
            return
        ids = torch.from_numpy(self._ids[:distinct]).to(logits.device)
        counts = torch.from_numpy(self._counts[:distinct]).to(logits.device)
        values = logits[ids]
        if self._repetition != 1:
            values = torch.where(values > 0, values / self._repetition, values * self._repetition)
        if self._frequency:
            values -= self._frequency * counts
        if self._presence:
            values -= self._presence * (counts > 0)
        logits[ids] = values
