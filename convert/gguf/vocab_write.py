"""Tokenizer metadata out of a Hugging Face folder, checked by using it.

    tokenizer.json model   tokenizer.ggml.model
    BPE, byte-level        gpt2    merges, and the pre-tokenizer's name (pretokenizers.py)
    BPE, byte_fallback     llama   scores in the order of merges
    none, but a            llama   its pieces and scores as they are (sentencepiece.py)
    tokenizer.model

Whatever the mapping misses would show only as bad text, so nothing is written on trust: the
tokenizer is rebuilt from the metadata (vocab.py) and has to give the folder's own tokens for
texts that exercise what differs between tokenizers.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from qtool.convert.gguf import pretokenizers
from qtool.convert.gguf.container import KeyValue
from qtool.convert.gguf.pretokenizers import PRE_TOKENIZERS
from qtool.convert.gguf.sentencepiece import Piece, SentencePieceModel
from qtool.convert.gguf.types import ValueType
from qtool.convert.gguf.vocab import PREFIX, SPACE, TokenKind, tokenizer_from_gguf
from qtool.convert.gguf.vocab_entries import (
    list_entry,
    read_optional,
    special_entries,
    template_entries,
    text_entry,
)
from qtool.errors import FormatError, QtoolError, UnknownName, UnsupportedModel
from qtool.json_files import read_json

_SAMPLES = (
    "Hello, world! It's 3.14159 o'clock; they'LL've paid $1,234,567.89 (about 12%).",
    "    def f(x):\n\t\treturn {'a': [x**2 for _ in range(10)]}  # tabs\t and   \n\n\n  end",
    "Übergrößenträger naïve café Ελληνικά русский язык עברית العربية हिन्दी ไทย",
    "日本語のテキスト、中文文本、한국어 텍스트 — “quotes” … ™ 1²3 ½ Ⅷ ١٢٣",
    "🚀 (normal) 😶‍🌫️ (several points) 👨‍👩‍👧 \u200b\u00a0\u3000 \x01 end",
    "3 33 333 3333 33333 word123word CamelCaseWords SCREAMING_CASE http://a.b/c?d=e&f#g",
    "  leading, trailing  \r\n windows\r\n\r\nline ends 'quoted''s I'm you're we'Re",
)


def tokenizer_metadata(
    folder: Path, config: Mapping[str, Any], pre: str | None = None
) -> list[KeyValue]:
    """The tokenizer.* entries for a model folder.

    config  config.json: its vocab_size is the number of rows of the embedding
    pre     tokenizer.ggml.pre by the user's word, for pre-tokenizers that are not recognized
    """
    path = folder / "tokenizer.json"
    if not path.is_file() and (folder / "tokenizer.model").is_file():
        return _from_sentencepiece(folder, config)
    if not path.is_file():
        raise UnsupportedModel(
            f"{folder} has no tokenizer.json and no tokenizer.model, so its tokenizer cannot be "
            "put into GGUF",
            "load it with transformers and save_pretrained() it: that writes one",
        )
    try:
        own = Tokenizer.from_file(str(path))  # also vouches for the structure of the JSON
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # bare Exceptions, and panics of Rust, which are not even those
        raise FormatError(f"{path} cannot be loaded: {error}") from error
    source = read_json(path)
    settings = read_optional(folder / "tokenizer_config.json")
    model = source.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE" or "vocab" not in model:
        kind = model.get("type") if isinstance(model, dict) else None
        raise UnsupportedModel(f"{path}: a {kind} tokenizer cannot be put into GGUF; BPE can")
    if pre is not None and pre not in PRE_TOKENIZERS:
        raise UnknownName("tokenizer.ggml.pre", pre, PRE_TOKENIZERS)
    sentencepiece = bool(model.get("byte_fallback"))
    tokens, kinds = _tokens(path, source, config, bytes_too=sentencepiece)
    entries = [text_entry("model", "llama" if sentencepiece else "gpt2")]
    entries.append(text_entry("pre", "default" if sentencepiece else _pre(path, source, pre)))
    entries.append(list_entry("tokens", tokens, ValueType.STRING))
    if sentencepiece:
        entries.append(list_entry("scores", _scores(model, tokens, kinds), ValueType.FLOAT32))
    entries.append(list_entry("token_type", [int(kind) for kind in kinds], ValueType.INT32))
    if not sentencepiece:
        merges = [_merge_text(merge) for merge in model["merges"]]
        entries.append(list_entry("merges", merges, ValueType.STRING))
    entries += special_entries(folder, source, settings, config, tokens)
    if sentencepiece:
        entries += _space_prefix(path, source)
    entries += template_entries(folder, settings)
    _check(path, own, entries, pre)
    return entries


def _from_sentencepiece(folder: Path, config: Mapping[str, Any]) -> list[KeyValue]:
    """From a tokenizer.model alone, which has all that llama.cpp's kind of tokenizer needs.

    Tokens that were added since are in added_tokens.json or tokenizer_config.json; they are found
    in text as they stand, and their score is never asked for.
    """
    path = folder / "tokenizer.model"
    model = SentencePieceModel.open(path)
    settings = read_optional(folder / "tokenizer_config.json")
    rows = int(config["vocab_size"])
    padding = range(len(model.pieces), rows)
    pieces = [*model.pieces, *(Piece(f"[PAD{n}]", -10000.0, TokenKind.UNUSED) for n in padding)]
    for number, text, special in _added_later(folder, settings):
        if not 0 <= number < rows:
            raise UnsupportedModel(
                f"{folder} adds token {text!r} with id {number}, and the model's embedding has "
                f"{rows} rows"
            )
        if pieces[number].text != text or pieces[number].kind == TokenKind.NORMAL:
            kind = TokenKind.CONTROL if special else TokenKind.USER_DEFINED
            pieces[number] = Piece(text, -1000.0, kind)
    if len(pieces) > rows:
        raise UnsupportedModel(
            f"{path} has {len(pieces)} tokens, and the model's embedding has {rows} rows"
        )
    tokens = [piece.text for piece in pieces]
    entries = [text_entry("model", "llama"), text_entry("pre", "default")]
    entries.append(list_entry("tokens", tokens, ValueType.STRING))
    entries.append(list_entry("scores", [piece.score for piece in pieces], ValueType.FLOAT32))
    entries.append(list_entry("token_type", [int(piece.kind) for piece in pieces], ValueType.INT32))
    ids = {f"{name}_token_id": number for name, number in model.special_ids.items()}
    known = {key: value for key, value in config.items() if value is not None}
    entries += special_entries(folder, {}, settings, ids | known, tokens)
    # an absent post-processor says nothing here: llama.cpp adds bos to this kind by itself
    silent = {
        f"{PREFIX}add_{name}_token"
        for name in ("bos", "eos")
        if not isinstance(settings.get(f"add_{name}_token"), bool)
    }
    entries = [entry for entry in entries if entry.key not in silent]
    if not model.adds_space:
        entries.append(KeyValue(f"{PREFIX}add_space_prefix", False, ValueType.BOOL))
    entries += template_entries(folder, settings)
    tokenizer_from_gguf({entry.key: entry.value for entry in entries})  # refuses what makes none
    return entries


def _added_later(folder: Path, settings: Mapping[str, Any]) -> Iterator[tuple[int, str, bool]]:
    """(id, text, whether it is special) of tokens that are not the model's own."""
    for text, number in read_optional(folder / "added_tokens.json").items():
        if not isinstance(number, int) or isinstance(number, bool):
            raise FormatError(f"{folder / 'added_tokens.json'}: the id of {text!r} is {number!r}")
        yield number, text, False
    decoder = settings.get("added_tokens_decoder")
    for key, token in (decoder if isinstance(decoder, dict) else {}).items():
        if not isinstance(token, dict) or not isinstance(token.get("content"), str):
            raise FormatError(f"{folder / 'tokenizer_config.json'}: token {key} has no content")
        if not key.isdecimal():
            raise FormatError(f"{folder / 'tokenizer_config.json'}: {key!r} is no token's id")
        yield int(key), token["content"], bool(token.get("special"))


