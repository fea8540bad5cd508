"""Every wrong request ends in an error that names it and the next step: exit code 2 for misuse, 1
for failure, never a traceback, and nothing under the name that was asked for.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

QtoolRun = Callable[..., Any]


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory, books_7m: Path) -> Path:
    """A folder of things that are wrong, each in its own way."""
    root = tmp_path_factory.mktemp("bad")
    (root / "empty").mkdir()
    (root / "notes.txt").write_text("not a model", encoding="utf-8")

    def copied(name: str) -> Path:
        return Path(shutil.copytree(books_7m, root / name))

    weights = copied("truncated") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    hostile = copied("hostile") / "model.safetensors"
    hostile.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    overlapping = {
        "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
        "b": {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]},
    }
    header = json.dumps(overlapping).encode()
    overlap = copied("overlap") / "model.safetensors"
    overlap.write_bytes(struct.pack("<Q", len(header)) + header + bytes(24))
    (copied("no-json") / "config.json").write_text("{", encoding="utf-8")
    config = json.loads((books_7m / "config.json").read_text(encoding="utf-8"))
    strange = {**config, "model_type": "perceiver-of-worlds", "architectures": ["Nothing"]}
    (copied("strange") / "config.json").write_text(json.dumps(strange), encoding="utf-8")
    narrow = {**config, "intermediate_size": 700}
    (copied("narrow") / "config.json").write_text(json.dumps(narrow), encoding="utf-8")
    (root / "short.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1 << 62, 5))
    (root / "other.gguf").write_bytes(b"ELF\x7f" + bytes(100))
    (root / "recipe.yaml").write_text(
        "bits: 4\ngroup_sise: 32\nmethod: {name: rtn}\n", encoding="utf-8"
    )
    return root


# (what is asked, exit code, what the error says). {bad} is the folder above; the output is always
# {bad}/out, which must not appear.
TABLE: list[tuple[str, int, str]] = [
    ("quantize {bad}/nothing --recipe int4", 2, "no model at"),
    ("quantize {bad}/empty --recipe int4", 2, "no config.json"),
    ("quantize {bad}/notes.txt --recipe int4", 2, "is a file"),
    ("quantize builtin:book-7m --recipe int4", 2, "did you mean books-7m"),
    ("quantize builtin:books-7m --recipe itn4", 2, "did you mean int4"),
    ("quantize builtin:books-7m --recipe {bad}/recipe.yaml", 2, "did you mean group_size"),
    ("quantize builtin:books-7m --recipe int4 --format gtpq", 2, "gptq"),
    ("quantize builtin:books-7m --recipe int4 --group-size 96", 2, "--group-size"),
    ("quantize builtin:books-7m --recipe int4 --group-size nine", 2, "nine"),
    ("quantize {bad}/truncated --recipe int4", 1, "truncated"),
    ("quantize {bad}/hostile --recipe int4", 1, "header claims"),
    ("quantize {bad}/overlap --recipe int4", 1, "overlaps"),
    ("quantize {bad}/no-json --recipe int4", 1, "config.json"),
    ("quantize {bad}/strange --recipe int4", 1, "perceiver-of-worlds"),
    ("quantize {bad}/narrow --recipe int4", 1, "mlp"),
    ("convert {bad}/nothing --to gguf", 2, "no model at"),
    ("convert builtin:books-7m --to gugf", 2, "gguf"),
    ("convert builtin:books-7m --to gguf --type Q9_Z", 2, "Q9_Z"),
    ("convert builtin:books-7m --to marlin", 1, "quantize"),
    ("convert {bad}/truncated --to gguf --type Q8_0", 1, "truncated"),
    ("convert {bad}/short.gguf --to hf", 1, "short.gguf"),
    ("convert {bad}/other.gguf --to hf", 1, "other.gguf"),
    ("eval {bad}/short.gguf", 1, "short.gguf"),
    ("eval {bad}/hostile", 1, "header claims"),
    ("eval builtin:books-7m --against {bad}/nothing", 2, "no model at"),
    ("eval builtin:books-7m --text {bad}/nothing.txt", 2, "no text at"),
]


@pytest.mark.parametrize(("request_", "code", "words"), TABLE, ids=[row[0] for row in TABLE])
def test_the_error_names_what_is_wrong(
    qtool: QtoolRun, bad: Path, request_: str, code: int, words: str
) -> None:
    before = {path.name for path in bad.iterdir()}
    name = "out.gguf" if "--to gguf" in request_ else "out"
    ended = qtool(*request_.format(bad=bad).split(), "--out", bad / name)
    assert ended.code == code, ended.err
    assert "Error:" in ended.err
    assert words in ended.err
    assert "Traceback" not in ended.err
    assert {path.name for path in bad.iterdir()} == before


HINTS: list[tuple[str, str]] = [
    ("quantize {bad}/nothing --recipe int4", "builtin:books-7m"),
    ("convert builtin:books-7m --to gguf --type Q9_Z", "Q4_K_M"),
    ("serve {bad}/empty", "config.json"),
]


@pytest.mark.parametrize(("request_", "words"), HINTS, ids=[row[0] for row in HINTS])
def test_the_hint_names_the_next_step(
    qtool: QtoolRun, bad: Path, request_: str, words: str
) -> None:
    ended = qtool(*request_.format(bad=bad).split())
    hint = ended.err.partition("hint:")[2]
    assert words in hint, ended.err


SERVE: list[tuple[str, int, str]] = [
    ("serve {bad}/nothing", 2, "no model at"),
    ("serve {bad}/truncated", 1, "truncated"),
    ("serve {bad}/short.gguf", 1, "short.gguf"),
    ("serve {bad}/strange", 1, "perceiver-of-worlds"),
    ("serve builtin:books-7m --dtype float8", 2, "float8"),
    ("serve builtin:books-7m --max-model-len -5", 2, "max-model-len"),
    ("server builtin:books-7m", 2, "Did you mean serve?"),
    ("verify {bad}/empty", 1, "qtool.json"),
]


@pytest.mark.parametrize(("request_", "code", "words"), SERVE, ids=[row[0] for row in SERVE])
def test_what_cannot_be_served_is_refused_at_once(
    qtool: QtoolRun, bad: Path, request_: str, code: int, words: str
) -> None:
    ended = qtool(
        *request_.format(bad=bad).split(), *(["--port", "0"] if "serve " in request_ else [])
    )
    assert ended.code == code, ended.err
    assert words in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.parametrize(
    "request_", ["quantize builtin:books-7m --recipe rtn-int4", "eval builtin:books-7m"]
)
def test_a_folder_that_exists_is_kept(qtool: QtoolRun, tmp_path: Path, request_: str) -> None:
    out = tmp_path / "taken"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work", encoding="utf-8")
    ended = qtool(*request_.split(), "--out", out)
    assert ended.code == 2
    assert "--force" in ended.err
    # and --force does not take it for something of ours
    assert qtool(*request_.split(), "--out", out, "--force").code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
    assert (out / "thesis.tex").read_text(encoding="utf-8") == "years of work"


def test_a_gguf_file_that_exists_is_kept(qtool: QtoolRun, tmp_path: Path) -> None:
    out = tmp_path / "taken.gguf"
    out.write_bytes(b"someone's model")
    ended = qtool("convert", "builtin:books-7m", "--to", "gguf", "--out", out)
    assert ended.code == 2
    assert "--force" in ended.err
    assert [path.name for path in tmp_path.iterdir()] == ["taken.gguf"]
    assert out.read_bytes() == b"someone's model"


@pytest.mark.parametrize(
    ("request_", "name"),
    [
        ("quantize builtin:books-7m --recipe rtn-int4", "out"),
        ("convert builtin:books-7m --to gguf", "out.gguf"),
    ],
)
def test_a_full_disk_is_found_before_the_work(
    qtool: QtoolRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request_: str, name: str
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    ended = qtool(*request_.split(), "--out", tmp_path / name)
    assert ended.code == 1
    assert "free" in ended.err
    assert "hint:" in ended.err
    assert list(tmp_path.iterdir()) == []


def test_an_artifact_that_was_changed_does_not_verify(
    qtool: QtoolRun, small_int4: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(small_int4, tmp_path / "copy"))
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    ended = qtool("verify", copy)
    assert ended.code == 1
    assert "model.safetensors has changed" in ended.err


def test_layers_that_no_group_divides_are_named(
    qtool: QtoolRun, stories: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    asked = ("quantize", stories, "--recipe", "rtn-int4", "--group-size", 32, "--out", out)
    ended = qtool(*asked)
    assert ended.code in (1, 2)
    assert "172" in ended.err
    assert "down_proj" in ended.err
    assert "--keep" in ended.err
    assert list(tmp_path.iterdir()) == []
    done = qtool("quantize", stories, "--recipe", "rtn-int4", "--out", out)
    assert done.code == 0, done.err
    assert "down_proj" in done.out + done.err
