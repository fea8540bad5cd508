"""``qtool verify``: is this artifact what was written?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from qtool.errors import UsageError


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def verify(artifact: Path, as_json: bool) -> None:
    """Check every file of an artifact against the checksums in its qtool.json, and every tensor
    for NaN and infinity.

    ARTIFACT is a folder, or a .gguf file. That has no checksums: its header, the places of its
    tensors, its parts and all values are checked.

    \b
    Examples:
      qtool verify ./books-7m-int4
      qtool verify ./books-7m-Q4_K_M.gguf
    """
    if not artifact.exists():
        raise UsageError(f"there is no {artifact}", "name a folder or a .gguf file")
    facts, said = _verify_file(artifact) if artifact.is_file() else _verify_folder(artifact)
    click.echo(json.dumps({"ok": True, **facts}) if as_json else f"{artifact}: {said}")


def _verify_folder(folder: Path) -> tuple[dict[str, Any], str]:
    from qtool.verification import verify_artifact

    manifest, num_tensors = verify_artifact(folder)
    facts = {"format": manifest.format, "files": len(manifest.files), "tensors": num_tensors}
    said = f"{len(manifest.files)} files match their checksums, {num_tensors} tensors are finite"
    return facts, said


def _verify_file(path: Path) -> tuple[dict[str, Any], str]:
    from qtool.convert.gguf.verification import verify_gguf

    if path.suffix != ".gguf":
        raise UsageError(
            f"{path} is neither a folder nor a .gguf file",
            f"an artifact is verified whole: qtool verify {path.parent}",
        )
    found = verify_gguf(path)
    facts = {
        "format": "gguf",
        "files": found.num_files,
        "tensors": found.num_tensors,
        "unread": found.num_unread,
    }
    files = "" if found.num_files == 1 else f" in {found.num_files} files"
    unread = f", {found.num_unread} hold no weights" if found.num_unread else ""
    said = f"header and places are sound, {found.num_tensors} tensors{files} are finite{unread}"
    return facts, f"{said}; GGUF has no checksums"
