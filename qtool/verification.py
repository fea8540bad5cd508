"""Is an artifact what was written, and finite?"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from qtool.artifact import Manifest, verify_checksums
from qtool.checkpoint import Checkpoint
from qtool.errors import VerificationFailed
from qtool.progress import track


class Verified(NamedTuple):
    manifest: Manifest
    num_tensors: int


def verify_artifact(folder: Path) -> Verified:
    """Compare every file with its checksum and look at every tensor; raises VerificationFailed that
    names what differs or is not finite.
    """
    manifest = verify_checksums(folder)
    checkpoint = Checkpoint.open(folder)
    bad = [
        name
        for name in track(checkpoint.tensors, "checking tensors")
        if checkpoint.tensors[name].dtype.is_floating_point
        and not checkpoint.tensor(name).float().isfinite().all()
    ]
    if bad:
        raise VerificationFailed(f"{folder}: not finite: {', '.join(bad)}")
    return Verified(manifest, len(checkpoint.tensors))
