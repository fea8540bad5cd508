"""`qtool verify FILE.gguf`: whole files pass, and each kind of damage is told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from qtool.cli import main
from qtool.convert.gguf.container import GgufFile
from qtool.convert.gguf.options import GgufOptions
from qtool.convert.gguf.verification import VerifiedGguf, verify_gguf
from qtool.convert.run import convert_model
from qtool.errors import FormatError, VerificationFailed

NAN = b"\x00\x7e"  # a float16


@pytest.fixture(scope="module")
def whole(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gguf") / "tiny-Q4_0.gguf"
    convert_model(str(tiny_checkpoint("llama")), to="gguf", type="Q4_0", out=out)
    return out


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return shutil.copy(whole, tmp_path / whole.name)


def spoil(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


def test_a_whole_file_is_sound(whole: Path) -> None:
    assert verify_gguf(whole) == VerifiedGguf(1, len(GgufFile.open(whole).tensors), 0)


def test_a_scale_that_is_no_number_is_found_in_the_tensor_that_has_it(copy: Path) -> None:
    packed = [e for e in GgufFile.open(copy).tensors.values() if e.type.name == "Q4_0"]
    spoil(copy, packed[3].offset + packed[3].nbytes - packed[3].type.block_bytes, NAN)
    with pytest.raises(VerificationFailed, match=f"not finite: {packed[3].name}$"):
        verify_gguf(copy)


def test_a_file_that_was_cut_short_is_refused(copy: Path) -> None:
    with copy.open("r+b") as file:
        file.truncate(copy.stat().st_size - 64)
    with pytest.raises(FormatError, match="truncated: tensor"):
        verify_gguf(copy)


def test_all_parts_are_looked_at(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "tiny.gguf"
    convert_model(
        str(tiny_checkpoint("llama")),
        to="gguf",
        type="F16",
        out=out,
        gguf=GgufOptions(split_max_tensors=8),
    )
    parts = sorted(tmp_path.glob("tiny-*.gguf"))
    found = verify_gguf(parts[0])
    assert found.num_files == len(parts) > 1
    last = list(GgufFile.open(parts[-1]).tensors.values())[-1]
    spoil(parts[-1], last.offset, NAN * 2)
    with pytest.raises(VerificationFailed, match=f"not finite: {last.name}"):
        verify_gguf(parts[0])
    parts[-1].unlink()
    with pytest.raises(FormatError, match="is not beside it"):
        verify_gguf(parts[0])


Says = Callable[[Sequence[str]], tuple[int, str, str]]


@pytest.fixture
def says(capsys: pytest.CaptureFixture[str]) -> Says:
    def run(words: Sequence[str]) -> tuple[int, str, str]:
        code = 0
        try:
            main(list(words))
        except SystemExit as ended:
            code = int(ended.code or 0)
        return code, *capsys.readouterr()

    return run


def test_the_command_says_what_it_checked(whole: Path, says: Says) -> None:
    num_tensors = len(GgufFile.open(whole).tensors)
    code, out, _ = says(["verify", str(whole)])
    assert code == 0
    assert f"{num_tensors} tensors are finite; GGUF has no checksums" in out
    code, out, _ = says(["verify", str(whole), "--json"])
    assert json.loads(out) == {
        "ok": True,
        "format": "gguf",
        "files": 1,
        "tensors": num_tensors,
        "unread": 0,
    }


def test_what_is_no_artifact_is_told_from_one(tmp_path: Path, says: Says) -> None:
    code, _, err = says(["verify", str(tmp_path / "nothing")])
    assert code == 2
    assert "there is no" in err
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"")
    code, _, err = says(["verify", str(weights)])
    assert code == 2
    assert f"qtool verify {tmp_path}" in err
