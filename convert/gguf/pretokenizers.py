"""How text is cut before byte-level BPE: the names of `tokenizer.ggml.pre` and what they mean.

A GGUF file names its pre-tokenizer instead of holding it, and llama.cpp has the regular expressions
(llama-vocab.cpp). A wrong name does not fail, it silently tokenizes badly, so the name is found by
comparing what tokenizer.json does with this table, never by a default.

A pre-tokenizer is a list of patterns. Each cuts every piece of text left by the one before into
its matches and what lies between them; then each piece is spelt in byte characters. Patterns are
in Hugging Face's spelling (Oniguruma), as in the tokenizer.json files of the models themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# what a ByteLevel pre-tokenizer with use_regex does
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT = r"\p{N}"
DIGITS = r"\p{N}+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
QWEN2 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"
QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LEAD = r"[^\r\n\p{L}\p{N}]?"
_CASED_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = rf"{_LEAD}{_UPPER}*{_LOWER}+|{_LEAD}{_UPPER}+{_LOWER}*|\p{{N}}|{_CASED_REST}"
GPT4O = (
    rf"{_LEAD}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_LEAD}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}|{_CASED_REST}"
)
_CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_FALCON_PUNCTUATION = r"[\p{P}\$\+<=>\^~\|`]+"
_DEFAULT_PUNCTUATION = r"[\p{P}\$\+<=>\^~\|]+"
_BLOOM = r" ?[^(\s|.,!?" + "\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c" + r")]+"


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """One entry: patterns in order, and whether a word that is a token is taken whole (BPE's
    ignore_merges)."""

    name: str
    patterns: tuple[str, ...]
    ignore_merges: bool = False


# Detection takes the first entry that fits, so each pattern's customary name comes first.
_ENTRIES = (
    PreTokenizer("gpt-2", (GPT2,)),
    PreTokenizer("llama-bpe", (LLAMA3,), ignore_merges=True),
    PreTokenizer("smaug-bpe", (LLAMA3,)),
    PreTokenizer("qwen2", (QWEN2,)),
    PreTokenizer("qwen35", (QWEN35,)),
    PreTokenizer("smollm", (DIGIT, GPT2)),
    PreTokenizer("tekken", (TEKKEN,), ignore_merges=True),
    PreTokenizer("gpt-4o", (GPT4O,)),
    PreTokenizer("deepseek-v3", (r"\p{N}{1,3}", _CJK, _DEEPSEEK3)),
    PreTokenizer(
        "deepseek-coder",
        (
            r"[\r\n]",
            r"\s?\p{L}+",
            r"\s?\p{P}+",
            "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
            DIGIT,
        ),
    ),
    PreTokenizer("falcon", (_FALCON_PUNCTUATION, GPT2, r"[0-9][0-9][0-9]")),
    PreTokenizer("default", (_DEFAULT_PUNCTUATION, GPT2, DIGITS, r"[0-9][0-9][0-9]")),
    PreTokenizer("bloom", (_BLOOM,)),
    PreTokenizer("viking", (_BLOOM, DIGIT)),
)

# Other names for the same thing, and names that differ in what does not concern tokens.
_ALIASES: dict[str, tuple[str, ...]] = {
    "gpt-2": (
        *("phi-2", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "jina-v1-en", "jina-v2-code"),
        *("roberta-bpe", "gigachat", "a.x-4.0", "mellum", "modern-bert", "mpt", "olmo", "jais"),
        *("trillion", "granite-docling", "exaone4"),
    ),
    "llama-bpe": (
        *("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
        *("jina-v5-nano",),
    ),
    "smaug-bpe": ("dbrx", "glm4", "chatglm-bpe"),
    "qwen2": (
        *("stablelm2", "hunyuan", "solar-open", "deepseek-r1-qwen", "kormo", "f2llmv2"),
        *("megrez", "grok-2"),
    ),
    "smollm": (
        *("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),
    ),
    "gpt-4o": ("llama4", "kanana2", "talkie", "minimax-m2"),
    "deepseek-v3": ("hunyuan-dense", "joyai-llm", "hy_v4"),
    "bloom": ("poro-chat", "gpt3-finnish"),
}

PRE_TOKENIZERS: dict[str, PreTokenizer] = {entry.name: entry for entry in _ENTRIES} | {
    alias: entry for entry in _ENTRIES for alias in _ALIASES.get(entry.name, ())
}


def detect(tokenizer_json: Mapping[str, Any]) -> str | None:
    """The `tokenizer.ggml.pre` of a tokenizer.json, or None where no entry does the same."""
    patterns = tuple(_patterns(tokenizer_json.get("pre_tokenizer")))
    ignore_merges = bool(tokenizer_json["model"].get("ignore_merges", False))
    alike = [entry for entry in _ENTRIES if entry.patterns == patterns]
    # Where merges reach every token, ignoring them changes nothing: the caller's check decides.
    alike.sort(key=lambda entry: entry.ignore_merges != ignore_merges)
    return alike[0].name if alike else None


def _patterns(node: Mapping[str, Any] | None) -> Iterator[str]:
    """The patterns that a pre_tokenizer node applies; what has no pattern gives its type, which
    matches no entry."""
    kind = None if node is None else node.get("type")
    if node is None:
        return
    if kind == "Sequence":
        for part in node["pretokenizers"]:
            yield from _patterns(part)
    elif kind == "ByteLevel":
        if node.get("add_prefix_space"):
            yield "ByteLevel with add_prefix_space"
        if node.get("use_regex", True):
            yield GPT2
    elif kind == "Digits":
        yield DIGIT if node.get("individual_digits") else DIGITS
    elif kind == "Split":
        yield _split_pattern(node)
    else:
        yield str(kind)


def _split_pattern(node: Mapping[str, Any]) -> str:
    pattern = node.get("pattern", {}).get("Regex")
    behavior, invert = node.get("behavior"), bool(node.get("invert"))
    # "Removed" inverted keeps the matches and drops what lies between them: the same where the
    # pattern matches everything, as those that end in \s+ do.
    isolated = behavior == "Isolated" or (behavior == "Removed" and invert)
    return str(pattern) if pattern is not None and isolated else f"Split {behavior}"
