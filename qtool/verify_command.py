"""``qtool verify``: is this artifact what was written?"""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def verify(folder: Path, as_json: bool) -> None:
    """Check every file of an artifact against the checksums in its qtool.json, and every tensor
    for NaN and infinity.

    \b
    Example:
      qtool verify ./books-7m-int4
    """
    from qtool.verification import verify_artifact

    manifest, num_tensors = verify_artifact(folder)
    if as_json:
        counts = {"files": len(manifest.files), "tensors": num_tensors}
        click.echo(json.dumps({"ok": True, "format": manifest.format, **counts}))
    else:
        click.echo(
            f"{folder}: {len(manifest.files)} files match their checksums, "
            f"{num_tensors} tensors are finite"
        )
