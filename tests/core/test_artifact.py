import json
from pathlib import Path

import pytest

from qtool.artifact import LayerReport, Manifest, verify_checksums, write_manifest
from qtool.errors import FormatError, VerificationFailed


def artifact(folder: Path) -> Manifest:
    (folder / "a.bin").write_bytes(b"abc")
    layer = LayerReport("m.q", "int4-g128-sym", "gptq", error=0.1, rtn_error=0.2, notes=("x",))
    return write_manifest(
        folder, Manifest(format="gptq", source="s", layers=(layer,), unquantized={"m.k": "172"})
    )


def test_a_manifest_reads_back_as_written(tmp_path: Path) -> None:
    written = artifact(tmp_path)
    assert Manifest.load(tmp_path) == written


def test_checksums_are_sha256(tmp_path: Path) -> None:
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert artifact(tmp_path).files == {"a.bin": digest}
    assert verify_checksums(tmp_path).format == "gptq"


def test_every_changed_or_missing_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "b.bin").write_bytes(b"b")
    artifact(tmp_path)
    (tmp_path / "a.bin").write_bytes(b"abd")
    (tmp_path / "b.bin").unlink()
    with pytest.raises(VerificationFailed, match=r"a\.bin has changed; b\.bin is missing"):
        verify_checksums(tmp_path)


@pytest.mark.parametrize(
    "text", ["{}", '{"qtool": 2}', '{"qtool": 1, "surprise": 3}', '{"qtool": 1, "layers": [3]}']
)
def test_a_malformed_manifest_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "qtool.json").write_text(text)
    with pytest.raises(FormatError, match=r"qtool\.json"):
        Manifest.load(tmp_path)


def test_the_file_names_its_version(tmp_path: Path) -> None:
    artifact(tmp_path)
    assert json.loads((tmp_path / "qtool.json").read_text())["qtool"] == 1