def _tokens(
    path: Path, source: Mapping[str, Any], config: Mapping[str, Any], *, bytes_too: bool
) -> tuple[list[str], list[TokenKind]]:
    """Every token by id with its kind; ids of the embedding that no token has are padding."""
    vocab: dict[str, int] = dict(source["model"]["vocab"])
    added = {token["content"]: token for token in source.get("added_tokens") or []}
    vocab |= {text: token["id"] for text, token in added.items()}
    rows = int(config["vocab_size"])
    by_id: dict[int, str] = {}
    for text, number in vocab.items():
        if not isinstance(number, int) or number < 0 or number in by_id:
            raise FormatError(f"{path}: the id {number!r} of token {text!r} is taken or no number")
        by_id[number] = text
    if max(by_id) >= rows:
        raise UnsupportedModel(
            f"{path} has token {by_id[max(by_id)]!r} with id {max(by_id)}, and the model's "
            f"embedding has {rows} rows"
        )
    unknown = source["model"].get("unk_token")
    tokens, kinds = [], []
    for number in range(rows):
        text = by_id.get(number, f"[PAD{number}]")
        tokens.append(text)
        if number not in by_id:
            kinds.append(TokenKind.UNUSED)
        elif text == unknown and bytes_too:
            kinds.append(TokenKind.UNKNOWN)
        elif text in added:
            special = added[text].get("special")
            kinds.append(TokenKind.CONTROL if special else TokenKind.USER_DEFINED)
        elif bytes_too and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            kinds.append(TokenKind.BYTE)
        else:
            kinds.append(TokenKind.NORMAL)
    return tokens, kinds


