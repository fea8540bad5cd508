import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qtool.checkpoint import Checkpoint, read_safetensors_header
from qtool.errors import FormatError, OutputExists, QtoolError, UsageError
from qtool.output import OutputFolder, copy_side_files, require_disk_space
from qtool.shards import ShardWriter
from qtool.source import resolve


def model_folder(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    path.mkdir()
    (path / "config.json").write_text("{}")
    save_file(tensors, str(path / "model.safetensors"))
    return path


def test_the_bundled_model_opens_and_reads(books_7m: Path) -> None:
    checkpoint = Checkpoint.open(resolve("builtin:books-7m").path)
    info = checkpoint.tensors["model.embed_tokens.weight"]
    assert info.shape == (4096, 256)
    assert info.dtype == torch.bfloat16
    assert checkpoint.tensor(info.name).shape == info.shape
    assert checkpoint.folder == books_7m


def test_shards_stream_and_read_back(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((100,), float(i)) for i in range(7)}
    (tmp_path / "config.json").write_text("{}")
    writer = ShardWriter(tmp_path, max_shard_bytes=1000)
    writer.add_all(tensors.items())
    writer.finish()
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert names == [f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)]
    checkpoint = Checkpoint.open(tmp_path)
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.tensor(name), tensor)


def test_every_dtype_and_shape_reads_back_aligned(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    tensors = {
        "odd bytes": torch.arange(3, dtype=torch.uint8),
        "halves": torch.randn(5, dtype=torch.bfloat16),
        "a number": torch.tensor(7, dtype=torch.int64),
        "words": torch.arange(6, dtype=torch.int32).reshape(2, 3),
        "floats": torch.randn(4, 3).t(),
        "empty": torch.zeros(0, 4),
        "eight": torch.randn(3).to(torch.float8_e4m3fn),
    }
    writer = ShardWriter(tmp_path)
    writer.add_all(tensors.items())
    writer.finish()
    checkpoint = Checkpoint.open(tmp_path)
    theirs = load_file(str(tmp_path / "model.safetensors"))
    for name, tensor in tensors.items():
        for read in (checkpoint.tensor(name), theirs[name]):
            assert read.dtype == tensor.dtype
            assert read.shape == tensor.shape
            assert torch.equal(read.double(), tensor.double())


def test_one_shard_has_the_plain_name(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path)
    writer.add("t", torch.zeros(3))
    writer.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_an_output_appears_only_when_complete(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with OutputFolder(out) as stage:
        (stage.path / "config.json").write_text("{}")
        assert not out.exists()
    assert (out / "config.json").read_text() == "{}"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail() -> None:
        with OutputFolder(tmp_path / "out") as stage:
            (stage.path / "half").write_text("x")
            raise QtoolError("stop")

    with pytest.raises(QtoolError, match="stop"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_resumable_work_keeps_its_stage(tmp_path: Path) -> None:
    def fail() -> None:
        with OutputFolder(tmp_path / "out", resumable=True) as stage:
            (stage.path / "half").write_text("x")
            raise QtoolError("stop")

    with pytest.raises(QtoolError, match="stop"):
        fail()
    with OutputFolder(tmp_path / "out", resumable=True) as stage:
        assert (stage.path / "half").read_text() == "x"
    assert (tmp_path / "out" / "half").exists()


def test_an_existing_output_is_refused_unless_forced(tmp_path: Path) -> None:
    out = model_folder(tmp_path / "out", {"t": torch.zeros(1)})
    with pytest.raises(OutputExists) as error:
        OutputFolder(out)
    assert error.value.exit_code == 2
    with OutputFolder(out, force=True) as stage:
        (stage.path / "new").write_text("x")
    assert [path.name for path in out.iterdir()] == ["new"]


def test_force_does_not_replace_a_folder_that_is_no_model(tmp_path: Path) -> None:
    precious = tmp_path / "home"
    precious.mkdir()
    (precious / "thesis.txt").write_text("x")
    with pytest.raises(UsageError, match="not a model folder"):
        OutputFolder(precious, force=True)
    assert (precious / "thesis.txt").exists()


def test_a_full_disk_is_seen_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(QtoolError, match="needs 1,000 TB"):
        require_disk_space(tmp_path, 10**15)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "no model at"),
        ("nowhere", "no model at"),
        ("a/b/c", "no model at"),
        ("builtin:books-7n", "unknown builtin model"),
    ],
)
def test_a_model_that_is_not_there_is_misuse(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve(name)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no config\.json"):
        resolve(str(tmp_path))


def hub_cache(root: Path, repo: str, source: Path) -> str:
    """Lay out a Hub cache by hand: refs/main names the commit, snapshots hold links to blobs."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = root / "hub" / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (folder / "blobs").mkdir()
    for file in source.iterdir():
        blob = folder / "blobs" / file.name
        shutil.copyfile(file, blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    return commit


def test_a_hub_id_is_found_in_the_local_cache_when_offline(books_7m: Path, tmp_path: Path) -> None:
    import subprocess
    import sys

    from qtool.settings import child_environment

    commit = hub_cache(tmp_path, "someone/books", books_7m)
    code = (
        "from qtool.checkpoint import Checkpoint\n"
        "from qtool.source import resolve\n"
        "s = resolve('someone/books')\n"
        "print(s.revision, s.short_name, len(Checkpoint.open(s.path).tensors))\n"
        "try:\n    resolve('someone/else')\n"
        "except Exception as e:\n    print(type(e).__name__, e, '|', e.hint)\n"
    )
    environment = child_environment(HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    found, missing = run.stdout.splitlines()
    assert found == f"{commit} books 74"
    assert "someone/else is not in the local Hub cache and HF_HUB_OFFLINE is set" in missing
    assert "unset HF_HUB_OFFLINE" in missing


def test_side_files_are_copied_and_weights_are_not(books_7m: Path, tmp_path: Path) -> None:
    names = copy_side_files(books_7m, tmp_path)
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= set(names)
    assert not (tmp_path / "config.json").exists()
    assert not list(tmp_path.glob("*.safetensors"))


def raw_safetensors(header: Any, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape: Any, begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HOSTILE = {
    "empty file": (b"", "too short"),
    "header longer than the file": (struct.pack("<Q", 10**9) + b"{}", "claims 1000000000 bytes"),
    "header length of 2**64-1": (b"\xff" * 8, "claims"),
    "header that is not JSON": (struct.pack("<Q", 4) + b"\xff\xfe{}", "not JSON"),
    "deeply nested header": (struct.pack("<Q", 50000) + b"[" * 50000, "not JSON"),
    "header that is a list": (raw_safetensors([]), "not a JSON object"),
    "truncated data": (raw_safetensors({"a": entry([2], 0, 8)}, b"1234"), "tensors need 8 bytes"),
    "trailing data": (raw_safetensors({"a": entry([1], 0, 4)}, b"12345"), "holds 5"),
    "overlap": (
        raw_safetensors({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, b"x" * 12),
        "'b' at offset 4 overlaps",
    ),
    "a name twice": (
        raw_safetensors({"a": entry([1], 0, 4), "b": entry([1], 4, 8)}, b"x" * 8).replace(
            b'"b"', b'"a"'
        ),
        "the key 'a' twice",
    ),
    "gap": (raw_safetensors({"a": entry([1], 4, 8)}, b"x" * 8), "'a' at offset 4 leaves a gap"),
    "size that disagrees": (raw_safetensors({"a": entry([3], 0, 8)}, b"x" * 8), "takes 12 bytes"),
    "negative shape": (raw_safetensors({"a": entry([-1], 0, 4)}, b"1234"), "has shape"),
    "float shape": (raw_safetensors({"a": entry([1.0], 0, 4)}, b"1234"), "has shape"),
    "huge shape": (raw_safetensors({"a": entry([2**62, 8], 0, 4)}, b"1234"), "takes"),
    "unknown dtype": (raw_safetensors({"a": entry([1], 0, 4, "F4")}, b"1234"), "dtype 'F4'"),
    "entry that is no object": (raw_safetensors({"a": 3}), "not described by an object"),
    "one offset": (
        raw_safetensors({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, b"1234"),
        "offsets",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_header_is_refused_by_name(case: str, tmp_path: Path) -> None:
    data, message = HOSTILE[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(FormatError, match=message) as error:
        read_safetensors_header(path)
    assert "model.safetensors" in error.value.message


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_mutated_file_opens_or_is_refused(data: st.DataObject, tmp_path: Path) -> None:
    original = raw_safetensors(
        {"a": entry([2, 2], 0, 16), "b": entry([3], 16, 22, "BF16")}, b"x" * 22
    )
    mutated = bytearray(original)
    for _ in range(data.draw(st.integers(1, 6))):
        mutated[data.draw(st.integers(0, len(mutated) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(mutated[: data.draw(st.integers(0, len(mutated)))]))
    (tmp_path / "config.json").write_text("{}")
    try:
        checkpoint = Checkpoint.open(tmp_path)
        for name in checkpoint.tensors:
            assert checkpoint.tensor(name).shape == checkpoint.tensors[name].shape
    except FormatError:
        pass


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"t": "../../etc/passwd"}}, "outside the model's folder"),
        ({"weight_map": {"t": "gone.safetensors"}}, "which is missing"),
        ({"weight_map": ["t"]}, "no weight_map"),
        ({}, "no weight_map"),
    ],
)
def test_a_bad_index_is_refused(index: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FormatError, match=message):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", "\x00"])
def test_a_bad_config_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(FormatError, match=r"config\.json"):
        Checkpoint.open(tmp_path)
