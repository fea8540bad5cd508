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
_SPARK = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+|[\r\n]|\s+(?!\S)|\s+"
)
# The cased letters that DeepSeek's first tokenizers list; not all that there are.
_CASED = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
    "\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1"
    "\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5"
    "\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a"
    "\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d"
    "\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3"
    "\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115"
    "\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f"
    "\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3"
    "\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf"
    "\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f"
    "\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2"
    "\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_DEEPSEEK_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_YOUTU_ASIAN = (
    "[\uac00-\ud7a3\u3131-\u318e]+|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b"
    "\uff0c\u3001-\u303f\ufe30-\ufe4f]+|[\u3105-\u312f]+|" + _CJK
)
_YOUTU = (
    rf"{_LEAD}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_LEAD}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    rf"|\p{{N}}|{_CASED_REST}"
)
_JAIS2 = (
    rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+"
    r"|\s{512}(?!\S)|\s{256}(?!\S)|\s{128}(?!\S)|\s{64}(?!\S)|\s{32}(?!\S)|\s{16}(?!\S)"
    r"|\s{8}(?!\S)|\s{4}(?!\S)|\s{1,2}(?!\S)|\s{1}"
)
_BAILING = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
_SEED = (
    rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1}}"
    "| ?[^\\s\\p{L}\\p{N}\r\n]+|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
)
_EXAONE_MOE = (
    rf"{_CONTRACTIONS}|{_LEAD}(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)
_WESTERN = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_KIMI = (
    r"[\p{Han}]+"
    rf"|{_LEAD}[{_WESTERN[0]}&&[^\p{{Han}}]]*[{_WESTERN[1]}&&[^\p{{Han}}]]+{_CONTRACTIONS}?"
    rf"|{_LEAD}[{_WESTERN[0]}&&[^\p{{Han}}]]+[{_WESTERN[1]}&&[^\p{{Han}}]]*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}|{_REST}"
)
_AFMOE_ASIAN = (
    "[\u4e00-\u9fff\u3400-\u4dbf\uf900-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f"
    "\u2f00-\u2fdf\u0e00-\u0e7f\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f"
    "\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+"
)
# what a Punctuation pre-tokenizer does
PUNCTUATION = r"[\p{P}!-/:-@\[-`{-~]"
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
            _DEEPSEEK_CJK,
            DIGIT,
        ),
    ),
    PreTokenizer(
        "deepseek-llm",
        (
            "[\r\n]",
            rf"\s?[{_CASED}]+",
            "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
            r"\s+$",
            _DEEPSEEK_CJK,
            DIGITS,
        ),
    ),
    PreTokenizer("spark2_5", (r"\p{N}{1,3}", _CJK, _SPARK, DIGIT)),
    PreTokenizer("youtu", (_YOUTU_ASIAN, _YOUTU), ignore_merges=True),
    PreTokenizer("jais-2", (_JAIS2,)),
    PreTokenizer("bailingmoe", (_BAILING,)),
    PreTokenizer("seed-coder", (_SEED,)),
    PreTokenizer("exaone-moe", (_EXAONE_MOE,)),
    PreTokenizer("tiny_aya", (r"\d{1,3}(?=(?:\d{3})*\b)", GPT4O)),
    PreTokenizer(
        "minicpm5",
        (r"\p{N}{1,3}", rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}+|{_REST}"),
        ignore_merges=True,
    ),
    PreTokenizer("ufakzeka", (rf"{_WORDS}|\p{{N}}|{_REST}",)),
    PreTokenizer("laguna", ("[^\n]+|[\n]+", QWEN2)),
    PreTokenizer("kimi-k2", (_KIMI,)),
    PreTokenizer("superbpe", (DIGITS, r"(?=(\d{3})+(?!\d))")),
    PreTokenizer("afmoe", (r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))", _AFMOE_ASIAN, _DEEPSEEK3)),
    PreTokenizer(
        "chameleon",
        (
            r"<sentinel:[0-9]+>",
            r"(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
            r"([\t\n]|    |  )",
            DIGIT,
            PUNCTUATION,
            GPT2,
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
    "bailingmoe": ("bailingmoe2", "llada-moe"),
    "tiny_aya": ("cohere2moe",),
}

# Never chosen by itself: the same pattern under a name that says less of where it comes from.
_BY_NAME = (PreTokenizer("granite-embed-multi-97m", (GPT4O,), ignore_merges=True),)

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    entry.name: entry for entry in (*_ENTRIES, *_BY_NAME)
} | {alias: entry for entry in _ENTRIES for alias in _ALIASES.get(entry.name, ())}


def detect(tokenizer_json: Mapping[str, Any]) -> str | None:
    """The `tokenizer.ggml.pre` of a tokenizer.json, or None where no entry does the same."""
    patterns = tuple(_patterns(tokenizer_json.get("pre_tokenizer")))
    ignore_merges = bool(tokenizer_json["model"].get("ignore_merges", False))
    wanted = [_canonical(pattern) for pattern in patterns]
    alike = [entry for entry in _ENTRIES if [_canonical(own) for own in entry.patterns] == wanted]
    # Where merges reach every token, ignoring them changes nothing: the caller's check decides.
    alike.sort(key=lambda entry: entry.ignore_merges != ignore_merges)
    return alike[0].name if alike else None


def _canonical(pattern: str) -> str:
    r"""One spelling of line ends: files have them as characters or as \r and \n."""
    return pattern.replace("\r", r"\r").replace("\n", r"\n")


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
    elif kind == "Punctuation" and node.get("behavior", "Isolated") == "Isolated":
        yield PUNCTUATION
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
