"""Calibration tokens: from a text, rows of text or chats, a Hub dataset, or the text that ships.

Texts are tokenized and laid end to end until there are enough tokens, and cut into windows of one
length. Rows, or passages of a plain text, are taken in an order that the seed alone decides. The
hash of the tokens is kept in the artifact: equal hashes mean that two runs saw the same data.

Every window starts with the tokenizer's beginning-of-text token where it adds one by itself:
models that were trained with it park attention there, and windows without it have other statistics.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from qtool.builtin import calibration_text
from qtool.errors import FormatError, QtoolError, UnsupportedModel, UsageError
from qtool.recipe import Calibration
from qtool.settings import settings

# Fewer samples than this make quality depend on which ones they are.
FEW_SAMPLES = 128
# Of one plain text file; calibration takes well under a megabyte of it.
_MAX_TEXT_BYTES = 64_000_000
# Characters of a passage, for each token of a window: about four windows of English.
_PASSAGE_CHARACTERS = 16
_SUFFIXES = (".txt", ".jsonl", ".parquet")
_HUB_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(?::(?P<config>[\w.-]+))?")
_CHAT_FIELDS = ("messages", "conversations")


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class CalibrationTokens:
    """tokens    [samples, length] int64
    dataset   what the user named, or "builtin"
    sha256    of the tokens as little-endian int64
    """

    tokens: Tensor
    dataset: str
    sha256: str
    seed: int
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        samples, length = self.tokens.shape
        return {
            "dataset": self.dataset,
            "num_samples": samples,
            "sequence_length": length,
            "seed": self.seed,
            "sha256": self.sha256,
        }


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many kinds for files it cannot read
        text = str(error).strip().splitlines()
        raise UnsupportedModel(
            f"{folder.name} has no tokenizer that transformers can load: "
            f"{text[0] if text else type(error).__name__}",
            "calibration needs the tokenizer; --recipe rtn-int4 does not",
        ) from error


def load_calibration(
    wanted: Calibration, tokenizer: Any, *, vocab_size: int | None = None
) -> CalibrationTokens:
    """The windows that a recipe asks for; UsageError where the data is too short."""
    needed = wanted.num_samples * wanted.sequence_length
    warnings: list[str] = []
    if wanted.num_samples < FEW_SAMPLES:
        warnings.append(
            f"{wanted.num_samples} calibration samples are few: below {FEW_SAMPLES} the result "
            "depends on which ones they are"
        )
    path = Path(wanted.dataset) if wanted.dataset is not None else calibration_text()
    if path.suffix == ".txt" or wanted.dataset is None:
        passages = _passages(_read_text(path), _PASSAGE_CHARACTERS * wanted.sequence_length)
        ids = _tokenize(_shuffled(passages, wanted.seed), tokenizer, needed, end=None)
    else:
        documents = _documents(wanted, tokenizer, warnings)
        end = getattr(tokenizer, "eos_token_id", None)
        ids = _tokenize(documents, tokenizer, needed, end=end)
    name = wanted.dataset or "builtin"
    if len(ids) < needed:
        raise UsageError(
            f"{name} gives {len(ids)} calibration tokens, {wanted.num_samples} samples of "
            f"{wanted.sequence_length} need {needed}",
            f"give more text, or --num-samples {max(1, len(ids) // wanted.sequence_length)}"
            if len(ids) >= wanted.sequence_length
            else "give more text, or a smaller --sequence-length",
        )
    windows = torch.tensor(ids[:needed], dtype=torch.int64)
    tokens = windows.view(wanted.num_samples, wanted.sequence_length)
    _set_beginning(tokens, tokenizer)
    if vocab_size is not None and int(tokens.max()) >= vocab_size:
        raise FormatError(
            f"the tokenizer gives token {int(tokens.max())}, the model's vocabulary has "
            f"{vocab_size}",
            "tokenizer and model do not belong together",
        )
    digest = hashlib.sha256(tokens.numpy().astype("<i8").tobytes()).hexdigest()
    return CalibrationTokens(tokens, name, digest, wanted.seed, tuple(warnings))


def _set_beginning(tokens: Tensor, tokenizer: Any) -> None:
    beginning = getattr(tokenizer, "bos_token_id", None)
    added = tokenizer("a", verbose=False)["input_ids"]
    if beginning is not None and added and added[0] == beginning:
        tokens[:, 0] = beginning


def _tokenize(texts: Iterable[str], tokenizer: Any, needed: int, *, end: int | None) -> list[int]:
    """Token ids of texts end to end, until there are enough.

    end  follows each text, as the model was taught that a document ends; None for passages of one
    """
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if end is not None:
            ids.append(end)
        if len(ids) >= needed:
            break
    return ids


def _passages(text: str, characters: int) -> list[str]:
    """A text in pieces of at least so many characters, each ending with a line."""
    passages = []
    start = 0
    while start < len(text):
        stop = text.find("\n", start + characters) + 1
        stop = stop if stop > 0 else len(text)
        passages.append(text[start:stop])
        start = stop
    return passages


def _read_text(path: Path) -> str:
    _require_file(path)
    with path.open("rb") as file:
        data = file.read(_MAX_TEXT_BYTES)
    try:
        # A cut at the limit may fall inside a character.
        return data.decode("utf-8", errors="ignore" if len(data) == _MAX_TEXT_BYTES else "strict")
    except UnicodeDecodeError as error:
        raise FormatError(f"{path} is not UTF-8 text: byte {error.start}") from error


def _documents(wanted: Calibration, tokenizer: Any, warnings: list[str]) -> Iterator[str]:
    assert wanted.dataset is not None
    path = Path(wanted.dataset)
    if path.suffix in _SUFFIXES or path.exists():
        _require_file(path)
        if path.suffix == ".jsonl":
            rows: Iterable[dict[str, Any]] = _shuffled(list(_jsonl_rows(path)), wanted.seed)
        elif path.suffix == ".parquet":
            rows = _shuffled(list(_parquet_rows(path)), wanted.seed)
        else:
            raise UsageError(
                f"{path} is not a calibration file that is read",
                f"use {', '.join(_SUFFIXES)}, or a Hub dataset id",
            )
    elif match := _HUB_ID.fullmatch(wanted.dataset):
        rows = _hub_rows(match["id"], match["config"], wanted.seed)
    else:
        raise UsageError(
            f"no calibration data at {wanted.dataset!r}",
            "name a .txt, .jsonl or .parquet file, or a Hub dataset as owner/name or "
            "owner/name:config",
        )
    for number, row in enumerate(rows):
        yield _text_of(row, wanted.dataset, number, tokenizer, warnings)


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise UsageError(
            f"no calibration file {path}",
            "name a .txt, .jsonl or .parquet file, or a Hub dataset id such as owner/name",
        )


def _shuffled(items: Sequence[T], seed: int) -> Iterator[T]:
    generator = torch.Generator().manual_seed(seed)
    return (items[int(i)] for i in torch.randperm(len(items), generator=generator))


def _jsonl_rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise FormatError(f"{path}:{number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise FormatError(f"{path}:{number} is a JSON {type(row).__name__}, not an object")
            yield row


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise FormatError(f"{path} is not readable parquet: {error}") from error


def _hub_rows(dataset: str, config: str | None, seed: int) -> Iterator[dict[str, Any]]:
    import datasets

    offline = settings().hub_offline
    try:
        # Streaming reads only what is needed; offline, only a complete local copy can be read.
        rows = datasets.load_dataset(dataset, config, split="train", streaming=not offline)
        shuffled = rows.shuffle(seed=seed) if offline else rows.shuffle(seed=seed, buffer_size=1000)
        for row in shuffled:
            yield dict(row)
    except QtoolError:
        raise
    except Exception as error:  # datasets raises many kinds: absent, gated, offline, no such config
        text = str(error).strip().splitlines()
        raise QtoolError(
            f"dataset {dataset} could not be read: {text[0] if text else type(error).__name__}",
            "HF_HUB_OFFLINE is set, so only datasets in the local cache can be used"
            if offline
            else "check the name, as owner/name or owner/name:config, and the network; or give a "
            "local .txt, .jsonl or .parquet file",
        ) from error


def _text_of(
    row: dict[str, Any], dataset: str, number: int, tokenizer: Any, warnings: list[str]
) -> str:
    """A row's text: its chat through the model's template, or its text field."""
    for field in _CHAT_FIELDS:
        if isinstance(row.get(field), list):
            return _chat_text(row[field], f"{dataset}: row {number + 1}", tokenizer, warnings)
    if isinstance(row.get("text"), str):
        return str(row["text"])
    strings = [key for key, value in row.items() if isinstance(value, str)]
    if len(strings) == 1:
        return str(row[strings[0]])
    raise FormatError(
        f"{dataset}: row {number + 1} has no text: its fields are {', '.join(row) or 'none'}",
        "a row needs a text field, or a messages list of {role, content}",
    )


def _chat_text(chat: list[Any], where: str, tokenizer: Any, warnings: list[str]) -> str:
    messages = []
    for item in chat:
        # ShareGPT's spelling is from/value.
        role = item.get("role", item.get("from")) if isinstance(item, dict) else None
        content = item.get("content", item.get("value")) if isinstance(item, dict) else None
        if not isinstance(role, str) or not isinstance(content, str):
            raise FormatError(f"{where}: a message is not {{role, content}} with texts: {item!r}")
        messages.append({"role": _ROLES.get(role, role), "content": content})
    if getattr(tokenizer, "chat_template", None) is None:
        note = "the model has no chat template, so chats are calibrated as plain `role: content`"
        if note not in warnings:
            warnings.append(note)
        return "\n".join(f"{message['role']}: {message['content']}" for message in messages)
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # templates raise what they like
        raise FormatError(f"{where} is refused by the model's chat template: {error}") from error


_ROLES = {"human": "user", "gpt": "assistant"}
