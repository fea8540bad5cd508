"""Text that must match a grammar: JSON schemas, regular expressions, choices, Lark and GBNF.

The parsing is llguidance's: after each token it says which tokens of the vocabulary may follow, one
bit each. A grammar is compiled once and kept; every sequence that uses it has a parser of its own,
copied from the compiled one. Masks are computed in a worker thread while the model computes the
logits they are for (llguidance releases the interpreter lock), for drafted tokens too: the parser
walks along the drafts and back again.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Callable
from collections.abc import Sequence as Series
from concurrent.futures import Executor, Future

import llguidance
import numpy as np
import torch
from torch import Tensor

from qtool.errors import QtoolError, UsageError
from qtool.runtime.engine.sampling_params import StructuredOutputsParams

# Compiled grammars kept; a schema's takes some hundred kilobytes.
KEPT_GRAMMARS = 64


class GrammarCompiler:
    """Compiles what requests ask for against one model's vocabulary; may be called by any thread.

    tokenizer_json  the text of the model's tokenizer.json; None: the model has no tokenizer
    """

    def __init__(
        self,
        tokenizer_json: Callable[[], str] | None,
        vocab_size: int,
        eos_token_ids: Series[int],
    ) -> None:
        self._tokenizer_json = tokenizer_json
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._compiled: OrderedDict[StructuredOutputsParams, Future[llguidance.LLMatcher]]
        self._compiled = OrderedDict()
        # Held for moments only: a grammar that takes a second must not hold up the engine, which
        # asks for another.
        self._lock = threading.Lock()
        self._vocabulary_lock = threading.Lock()

    def check(self, wanted: StructuredOutputsParams) -> None:
        """Compile, or raise a UsageError that says what is wrong with the grammar."""
        self._compile(wanted)

    def grammar(self, wanted: StructuredOutputsParams, num_prompt_tokens: int) -> Grammar:
        """The grammar of a new sequence; raises as `check` does."""
        matcher = self._compile(wanted).deep_copy()
        return Grammar(matcher, num_prompt_tokens, self._vocab_size)

    def _compile(self, wanted: StructuredOutputsParams) -> llguidance.LLMatcher:
        with self._lock:
            compiled = self._compiled.get(wanted)
            if compiled is not None:
                self._compiled.move_to_end(wanted)
            else:
                ours = self._compiled[wanted] = Future()
                if len(self._compiled) > KEPT_GRAMMARS:
                    self._compiled.popitem(last=False)
        if compiled is not None:
            return compiled.result()
        try:
            ours.set_result(_matcher(wanted, self._vocabulary()))
        except BaseException as error:
            with self._lock:
                self._compiled.pop(wanted, None)
            ours.set_exception(error)
        return ours.result()

    def _vocabulary(self) -> llguidance.LLTokenizer:
        with self._vocabulary_lock:
            if self._tokenizer is None:
                if self._tokenizer_json is None or not self._eos_token_ids:
                    lacks = "tokenizer" if self._tokenizer_json is None else "end-of-text token"
                    raise UsageError(f"structured_outputs: the model has no {lacks}")
                # About a second for 150,000 tokens, so only when first needed.
                self._tokenizer = llguidance.LLTokenizer(
                    self._tokenizer_json(), n_vocab=self._vocab_size, eos_token=self._eos_token_ids
                )
            return self._tokenizer


def _matcher(
    wanted: StructuredOutputsParams, tokenizer: llguidance.LLTokenizer
) -> llguidance.LLMatcher:
    try:
        grammar = _grammar_text(wanted)
    except ValueError as error:
        raise UsageError(f"structured_outputs: {error}") from None
    matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0)
    if matcher.is_error():
        reason = _plain(matcher.get_error())
        raise UsageError(f"structured_outputs: the grammar cannot be used: {reason:.500}")
    return matcher


def _plain(message: str) -> str:
    """In one line, without the grammar's own lines that llguidance shows below."""
    first = message.split("\n\n")[0].splitlines()
    shown = re.compile(r"\s*(\d+ \||\^+\s*$)")
    return " ".join(line.strip() for line in first if not shown.match(line))


