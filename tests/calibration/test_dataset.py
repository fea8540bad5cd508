"""Calibration tokens: what is read, how it is cut, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qtool.builtin import calibration_text
from qtool.calibration.dataset import load_calibration, load_tokenizer
from qtool.errors import FormatError, QtoolError, UnsupportedModel, UsageError
from qtool.recipe import Calibration

SENTENCE = "The ship came home in the grey of the morning, and nobody was on deck. "


@pytest.fixture(scope="module")
def tokenizer(books_7m: Path) -> Any:
    return load_tokenizer(books_7m)


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(calibration_text().read_text(encoding="utf-8")[:20_000], encoding="utf-8")
    return path


def small(dataset: Path | str | None, **changes: Any) -> Calibration:
    settings = {"num_samples": 4, "sequence_length": 16, **changes}
    return Calibration(dataset=None if dataset is None else str(dataset), **settings)


def test_the_text_that_ships_is_the_default(tokenizer: Any) -> None:
    found = load_calibration(Calibration(), tokenizer, vocab_size=4096)
    assert found.tokens.shape == (128, 512)
    assert found.tokens.dtype == torch.int64
    assert found.dataset == "builtin"
    assert found.warnings == ()
    text = calibration_text().read_text(encoding="utf-8")
    assert tokenizer.decode(found.tokens[3, 1:]).strip() in text


def test_the_seed_alone_decides(tokenizer: Any, text_file: Path) -> None:
    first = load_calibration(small(text_file, seed=7), tokenizer)
    again = load_calibration(small(text_file, seed=7), tokenizer)
    other = load_calibration(small(text_file, seed=8), tokenizer)
    assert torch.equal(first.tokens, again.tokens)
    assert first.sha256 == again.sha256
    assert first.sha256 != other.sha256


def test_windows_begin_with_the_beginning_token_only_where_the_tokenizer_adds_it(
    tokenizer: Any, text_file: Path
) -> None:
    plain = load_calibration(small(text_file), tokenizer).tokens
    adds = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    assert bool((plain[:, 0] == tokenizer.bos_token_id).all()) == adds

    class WithBeginning:
        bos_token_id = 0
        eos_token_id = None

        def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> Any:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            return {"input_ids": [0, *ids] if add_special_tokens else ids}

    found = load_calibration(small(text_file), WithBeginning()).tokens
    assert found[:, 0].tolist() == [0, 0, 0, 0]
    assert torch.equal(found[:, 1:], plain[:, 1:])


def test_few_samples_are_warned_about(tokenizer: Any, text_file: Path) -> None:
    (warning,) = load_calibration(small(text_file), tokenizer).warnings
    assert "4 calibration samples are few" in warning


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_rows_of_text_are_read_in_an_order_of_the_seed(
    tmp_path: Path, tokenizer: Any, suffix: str
) -> None:
    rows = [{"text": f"Number {i}. " + SENTENCE, "id": i} for i in range(40)]
    path = write_rows(tmp_path / f"rows{suffix}", rows)
    found = load_calibration(small(path), tokenizer)
    assert found.tokens.shape == (4, 16)
    assert found.dataset == str(path)
    other = load_calibration(small(path, seed=1), tokenizer)
    assert found.sha256 != other.sha256


def test_both_kinds_of_file_give_the_same_tokens(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"text": f"Number {i}. " + SENTENCE} for i in range(40)]
    hashes = {
        load_calibration(small(write_rows(tmp_path / name, rows)), tokenizer).sha256
        for name in ("rows.jsonl", "rows.parquet")
    }
    assert len(hashes) == 1


def test_chats_go_through_the_models_template(tmp_path: Path, books_7m: Path) -> None:
    tokenizer = load_tokenizer(books_7m)
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
    )
    chat = [{"role": "user", "content": SENTENCE}, {"role": "assistant", "content": SENTENCE}]
    path = write_rows(tmp_path / "chats.jsonl", [{"messages": chat}] * 8)
    found = load_calibration(small(path, num_samples=2, sequence_length=64), tokenizer)
    text = tokenizer.decode(found.tokens.flatten())
    assert "<|im_start|>user The ship" in text
    assert "<|im_start|>assistant The ship" in text


def test_chats_of_a_model_without_a_template_are_plain_and_announced(
    tmp_path: Path, tokenizer: Any
) -> None:
    chat = [{"from": "human", "value": SENTENCE}, {"from": "gpt", "value": SENTENCE}]
    path = write_rows(tmp_path / "chats.jsonl", [{"conversations": chat}] * 8)
    found = load_calibration(small(path), tokenizer)
    assert any("no chat template" in warning for warning in found.warnings)
    assert "user:" in tokenizer.decode(found.tokens.flatten())


def test_too_short_a_text_says_what_was_found_and_what_is_needed(
    tmp_path: Path, tokenizer: Any
) -> None:
    path = tmp_path / "short.txt"
    path.write_text(SENTENCE * 3, encoding="utf-8")
    with pytest.raises(UsageError) as error:
        load_calibration(small(path), tokenizer)
    count = len(tokenizer(SENTENCE * 3)["input_ids"])
    assert f"gives {count} calibration tokens" in error.value.message
    assert "4 samples of 16 need 64" in error.value.message
    assert f"--num-samples {count // 16}" in (error.value.hint or "")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", '{"text": "a"}\nnot json\n', "rows.jsonl:2 is not JSON"),
        ("rows.jsonl", "[1, 2]\n", "rows.jsonl:1 is a JSON list"),
        ("rows.jsonl", '{"a": 1, "b": "x", "c": "y"}\n', "row 1 has no text: its fields are a"),
        ("rows.jsonl", '{"messages": [{"role": "user"}]}\n', "a message is not {role, content}"),
        ("rows.parquet", "PAR1 this is no parquet", "is not readable parquet"),
        ("text.txt", b"\xff\xfe\x00broken", "is not UTF-8 text: byte 0"),
    ],
)
def test_damaged_files_are_named_with_the_place(
    tmp_path: Path, tokenizer: Any, name: str, content: str | bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(FormatError, match=message.replace("{", r"\{")):
        load_calibration(small(path), tokenizer)


@pytest.mark.parametrize("dataset", ["absent.txt", "absent.jsonl", "no such thing", "/nowhere"])
def test_data_that_is_nowhere_is_a_mistake_of_the_request(tokenizer: Any, dataset: str) -> None:
    with pytest.raises(UsageError) as error:
        load_calibration(small(dataset), tokenizer)
    assert error.value.exit_code == 2
    assert error.value.hint


def test_a_hub_dataset_that_is_not_cached_is_refused_offline(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import datasets

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(QtoolError) as error:
        load_calibration(small("nobody/no-such-dataset"), tokenizer)
    assert "nobody/no-such-dataset" in error.value.message
    assert "HF_HUB_OFFLINE" in (error.value.hint or "")


def test_a_tokenizer_of_another_model_is_refused(tokenizer: Any, text_file: Path) -> None:
    with pytest.raises(FormatError, match="vocabulary has 100"):
        load_calibration(small(text_file), tokenizer, vocab_size=100)


def test_a_model_without_a_tokenizer_says_what_needs_it(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path]
) -> None:
    (tmp_path / "config.json").write_bytes((tiny_checkpoint("llama") / "config.json").read_bytes())
    with pytest.raises(UnsupportedModel, match="no tokenizer"):
        load_tokenizer(tmp_path)
