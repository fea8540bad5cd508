"""How an engine guesses ahead, as vLLM's `speculative_config` says it. Loads nothing heavy."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal, get_args

from qtool.errors import UnknownName, UsageError

SpeculationMethod = Literal["ngram", "draft"]

METHOD_ALIASES = {"draft_model": "draft", "[ngram]": "ngram", "prompt_lookup": "ngram"}


@dataclass(frozen=True)
class SpeculativeConfig:
    """What to guess by, and how far.

    method                  ngram: what followed the same words earlier in the text; draft: what a
                            smaller model with the same vocabulary would write
    model                   the smaller model: folder, .gguf file, builtin:NAME or Hub id
    num_speculative_tokens  guesses for each token, at most
    prompt_lookup_max       words compared for ngram, at most
    prompt_lookup_min       and at least
    adaptive                guess less, or not at all, where that is measured to be faster
    """

    method: SpeculationMethod = "ngram"
    model: str | None = None
    num_speculative_tokens: int = 5
    prompt_lookup_max: int = 4
    prompt_lookup_min: int = 2
    adaptive: bool = True

    def __post_init__(self) -> None:
        if self.method not in get_args(SpeculationMethod):
            raise UnknownName("speculation method", self.method, get_args(SpeculationMethod))
        if (self.method == "draft") != (self.model is not None):
            need = "needs a model" if self.model is None else "takes no model"
            raise UsageError(
                f"speculation by {self.method} {need}",
                hint='for example {"method": "draft", "model": "./smaller-model"}',
            )
        for name in ("num_speculative_tokens", "prompt_lookup_min"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}, must be at least 1")
        if self.prompt_lookup_max < self.prompt_lookup_min:
            raise UsageError(
                f"prompt_lookup_max is {self.prompt_lookup_max}, must be at least "
                f"prompt_lookup_min, {self.prompt_lookup_min}"
            )

    @classmethod
    def parse(cls, value: object) -> "SpeculativeConfig":
        """From a mapping or its JSON text."""
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except json.JSONDecodeError as error:
                raise UsageError(f"speculative_config is not valid JSON: {error}") from None
        if not isinstance(value, Mapping):
            raise UsageError(f"speculative_config is {value!r:.80}, must be an object")
        given = dict(value)
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                raise UnknownName("field of speculative_config", name, known)
        method = given.get("method") or ("draft" if given.get("model") else "ngram")
        if given.get("model") in METHOD_ALIASES:  # vLLM's old way to ask for ngram
            method = METHOD_ALIASES[given.pop("model")]
        given["method"] = METHOD_ALIASES.get(method, method)
        return cls(**given)
