"""A tokenizer as transformers would hold it, in values that can be kept in a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tokenizers import Tokenizer as Backend


@dataclass(frozen=True, slots=True, eq=False)
class TokenizerParts:
    """
    special_tokens  by transformers' names, such as "bos_token": templates know them by these
    chat_template   Jinja's source, or several by name ("default", "tool_use", ...), or None
    """

    backend: Backend
    special_tokens: Mapping[str, str]
    bos_token_id: int | None
    eos_token_id: int | None
    chat_template: str | Mapping[str, str] | None
