"""`python -m qtool.runtime.server --model M`: `qtool serve` in the module form of other servers."""

from __future__ import annotations

import sys

from qtool.cli import main

if __name__ == "__main__":
    main(["serve", *sys.argv[1:]])
