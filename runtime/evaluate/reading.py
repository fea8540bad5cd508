"""What of the text the models of an evaluation read.

Models are compared token by token, so all of them must read the same tokens. Where nothing is
compared, they may differ: then each reads the same piece of the text in tokens of its own, and bits
per byte say which knows it better.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from qtool.errors import QtoolError
from qtool.runtime.evaluate.perplexity import Protocol, llama_cpp_protocol, papers_protocol
from qtool.runtime.evaluate.scorer import Scorer, TokenizedText, require_same_tokens
from qtool.runtime.evaluate.stored import StoredReference
from qtool.runtime.evaluate.text import EvaluationText
from qtool.runtime.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Reading:
    """The tokens [tokens] int64 that were used of the text, and how they were cut and scored."""

    tokens: Tensor
    bos_token_id: int | None
    protocols: tuple[Protocol, ...]


class Opened(NamedTuple):
    """A loaded model, what is used of the text as it reads it, and how long the whole text is."""

    scorer: Scorer
    text: TokenizedText
    num_tokens: int


class FirstRead(NamedTuple):
    """What is kept of the first model while others are loaded in its place."""

    name: str
    vocab_size: int
    tokenizer: Tokenizer | None
    text: TokenizedText
    num_tokens: int

    @classmethod
    def of(cls, opened: Opened) -> FirstRead:
        scorer = opened.scorer
        return cls(scorer.name, scorer.vocab_size, scorer.tokenizer, opened.text, opened.num_tokens)


def read_by_all(
    scorers: Sequence[Scorer],
    text: EvaluationText,
    max_tokens: int | None,
    stored: StoredReference | None,
    first: FirstRead | None,
    *,
    may_differ: bool,
) -> list[list[Opened]]:
    """The models with what they read, those that read alike together.

    first       of a group before this one
    may_differ  nothing is compared token by token, so tokenizers may differ; all read the piece of
                the text that the first model has in max_tokens
    """
    alike: list[list[Opened]] = []
    for scorer in scorers:
        whole = scorer.tokenize(text.content)
        if stored is not None:
            whole = as_stored(stored, whole, scorer)
        own = Opened(scorer, _shortened(whole, max_tokens), whole.ids.numel())
        first = first or FirstRead.of(own)
        if not may_differ:
            require_same_tokens(first, first.text, scorer, own.text)
        elif not _same(first.text, own.text):
            own = Opened(scorer, scorer.tokenize(_words(first)), whole.ids.numel())
        place = next((found for found in alike if _same(found[0].text, own.text)), None)
        if place is None:
            alike.append([own])
        else:
            place.append(own)
    return alike


def _words(first: FirstRead) -> str:
    """The piece of text that a model reads."""
    assert first.tokenizer is not None, "it has read the text"
    ids = first.text.ids if first.text.bos_token_id is None else first.text.ids[1:]
    return first.tokenizer.decode(ids.tolist())


def _shortened(text: TokenizedText, max_tokens: int | None) -> TokenizedText:
    return TokenizedText(text.ids[:max_tokens], text.bos_token_id)


def _same(a: TokenizedText, b: TokenizedText) -> bool:
    return a.bos_token_id == b.bos_token_id and torch.equal(a.ids, b.ids)


def plan_reading(
    text: TokenizedText, context: int, stored: StoredReference | None, *, papers: bool
) -> Reading:
    count = text.ids.numel()
    llama_cpp = llama_cpp_protocol(
        context=context if stored is None else stored.window,
        num_tokens=count,
        bos_token_id=text.bos_token_id,
    )
    others = (papers_protocol(context=context, num_tokens=count),) if papers else ()
    return Reading(text.ids, text.bos_token_id, (llama_cpp, *others))


def as_stored(stored: StoredReference, own: TokenizedText, scorer: Scorer) -> TokenizedText:
    """The tokens of the file, with BOS where this model's tokenizer puts one."""
    if scorer.vocab_size != stored.vocab_size:
        raise QtoolError(
            f"{scorer.name} predicts {scorer.vocab_size} tokens, {stored.name} holds predictions "
            f"of {stored.vocab_size}",
            "compare a model with the one that it was made from",
        )
    return TokenizedText(stored.tokens, own.bos_token_id)
