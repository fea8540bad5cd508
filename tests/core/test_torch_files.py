"""Older `.bin` checkpoints: read as they are, and no pickle in them ever runs."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qtool.checkpoint import Checkpoint
from qtool.errors import FormatError
from qtool.torch_files import read_torch_file

NAMES = ("a", "b", "c")


def saved(path: Path, state: Any, **options: Any) -> Path:
    torch.save(state, path, **options)
    return path


def with_pickle(path: Path, program: bytes) -> Path:
    """An archive like torch's with another data.pkl."""
    buffer = io.BytesIO()
    torch.save({"weight": torch.ones(4)}, buffer)
    with zipfile.ZipFile(buffer) as good, zipfile.ZipFile(path, "w") as bad:
        for entry in good.infolist():
            is_pickle = entry.filename.endswith("/data.pkl")
            bad.writestr(entry.filename, program if is_pickle else good.read(entry))
    return path


def as_bin(folder: Path, out: Path, shards: int = 1) -> Path:
    """A copy of a model folder with its weights in .bin files."""
    out.mkdir()
    (out / "config.json").write_text((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    if shards == 1:
        saved(out / "pytorch_model.bin", tensors)
        return out
    weight_map = {}
    for i in range(shards):
        file = f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin"
        held = {name: tensors[name] for name in names[i::shards]}
        saved(out / file, held)
        weight_map |= dict.fromkeys(held, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (out / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return out


@pytest.mark.parametrize("shards", [1, 3])
def test_a_checkpoint_of_bin_files_is_the_same_model(
    shards: int, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_checkpoint("llama", dtype="bfloat16")
    plain = Checkpoint.open(folder)
    old = Checkpoint.open(as_bin(folder, tmp_path / "old", shards))
    assert old.tensors.keys() == plain.tensors.keys()
    for name, info in plain.tensors.items():
        found = old.tensors[name]
        assert (found.dtype, found.shape, found.nbytes) == (info.dtype, info.shape, info.nbytes)
        assert torch.equal(old.tensor(name), plain.tensor(name))
    assert old.nbytes == plain.nbytes


def test_safetensors_are_preferred_where_both_are_there(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = as_bin(tiny_checkpoint("llama", dtype="bfloat16"), tmp_path / "both")
    source = tiny_checkpoint("llama", dtype="bfloat16") / "model.safetensors"
    (folder / "model.safetensors").write_bytes(source.read_bytes())
    files = {info.file.suffix for info in Checkpoint.open(folder).tensors.values()}
    assert files == {".safetensors"}


def test_tied_transposed_and_parameter_tensors_keep_their_values(tmp_path: Path) -> None:
    matrix = torch.arange(12.0).view(3, 4)
    state = OrderedDict(a=matrix, b=matrix, t=matrix.t(), p=torch.nn.Parameter(matrix[1:]))
    state._metadata = OrderedDict(version=1)  # type: ignore[attr-defined]
    read = read_torch_file(saved(tmp_path / "m.bin", state))
    assert all(torch.equal(read[name], state[name]) for name in state)
    assert not read["p"].requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8, torch.bool,
                                   torch.float8_e4m3fn, torch.float64])  # fmt: skip
def test_every_number_type_is_read(dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = torch.tensor([0.0, 1.0, 1.0]).to(dtype)
    (read,) = read_torch_file(saved(tmp_path / "m.bin", {"x": tensor})).values()
    assert torch.equal(read.view(torch.uint8), tensor.view(torch.uint8))


class Runs:
    """Unpickled, it would call something."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


@pytest.mark.parametrize(
    ("function", "arguments", "named"),
    [
        (os.system, ("touch {marker}",), "posix.system"),
        (eval, ("open('{marker}', 'w')",), "eval"),
        (exec, ("open('{marker}', 'w')",), "exec"),
        (bytearray, (2**40,), "bytearray"),
        (torch.load, ("{marker}",), "torch.serialization.load"),
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_malicious_pickle_is_named_and_never_run(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    named: str,
    protocol: int,
    tmp_path: Path,
) -> None:
    marker = tmp_path / "was-run"
    filled = [a.format(marker=marker) if isinstance(a, str) else a for a in arguments]
    state = {"weight": Runs(function, *filled)}
    path = with_pickle(tmp_path / "bad.bin", pickle.dumps(state, protocol=protocol))
    message = "STACK_GLOBAL" if protocol == 4 else named
    with pytest.raises(FormatError, match=message):
        read_torch_file(path)
    assert not marker.exists()
    # The file would have done it: Python's own unpickler runs it.
    if "{marker}" in str(arguments) and function is not torch.load and protocol == 2:
        with zipfile.ZipFile(path) as archive:
            pickle.loads(archive.read("archive/data.pkl"))
        assert marker.exists()


def test_a_bare_pickle_is_refused_and_never_run(tmp_path: Path) -> None:
    marker = tmp_path / "was-run"
    path = tmp_path / "bare.bin"
    path.write_bytes(pickle.dumps(Runs(os.system, f"touch {marker}")))
    with pytest.raises(FormatError, match=r"bare\.bin is no archive of torch\.save"):
        read_torch_file(path)
    assert not marker.exists()


def test_files_of_before_the_archive_format_are_refused_with_a_way_out(tmp_path: Path) -> None:
    path = saved(tmp_path / "old.bin", {"x": torch.ones(2)}, _use_new_zipfile_serialization=False)
    with pytest.raises(FormatError, match=r"no archive of torch\.save") as caught:
        read_torch_file(path)
    assert "safetensors" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ([torch.ones(2)], "holds a list, not a table"),
        ({"a": 3}, "'a' is a int, not a tensor"),
        ({7: torch.ones(2)}, "not a tensor under a name"),
        ({"a": torch.ones(1).expand(2**40)}, r"'a' of shape \[1099511627776\] is larger"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "ComplexFloatStorage"),
        ({"a": torch.ones(2, 2).to_sparse()}, "_rebuild_sparse_tensor"),
    ],
)
def test_what_is_no_table_of_plain_tensors_is_refused(
    state: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(FormatError, match=message):
        read_torch_file(saved(tmp_path / "m.bin", state))


def test_a_compressed_or_truncated_archive_is_refused(tmp_path: Path) -> None:
    good = saved(tmp_path / "good.bin", {"x": torch.zeros(1000)})
    packed = tmp_path / "packed.bin"
    with zipfile.ZipFile(good) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as out:
        for entry in source.infolist():
            out.writestr(entry.filename, source.read(entry))
    with pytest.raises(FormatError, match="is compressed or damaged"):
        read_torch_file(packed)
    # A central directory that counts more bytes of data.pkl than there are to read.
    data = bytearray(good.read_bytes())
    entry = data.rindex(b"PK\x01\x02", 0, data.rindex(b"data.pkl"))
    more = len(data).to_bytes(4, "little")
    data[entry + 20 : entry + 28] = more + more
    (tmp_path / "longer.bin").write_bytes(data)
    with pytest.raises(FormatError, match=r"longer\.bin"):
        read_torch_file(tmp_path / "longer.bin")
    data = good.read_bytes()
    for length in (0, 10, len(data) // 2, len(data) - 1):
        (tmp_path / "cut.bin").write_bytes(data[:length])
        with pytest.raises(FormatError, match=r"cut\.bin"):
            read_torch_file(tmp_path / "cut.bin")


def test_an_index_names_bin_files_of_its_own_folder_only(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = as_bin(tiny_checkpoint("llama", dtype="bfloat16"), tmp_path / "m", shards=2)
    for name, message in (
        ("../x.bin", "outside the model's folder"),
        ("x.safetensors", "no .bin file"),
        ("x.bin", "is missing"),
    ):
        index = {"weight_map": {"a": name}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        with pytest.raises(FormatError, match=message):
            Checkpoint.open(folder)
