"""``qtool.json``: what an artifact is, where it came from, what was lost, and a checksum of every
file.

An artifact is a model folder that Hugging Face loaders read as it is; this file stands beside the
weights. Nothing about an artifact is ever inferred from its name.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from qtool import __version__
from qtool.errors import FormatError, VerificationFailed
from qtool.json_files import read_json, write_json

MANIFEST_NAME = "qtool.json"
CARD_NAME = "README.md"
MANIFEST_VERSION = 1


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One linear. Errors are relative: tr(dW H dWᵀ) / tr(W H Wᵀ), H the second moment of the
    layer's inputs (the identity where no data was used); ``rtn_error`` is that of plain rounding
    at the same scheme. Where the weight was aimed at the original model's activations, both are
    measured from the weight that was aimed for.

    steps       what was done beyond the method's name, in order, and kept
    peak_bytes  the most memory that the process had held until then
    device_peak_bytes  the same of the device that the layer was quantized on, where it is no CPU
    fallbacks   where the numbers did not allow what was asked, and what was done in its place
    notes       other decisions that were not the plain path
    """

    module: str
    scheme: str | None
    method: str
    error: float | None = None
    rtn_error: float | None = None
    num_tokens: int | None = None
    seconds: float | None = None
    steps: tuple[str, ...] = ()
    peak_bytes: int | None = None
    device_peak_bytes: int | None = None
    fallbacks: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LayerReport:
        """From JSON, whose lists are tuples here."""
        texts = {name: tuple(data.get(name, ())) for name in ("steps", "fallbacks", "notes")}
        return cls(**{**data, **texts})

    @property
    def remarks(self) -> tuple[str, ...]:
        """Fallbacks and notes."""
        return (*self.fallbacks, *self.notes)


@dataclass(frozen=True, slots=True)
class Manifest:
    """The content of qtool.json."""

    format: str
    source: str
    source_revision: str | None = None
    recipe: Mapping[str, Any] | None = None
    calibration: Mapping[str, Any] | None = None
    layers: tuple[LayerReport, ...] = ()
    # Linears left in 16 bit, with the reason.
    unquantized: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=lambda: tool_versions())
    files: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        data = read_json(folder / MANIFEST_NAME)
        if data.pop("qtool", None) != MANIFEST_VERSION:
            raise FormatError(
                f"{folder / MANIFEST_NAME} is not a version {MANIFEST_VERSION} manifest",
                "it was written by another version of qtool",
            )
        try:
            layers = tuple(LayerReport.from_dict(layer) for layer in data.pop("layers", []))
            warnings = tuple(data.pop("warnings", ()))
            return cls(layers=layers, warnings=warnings, **data)
        except (TypeError, AttributeError) as error:
            raise FormatError(f"{folder / MANIFEST_NAME} is malformed: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        return {"qtool": MANIFEST_VERSION, **asdict(self)}


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Hash every file of the folder and write qtool.json; returns the manifest as written."""
    files = {
        path.relative_to(folder).as_posix(): sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST_NAME
    }
    written = Manifest(**{**_shallow(manifest), "files": files})
    write_json(folder / MANIFEST_NAME, written.to_dict())
    return written


def verify_checksums(folder: Path) -> Manifest:
    """Compare every file with the manifest; raises VerificationFailed that names what differs."""
    manifest = Manifest.load(folder)
    problems = []
    for name, digest in manifest.files.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif sha256(path) != digest:
            problems.append(f"{name} has changed")
    if problems:
        raise VerificationFailed(
            f"{folder}: {'; '.join(problems)}", "fetch or make the artifact again"
        )
    return manifest


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tool_versions() -> dict[str, str]:
    packages = ("torch", "transformers", "safetensors", "compressed-tensors", "gguf")
    return {
        "qtool": __version__,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in packages},
    }


def _shallow(manifest: Manifest) -> dict[str, Any]:
    return {name: getattr(manifest, name) for name in Manifest.__slots__}
