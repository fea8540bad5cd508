"""Tokenizers in GGUF metadata: both directions give the same tokens."""

from __future__ import annotations

import json
import re
import shutil
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers

from qtool.builtin import evaluation_text
from qtool.convert.gguf.container import GgufFile, KeyValue
from qtool.convert.gguf.pretokenizers import GPT2, LLAMA3, PRE_TOKENIZERS, QWEN2, detect
from qtool.convert.gguf.vocab import (
    GgufTokenizer,
    TokenKind,
    end_of_generation_ids,
    merges_from_scores,
    tokenizer_from_gguf,
)
from qtool.convert.gguf.vocab_write import tokenizer_metadata
from qtool.errors import FormatError, QtoolError, UnknownName, UnsupportedModel

Metadata = dict[str, Any]


def as_metadata(entries: list[KeyValue]) -> Metadata:
    return {entry.key: entry.value for entry in entries}


def written(folder: Path, rows: int, pre: str | None = None) -> Metadata:
    return as_metadata(tokenizer_metadata(folder, {"vocab_size": rows}, pre))


def sample_text() -> str:
    return evaluation_text().read_text(encoding="utf-8")[:20_000]


@pytest.fixture
def byte_level(books_7m: Path, tmp_path: Path) -> Callable[..., Path]:
    """A folder with the bundled tokenizer, its tokenizer.json and config edited."""

    def make(edit: Callable[[Metadata], None] | None = None, **config: Any) -> Path:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(books_7m / name, tmp_path / name)
        tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
        if edit is not None:
            edit(tokenizer)
        (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
        settings = json.loads((tmp_path / "tokenizer_config.json").read_text()) | config
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        return tmp_path

    return make


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama-2-style tokenizer.json: BPE over text with spaces as U+2581, bytes as fallback."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=[*special, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
        max_token_length=8,
    )
    words = sample_text().replace("\n", " ").split(" ")
    tokenizer.train_from_iterator((f" {word}" for word in words), trainer)
    state = json.loads(tokenizer.to_str())
    # bytes are part of the model, not marks in text
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < 3]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def assert_same_tokens(folder: Path, rebuilt: GgufTokenizer) -> None:
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in (sample_text(), "", " ", "naïve 日本 🚀\n\n\tx  y", "a<|im_start|>b"):
        for special in (False, True):
            expected = own.encode(text, add_special_tokens=special).ids
            found = rebuilt.tokenizer.encode(text, add_special_tokens=special).ids
            assert found == expected, text[:30]
            assert rebuilt.tokenizer.decode(found) == own.decode(expected)


