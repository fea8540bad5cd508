"""SentencePiece's tokenizer.model, read without its library.

The file is one protocol-buffers message (sentencepiece_model.proto); of it are read

    ModelProto      1 pieces: { 1 text, 2 score f32, 3 kind }    2 trainer    3 normalizer
    TrainerSpec     3 model_type (1 unigram, 2 BPE)   35 byte_fallback   40..43 unk, bos, eos, pad
    NormalizerSpec  2 precompiled_charsmap   3 add_dummy_prefix   4 remove_extra_whitespaces
                    5 escape_whitespaces

Kinds have GGUF's numbers already. llama.cpp merges pieces by score and does nothing else to text,
so a model that rewrites its text first is refused: it would be read as another one's.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from qtool.errors import FormatError, UnsupportedModel

MAX_BYTES = 1 << 28
BPE = 2
_MAX_KIND = 6
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class Piece(NamedTuple):
    """A token: its text with spaces as U+2581, its score, its kind (vocab.TokenKind)."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True, slots=True)
class SentencePieceModel:
    """pieces      by id
    special_ids  "bos", "eos", "unk", "pad": id, those that the model has
    adds_space   whether a text gets a leading space
    """

    pieces: tuple[Piece, ...]
    special_ids: dict[str, int]
    adds_space: bool

    @classmethod
    def open(cls, path: Path) -> SentencePieceModel:
        """Read a model that llama.cpp's "llama" tokenizer can be; raises where it cannot."""
        try:
            if path.stat().st_size > MAX_BYTES:
                raise FormatError(f"{path} is larger than {MAX_BYTES} bytes")
            data = path.read_bytes()
        except OSError as error:
            raise FormatError(f"{path} cannot be read: {error.strerror or error}") from error
        pieces: list[Piece] = []
        specs: dict[int, dict[int, int | bytes]] = {2: {}, 3: {}}
        for number, value in _fields(path, data):
            if not isinstance(value, bytes):
                continue
            if number == 1:
                pieces.append(_piece(path, value, len(pieces)))
            elif number in specs:
                specs[number].update(_fields(path, value))
        if not pieces:
            raise FormatError(f"{path} holds no SentencePiece model")
        trainer, normalizer = specs[2], specs[3]
        _refuse_what_llama_cpp_lacks(path, trainer, normalizer)
        return cls(tuple(pieces), _special_ids(trainer, len(pieces)), normalizer.get(3, 1) == 1)


def _refuse_what_llama_cpp_lacks(
    path: Path, trainer: dict[int, int | bytes], normalizer: dict[int, int | bytes]
) -> None:
    hint = "load it with transformers and save_pretrained() it: that writes a tokenizer.json"
    if trainer.get(3, 1) != BPE:
        raise UnsupportedModel(
            f"{path} is a Unigram model, and GGUF's llama tokenizer merges pieces by score (BPE)"
        )
    if trainer.get(35, 0) != 1:
        raise UnsupportedModel(f"{path} has no byte_fallback, which GGUF's llama tokenizer does")
    problems = {
        "rewrites characters first (precompiled_charsmap)": bool(normalizer.get(2)),
        "removes repeated spaces (remove_extra_whitespaces)": normalizer.get(4, 1) == 1,
        "leaves spaces as they are (escape_whitespaces)": normalizer.get(5, 1) != 1,
    }
    for problem, found in problems.items():
        if found:
            raise UnsupportedModel(f"{path} {problem}, which llama.cpp does not", hint)


def _special_ids(trainer: dict[int, int | bytes], num_pieces: int) -> dict[str, int]:
    numbers = {"unk": (40, 0), "bos": (41, 1), "eos": (42, 2), "pad": (43, -1)}
    found = {}
    for name, (number, default) in numbers.items():
        value = trainer.get(number, default)
        if isinstance(value, int) and 0 <= value < num_pieces:  # -1 arrives as a huge number
            found[name] = value
    return found


def _piece(path: Path, data: bytes, number: int) -> Piece:
    text, score, kind = "", 0.0, 1
    for field, value in _fields(path, data):
        if field == 1 and isinstance(value, bytes):
            try:
                text = value.decode("utf-8")
            except UnicodeDecodeError as error:
                raise FormatError(f"{path}: piece {number} is not UTF-8") from error
        elif field == 2 and isinstance(value, bytes) and len(value) == 4:
            score = struct.unpack("<f", value)[0]
        elif field == 3 and isinstance(value, int):
            kind = value
    if not 1 <= kind <= _MAX_KIND or score != score or abs(score) == float("inf"):
        raise FormatError(f"{path}: piece {number} {text!r} has kind {kind} and score {score}")
    return Piece(text, score, kind)


def _fields(path: Path, data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of a message: integers, or bytes for all that is not a varint."""
    position = 0
    while position < len(data):
        key, position = _varint(path, data, position)
        kind = key & 7
        if kind == _VARINT:
            value, position = _varint(path, data, position)
            yield key >> 3, value
            continue
        if kind == _BYTES:
            length, position = _varint(path, data, position)
        else:
            length = {_FIXED32: 4, _FIXED64: 8}.get(kind, len(data))
        if length > len(data) - position or kind not in (_BYTES, _FIXED32, _FIXED64):
            raise FormatError(f"{path} is no SentencePiece model, or is cut short")
        yield key >> 3, data[position : position + length]
        position += length


def _varint(path: Path, data: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            break
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise FormatError(f"{path} is no SentencePiece model, or is cut short")
