"""What a request changes in the logits before temperature and the cut of unlikely tokens.

    grammar and allowed ids -> bad words -> min_tokens -> logit_bias -> penalties

Everything is a function of the text so far, so a sequence that was preempted, or whose step failed
and is repeated, gets what it would have got; what is counted (penalties) or parsed (a grammar) is
caught up with the text on each call, one new token at a time.
"""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as Series
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qtool.errors import UsageError
from qtool.runtime.engine.penalties import Penalties
from qtool.runtime.engine.sampling_params import SamplingParams

Bits = NDArray[np.uint8]


class TokenMask(Protocol):
    """Says which tokens may follow an answer: a grammar, as its sequence's rules see it."""

    def restrict(self, logits: Tensor, token_ids: Series[int], accepted: Series[int]) -> None:
        """Put -inf on the tokens of logits [vocab] that may not follow prompt and answer,
        token_ids, and the accepted tokens after them.
        """
        ...

    def bits(self, token_ids: Series[int], accepted: Series[int] = ()) -> bytes:
        """The same as a bit for each token, the lowest of a byte first; set: may follow."""
        ...


@dataclass(slots=True, eq=False)
class LogitRules:
    """The rules of one sequence.

    banned_runs    runs of ids that must not be completed, longer than one
    banned         [ids] that are never drawn
    ending         [ids] that are not drawn before min_tokens
    """

    num_prompt_tokens: int
    grammar: TokenMask | None = None
    allowed: Tensor | None = None
    banned: Tensor | None = None
    banned_runs: tuple[tuple[int, ...], ...] = ()
    min_tokens: int = 0
    ending: Tensor | None = None
    biased: Tensor | None = None
    biases: Tensor | None = None
    penalties: Penalties | None = None
    _num_counted: int = field(default=0, init=False)
    # What no text changes, as `mask` has it.
    _fixed: Bits | None = field(default=None, init=False)

    @property
    def reads_last_token(self) -> bool:
        """Whether what may follow depends on which token came last, and not on their number."""
        return self.grammar is not None or bool(self.banned_runs)

    @property
    def masks(self) -> bool:
        """Whether `mask` can rule anything out."""
        return self.reads_last_token or any(
            ids is not None for ids in (self.allowed, self.banned, self.ending)
        )

    @classmethod
    def for_request(
        cls,
        sampling: SamplingParams,
        prompt_token_ids: Series[int],
        stop_token_ids: Collection[int],
        grammar: TokenMask | None = None,
    ) -> LogitRules | None:
        """None where the request changes no logits, as most do not."""
        runs = [_as_ids(word) for word in sampling.bad_words]
        single = [run[0] for run in runs if len(run) == 1]
        bias = sampling.logit_bias or {}
        has_minimum = sampling.min_tokens > 0 and len(stop_token_ids) > 0
        penalties = Penalties.for_request(sampling, prompt_token_ids)
        if not (grammar or sampling.allowed_token_ids or runs or has_minimum or bias or penalties):
            return None
        return cls(
            num_prompt_tokens=len(prompt_token_ids),
            grammar=grammar,
            allowed=_index(sampling.allowed_token_ids or ()),
            banned=_index(single),
            banned_runs=tuple(run for run in runs if len(run) > 1),
            min_tokens=sampling.min_tokens,
            ending=_index(stop_token_ids) if has_minimum else None,
            biased=_index(bias),
            biases=torch.tensor(list(bias.values())) if bias else None,
            penalties=penalties,
        )

    def apply(self, logits: Tensor, token_ids: Series[int], accepted: Series[int] = ()) -> None:
        """Change logits [vocab] float32 of the position after token_ids (prompt and answer) and
        the accepted tokens that follow them.
        """
        num_answer = len(token_ids) - self.num_prompt_tokens + len(accepted)
        if self.grammar is not None:
            self.grammar.restrict(logits, token_ids, accepted)
        if self.allowed is not None:
            kept = logits[self.allowed]
            logits.fill_(-torch.inf)
            logits[self.allowed] = kept
        if self.banned is not None:
            logits[self.banned] = -torch.inf
        for run in self.banned_runs:
            if _ends_with(token_ids, accepted, run[:-1]):
                logits[run[-1]] = -torch.inf
        if self.ending is not None and num_answer < self.min_tokens:
            ends = logits[self.ending]
            logits[self.ending] = -torch.inf
            if self.grammar is not None and bool(logits.max() == -torch.inf):
                logits[self.ending] = ends  # the grammar is at its end, and nothing else may follow
        if self.biased is not None and self.biases is not None:
            logits[self.biased] += self.biases.to(logits.device)
        if self.penalties is not None:
            self._catch_up(self.penalties, token_ids, accepted)
            self.penalties.apply(logits)

    def mask(self, token_ids: Series[int], num_tokens: int, vocab_size: int) -> Bits:
        """Which tokens may follow a text of num_tokens: [vocab in whole words] uint8, a bit for
        each, the lowest first. What `apply` rules out, for where logits are not on the host.

        token_ids  the text; not the last of it, where nothing here reads it
        """
        if self._fixed is None:
            self._fixed = _bits(self.allowed, vocab_size) & ~_bits(self.banned, vocab_size, none=0)
        found = self._fixed.copy()
        if self.grammar is not None:
            bits = np.frombuffer(self.grammar.bits(token_ids), dtype=np.uint8)
            found[: len(bits)] &= bits[: len(found)]
            found[len(bits) :] = 0
        for run in self.banned_runs:
            if _ends_with(token_ids, (), run[:-1]):
                found[run[-1] // 8] &= ~np.uint8(1 << run[-1] % 8)
        if self.ending is not None and num_tokens - self.num_prompt_tokens < self.min_tokens:
            going_on = found & ~_bits(self.ending, vocab_size, none=0)
            # The grammar may be at its end, and nothing else may follow.
            if self.grammar is None or going_on.any():
                found = going_on
        return found

    def _catch_up(
        self, penalties: Penalties, token_ids: Series[int], accepted: Series[int]
    ) -> None:
        start = self.num_prompt_tokens + self._num_counted
        for position in range(start, len(token_ids) + len(accepted)):
            offset = position - len(token_ids)
            penalties.count(token_ids[position] if offset < 0 else accepted[offset])
            self._num_counted += 1


def _bits(ids: Tensor | None, vocab_size: int, none: int = 1) -> Bits:
    """ids [any] as set bits, in whole words of 32; of None all bits of the vocabulary are `none`"""
    flags = np.zeros(-(-vocab_size // 32) * 32, dtype=np.uint8)
    if ids is None:
        flags[:vocab_size] = none
    else:
        flags[ids.numpy()] = 1
    return np.packbits(flags, bitorder="little")


def _index(ids: Collection[int]) -> Tensor | None:
    return torch.tensor(sorted(ids) if not isinstance(ids, dict) else list(ids)) if ids else None


def _as_ids(word: str | tuple[int, ...]) -> tuple[int, ...]:
    if isinstance(word, str):
        raise UsageError(
            f"bad_words holds the text {word!r}, and the engine takes token ids",
            hint="turn it into ids with the model's tokenizer",
        )
    return word


def _ends_with(text: Series[int], accepted: Series[int], run: Series[int]) -> bool:
    """Whether text + accepted ends with the run."""
    if len(run) > len(text) + len(accepted):
        return False
    tail = [*text[-len(run) :], *accepted][-len(run) :]
    return tail == list(run)