def test_the_bundled_byte_level_tokenizer_survives(books_7m: Path) -> None:
    metadata = written(books_7m, 4096)
    assert metadata["tokenizer.ggml.model"] == "gpt2"
    assert metadata["tokenizer.ggml.pre"] == "gpt-2"
    assert metadata["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]
    assert metadata["tokenizer.ggml.add_bos_token"] is False
    rebuilt = tokenizer_from_gguf(metadata)
    assert_same_tokens(books_7m, rebuilt)
    assert rebuilt.token("bos") == "<|endoftext|>"
    assert rebuilt.eos_token_ids == (0, 2)  # and <|im_end|>, by its text, as llama.cpp does


def test_a_sentencepiece_tokenizer_survives(sentencepiece: Path) -> None:
    metadata = written(sentencepiece, 700)
    assert metadata["tokenizer.ggml.model"] == "llama"
    kinds = metadata["tokenizer.ggml.token_type"]
    assert kinds[:4] == [TokenKind.UNKNOWN, TokenKind.CONTROL, TokenKind.CONTROL, TokenKind.BYTE]
    rebuilt = tokenizer_from_gguf(metadata)
    assert_same_tokens(sentencepiece, rebuilt)
    assert rebuilt.add_bos
    assert rebuilt.tokenizer.encode("x").ids[0] == 1


def test_stories_tokenizer_survives(stories: Path) -> None:
    assert_same_tokens(stories, tokenizer_from_gguf(written(stories, 512)))


@pytest.mark.parametrize("name", ["gpt-2", "llama-bpe", "qwen2", "llama-spm", "phi-3"])
def test_tokenizers_of_llama_cpp_give_its_own_tokens(name: str, shared_data: Path) -> None:
    """47 texts a vocabulary, with the ids that llama.cpp's tests expect."""
    path = shared_data / "tokenizers" / "gguf-vocab" / f"ggml-vocab-{name}.gguf"
    tokenizer = tokenizer_from_gguf(GgufFile.open(path).metadata).tokenizer
    texts = path.with_name(path.name + ".inp").read_bytes().decode()
    cases = texts.split("\n__ggml_vocab_test__\n")
    expected = path.with_name(path.name + ".out").read_text().split("\n")
    assert len(cases) == len(expected) == 47
    for text, ids in zip(cases, expected, strict=True):
        found = tokenizer.encode(text, add_special_tokens=False).ids
        assert found == [int(word) for word in ids.split()], text


def split(pattern: str) -> Metadata:
    return {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
            | {"invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
            | {"trim_offsets": True},
        ],
    }


def test_a_tokenizer_like_gemmas_has_no_leading_space(sentencepiece: Path, tmp_path: Path) -> None:
    folder = tmp_path / "gemma"
    shutil.copytree(sentencepiece, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    space = {"String": " "}
    tokenizer["normalizer"] = {"type": "Replace", "pattern": space, "content": "\u2581"}
    tokenizer["pre_tokenizer"] = {"type": "Split", "pattern": space, "invert": False}
    tokenizer["pre_tokenizer"]["behavior"] = "MergedWithPrevious"
    tokenizer["decoder"] = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        ],
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    metadata = written(folder, 700)
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert metadata["tokenizer.ggml.add_space_prefix"] is False
    assert_same_tokens(folder, tokenizer_from_gguf(metadata))


LLAMA_3_AS_PUBLISHED = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize(
    ("node", "ignore_merges", "expected"),
    [
        ({"type": "ByteLevel", "use_regex": True}, False, "gpt-2"),
        (split(LLAMA_3_AS_PUBLISHED), True, "llama-bpe"),
        (split(LLAMA_3_AS_PUBLISHED), False, "smaug-bpe"),
        (split(LLAMA_3_AS_PUBLISHED.replace("{1,3}", "")), False, "qwen2"),
        (
            {
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Digits", "individual_digits": True},
                    {"type": "ByteLevel", "add_prefix_space": False},
                ],
            },
            False,
            "smollm",
        ),
        (split(r"\w+"), False, None),
        ({"type": "Metaspace"}, False, None),
        ({"type": "ByteLevel", "add_prefix_space": True}, False, None),
        (None, False, None),
    ],
)
def test_pre_tokenizers_are_told_by_what_they_do(
    node: Metadata | None, ignore_merges: bool, expected: str | None
) -> None:
    found = detect({"pre_tokenizer": node, "model": {"ignore_merges": ignore_merges}})
    assert found == expected


def test_known_patterns_are_spelt_as_in_published_tokenizers() -> None:
    assert LLAMA3 == LLAMA_3_AS_PUBLISHED
    assert PRE_TOKENIZERS["qwen2"].patterns == (QWEN2,)
    assert PRE_TOKENIZERS["olmo"].patterns == (GPT2,)


def sequence(patterns: Sequence[str]) -> Metadata:
    nodes = [split(pattern)["pretokenizers"] for pattern in patterns]
    return {"type": "Sequence", "pretokenizers": [*(node[0] for node in nodes), nodes[0][1]]}


NAMES = sorted({entry.name for entry in PRE_TOKENIZERS.values()})
FOUND = sorted(set(NAMES) - {"granite-embed-multi-97m"})  # the pattern of gpt-4o


@pytest.mark.parametrize("name", FOUND)
def test_every_pre_tokenizer_is_found_by_its_patterns_and_tokenizes_alike(
    name: str, byte_level: Callable[..., Path]
) -> None:
    entry = PRE_TOKENIZERS[name]

    def edit(tokenizer: Metadata) -> None:
        tokenizer["pre_tokenizer"] = sequence([p.replace(r"\n", "\n") for p in entry.patterns])
        tokenizer["model"]["ignore_merges"] = entry.ignore_merges

    folder = byte_level(edit)
    metadata = written(folder, 4096)
    assert metadata["tokenizer.ggml.pre"] == name
    assert_same_tokens(folder, tokenizer_from_gguf(metadata))


