"""What a client may ask of sampling: one frozen value with vLLM's names, checked when it is built.

The engine knows ids, not text. Three things here are text all the same, because clients write them
here: `stop` strings are found by whoever turns ids into text, `bad_words` given as text become ids
by `runtime.tokenizer.resolve_bad_words`, and `structured_outputs` are compiled against the model's
vocabulary by `runtime.engine.grammar`.

Names and meanings: vLLM's `SamplingParams` and `StructuredOutputsParams`; `typical_p` and
`best_of` as in transformers and in vLLM before it dropped the latter.
"""

import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any

from qtool.errors import UsageError

# vLLM and OpenAI take no stronger penalty; a repetition penalty has no such bound.
PENALTY_LIMIT = 2.0

BadWord = str | tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StructuredOutputsParams:
    """What the text must look like: one of these, and no more than one.

    json         a JSON schema, as a mapping or as its text
    json_object  any JSON object
    regex        a regular expression that the whole text matches
    choice       the text is one of these strings
    grammar      a context-free grammar, in Lark's or in GBNF syntax
    """

    json: str | None = None
    json_object: bool = False
    regex: str | None = None
    choice: tuple[str, ...] | None = None
    grammar: str | None = None
    disable_any_whitespace: bool = False
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        schema: Any = self.json
        if isinstance(schema, Mapping | bool):
            object.__setattr__(self, "json", json.dumps(schema))
        elif schema is not None:
            _check_schema_text(schema)
        for name in ("regex", "grammar"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise UsageError(f"structured_outputs.{name} is {value!r}, must be a string")
        if self.choice is not None:
            object.__setattr__(self, "choice", _strings("structured_outputs.choice", self.choice))
            if not self.choice:
                raise UsageError("structured_outputs.choice is empty, must name what to choose of")
        kinds = ("json", "json_object", "regex", "choice", "grammar")
        asked = [name for name in kinds if getattr(self, name) not in (None, False)]
        if len(asked) != 1:
            found = " and ".join(asked) or "nothing"
            raise UsageError(
                f"structured_outputs asks for {found}, must ask for one of {', '.join(kinds)}"
            )


def _check_schema_text(schema: object) -> None:
    try:
        document = json.loads(schema) if isinstance(schema, str) else None
    except json.JSONDecodeError as error:
        raise UsageError(f"structured_outputs.json is not valid JSON: {error}") from None
    if not isinstance(document, dict | bool):
        raise UsageError(f"structured_outputs.json is {schema!r:.80}, must be a JSON schema")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is drawn. vLLM's names and defaults.

    n                    answers to one prompt, which share its cache
    best_of              answers generated, of which the n likeliest a token are returned
    temperature          0: always the likeliest token
    top_p                keep the smallest set of likeliest tokens with this much probability
    top_k                keep this many likeliest tokens; 0 or -1: all
    min_p                keep tokens at least this likely, relative to the likeliest
    typical_p            keep the tokens closest to the expected surprise, with this probability
    presence_penalty     taken off the logits of tokens that the answer holds
    frequency_penalty    the same, once for each time
    repetition_penalty   divides the logits of tokens in prompt or answer, if positive; above 1:
                         less of them
    logit_bias           added to the logits of these ids
    bad_words            texts or runs of ids that are not written
    allowed_token_ids    nothing else is written
    max_tokens           new tokens at most; None: until the context is full
    min_tokens           end-of-text and stop ids cannot be drawn before this many new tokens
    stop                 strings that end the text and are left out of it
    stop_token_ids       token ids that end the text, as the model's own end-of-text ids do
    include_stop_str_in_output   they are left in
    ignore_eos           run past the model's end-of-text ids
    skip_special_tokens  leave special tokens out of the text
    logprobs             log-probabilities of each token and of this many likeliest; -1: of all
    prompt_logprobs      the same of the prompt's tokens
    seed                 makes the text a function of the prompt, whatever else runs beside it
    structured_outputs   what the text must look like
    """

    n: int = 1
    best_of: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    typical_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = None
    bad_words: tuple[BadWord, ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    seed: int | None = None
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        self._freeze()
        for name, holds, rule in RULES:
            if not holds(self):
                raise UsageError(f"{name} is {getattr(self, name)!r}, must be {rule}")

    def _freeze(self) -> None:
        """Take copies, so that the value cannot change under a running sequence."""

        def set_field(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        set_field("stop", _strings("stop", self.stop))
        set_field("stop_token_ids", _ids("stop_token_ids", self.stop_token_ids or ()))
        if self.allowed_token_ids is not None:
            set_field("allowed_token_ids", _ids("allowed_token_ids", self.allowed_token_ids))
        if self.logit_bias is not None:
            set_field("logit_bias", _biases(self.logit_bias))
        set_field("bad_words", tuple(_bad_word(word) for word in self.bad_words or ()))
        if isinstance(self.structured_outputs, Mapping):
            known = {field.name for field in fields(StructuredOutputsParams)}
            if unknown := sorted(set(self.structured_outputs) - known):
                raise UsageError(f"structured_outputs has {unknown[0]!r}, which is not known")
            set_field("structured_outputs", StructuredOutputsParams(**self.structured_outputs))

    @property
    def greedy(self) -> bool:
        # Below this a float32 softmax has one non-zero entry anyway, and logits / T overflows.
        return self.temperature < 1e-5

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise unless every token id that the request names is in the vocabulary."""
        named: tuple[tuple[str, Collection[int]], ...] = (
            ("stop_token_ids", self.stop_token_ids),
            ("allowed_token_ids", self.allowed_token_ids or ()),
            ("logit_bias", (self.logit_bias or {}).keys()),
            *(("bad_words", word) for word in self.bad_words if not isinstance(word, str)),
        )
        for name, token_ids in named:
            for token_id in token_ids:
                if not 0 <= token_id < vocab_size:
                    raise UsageError(
                        f"{name} has {token_id}, outside the vocabulary of {vocab_size} tokens"
                    )

    @property
    def num_logprobs(self) -> int | None:
        """What `logprobs` asks for, or what choosing the best answers needs."""
        chooses = self.logprobs is None and self.num_sequences > self.n
        return 0 if chooses else self.logprobs

    @property
    def num_sequences(self) -> int:
        """Answers to generate, of which n are returned."""
        return self.best_of or self.n


def _finite(value: float) -> bool:
    return math.isfinite(value)


# Field, what must hold, and how it is said.
RULES: tuple[tuple[str, Callable[[SamplingParams], bool], str], ...] = (
    ("n", lambda p: p.n >= 1, "at least 1"),
    ("best_of", lambda p: p.best_of is None or p.best_of >= p.n, "at least n"),
    ("temperature", lambda p: _finite(p.temperature) and p.temperature >= 0, ">= 0"),
    ("top_p", lambda p: 0 < p.top_p <= 1, "above 0 and at most 1"),
    ("top_k", lambda p: p.top_k >= -1, "at least 1, or 0 or -1 for all tokens"),
    ("min_p", lambda p: 0 <= p.min_p <= 1, "between 0 and 1"),
    ("typical_p", lambda p: 0 < p.typical_p <= 1, "above 0 and at most 1"),
    ("presence_penalty", lambda p: abs(p.presence_penalty) <= PENALTY_LIMIT, "between -2 and 2"),
    ("frequency_penalty", lambda p: abs(p.frequency_penalty) <= PENALTY_LIMIT, "between -2 and 2"),
    (
        "repetition_penalty",
        lambda p: _finite(p.repetition_penalty) and p.repetition_penalty > 0,
        "above 0",
    ),
    (
        "logit_bias",
        lambda p: not p.logit_bias or all(map(_finite, p.logit_bias.values())),
        "finite numbers by token id",
    ),
    (
        "allowed_token_ids",
        lambda p: p.allowed_token_ids is None or len(p.allowed_token_ids) > 0,
        "at least one token id",
    ),
    ("max_tokens", lambda p: p.max_tokens is None or p.max_tokens >= 1, "at least 1"),
    ("min_tokens", lambda p: p.min_tokens >= 0, "at least 0"),
    (
        "min_tokens",
        lambda p: p.max_tokens is None or p.min_tokens <= p.max_tokens,
        "at most max_tokens",
    ),
    ("stop", lambda p: "" not in p.stop, "without empty strings"),
    ("logprobs", lambda p: p.logprobs is None or p.logprobs >= -1, "at least 0, or -1 for all"),
    (
        "prompt_logprobs",
        lambda p: p.prompt_logprobs is None or p.prompt_logprobs >= -1,
        "at least 0, or -1 for all",
    ),
)


def _strings(name: str, value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    if isinstance(value, tuple | list) and all(isinstance(item, str) for item in value):
        return tuple(value)
    raise UsageError(f"{name} is {value!r}, must be a string or several")


def _ids(name: str, value: object) -> tuple[int, ...]:
    if isinstance(value, tuple | list | set | frozenset) and all(map(_is_id, value)):
        return tuple(value)
    raise UsageError(f"{name} is {value!r:.80}, must be token ids")


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _biases(value: object) -> dict[int, float]:
    # JSON has no integer keys: OpenAI's clients send the ids as strings.
    if isinstance(value, Mapping):
        try:
            return {int(token_id): float(bias) for token_id, bias in value.items()}
        except (TypeError, ValueError):
            pass
    raise UsageError(f"logit_bias is {value!r:.80}, must be numbers by token id")


def _bad_word(word: object) -> BadWord:
    if isinstance(word, str) and word.strip():
        return word
    if isinstance(word, tuple | list) and word:
        return _ids("bad_words", word)
    raise UsageError(f"bad_words holds {word!r:.80}, must be text or token ids")
