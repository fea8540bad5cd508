"""qtool from Python: ``from qtool.api import quantize, convert, evaluate``.

What an export to GGUF can be told is a value: ``convert(model, to="gguf", gguf=GgufOptions(...))``.
"""

from __future__ import annotations

from qtool.convert.gguf.options import GgufOptions
from qtool.convert.run import convert_model as convert
from qtool.quantize.pipeline import quantize_model as quantize
from qtool.runtime.evaluate.run import evaluate

__all__ = ["GgufOptions", "convert", "evaluate", "quantize"]