def test_the_letters_of_deepseeks_first_tokenizers_are_cased_ones() -> None:
    pattern = re.compile(PRE_TOKENIZERS["deepseek-llm"].patterns[1])
    letters = [chr(code) for code in range(0x110000) if pattern.fullmatch(chr(code))]
    assert {unicodedata.category(letter) for letter in letters} == {"Lu", "Ll", "Lt"}
    assert len(letters) > 1000


@pytest.mark.parametrize("pattern", [LLAMA3, QWEN2])
def test_other_patterns_survive_with_their_own_name(
    pattern: str, byte_level: Callable[..., Path]
) -> None:
    def edit(tokenizer: Metadata) -> None:
        tokenizer["pre_tokenizer"] = split(pattern)

    folder = byte_level(edit)
    metadata = written(folder, 4096)
    assert metadata["tokenizer.ggml.pre"] in ("smaug-bpe", "qwen2")
    assert_same_tokens(folder, tokenizer_from_gguf(metadata))


def test_an_unknown_pre_tokenizer_is_refused_with_the_flag_that_names_one(
    byte_level: Callable[..., Path],
) -> None:
    def edit(tokenizer: Metadata) -> None:
        tokenizer["pre_tokenizer"] = split(r"\w+|\W+")

    folder = byte_level(edit)
    with pytest.raises(UnsupportedModel, match="none that llama") as caught:
        written(folder, 4096)
    assert "--pre" in str(caught.value.hint)
    with pytest.raises(QtoolError, match="otherwise") as wrong:
        written(folder, 4096, pre="llama-bpe")
    assert "--pre" in str(wrong.value.hint)
    with pytest.raises(UnknownName, match="lama-bpe"):
        written(folder, 4096, pre="lama-bpe")


def test_a_pre_tokenizer_that_does_the_same_may_be_named(
    byte_level: Callable[..., Path],
) -> None:
    """The same regular expression in other words: not recognized, but right when named."""

    def edit(tokenizer: Metadata) -> None:
        tokenizer["pre_tokenizer"] = split(f"(?:{QWEN2})")

    folder = byte_level(edit)
    assert written(folder, 4096, pre="qwen2")["tokenizer.ggml.pre"] == "qwen2"


def test_what_llama_cpp_does_not_do_is_found_by_trying(byte_level: Callable[..., Path]) -> None:
    def edit(tokenizer: Metadata) -> None:
        tokenizer["normalizer"] = {"type": "Lowercase"}

    with pytest.raises(UnsupportedModel, match="otherwise"):
        written(byte_level(edit), 4096)


def test_padding_rows_of_the_embedding_become_unused_tokens(books_7m: Path) -> None:
    metadata = written(books_7m, 4100)
    assert metadata["tokenizer.ggml.tokens"][4095:] == [
        *metadata["tokenizer.ggml.tokens"][4095:4096],
        *("[PAD4096]", "[PAD4097]", "[PAD4098]", "[PAD4099]"),
    ]
    assert metadata["tokenizer.ggml.token_type"][-4:] == [TokenKind.UNUSED] * 4
    with pytest.raises(UnsupportedModel, match="embedding has 4000 rows"):
        written(books_7m, 4000)


def test_added_tokens_are_control_or_user_defined(byte_level: Callable[..., Path]) -> None:
    def edit(tokenizer: Metadata) -> None:
        for number, (text, special) in enumerate((("<tool>", False), ("<end>", True)), 4096):
            tokenizer["added_tokens"].append(
                tokenizer["added_tokens"][0] | {"id": number, "content": text, "special": special}
            )

    folder = byte_level(edit, eos_token="<end>")
    metadata = written(folder, 4098)
    assert metadata["tokenizer.ggml.token_type"][-2:] == [
        TokenKind.USER_DEFINED,
        TokenKind.CONTROL,
    ]
    assert metadata["tokenizer.ggml.eos_token_id"] == 4097
    rebuilt = tokenizer_from_gguf(metadata).tokenizer
    assert rebuilt.encode("a<tool>b").ids == [
        *rebuilt.encode("a").ids,
        4096,
        *rebuilt.encode("b").ids,
    ]
    assert rebuilt.decode([4096, 4097]) == "<tool>"


