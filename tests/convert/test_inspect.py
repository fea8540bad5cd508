"""`qtool inspect`: what it says of folders and files, of any family, whole or broken."""

from __future__ import annotations

import json
import math
import os
import pty
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qtool.checkpoint import Checkpoint
from qtool.cli import main
from qtool.convert.inspect_command import shown
from qtool.convert.inspection import inspect_path
from qtool.convert.run import convert_model
from qtool.errors import FormatError
from qtool.json_files import read_json, write_json

Make = Callable[..., Path]


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    main(["inspect", *arguments])
    return capsys.readouterr().out


def facts(capsys: pytest.CaptureFixture[str], path: Path | str) -> dict[str, Any]:
    found = json.loads(said(capsys, str(path), "--json"))
    assert isinstance(found, dict)
    return found


def test_a_plain_model_is_described_whole(capsys: pytest.CaptureFixture[str]) -> None:
    found = facts(capsys, "builtin:books-7m")
    assert (found["format"], found["architecture"]) == ("dense", "LlamaForCausalLM (llama)")
    assert found["sizes"] == {
        "blocks": 8, "hidden": 256, "heads": 4, "kv heads": 2, "head dim": 64, "ffn": 768,
        "vocabulary": 4096, "context": 512, "rope theta": 10000.0,
    }  # fmt: skip
    assert found["bits_per_weight"] == 16
    assert found["num_weights"] == sum(math.prod(t["shape"]) for t in found["tensors"])
    assert found["tokenizer"] == {"kind": "BPE", "tokens": 4096, "bos": "<|endoftext|>",
                                  "eos": "<|endoftext|>", "chat template": False}  # fmt: skip
    assert found["metadata"]["hidden_size"] == 256
    text = said(capsys, "builtin:books-7m")
    assert "books-7m: dense, LlamaForCausalLM (llama)" in text
    assert "7.34 M in 74 tensors, 14.7 MB, 16.00 bits a weight" in text
    assert "layers.0" not in text
    assert "model.layers.7.mlp.up_proj.weight" in said(capsys, "builtin:books-7m", "--tensors")


@pytest.mark.parametrize(
    ("name", "scheme", "bits"),
    [
        ("compressed-tensors", "int4-g128-sym", 4 + 16 / 128),
        ("gptq", "int4-g64-sym", 4 + 20 / 64),
        ("awq", "int4-g128-asym", 4 + 20 / 128),
        ("marlin", "int8-row-sym", 8 + 16 / 256),
    ],
)
def test_bits_are_those_of_all_that_a_linear_takes(
    name: str, scheme: str, bits: float, packed_checkpoint: Make
) -> None:
    found = inspect_path(packed_checkpoint(name, scheme, intermediate_size=256))
    assert found.format == name
    kinds = dict(found.by_kind())
    packed = kinds[scheme]
    assert len(packed) == 14
    stored = 8 * sum(row.nbytes for row in packed) / sum(row.num_weights for row in packed)
    assert bits <= stored < bits + 0.2  # shapes, g_idx
    assert all(row.bits == 16 for row in kinds["bfloat16"])


@pytest.mark.parametrize(("kind", "word"), [("nf4", "nf4-g64"), ("fp8-block", "fp8-128x128")])
def test_every_byte_of_a_folder_is_accounted_for(
    kind: str, word: str, foreign_checkpoint: Make
) -> None:
    folder = foreign_checkpoint(kind)
    found = inspect_path(folder)
    assert word in dict(found.by_kind())
    assert found.tensor_bytes == Checkpoint.open(folder).nbytes


