"""Exports in several files: cut, numbered and read as llama.cpp's own."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from qtool.cli import main
from qtool.convert.formats import open_weights
from qtool.convert.gguf.container import GgufFile, KeyValue
from qtool.convert.gguf.export import write_gguf
from qtool.convert.gguf.options import GgufOptions, parse_size
from qtool.convert.gguf.parts import open_parts
from qtool.convert.gguf.plan import plan_export
from qtool.convert.gguf.split import SplitLimits, split_layouts
from qtool.convert.gguf.types import TENSOR_TYPES, ValueType
from qtool.convert.gguf.writer import TensorInfo
from qtool.convert.run import convert_model
from qtool.errors import OutputExists, UsageError
from qtool.runtime.evaluate.sizes import measure, weight_hashes
from qtool.source import Source, resolve

TinyCheckpoint = Callable[..., Path]
NAME = KeyValue("general.name", "x", ValueType.STRING)


def infos(*nbytes: int) -> list[TensorInfo]:
    return [TensorInfo(f"t{i}", (n // 4,), TENSOR_TYPES["F32"]) for i, n in enumerate(nbytes)]


def cut(nbytes: Sequence[int], limits: SplitLimits) -> list[list[str]]:
    layouts = split_layouts([NAME], infos(*nbytes), limits)
    return [[info.name for info in layout.tensors] for layout in layouts]


@pytest.mark.parametrize(
    ("nbytes", "limits", "expected"),
    [
        # sizes count with their padding: 36 bytes are 64
        ((32, 36, 32), SplitLimits(max_bytes=128), [["t0", "t1", "t2"]]),
        ((32, 36, 32), SplitLimits(max_bytes=127), [["t0", "t1"], ["t2"]]),
        ((32, 36, 32), SplitLimits(max_bytes=95), [["t0"], ["t1"], ["t2"]]),
        # larger than a file may be: alone
        ((320, 32, 320, 32), SplitLimits(max_bytes=64), [["t0"], ["t1"], ["t2"], ["t3"]]),
        ((32,) * 5, SplitLimits(max_tensors=2), [["t0", "t1"], ["t2", "t3"], ["t4"]]),
        ((32,) * 4, SplitLimits(max_tensors=2), [["t0", "t1"], ["t2", "t3"]]),
        ((32, 32), SplitLimits(max_tensors=1, metadata_first=True), [[], ["t0"], ["t1"]]),
    ],
)
def test_files_end_where_gguf_split_ends_them(
    nbytes: tuple[int, ...], limits: SplitLimits, expected: list[list[str]]
) -> None:
    assert cut(nbytes, limits) == expected


def test_keys_are_gguf_splits(tmp_path: Path) -> None:
    stale = KeyValue("split.count", 7, ValueType.UINT16)  # of a source in parts
    first, second = split_layouts([NAME, stale], infos(32, 32), SplitLimits(max_tensors=1))
    keys = []
    for number, layout in enumerate((first, second)):
        path = tmp_path / f"{number}.gguf"
        path.write_bytes(layout.header + bytes(layout.nbytes - len(layout.header)))
        keys.append([(e.key, e.value, e.type) for e in GgufFile.open(path).entries])
    split = [
        [
            ("split.no", number, ValueType.UINT16),
            ("split.tensors.count", 2, ValueType.INT32),
            ("split.count", 2, ValueType.UINT16),
        ]
        for number in (0, 1)
    ]
    assert keys == [[("general.name", "x", ValueType.STRING), *split[0]], split[1]]


def test_a_model_that_fits_one_file_is_one_plain_file() -> None:
    (layout,) = split_layouts([NAME], infos(32, 32), SplitLimits(max_bytes=1000))
    assert b"split." not in layout.header


def test_too_many_files_are_refused() -> None:
    with pytest.raises(UsageError, match="70,000 files"):
        split_layouts([NAME], infos(*[32] * 70_000), SplitLimits(max_tensors=1))


@pytest.mark.parametrize("text", ["2", "2.5G", "0M", "-1G", "2GB", "", "G"])
def test_sizes_are_whole_megabytes_or_gigabytes(text: str) -> None:
    assert (parse_size("500M"), parse_size("2G")) == (500_000_000, 2_000_000_000)
    with pytest.raises(UsageError, match="no size"):
        parse_size(text)


@pytest.mark.parametrize("metadata_first", [False, True])
def test_the_parts_are_the_whole(
    metadata_first: bool, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    folder = tiny_checkpoint("llama", dtype="bfloat16")
    whole = convert_model(str(folder), to="gguf", type="Q4_K_M", out=tmp_path / "whole.gguf")
    options = GgufOptions(split_max_bytes=1_000_000, no_tensor_first_split=metadata_first)
    first = convert_model(
        str(folder), to="gguf", type="Q4_K_M", out=tmp_path / "model.gguf", gguf=options
    )
    count = len(list(tmp_path.glob("model-*.gguf")))
    assert count > 2
    assert first.name == f"model-00001-of-{count:05}.gguf"
    parts, one = open_parts(first), GgufFile.open(whole)
    assert parts.entries == one.entries
    assert list(parts.tensors) == list(one.tensors)
    for name in one.tensors:
        assert parts.data(name).equal(one.data(name)), name
    assert bool(GgufFile.open(first).tensors) != metadata_first
    for path in parts.paths[1:]:
        assert [entry.key for entry in GgufFile.open(path).entries] == [
            "split.no",
            "split.tensors.count",
            "split.count",
        ]
    # and back into one file, with the bytes of the whole
    again = tmp_path / "again.gguf"
    write_gguf(plan_export(open_weights(resolve(str(first))), "Q4_K_M"), again)
    assert again.read_bytes() == whole.read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_sizes_count_every_part(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_checkpoint("llama", dtype="bfloat16")
    arguments = ["convert", str(folder), "--to", "gguf", "--type", "Q8_0", "--json"]
    main([*arguments, "--out", str(tmp_path / "one.gguf")])
    whole = json.loads(capsys.readouterr().out)
    main([*arguments, "--out", str(tmp_path / "m.gguf"), "--split-max-tensors", "8"])
    done = json.loads(capsys.readouterr().out)
    paths = sorted(tmp_path.glob("m-*.gguf"))
    total = sum(path.stat().st_size for path in paths)
    assert [file["name"] for file in done["files"]] == [path.name for path in paths]
    assert [file["bytes"] for file in done["files"]] == [path.stat().st_size for path in paths]
    assert done["bytes"] == total
    assert done["out"] == str(paths[0])
    size = measure(open_weights(Source("m", paths[0])))
    one = measure(open_weights(Source("one", tmp_path / "one.gguf")))
    assert size.file_bytes == total > one.file_bytes
    assert size[1:] == one[1:]
    assert list(weight_hashes(Source("m", paths[0]))) == [path.name for path in paths]

    main(["inspect", str(paths[0]), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["file_bytes"] == total
    assert len(found["tensors"]) == sum(file["tensors"] for file in whole["files"])
    assert found["bits_per_weight"] == pytest.approx(one.bits_per_weight)
    main(["inspect", str(paths[1])])
    assert f"part 2 of {len(paths)}" in capsys.readouterr().out
    paths[-1].unlink()
    main(["inspect", str(paths[0])])
    assert f"{paths[-1].name} is not beside it" in capsys.readouterr().out


def test_bad_requests_are_refused_before_the_plan_is_printed(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(tiny_checkpoint("llama"))

    def refused(*options: str) -> str:
        with pytest.raises(SystemExit) as exit_:
            main(["convert", folder, "--to", "gguf", "--type", "Q8_0", *options])
        assert exit_.value.code == 2
        error = capsys.readouterr().err
        assert "about" not in error  # no table of the plan
        return error

    size, tensors = ("--split-max-size", "1M"), ("--split-max-tensors", "9")
    assert "exclude each other" in refused(*size, *tensors)
    assert "no size" in refused("--split-max-size", "1 MB")
    assert "not positive" in refused("--split-max-tensors", "0")
    assert "several files" in refused("--no-tensor-first-split")
    assert "does not end in .gguf" in refused("--out", str(tmp_path / "model"))
    assert "is a folder" in refused("--out", str(tmp_path / "folder.gguf"), *make(tmp_path))
    taken = tmp_path / "m-00002-of-00003.gguf"
    taken.write_text("mine")
    assert "already exists" in refused("--out", str(tmp_path / "m.gguf"), *tensors)
    assert taken.read_text() == "mine"
    with pytest.raises(OutputExists):
        convert_model(
            folder,
            to="gguf",
            type="Q8_0",
            out=tmp_path / "m.gguf",
            gguf=GgufOptions(split_max_tensors=9),
        )


def make(folder: Path) -> list[str]:
    (folder / "folder.gguf").mkdir()
    return []
