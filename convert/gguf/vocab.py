"""A tokenizer out of GGUF metadata: tokens, merges or scores, special tokens, chat templates.

Two kinds of tokenizer.ggml.model are read:

    gpt2    byte-level BPE: `merges` in order of rank, text cut by the regex named by `pre`
    llama   SentencePiece BPE: among adjacent pieces whose join is a token, the join of highest
            score comes first; what no token covers becomes byte tokens <0x0A>

The second has no merges. `tokenizers` needs them, so every way of cutting a token into two tokens
becomes one, ranked by the token's score: the same text then merges in the same order.

tokenizer.ggml.token_type: 1 normal, 2 unknown, 3 control (not shown), 4 user defined (matched in
text before anything else), 5 unused, 6 byte.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from tokenizers import pre_tokenizers as pre
from tokenizers.processors import TemplateProcessing

from qtool.convert.gguf.pretokenizers import PRE_TOKENIZERS, PreTokenizer
from qtool.errors import FormatError, UnsupportedModel

PREFIX = "tokenizer.ggml."
SPACE = "\u2581"  # SentencePiece writes a space so
MAX_PIECE = 512  # characters; a longer token is no piece of text, and cutting it takes its square

# key of a special token's id: how it is called here
SPECIAL_KEYS = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "eot": "eot_token_id",
    "eom": "eom_token_id",
    "unk": "unknown_token_id",
    "sep": "seperator_token_id",  # so spelt in the format
    "pad": "padding_token_id",
    "mask": "mask_token_id",
}
# llama.cpp also ends generation at control tokens with these texts
END_TEXTS = frozenset(
    (
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|eom_id|>", "</s>"),
        *("<|endoftext|>", "<|end_of_text|>", "<end_of_turn>", "<end_of_utterance>", "<eos>"),
        *("<EOT>", "_<EOT>", "[EOT]", "[EOS]"),
    )
)


class TokenKind(IntEnum):
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class GgufTokenizer:
    """What a file says of its tokenizer.

    special_ids     "bos", "eos", ... : id, those that the file names
    eos_token_ids   every token that ends generation
    chat_template   the default one; `chat_templates` holds further ones by name
    """

    tokenizer: Tokenizer
    special_ids: Mapping[str, int]
    eos_token_ids: tuple[int, ...]
    add_bos: bool
    add_eos: bool
    chat_template: str | None
    chat_templates: Mapping[str, str]

    def token(self, name: str) -> str | None:
        """The text of a special token, such as token("bos")."""
        number = self.special_ids.get(name)
        text: str | None = None if number is None else self.tokenizer.id_to_token(number)
        return text


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> GgufTokenizer:
    """The tokenizer that a file's metadata describes; raises FormatError where it does not."""
    vocabulary = _Vocabulary.of(metadata)
    model = metadata.get(f"{PREFIX}model")
    if model == "gpt2":
        tokenizer = _byte_level(vocabulary, metadata)
    elif model == "llama":
        tokenizer = _sentencepiece(vocabulary, metadata)
    else:
        raise UnsupportedModel(
            f"tokenizer.ggml.model {model!r} is not supported", "known: gpt2, llama"
        )
    tokenizer.add_special_tokens(vocabulary.added(special=True))
    tokenizer.add_tokens(vocabulary.added(special=False))
    ids = special_ids(metadata, len(vocabulary.tokens))
    add_bos = _flag(metadata, "add_bos_token", model == "llama" or _adds_bos(metadata))
    add_eos = _flag(metadata, "add_eos_token", False)
    _add_template(tokenizer, ids if add_bos else {}, ids if add_eos else {})
    return GgufTokenizer(
        tokenizer=tokenizer,
        special_ids=ids,
        eos_token_ids=end_of_generation_ids(metadata),
        add_bos=add_bos and "bos" in ids,
        add_eos=add_eos and "eos" in ids,
        chat_template=_text(metadata, "tokenizer.chat_template"),
        chat_templates=_named_templates(metadata),
    )