def _grammar_text(wanted: StructuredOutputsParams) -> str:
    if wanted.regex is not None:
        return llguidance.grammar_from("regex", wanted.regex)
    if wanted.choice is not None:
        return llguidance.grammar_from("choice", list(wanted.choice))  # type: ignore[arg-type]
    if wanted.grammar is not None:
        return llguidance.grammar_from("grammar", wanted.grammar)
    schema = '{"type": "object"}' if wanted.json is None else wanted.json
    options: dict[str, object] = {}
    if wanted.disable_any_whitespace:
        options["whitespace_flexible"] = False
    if wanted.whitespace_pattern is not None:
        options["whitespace_pattern"] = wanted.whitespace_pattern
    return llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=options)  # type: ignore[arg-type]


class Grammar:
    """Where one sequence's answer stands in its grammar: a `TokenMask`."""

    def __init__(
        self, matcher: llguidance.LLMatcher, num_prompt_tokens: int, vocab_size: int
    ) -> None:
        self._matcher = matcher
        self._num_prompt_tokens = num_prompt_tokens
        self._vocab_size = vocab_size
        self._num_consumed = 0
        # Bits of the tokens that may follow a text of this many tokens and these drafts after it.
        self._masks: dict[tuple[int, ...], bytes] = {}
        self._preparing: Future[None] | None = None

    def prepare(
        self, executor: Executor, token_ids: Series[int], draft_token_ids: Series[int]
    ) -> None:
        """Begin to compute the masks of the position after token_ids and after each draft."""
        self._consume(token_ids, ())
        drafts = list(draft_token_ids)
        self._preparing = executor.submit(self._compute_masks, len(token_ids), drafts)

    def num_valid(self, token_ids: Series[int], draft_token_ids: Series[int]) -> int:
        """How many of the drafts may follow, from the left."""
        self._consume(token_ids, ())
        return self._matcher.validate_tokens(list(draft_token_ids))

    def restrict(self, logits: Tensor, token_ids: Series[int], accepted: Series[int]) -> None:
        words = np.frombuffer(self.bits(token_ids, accepted), dtype=np.uint8)
        allowed = np.unpackbits(words, count=self._vocab_size, bitorder="little").view(bool)
        logits.masked_fill_(~torch.from_numpy(allowed).to(logits.device), -torch.inf)

    def bits(self, token_ids: Series[int], accepted: Series[int] = ()) -> bytes:
        if self._preparing is not None:
            self._preparing.result()
            self._preparing = None
        mask = self._masks.get((len(token_ids), *accepted))
        if mask is None:
            self._consume(token_ids, accepted)
            mask = self._mask()
        return mask

    def _consume(self, token_ids: Series[int], accepted: Series[int]) -> None:
        """Take the answer's tokens that were not taken before; the text never gets shorter."""
        for position in range(
            self._num_prompt_tokens + self._num_consumed, len(token_ids) + len(accepted)
        ):
            offset = position - len(token_ids)
            token_id = token_ids[position] if offset < 0 else accepted[offset]
            if not self._matcher.consume_token(token_id):
                raise QtoolError(f"the grammar cannot go on: {self._matcher.get_error():.200}")
            self._num_consumed += 1

    def _compute_masks(self, num_tokens: int, drafts: list[int]) -> None:
        walked = 0
        self._masks = {(num_tokens,): self._mask()}
        for draft in drafts:
            if not self._matcher.try_consume_tokens([draft]):
                break
            walked += 1
            self._masks[num_tokens, *drafts[:walked]] = self._mask()
        if walked:
            self._matcher.rollback(walked)

    def _mask(self) -> bytes:
        mask = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise QtoolError(f"the grammar cannot go on: {self._matcher.get_error():.200}")
        return mask
