"""The text of a single token, and log-probabilities in the two forms of OpenAI's API.

A token is bytes, not always characters: decoding it alone loses the space before a word or half a
character. The bytes are read from the vocabulary as its decoder would: byte-level BPE maps bytes to
letters (GPT-2's table), SentencePiece writes a space as "▁" and single bytes as "<0x0A>".
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from qtool.runtime.engine.logprobs import TokenLogprobs
from qtool.runtime.tokenizer import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_letters() -> dict[str, int]:
    """GPT-2's letters for the 256 bytes: printable ones stand for themselves, others follow 255."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return {**letters, **{chr(256 + place): byte for place, byte in enumerate(others)}}


class TokenTexts:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self._backend = tokenizer.backend
        self._added = tokenizer.backend.get_added_tokens_decoder()
        decoder = tokenizer.backend.decoder
        described = json.loads(decoder.__getstate__()) if decoder is not None else {}
        self._letters = byte_letters() if "ByteLevel" in json.dumps(described) else None

    def bytes_of(self, token_id: int) -> bytes:
        added = self._added.get(token_id)
        if added is not None:
            return str(added.content).encode()
        token = self._backend.id_to_token(token_id)
        if token is None:  # ids above the vocabulary, which pads the model's matrix
            return b""
        if self._letters is not None:
            letters = self._letters
            return b"".join(
                bytes([letters[letter]]) if letter in letters else letter.encode()
                for letter in token
            )
        if found := _BYTE.fullmatch(token):
            return bytes([int(found[1], 16)])
        return str(token).replace("▁", " ").encode()

    def is_special(self, token_id: int) -> bool:
        added = self._added.get(token_id)
        return added is not None and bool(added.special)

    def text_of(self, token_id: int, *, as_id: bool = False) -> str:
        """`as_id`: "token_id:5", vLLM's unambiguous form."""
        if as_id:
            return f"token_id:{token_id}"
        return self.bytes_of(token_id).decode("utf-8", "replace")

    def key_of(self, token_id: int, *, as_id: bool = False) -> str:
        """A text that tells half characters apart: "bytes:\\xe2\\x96" where it is no UTF-8."""
        if as_id:
            return f"token_id:{token_id}"
        raw = self.bytes_of(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def chat_logprobs(
    entries: Sequence[TokenLogprobs], texts: TokenTexts, num_top: int, *, as_ids: bool
) -> dict[str, Any]:
    """`choices[].logprobs` of chat answers."""

    def described(token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": texts.text_of(token_id, as_id=as_ids),
            "logprob": logprob,
            "bytes": list(texts.bytes_of(token_id)),
        }

    return {
        "content": [
            {
                **described(entry.token_id, entry.logprob),
                "top_logprobs": [described(*top) for top in entry.top[:num_top]],
            }
            for entry in entries
        ],
        "refusal": None,
    }


def completion_logprobs(
    entries: Sequence[TokenLogprobs | None],
    token_ids: Sequence[int],
    texts: TokenTexts,
    num_top: int,
    *,
    offset: int,
    as_ids: bool,
) -> dict[str, Any]:
    """The older form: four arrays of one length.

    entries    None where nothing stands before a token (the first of a prompt)
    token_ids  the tokens themselves
    offset     characters before the first of them
    num_top    the likeliest tokens of each position; the chosen one is always among them, with the
               very float of `token_logprobs`, since harnesses compare the two with ==
    """
    tokens = [texts.key_of(token_id, as_id=as_ids) for token_id in token_ids]
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    tops: list[dict[str, float] | None] = []
    for entry, token in zip(entries, tokens, strict=True):
        if entry is None or num_top == 0:
            tops.append(None)
            continue
        top: dict[str, float] = {}
        for token_id, logprob in entry.top[:num_top]:
            key = token if token_id == entry.token_id else texts.key_of(token_id, as_id=as_ids)
            # Two tokens can have one text; the chosen one keeps it.
            if key in top or (key == token and token_id != entry.token_id):
                key = f"token_id:{token_id}"
            top[key] = logprob
        top.setdefault(token, entry.logprob)
        tops.append(top)
    return {
        "tokens": tokens,
        "token_logprobs": [None if entry is None else entry.logprob for entry in entries],
        "top_logprobs": tops,
        "text_offset": offsets,
    }


def prompt_logprobs(
    entries: Sequence[TokenLogprobs | None], texts: TokenTexts, num_top: int
) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: for each position, by token id."""
    told: list[dict[str, Any] | None] = []
    for entry in entries:
        if entry is None:
            told.append(None)
            continue
        ranked = [
            (token_id, logprob, rank)
            for rank, (token_id, logprob) in enumerate(entry.top[:num_top], 1)
        ]
        if all(token_id != entry.token_id for token_id, _, _ in ranked):
            ranked.append((entry.token_id, entry.logprob, entry.rank))
        told.append(
            {
                str(token_id): {
                    "logprob": logprob,
                    "rank": rank,
                    "decoded_token": texts.text_of(token_id),
                }
                for token_id, logprob, rank in ranked
            }
        )
    return told
