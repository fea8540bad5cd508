"""The command's options for GGUF are the fields of one value, which Python takes as it is."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qtool.api import GgufOptions, convert
from qtool.cli import main
from qtool.convert.command import convert as convert_command
from qtool.convert.gguf.container import GgufFile
from qtool.convert.gguf_options import gguf_options, options_for
from qtool.errors import QtoolError, UnknownName, UsageError

TinyCheckpoint = Callable[..., Path]


def test_every_option_of_the_command_is_a_field_and_every_field_an_option() -> None:
    fields = {field.name for field in dataclasses.fields(GgufOptions)}

    def command(**values: object) -> None:
        return None

    options = gguf_options(command).__click_params__  # type: ignore[attr-defined]
    assert {option.name for option in options} == fields
    assert fields < {option.name for option in convert_command.params}
    assert inspect.signature(convert).parameters["gguf"].annotation == "GgufOptions | None"


@pytest.mark.parametrize(
    "given",
    [
        {"calibration": "x.txt"},
        {"num_samples": 128},
        {"sequence_length": 512},
        {"seed": 0},
        {"trust_remote_code": True},
    ],
)
def test_what_only_a_search_uses_is_refused_without_one(given: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=r"--search is plain"):
        GgufOptions(**given)  # type: ignore[arg-type]
    GgufOptions(search="best", **given)  # type: ignore[arg-type]


def test_what_is_no_option_is_refused() -> None:
    with pytest.raises(UnknownName, match="bset"):
        GgufOptions(search="bset")
    with pytest.raises(UsageError, match="--output-tensor-type is for --to gguf, not for --to hf"):
        options_for("hf", {"output_type": "Q8_0"})
    with pytest.raises(UsageError, match="--split-max-size is for --to gguf"):
        options_for("marlin", {"split_max_bytes": "2G"})


def test_python_and_the_command_write_the_same(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    folder = str(tiny_checkpoint("llama", dtype="bfloat16"))
    options = GgufOptions(
        tensor_types=("ffn_up=Q5_K",),
        output_type="Q8_0",
        embedding_type="Q4_0",
        search="best",
        num_samples=3,
        sequence_length=48,
        seed=3,
        split_max_tensors=10,
    )
    ours = convert(folder, to="gguf", type="q3_k_m", out=tmp_path / "a.gguf", gguf=options)
    arguments = ["convert", folder, "--to", "gguf", "--type", "Q3_K_M"]
    arguments += ["--tensor-type", "ffn_up=Q5_K", "--output-tensor-type", "q8_0"]
    arguments += ["--token-embedding-type", "q4_0", "--search", "best", "--num-samples", "3"]
    arguments += ["--sequence-length", "48", "--seed", "3", "--split-max-tensors", "10"]
    main([*arguments, "--out", str(tmp_path / "b.gguf")])
    names = sorted(path.name for path in tmp_path.glob("a-*.gguf"))
    assert ours == tmp_path / names[0]
    assert len(names) == 3
    for name in names:
        other = tmp_path / name.replace("a-", "b-")
        assert (tmp_path / name).read_bytes() == other.read_bytes()


def test_options_for_gguf_do_nothing_elsewhere_and_say_so(tiny_checkpoint: TinyCheckpoint) -> None:
    with pytest.raises(UsageError, match="options for GGUF"):
        convert(str(tiny_checkpoint("llama")), to="hf", gguf=GgufOptions(pure=True))


def test_a_pre_tokenizer_by_name(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    folder = tiny_checkpoint("llama")
    out = tmp_path / "model.gguf"
    main([*f"convert {folder} --to gguf --type Q8_0 --pre mpt --out {out}".split()])
    assert GgufFile.open(out).metadata["tokenizer.ggml.pre"] == "mpt"
    for name, problem in (("qwen2", "--pre"), ("nonsense", "nonsense")):
        with pytest.raises(QtoolError) as error:
            convert(str(folder), to="gguf", out=out, force=True, gguf=GgufOptions(pre=name))
        assert problem in f"{error.value.message} {error.value.hint}"


def test_a_dry_run_lists_every_tensor_and_writes_nothing(
    tiny_checkpoint: TinyCheckpoint,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tiny_checkpoint("llama")
    arguments = ["convert", str(folder), "--to", "gguf", "--type", "Q4_K_M", "--dry-run", "--json"]
    main([*arguments, "--split-max-tensors", "6", "--target-bits", "5"])
    found = json.loads(capsys.readouterr().out)
    assert len(found["tensor_plan"]) == sum(file["tensors"] for file in found["files"]) == 21
    assert len(found["files"]) == 4
    assert found["bytes"] == sum(file["bytes"] for file in found["files"])
    assert found["bits_per_weight"] <= 5
    row = next(row for row in found["tensor_plan"] if row["name"] == "blk.0.ffn_down.weight")
    assert row.keys() >= {"shape", "has", "type", "bytes", "how", "importance", "why", "fallback"}
    assert row["why"] == "5 bits a weight"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_progress_never_shows_hidden_names(books_7m: Path, tmp_path: Path) -> None:
    """On a terminal, where bars are drawn."""
    ours, theirs = pty.openpty()
    arguments = ["convert", str(books_7m), "--to", "gguf", "--type", "Q5_K_M"]
    arguments += ["--out", str(tmp_path / "model.gguf"), "--split-max-size", "2M"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "200"}
    run = subprocess.Popen(
        [sys.executable, "-m", "qtool", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=theirs,
        env=environment,
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            data = os.read(ours, 65536)
        except OSError:  # the terminal's end, on Linux
            break
        if not data:
            break
        shown += data
    os.close(ours)
    assert run.wait() == 0
    assert b"writing model.gguf" in shown
    assert b"checking model.gguf" in shown
    assert b".partial" not in shown
    assert b".model" not in shown
