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

import torch
from torch import Tensor

from qtool.errors import UsageError
from qtool.runtime.engine.penalties import Penalties
from qtool.runtime.engine.sampling_params import SamplingParams


class TokenMask(Protocol):
    """Says which tokens may follow an answer: a grammar, as its sequence's rules see it."""

    def restrict(self, logits: Tensor, token_ids: Series[int], accepted: Series[int]) -> None:
        """Put -inf on the tokens of logits [vocab] that may not follow prompt and answer,
        token_ids, and the accepted tokens after them.
        """
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

    def _catch_up(
        self, penalties: Penalties, token_ids: Series[int], accepted: Series[int]
    ) -> None:
        start = self.num_prompt_tokens + self._num_counted
        for position in range(start, len(token_ids) + len(accepted)):
            offset = position - len(token_ids)
            penalties.count(token_ids[position] if offset < 0 else accepted[offset])
            self._num_counted += 1


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
