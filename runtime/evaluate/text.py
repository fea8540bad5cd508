"""The text that models are scored on: read, hashed, and checked against the calibration text.

A model that was calibrated on the text it is judged by looks better than it is, so the report says
of every text how many of its paragraphs are also in the calibration text that ships.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qtool.builtin import calibration_text, evaluation_text
from qtool.errors import UsageError

# What models can be scored in. "auto" is not among them: a report names what it computed in.
ScoringDtype = Literal["float32", "bfloat16", "float16"]

# 64 windows of 512: the standard error of a KL divergence is then a few percent of it, and a model
# of 0.5B takes minutes on a laptop, not an hour.
DEFAULT_MAX_TOKENS = 32_768

# A shared chapter heading is no leak; a shared paragraph is.
MIN_PARAGRAPH_CHARACTERS = 80


@dataclass(frozen=True, slots=True)
class EvaluationText:
    """name: the file as the user gave it, or what the default is called.

    num_shared_paragraphs   None where the text itself is not here, only its tokens
    """

    name: str
    content: str
    sha256: str
    num_shared_paragraphs: int | None

    @property
    def overlap(self) -> str:
        if self.num_shared_paragraphs is None:
            return "whether calibration has seen it is not known"
        if not self.num_shared_paragraphs:
            return "no paragraph shared with the calibration text that ships"
        count = f"{self.num_shared_paragraphs} paragraphs"
        return f"{count} are also in the calibration text that ships: a model looks better on them"


def read_text(path: Path | None) -> EvaluationText:
    """The text of a UTF-8 file, or the one that ships."""
    file = evaluation_text() if path is None else path
    try:
        content = file.read_bytes().decode("utf-8")
    except FileNotFoundError as error:
        raise UsageError(f"no text at {file}", "name a UTF-8 text file with --text") from error
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{file} is not UTF-8 text: byte {error.start} cannot be read",
            "convert it first, for example with iconv -t utf-8",
        ) from error
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}") from error
    if not content.strip():
        raise UsageError(f"{file} holds no text", "name a longer UTF-8 text file with --text")
    calibration = calibration_text().read_text(encoding="utf-8")
    return EvaluationText(
        name="the evaluation text that ships (public-domain books)" if path is None else str(path),
        content=content,
        sha256=hashlib.sha256(content.encode("utf-8")).hexdigest(),
        num_shared_paragraphs=len(paragraphs(content) & paragraphs(calibration)),
    )


def paragraphs(text: str) -> set[str]:
    """Paragraphs long enough to be told apart, each on one line."""
    joined = (" ".join(part.split()) for part in text.replace("\r\n", "\n").split("\n\n"))
    return {paragraph for paragraph in joined if len(paragraph) >= MIN_PARAGRAPH_CHARACTERS}
