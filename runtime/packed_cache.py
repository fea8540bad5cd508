"""The packed form of a model, kept in a file beside it (`--cache-packed`).

    model.gguf      -> model.gguf.packed
    a model folder  -> FOLDER/model.packed

Packing reads the whole model and writes as much memory; where the kernels' form is kept, the next
start maps it. The file is used only if all that went into it is the same: the model's files (name,
size, time of change, both ends), the code that reads and packs, the CPU's instructions, and what
was asked of packed layers. Otherwise it is left aside with a line that says why, and made anew. It
is as large as the packed layers, and can be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from qtool import arch, decoder_config, scheme, weights
from qtool.convert import formats
from qtool.convert.formats import WeightReader
from qtool.errors import FormatError
from qtool.kernels import dispatch
from qtool.kernels.cpu import native_linear, packed_form
from qtool.kernels.cpu.build import SOURCES
from qtool.kernels.cpu.native import Native, load
from qtool.native_build import cpu_flags
from qtool.progress import console
from qtool.runtime import layers
from qtool.runtime.layers import PackingRules
from qtool.runtime.models import build, layer_maker, layer_store, tensors, text_part
from qtool.runtime.models import load as load_models
from qtool.runtime.models.layer_store import UNSTORED, LayerReader, LayerStore, LayerWriter
from qtool.settings import settings
from qtool.source import Source
from qtool.units import size_text

# What decides what a layer holds and how it is packed: kernels, how each format is read, how
# weights are put together. A change of any of them may be another layer.
CODE = (
    *(native_linear, packed_form, dispatch, layers, layer_store),
    *(build, layer_maker, tensors, text_part, load_models, arch, decoder_config, scheme, weights),
)
READERS = Path(str(formats.__file__)).parent
END_BYTES = 1 << 16
DIFFERENCES = {
    "files": "the model's files have changed",
    "code": "it was made by another version of qtool",
    "cpu": "it was made for another CPU",
    "rules": "it was made for other settings (dtype, activations, head)",
}


def packed_path(source: Source) -> Path:
    path = source.path
    return path.with_name(f"{path.name}.packed") if source.is_gguf else path / "model.packed"


@contextmanager
def packed_store(
    reader: WeightReader, dtype: torch.dtype, device: torch.device, rules: PackingRules
) -> Iterator[LayerStore]:
    """The store that a model is loaded by; when the context ends well, the file is there."""
    native = load()
    refusal = native_linear.refuses_any(dtype, device, rules.activations)
    if refusal is not None or not isinstance(native, Native):
        say(f"no packed form is kept: the compiled kernel {refusal}")
        yield UNSTORED
        return
    path, wanted = packed_path(reader.source), identity_of(reader, dtype, rules)
    stored = _stored(path, wanted, native)
    if stored is not None:
        say(f"packed form mapped from {path.name}")
        yield stored
        return
    try:
        writer = LayerWriter(path)
    except OSError as error:
        say(f"{path} cannot be written ({error.strerror}); the packed form is not kept")
        yield UNSTORED
        return
    try:
        yield writer  # what fails here is the model's own, and nothing to go on from
        try:
            num_bytes = writer.finish(wanted)
        except OSError as error:
            say(f"{path} could not be written ({error.strerror}); the packed form is not kept")
        else:
            say(f"packed form kept in {path}: {size_text(num_bytes)}")
    finally:
        writer.discard()


def identity_of(reader: WeightReader, dtype: torch.dtype, rules: PackingRules) -> dict[str, Any]:
    return {
        "files": _digest_of_files(reader),
        "code": _digest(
            path.read_bytes()
            for path in (
                *sorted(SOURCES.iterdir()),
                *sorted(READERS.rglob("*.py")),
                *(Path(str(module.__file__)) for module in CODE),
            )
        ),
        "cpu": _digest([" ".join(sorted(cpu_flags())).encode()]),
        "rules": [str(dtype), rules.activations or settings().activations, rules.lm_head],
    }


def _digest_of_files(reader: WeightReader) -> str:
    facts = []
    for file in _weight_files(reader):
        found = file.stat()
        with file.open("rb") as opened:
            first = opened.read(END_BYTES)
            opened.seek(max(found.st_size - END_BYTES, 0))
            ends = _digest([first, opened.read(END_BYTES)])
        facts.append([file.name, found.st_size, found.st_mtime_ns, ends])
    return _digest([json.dumps([facts, reader.config], sort_keys=True, default=str).encode()])


def _weight_files(reader: WeightReader) -> Sequence[Path]:
    folder = reader.source.path
    if folder.is_dir():
        return sorted(file for file in folder.iterdir() if file.suffix in (".safetensors", ".bin"))
    from qtool.convert.gguf.import_ import GgufWeights

    assert isinstance(reader, GgufWeights)
    return reader.file.paths


def _digest(parts: Iterable[bytes]) -> str:
    whole = hashlib.sha256()
    for part in parts:
        whole.update(len(part).to_bytes(8, "little") + part)
    return whole.hexdigest()


def _stored(path: Path, wanted: dict[str, Any], native: Native) -> LayerReader | None:
    try:
        found = LayerReader(path, native)
    except FileNotFoundError:
        return None
    except OSError as error:
        say(f"{path} cannot be read ({error.strerror}); it is made again")
        return None
    except (FormatError, ValueError, KeyError, TypeError) as error:
        say(f"{path} is ignored and made again: {error}")
        return None
    for key, difference in DIFFERENCES.items():
        if found.identity.get(key) != wanted[key]:
            say(f"{path} is ignored and made again: {difference}")
            return None
    return found


def say(line: str) -> None:
    console.print(line, highlight=False, soft_wrap=True)
