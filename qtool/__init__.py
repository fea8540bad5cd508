"""qtool: take a language model from the Hub to production.

``from qtool import LLM, SamplingParams`` works and loads torch only then; ``import qtool`` loads
nothing heavy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from qtool.runtime.engine.sampling_params import SamplingParams
    from qtool.runtime.llm import LLM

__all__ = ["LLM", "SamplingParams", "__version__"]

# What is loaded on first use, and from where.
_LAZY = {"LLM": "qtool.runtime.llm", "SamplingParams": "qtool.runtime.engine.sampling_params"}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'qtool' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
