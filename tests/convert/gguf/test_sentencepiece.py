"""Tokenizers that are a tokenizer.model alone."""

from __future__ import annotations

import json
import shutil
import struct
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qtool.convert.gguf.container import GgufFile
from qtool.convert.gguf.sentencepiece import Piece, SentencePieceModel
from qtool.convert.gguf.vocab import TokenKind, tokenizer_from_gguf
from qtool.convert.gguf.vocab_write import tokenizer_metadata
from qtool.convert.inspection import inspect_path
from qtool.convert.run import convert_model
from qtool.errors import FormatError, QtoolError, UnsupportedModel

SPACE = "\u2581"
Metadata = dict[str, Any]


def varint(value: int) -> bytes:
    data = b""
    while value >= 0x80:
        data, value = data + bytes([value & 0x7F | 0x80]), value >> 7
    return data + bytes([value])


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value % (1 << 64))


def message(field: int, data: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(data)) + data


def model_bytes(
    pieces: Sequence[Piece],
    *,
    model_type: int = 2,
    byte_fallback: int = 1,
    charsmap: bytes = b"",
    dummy_prefix: int = 1,
    extra_whitespaces: int = 0,
    unknown: int = 0,
) -> bytes:
    """A tokenizer.model, as SentencePiece's trainer serializes it."""
    data = b"".join(
        message(
            1,
            message(1, text.encode()) + varint(2 << 3 | 5) + struct.pack("<f", score)
            + (number(3, kind) if kind != 1 else b""),
        )
        for text, score, kind in pieces
    )  # fmt: skip
    data += message(2, number(3, model_type) + number(35, byte_fallback) + number(40, unknown)
                    + number(41, 1) + number(42, 2) + number(43, -1))  # fmt: skip
    normalizer = message(1, b"identity") + (message(2, charsmap) if charsmap else b"")
    return data + message(
        3, normalizer + number(3, dummy_prefix) + number(4, extra_whitespaces) + number(5, 1)
    )


SMALL = [
    Piece("<unk>", 0, TokenKind.UNKNOWN),
    Piece("<s>", 0, TokenKind.CONTROL),
    Piece("</s>", 0, TokenKind.CONTROL),
    *(Piece(f"<0x{byte:02X}>", 0, TokenKind.BYTE) for byte in range(256)),
    Piece(f"{SPACE}a", -1, TokenKind.NORMAL),
    Piece("ab", -2, TokenKind.NORMAL),
    Piece(SPACE, -3, TokenKind.NORMAL),
    Piece("a", -4, TokenKind.NORMAL),
    Piece("b", -5, TokenKind.NORMAL),
]


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    def make(pieces: Sequence[Piece] = SMALL, config: Metadata | None = None, **kw: Any) -> Path:
        (tmp_path / "tokenizer.model").write_bytes(model_bytes(pieces, **kw))
        if config is not None:
            (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        return tmp_path

    return make


def metadata_of(folder: Path, rows: int) -> Metadata:
    return {e.key: e.value for e in tokenizer_metadata(folder, {"vocab_size": rows})}


def test_pieces_scores_and_kinds_are_read(folder: Callable[..., Path]) -> None:
    model = SentencePieceModel.open(folder() / "tokenizer.model")
    assert list(model.pieces) == SMALL
    assert model.special_ids == {"unk": 0, "bos": 1, "eos": 2}
    assert model.adds_space


def test_the_best_score_merges_first(folder: Callable[..., Path]) -> None:
    metadata = metadata_of(folder(), len(SMALL))
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert metadata["tokenizer.ggml.bos_token_id"] == 1
    assert "tokenizer.ggml.add_bos_token" not in metadata  # llama.cpp's own default is to add it
    tokenizer = tokenizer_from_gguf(metadata).tokenizer
    assert tokenizer.encode("ab b\u00e9").tokens == [
        "<s>", f"{SPACE}a", "b", SPACE, "b", "<0xC3>", "<0xA9>",
    ]  # fmt: skip
    assert "tokenizer.ggml.add_space_prefix" not in metadata
    bare = metadata_of(folder(dummy_prefix=0), len(SMALL))
    assert bare["tokenizer.ggml.add_space_prefix"] is False
    tokens = tokenizer_from_gguf(bare).tokenizer.encode("ab").tokens
    assert tokens == ["<s>", "ab"]


def test_tokens_that_were_added_since_are_found_in_text(folder: Callable[..., Path]) -> None:
    last = len(SMALL)
    decoder = {
        "0": {"content": "<unk>", "special": True},
        "1": {"content": "<s>", "special": True},
        str(last): {"content": "<|end|>", "special": True},
    }
    path = folder(
        config={
            "added_tokens_decoder": decoder,
            "add_bos_token": False,
            "eos_token": "<|end|>",
            "chat_template": "{{ x }}",
        }
    )
    (path / "added_tokens.json").write_text(json.dumps({"<tool>": last + 1}))
    metadata = metadata_of(path, last + 4)
    kinds = metadata["tokenizer.ggml.token_type"]
    assert kinds[:2] == [TokenKind.UNKNOWN, TokenKind.CONTROL]
    assert kinds[last:] == [
        TokenKind.CONTROL,
        TokenKind.USER_DEFINED,
        TokenKind.UNUSED,
        TokenKind.UNUSED,
    ]
    assert metadata["tokenizer.ggml.eos_token_id"] == last
    assert metadata["tokenizer.ggml.add_bos_token"] is False
    assert metadata["tokenizer.chat_template"] == "{{ x }}"
    found = tokenizer_from_gguf(metadata).tokenizer.encode("ab<tool>b")
    assert found.tokens == [f"{SPACE}a", "b", "<tool>", f"{SPACE}", "b"]
    with pytest.raises(UnsupportedModel, match="embedding has 264 rows"):
        metadata_of(path, 264)
    (path / "added_tokens.json").write_text(json.dumps({"<tool>": "x"}))
    with pytest.raises(FormatError, match="'<tool>' is 'x'"):
        metadata_of(path, last + 4)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"model_type": 1}, "Unigram"),
        ({"byte_fallback": 0}, "byte_fallback"),
        ({"charsmap": b"xyz"}, "rewrites characters"),
        ({"extra_whitespaces": 1}, "repeated spaces"),
    ],
)
def test_models_that_llama_cpp_would_read_otherwise_are_refused(
    options: Metadata, problem: str, folder: Callable[..., Path]
) -> None:
    with pytest.raises(UnsupportedModel, match=problem):
        metadata_of(folder(**options), len(SMALL))