def test_every_end_of_generation_id_is_kept(byte_level: Callable[..., Path]) -> None:
    folder = byte_level()
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 0]}))
    metadata = written(folder, 4096)
    assert metadata["tokenizer.ggml.eos_token_id"] == 0
    assert metadata["tokenizer.ggml.eot_token_id"] == 1
    assert end_of_generation_ids(metadata) == (0, 1, 2)


def test_chat_templates_go_both_ways(byte_level: Callable[..., Path]) -> None:
    folder = byte_level(chat_template="{{ one }}")
    assert tokenizer_from_gguf(written(folder, 4096)).chat_template == "{{ one }}"

    several = [
        {"name": "default", "template": "{{ d }}"},
        {"name": "tool use", "template": "{{ t }}"},
        {"name": "rag", "template": "{{ r }}"},
    ]
    metadata = written(byte_level(chat_template=several), 4096)
    assert metadata["tokenizer.chat_templates"] == ["rag", "tool_use"]
    found = tokenizer_from_gguf(metadata)
    assert found.chat_template == "{{ d }}"
    assert found.chat_templates == {"tool_use": "{{ t }}", "rag": "{{ r }}"}

    folder = byte_level()
    (folder / "chat_template.jinja").write_text("{{ file }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "x.jinja").write_text("{{ x }}")
    found = tokenizer_from_gguf(written(folder, 4096))
    assert (found.chat_template, found.chat_templates) == ("{{ file }}", {"x": "{{ x }}"})


def test_adding_bos_follows_the_post_processor(byte_level: Callable[..., Path]) -> None:
    def edit(tokenizer: Metadata) -> None:
        bos = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
        tokenizer["post_processor"]["single"].insert(0, bos)
        tokenizer["post_processor"]["special_tokens"] = {
            "<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
        }

    folder = byte_level(edit)
    metadata = written(folder, 4096)
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    assert_same_tokens(folder, tokenizer_from_gguf(metadata))


def test_scores_turn_into_merges_best_first() -> None:
    tokens = ["<unk>", "a", "b", "ab", "aab"]
    kinds = [TokenKind.UNKNOWN, *[TokenKind.NORMAL] * 4]
    assert merges_from_scores(tokens, kinds, [0, -3, -4, -1, -2]) == [("a", "b"), ("a", "ab")]


def test_folders_without_a_usable_tokenizer_say_so(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"no tokenizer\.json"):
        written(tmp_path, 10)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(FormatError, match="cannot be loaded"):
        written(tmp_path, 10)
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UnsupportedModel, match="WordLevel"):
        written(tmp_path, 10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.model": "t5"}, "'t5' is not supported"),
        ({"tokenizer.ggml.tokens": None}, "tokens is missing"),
        ({"tokenizer.ggml.tokens": [1, 2]}, "no array of str"),
        ({"tokenizer.ggml.tokens": ["a"] * 4096}, "'a' twice"),
        ({"tokenizer.ggml.token_type": [1]}, "token_type has 1 entries"),
        ({"tokenizer.ggml.merges": ["a b c d"]}, r"merges\[0\]"),
        ({"tokenizer.ggml.merges": ["nospace"]}, r"merges\[0\]"),
        ({"tokenizer.ggml.merges": None}, "merges is missing"),
        ({"tokenizer.ggml.pre": "unheard-of"}, "'unheard-of' is not known"),
        ({"tokenizer.ggml.tokens": ["\udcff"]}, "not UTF-8"),
    ],
)
def test_metadata_that_describes_no_tokenizer_is_refused(
    change: Metadata, message: str, books_7m: Path
) -> None:
    metadata = written(books_7m, 4096) | change
    with pytest.raises(QtoolError, match=message):
        tokenizer_from_gguf(metadata)


def test_special_ids_outside_the_vocabulary_are_left_out(books_7m: Path) -> None:
    metadata = written(books_7m, 4096) | {"tokenizer.ggml.eos_token_id": 2**31}
    found = tokenizer_from_gguf(metadata)
    assert "eos" not in found.special_ids
    assert found.eos_token_ids == (0, 2)
