"""What ships inside the package: a small real model, and the default texts for calibration and
evaluation.
"""

from __future__ import annotations

from pathlib import Path

from qtool.errors import UnknownName

_DATA = Path(__file__).parent / "data"

PREFIX = "builtin:"


def builtin_model(name: str) -> Path:
    """The folder of a bundled model, by the name after ``builtin:``."""
    folder = _DATA / "models" / name
    known = sorted(path.name for path in (_DATA / "models").iterdir() if path.is_dir())
    if name not in known:
        raise UnknownName("builtin model", name, known)
    return folder


def calibration_text() -> Path:
    """Excerpts of public-domain books; no paragraph of it is in the evaluation text."""
    return _DATA / "text" / "calibration.txt"


def evaluation_text() -> Path:
    """Excerpts of other public-domain books, held out from the bundled model's training."""
    return _DATA / "text" / "evaluation.txt"