def test_llama_2s_vocabulary_as_a_model_gives_llama_cpps_tokens(
    shared_data: Path, folder: Callable[..., Path]
) -> None:
    path = shared_data / "tokenizers" / "gguf-vocab" / "ggml-vocab-llama-spm.gguf"
    known = GgufFile.open(path).metadata
    columns = [known[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores", "token_type")]
    assert all(isinstance(column, list) for column in columns)
    pieces = [Piece(*row) for row in zip(*columns, strict=True)]  # type: ignore[arg-type]
    metadata = metadata_of(folder(pieces), len(pieces))
    for key in ("tokens", "scores", "token_type"):
        assert metadata[f"tokenizer.ggml.{key}"] == known[f"tokenizer.ggml.{key}"]
    tokenizer = tokenizer_from_gguf(metadata).tokenizer
    cases = path.with_name(path.name + ".inp").read_bytes().decode()
    expected = path.with_name(path.name + ".out").read_text().split("\n")
    for text, ids in zip(cases.split("\n__ggml_vocab_test__\n"), expected, strict=True):
        found = tokenizer.encode(text, add_special_tokens=False).ids
        assert found == [int(word) for word in ids.split()], text


def test_sentencepiece_itself_agrees(stories: Path, folder: Callable[..., Path]) -> None:
    """pip install sentencepiece"""
    library = pytest.importorskip("sentencepiece")
    known = {e.key: e.value for e in tokenizer_metadata(stories, {"vocab_size": 512})}
    columns = [known[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores", "token_type")]
    path = folder([Piece(*row) for row in zip(*columns, strict=True)])
    theirs = library.SentencePieceProcessor(str(path / "tokenizer.model"))
    ours = tokenizer_from_gguf(metadata_of(path, 512)).tokenizer
    for text in ("Once upon a time", "  two  spaces\n\nna\u00efve \u65e5\u672c", "", "x"):
        assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_damaged_models_are_refused_or_read(data: st.DataObject) -> None:
    whole = bytearray(model_bytes(SMALL))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(whole)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.model"
        path.write_bytes(whole[:cut] if data.draw(st.booleans()) else whole)
        with suppress(QtoolError):  # and nothing else
            assert len(SentencePieceModel.open(path).pieces) <= len(whole)


def test_a_model_with_it_alone_is_exported(
    stories: Path, tmp_path: Path, folder: Callable[..., Path]
) -> None:
    known = {e.key: e.value for e in tokenizer_metadata(stories, {"vocab_size": 512})}
    columns = [known[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores", "token_type")]
    source = tmp_path / "source"
    shutil.copytree(stories, source)
    (source / "tokenizer.json").unlink()
    made = folder([Piece(*row) for row in zip(*columns, strict=True)]) / "tokenizer.model"
    made.rename(source / "tokenizer.model")
    out = convert_model(str(source), to="gguf", type="Q8_0", out=tmp_path / "model.gguf")
    assert GgufFile.open(out).metadata["tokenizer.ggml.tokens"] == columns[0]
    assert inspect_path(source).tokenizer["tokens"] == 512
