"""Errors a user can act on.

    QtoolError                 exit code 1: the work could not be done
    ├── UnsupportedModel       a family, shape or format this tool does not take
    ├── FormatError            a malformed or hostile file; names the file and the key or offset
    ├── VerificationFailed     what was written is not what was meant
    └── UsageError             exit code 2: the request itself is wrong
        ├── UnknownName        a recipe, format, model... that does not exist, with a did-you-mean
        └── OutputExists       the output is there already and was not to be replaced

Every message names the thing, the value found and the rule; the hint names the next step.
``qtool.cli`` is the one place that turns an error into text and an exit code.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class QtoolError(Exception):
    """A failure with a message for the user and, where there is one, the next step."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UnsupportedModel(QtoolError):
    """A model family, shape or weight format that cannot be handled."""


class FormatError(QtoolError):
    """A file that does not hold what its format requires."""


class VerificationFailed(QtoolError):
    """Something that was written differs from what was meant."""


class UsageError(QtoolError):
    """The request is wrong as it stands."""

    exit_code = 2


class UnknownName(UsageError):
    """A name that is not in a known set."""

    def __init__(self, kind: str, value: str, known: Iterable[str]) -> None:
        names = sorted(known)
        guess = closest(value, names)
        known_text = f"known: {', '.join(names)}" if names else f"no {kind} is known here"
        hint = f"did you mean {guess}? ({known_text})" if guess else known_text
        super().__init__(f"unknown {kind} {value!r}", hint)


class OutputExists(UsageError):
    """The output path is taken."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            f"output {path} already exists",
            "pass --force to replace it, or name another with --out",
        )


def closest(value: str, known: Iterable[str]) -> str | None:
    """The known name nearest to ``value``, if any is near enough to be meant."""
    matches = difflib.get_close_matches(value.lower(), {k.lower(): k for k in known}, n=1)
    return next((k for k in known if k.lower() == matches[0]), None) if matches else None
