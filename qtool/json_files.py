"""JSON objects in files: read with a limit and an error that names the file, written to be read."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qtool.errors import FormatError

MAX_JSON_BYTES = 200_000_000


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises FormatError that names the file."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise FormatError(f"{path.name} is larger than {MAX_JSON_BYTES} bytes")
        value = json.loads(path.read_text(encoding="utf-8"))
    # ValueError: no JSON, no UTF-8, or a number of more digits than Python converts.
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise FormatError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
