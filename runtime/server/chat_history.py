"""What was typed at the prompt of `qtool chat`, kept for the next time: Up and Ctrl-R find it.

One line after the other in a file that only the user may read, written as soon as the line is
entered: a session that is killed loses nothing. Where Python has no readline (on Windows), or the
file cannot be written, the prompt works without.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

MAX_LINES = 2000


class PromptHistory:
    """readline's history of this process and the file behind it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._readline: Any = None
        # Importing it is enough for input() to have a history and be edited.
        if importlib.util.find_spec("readline"):
            self._readline = importlib.import_module("readline")
            self._load()
        self._count = self._length()

    def remember(self) -> None:
        """Keep the line that was entered last, if it is one that readline keeps."""
        if self._readline is None or self._length() <= self._count:
            return
        self._count = self._length()
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.touch(mode=0o600)
            self._readline.append_history_file(1, str(self._path))
        except OSError:
            self._readline = None  # the prompt has to work, its memory does not

    def _load(self) -> None:
        try:
            self._readline.read_history_file(str(self._path))
        except OSError:
            return  # none yet, or not to be read
        if self._length() > MAX_LINES:
            self._readline.set_history_length(MAX_LINES)
            self._readline.write_history_file(str(self._path))

    def _length(self) -> int:
        return 0 if self._readline is None else int(self._readline.get_current_history_length())