def _pre(path: Path, source: Mapping[str, Any], chosen: str | None) -> str:
    found = chosen or pretokenizers.detect(source)
    if found is None:
        raise UnsupportedModel(
            f"{path}: its pre_tokenizer is none that llama.cpp knows",
            "if you know a name that does the same, give it with --pre: "
            + ", ".join(sorted({entry.name for entry in PRE_TOKENIZERS.values()})),
        )
    return found


def _merge_text(merge: str | list[str]) -> str:
    """ "a b"; a space inside a part is written as byte-level BPE spells it, since it separates."""
    if isinstance(merge, str):
        return merge
    return " ".join(part.replace(" ", "\u0120") for part in merge)


def _scores(model: Mapping[str, Any], tokens: list[str], kinds: list[TokenKind]) -> list[float]:
    """Scores that merge in the order of the merges: minus the rank of the first that makes a token.

    SentencePiece's own files count the same way. Tokens that nothing makes (single characters)
    come after all merges, where their score is never asked for; bytes and special tokens have 0.
    """
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault(left + right, rank)
    scores, last = [], len(ranks)
    for token, kind in zip(tokens, kinds, strict=True):
        if kind is not TokenKind.NORMAL:
            scores.append(0.0)
        elif token in ranks:
            scores.append(-float(ranks[token]))
        else:
            scores.append(-float(last))
            last += 1
    return scores


def _space_prefix(path: Path, source: Mapping[str, Any]) -> Iterator[KeyValue]:
    """add_space_prefix: whether a text gets a leading space; llama.cpp takes silence for yes.

    Either a normalizer Prepend, or a pre-tokenizer Metaspace whose scheme is not "never".
    """
    normalizer = source.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    prepends = any(step.get("type") == "Prepend" for step in steps)
    node = source.get("pre_tokenizer") or {}
    if node.get("type") == "Metaspace":
        prepends = node.get("prepend_scheme", "always") != "never"
    elif not any(step.get("type") == "Replace" for step in steps):
        raise UnsupportedModel(f"{path}: nothing in it turns spaces into {SPACE}")
    if not prepends:
        yield KeyValue(f"{PREFIX}add_space_prefix", False, ValueType.BOOL)


def _check(path: Path, own: Tokenizer, entries: list[KeyValue], pre: str | None) -> None:
    """Rebuild the tokenizer from the entries and compare it with the folder's own."""
    rebuilt = tokenizer_from_gguf({entry.key: entry.value for entry in entries}).tokenizer
    samples = [*_SAMPLES, *_marked_samples(own)]
    # without a post-processor transformers adds special tokens by itself, by tokenizer_config.json
    for special in (False,) if own.post_processor is None else (False, True):
        for sample in samples:
            text = unicodedata.normalize("NFC", sample)  # which llama.cpp leaves to its callers
            expected = own.encode(text, add_special_tokens=special).ids
            found = rebuilt.encode(text, add_special_tokens=special).ids
            if expected != found:
                _refuse(path, entries, pre, text, expected, found)


def _marked_samples(own: Tokenizer) -> list[str]:
    """Text around special tokens, where the tokenizer takes them as they stand.

    Not for SentencePiece, whose space after a special token is a matter of taste (llama.cpp adds
    one, newer Hugging Face files do not).
    """
    if own.normalizer is not None and own.decoder is not None and own.pre_tokenizer is None:
        return []
    tokens = own.get_added_tokens_decoder().values()
    plain = [t for t in tokens if not (t.lstrip or t.rstrip or t.single_word or t.normalized)]
    return [f"one{token.content}two {token.content} three" for token in plain[:16]]


def _refuse(
    path: Path,
    entries: list[KeyValue],
    pre: str | None,
    text: str,
    expected: list[int],
    found: list[int],
) -> None:
    name = next(entry.value for entry in entries if entry.key == f"{PREFIX}pre")
    at = next(
        (i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b),
        min(len(expected), len(found)),
    )
    problem = (
        f"{path}: the tokenizer that GGUF metadata can describe (pre {name!r}) splits "
        f"{json.dumps(text[:40], ensure_ascii=False)}... otherwise: token {at} is "
        f"{found[at : at + 3]}, not {expected[at : at + 3]}"
    )
    if pre is not None:
        raise QtoolError(problem, "the name given with --pre does not do what this tokenizer does")
    raise UnsupportedModel(
        problem, "llama.cpp would tokenize it wrongly too; if another name fits, give it with --pre"
    )