def special_ids(metadata: Mapping[str, Any], num_tokens: int) -> dict[str, int]:
    """Special tokens by name. Ids that are no token's are left out, as llama.cpp does."""
    found: dict[str, int] = {}
    for name, key in SPECIAL_KEYS.items():
        value = metadata.get(PREFIX + key)
        whole = isinstance(value, int) and not isinstance(value, bool)
        if whole and 0 <= value < num_tokens:  # type: ignore[operator]
            found[name] = value  # type: ignore[assignment]
    return found


def end_of_generation_ids(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """eos, eot and eom of the file, then control tokens whose text says so; eos first."""
    tokens = metadata.get(f"{PREFIX}tokens")
    tokens = tokens if isinstance(tokens, list) else []
    kinds = metadata.get(f"{PREFIX}token_type")
    kinds = kinds if isinstance(kinds, list) else []
    named = special_ids(metadata, len(tokens))
    ids = [named[name] for name in ("eos", "eot", "eom") if name in named]
    marked = (TokenKind.CONTROL, TokenKind.USER_DEFINED)
    ids += [
        number
        for number, (token, kind) in enumerate(zip(tokens, kinds, strict=False))
        if token in END_TEXTS and kind in marked
    ]
    return tuple(dict.fromkeys(ids))


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    """Tokens by id, with their kinds and (for SentencePiece) scores."""

    tokens: list[str]
    kinds: list[int]
    ids: dict[str, int]

    @classmethod
    def of(cls, metadata: Mapping[str, Any]) -> _Vocabulary:
        tokens = _array(metadata, "tokens", str)
        kinds = _array(metadata, "token_type", int, optional=True) or [TokenKind.NORMAL] * len(
            tokens
        )
        if len(kinds) < len(tokens):
            raise FormatError(
                f"tokenizer.ggml.token_type has {len(kinds)} entries for {len(tokens)} tokens"
            )
        if _is_broken("".join(tokens)):
            number, token = next(
                (number, token) for number, token in enumerate(tokens) if _is_broken(token)
            )
            raise FormatError(f"tokenizer.ggml.tokens[{number}] {token!r} is not UTF-8")
        # llama.cpp gives nameless tokens a name of their own, so that ids stay distinct
        tokens = [token or f"[EMPTY_{number}]" for number, token in enumerate(tokens)]
        ids = {token: number for number, token in enumerate(tokens)}
        if len(ids) < len(tokens):
            twice = next(token for number, token in enumerate(tokens) if ids[token] != number)
            raise FormatError(f"tokenizer.ggml.tokens holds {twice!r} twice")
        return cls(tokens, kinds, ids)

    def added(self, *, special: bool) -> list[AddedToken]:
        """Tokens that are found in text as they stand, before it is normalized or cut."""
        wanted = (TokenKind.CONTROL, TokenKind.UNKNOWN) if special else (TokenKind.USER_DEFINED,)
        return [
            AddedToken(token, special=special, normalized=False)
            for token, kind in zip(self.tokens, self.kinds, strict=False)
            if kind in wanted
        ]


def _byte_level(vocabulary: _Vocabulary, metadata: Mapping[str, Any]) -> Tokenizer:
    entry = _pre_tokenizer(metadata)
    merges = []
    for index, merge in enumerate(_array(metadata, "merges", str)):
        cut = merge.find(" ", 1)  # from 1: a token may begin with the separator
        left, right = merge[:cut], merge[cut + 1 :]
        if cut < 0 or any(part not in vocabulary.ids for part in (left, right, left + right)):
            raise FormatError(
                f"tokenizer.ggml.merges[{index}] {merge!r} joins no two tokens to one"
            )
        merges.append((left, right))
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary.ids, merges=merges, ignore_merges=entry.ignore_merges)
    )
    steps: list[pre.PreTokenizer] = [
        pre.Split(Regex(pattern), "isolated") for pattern in entry.patterns
    ]
    steps.append(pre.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer.pre_tokenizer = pre.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pre_tokenizer(metadata: Mapping[str, Any]) -> PreTokenizer:
    name = _text(metadata, f"{PREFIX}pre") or "default"
    entry = PRE_TOKENIZERS.get(name)
    if entry is None:
        known = sorted({entry.name for entry in PRE_TOKENIZERS.values()})
        raise UnsupportedModel(
            f"tokenizer.ggml.pre {name!r} is not known", f"known: {', '.join(known)} and their kin"
        )
    return entry


def _adds_bos(metadata: Mapping[str, Any]) -> bool:
    """What llama.cpp assumes of these pre-tokenizers where the file does not say."""
    return metadata.get(f"{PREFIX}model") == "gpt2" and metadata.get(f"{PREFIX}pre") in (
        *("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0"),
        *("lfm2", "jina-v5-nano", "tekken", "chameleon"),
    )


def _sentencepiece(vocabulary: _Vocabulary, metadata: Mapping[str, Any]) -> Tokenizer:
    scores = _array(metadata, "scores", float)
    if len(scores) < len(vocabulary.tokens):
        raise FormatError(
            f"tokenizer.ggml.scores has {len(scores)} entries for {len(vocabulary.tokens)} tokens"
        )
    unknown = next(
        (
            token
            for token, kind in zip(vocabulary.tokens, vocabulary.kinds, strict=False)
            if kind == TokenKind.UNKNOWN
        ),
        None,
    )
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary.ids,
            merges=merges_from_scores(vocabulary.tokens, vocabulary.kinds, scores),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = _flag(metadata, "add_space_prefix", True)
    steps: list[normalizers.Normalizer] = [normalizers.Replace(" ", SPACE)]
    decoding: list[decoders.Decoder] = [
        decoders.Replace(SPACE, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if prefix:
        steps.insert(0, normalizers.Prepend(SPACE))
        decoding.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(decoding)
    return tokenizer


def merges_from_scores(
    tokens: Sequence[str], kinds: Sequence[int], scores: Sequence[float]
) -> list[tuple[str, str]]:
    """Every cut of a normal token into two, best score first.

    Tokens "a" -3, "b" -4, "ab" -1, "aab" -2 give (a, b), then (a, ab).
    """
    joinable = {
        token: score
        for token, kind, score in zip(tokens, kinds, scores, strict=False)
        if kind in (TokenKind.NORMAL, TokenKind.USER_DEFINED, TokenKind.UNUSED)
        and len(token) <= MAX_PIECE
    }
    merges = [
        (score, token[:cut], token[cut:])
        for token, score in joinable.items()
        for cut in range(1, len(token))
        if token[:cut] in joinable and token[cut:] in joinable
    ]
    merges.sort(key=lambda merge: -merge[0])  # stable: cuts of one token stay together
    return [(left, right) for _, left, right in merges]


def _add_template(tokenizer: Tokenizer, first: Mapping[str, int], last: Mapping[str, int]) -> None:
    """Make `encode` add bos and eos where the file wants them."""
    front = [first["bos"]] if "bos" in first else []
    back = [last["eos"]] if "eos" in last else []
    if not front and not back:
        return
    before = [tokenizer.id_to_token(number) for number in front]
    after = [tokenizer.id_to_token(number) for number in back]
    tokenizer.post_processor = TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *before, "$B", *after],
        special_tokens=list(zip([*before, *after], [*front, *back], strict=True)),
    )


def _named_templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    head = "tokenizer.chat_template."
    return {
        key.removeprefix(head): value
        for key, value in metadata.items()
        if key.startswith(head) and isinstance(value, str)
    }


def _is_broken(text: str) -> bool:
    """Whether it holds bytes that are no UTF-8, which were read as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _array(
    metadata: Mapping[str, Any], key: str, kind: type, *, optional: bool = False
) -> list[Any]:
    value = metadata.get(PREFIX + key)
    if value is None and optional:
        return []
    if not isinstance(value, list) or not all(
        issubclass(one, kind) for one in set(map(type, value))
    ):
        found = "missing" if value is None else f"no array of {kind.__name__}"
        raise FormatError(f"tokenizer.ggml.{key} is {found}")
    return value


def _text(metadata: Mapping[str, Any], key: str) -> str | None:
    value = metadata.get(key)
    return value if isinstance(value, str) else None


def _flag(metadata: Mapping[str, Any], key: str, default: bool) -> bool:
    value = metadata.get(PREFIX + key)
    return value if isinstance(value, bool) else default
