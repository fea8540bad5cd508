"""Questions through a loaded model: texts to tokens, tokens to likelihoods, likelihoods to answers.

Tokens are made as lm-evaluation-harness makes them: context and continuation are encoded as one
text, with the special tokens the tokenizer puts there, and the context's own encoding says where
the continuation begins; spaces at the end of a context go over to the continuation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

from qtool.errors import FormatError, QtoolError
from qtool.runtime.evaluate.tasks.likelihood import Continuation, Likelihood
from qtool.runtime.evaluate.tasks.results import Answers, judge
from qtool.runtime.evaluate.tasks.tasks import Task
from qtool.runtime.tokenizer import Tokenizer


class LikelihoodScorer(Protocol):
    """A loaded model, as tasks see it."""

    @property
    def name(self) -> str: ...

    @property
    def tokenizer(self) -> Tokenizer | None: ...

    def likelihoods(
        self, questions: Sequence[Sequence[Continuation]], advance: Callable[[int], None]
    ) -> list[list[Likelihood]]:
        """Of every continuation of every question; `advance` is told of questions as they end."""
        ...


def answer(scorer: LikelihoodScorer, task: Task, advance: Callable[[int], None]) -> Answers:
    """Every item of a task; raises QtoolError if the model gives no finite numbers."""
    questions = [
        [encode_pair(scorer, choice.context, choice.continuation) for choice in item.choices]
        for item in task.items
    ]
    likelihoods = scorer.likelihoods(questions, advance)
    for number, found in enumerate(likelihoods, start=1):
        if not all(math.isfinite(likelihood.logprob) for likelihood in found):
            raise QtoolError(
                f"{scorer.name} gives logits that are not finite on question {number} of "
                f"{task.name}",
                "try --dtype float32; if that fails too, the weights are damaged: run qtool verify",
            )
    return judge(task.items, likelihoods)


def encode_pair(scorer: LikelihoodScorer, context: str, continuation: str) -> Continuation:
    tokenizer = scorer.tokenizer
    if tokenizer is None:
        raise QtoolError(
            f"{scorer.name} has no tokenizer, so no question can be put to it",
            "put the original's tokenizer.json and tokenizer_config.json in its folder",
        )
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    if not stripped:
        return _without_context(tokenizer, continuation)
    before = tokenizer.encode(stripped)
    whole = tokenizer.encode(stripped + continuation)
    if len(whole) <= len(before):
        raise FormatError(
            f"{continuation!r} adds no token to {stripped[-40:]!r}, so it cannot be scored"
        )
    return Continuation(tuple(whole), len(before))


def _without_context(tokenizer: Tokenizer, continuation: str) -> Continuation:
    """Behind BOS or, where there is none, the end-of-text token."""
    tokens = tokenizer.encode(continuation, add_special_tokens=False)
    starts = (tokenizer.bos_token_id, *tokenizer.eos_token_ids)
    start = next((token for token in starts if token is not None), None)
    if start is None or tokens[0] == start:
        if len(tokens) < 2:
            raise FormatError(f"{continuation!r} has no token before it to be scored behind")
        return Continuation(tuple(tokens), 1)
    return Continuation((start, *tokens), 1)
