"""Tokenizers of model folders as transformers read them, kept for the next start.

One file a tokenizer, named by the SHA-256 of all that the result depends on: the bytes of the
folder's files other than weights, the versions of the two libraries, and of this layout. A folder
that changes has another name, so nothing here is ever out of date. A file is

    SHA-256 of the rest, 64 hexadecimal digits, and a line feed
    a line of JSON: special_tokens, bos_token_id, eos_token_id, chat_template
    the `tokenizers` library's own JSON

and appears by a rename once it is complete: processes that start together write the same bytes. One
that is damaged is as good as none, and one that cannot be written costs the time of the next start.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from qtool.runtime.tokenizer_parts import TokenizerParts

LAYOUT = 1
# Of models last loaded first; each takes as much as a tokenizer.json.
MAX_KEPT = 16
WEIGHTS = frozenset((".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack"))
# No tokenizer's file is larger; of such a one its size and time stand for its bytes.
MAX_FILE_BYTES = 1 << 26
TEMPLATES = "additional_chat_templates"


@dataclass(frozen=True, slots=True)
class TokenizerCache:
    """One folder's tokenizer: the place where it is kept."""

    path: Path

    @classmethod
    def of(cls, folder: Path, cache: Path) -> TokenizerCache:
        digest = hashlib.sha256()
        for part in (str(LAYOUT), version("transformers"), version("tokenizers")):
            digest.update(f"{part}\0".encode())
        for path in _files(folder):
            status = path.stat()
            digest.update(f"{path.name}\0{status.st_size}\0".encode())
            if status.st_size > MAX_FILE_BYTES:
                digest.update(f"{status.st_mtime_ns}\0".encode())
            else:
                digest.update(path.read_bytes())
        return cls(cache / "tokenizers" / f"{digest.hexdigest()}.json")

    def load(self) -> TokenizerParts | None:
        try:
            content = self.path.read_bytes()
        except OSError:
            return None
        checksum, _, rest = content.partition(b"\n")
        if hashlib.sha256(rest).hexdigest().encode() != checksum:
            return None
        head, _, backend = rest.partition(b"\n")
        return TokenizerParts(backend=Backend.from_buffer(backend), **json.loads(head))

    def keep(self, parts: TokenizerParts) -> None:
        if not self.path.is_absolute():  # no home folder, or a cache named against the XDG rules
            return
        content = _content(parts)
        if content is None:
            return
        folder = self.path.parent
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=folder, suffix=".partial")
            try:
                with open(handle, "wb") as file:
                    file.write(content)
                os.replace(name, self.path)
            except BaseException:
                Path(name).unlink(missing_ok=True)
                raise
            _drop_oldest(folder)
        except OSError:
            return


def _files(folder: Path) -> Iterator[Path]:
    """What transformers may look at, in one order."""
    for place in (folder, folder / TEMPLATES):
        if place.is_dir():
            yield from sorted(
                path for path in place.iterdir() if path.is_file() and path.suffix not in WEIGHTS
            )


def _content(parts: TokenizerParts) -> bytes | None:
    """None where the library's JSON does not hold all of the tokenizer."""
    text = parts.backend.to_str()
    if parts.backend.encode_special_tokens or Backend.from_str(text).to_str() != text:
        return None
    head: dict[str, Any] = {
        "special_tokens": dict(parts.special_tokens),
        "bos_token_id": parts.bos_token_id,
        "eos_token_id": parts.eos_token_id,
        "chat_template": parts.chat_template,
    }
    rest = f"{json.dumps(head)}\n{text}".encode()
    return hashlib.sha256(rest).hexdigest().encode() + b"\n" + rest


def _drop_oldest(folder: Path) -> None:
    kept = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for path in kept[MAX_KEPT:]:
        path.unlink(missing_ok=True)