def test_a_gguf_file_is_described_with_its_metadata(
    books_7m: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "books.gguf"
    convert_model(str(books_7m), to="gguf", type="Q8_0", out=path)
    found = facts(capsys, path)
    assert (found["format"], found["architecture"]) == ("gguf v3, Q8_0", "llama")
    assert found["sizes"]["blocks"] == 8
    assert found["sizes"]["vocabulary"] == 4096
    assert found["file_bytes"] == path.stat().st_size
    assert 8.5 <= found["bits_per_weight"] < 8.6
    assert found["tokenizer"]["kind"] == "gpt2"
    assert found["tokenizer"]["tokens"] == 4096
    tokens = found["metadata"]["tokenizer.ggml.tokens"]
    assert (tokens["array_of"], tokens["length"]) == ("string", 4096)
    text = said(capsys, str(path), "--tensors")
    assert "blk.0.attn_q.weight" in text
    assert "4,096 string: " in text


def test_an_artifact_tells_what_it_was_made_from(
    packed_checkpoint: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = packed_checkpoint("compressed-tensors", "int4-g64-sym")
    out = convert_model(str(source), to="marlin", out=tmp_path / "marlin")
    found = facts(capsys, out)
    assert found["origin"]["source"] == str(source)
    assert f"made by     source {source}" in said(capsys, str(out))


def test_a_packing_that_is_not_read_is_still_described(
    packed_checkpoint: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = packed_checkpoint("gptq", "int4-g64-sym")
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = read_json(tmp_path / "config.json")
    config["quantization_config"]["quant_method"] = "hqq"
    write_json(tmp_path / "config.json", config)
    found = facts(capsys, tmp_path)
    assert found["format"] == "hqq"
    assert "'hqq' is not read" in found["notes"][0]
    assert any(tensor["name"].endswith("q_proj.qweight") for tensor in found["tensors"])


def test_one_shard_is_described_by_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model-00001-of-00002.safetensors"
    save_file({"a.weight": torch.zeros(3, 4, dtype=torch.float16)}, path)
    found = facts(capsys, path)
    assert found["tensors"] == [
        {"name": "a.weight", "shape": [3, 4], "kind": "float16", "bytes": 24}
    ]
    assert "without a config.json" in found["notes"][0]


def test_what_a_terminal_would_act_on_is_made_visible(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shown("a\x1b[31m\nb\udc80é") == r"a\x1b[31m\nb\udc80é"
    save_file({"\x1b]0;title\x07": torch.zeros(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "\x1b[2J", "x": math.inf}))
    text = said(capsys, str(tmp_path), "--tensors")
    assert "\x1b" not in text
    assert r"\x1b[2J" in text
    assert facts(capsys, tmp_path)["metadata"]["x"] == "inf"


def test_a_screen_gets_lines_of_its_width_and_a_pipe_gets_them_whole(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    leader, follower = pty.openpty()
    monkeypatch.setenv("COLUMNS", "60")
    seen = b""
    with os.fdopen(follower, "w") as screen:
        monkeypatch.setattr("sys.stdout", screen)
        main(["inspect", "builtin:books-7m"])
        print("\x04", end="", file=screen, flush=True)
        while not seen.endswith(b"\x04"):  # a terminal hands on what it has, a part at a time
            seen += os.read(leader, 1 << 16)
    os.close(leader)
    lines = seen[:-1].decode().splitlines()
    assert max(map(len, lines)) == 60
    assert any(line.endswith("…") for line in lines)


def test_what_is_no_model_is_said_with_a_next_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.gguf").write_text("not a model")
    with pytest.raises(FormatError, match="not a GGUF file"):
        inspect_path(tmp_path / "notes.gguf")
    with pytest.raises(FormatError, match="nothing at"):
        inspect_path(tmp_path / "absent")
    with pytest.raises(SystemExit) as stopped:
        main(["inspect", str(tmp_path / "absent")])
    assert stopped.value.code == 2
    assert "hint: " in capsys.readouterr().err


def test_a_vocabulary_alone_is_described(shared_data: Path) -> None:
    found = inspect_path(shared_data / "tokenizers" / "gguf-vocab" / "ggml-vocab-gpt-2.gguf")
    assert (found.architecture, found.tensors) == ("gpt2", ())
    assert found.tokenizer["tokens"] == 50257
    assert found.notes == ("it holds no weights",)
