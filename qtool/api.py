"""qtool from Python: ``from qtool.api import quantize, convert, evaluate``."""

from __future__ import annotations

from qtool.convert.run import convert_model as convert
from qtool.quantize.pipeline import quantize_model as quantize
from qtool.runtime.evaluate.run import evaluate

__all__ = ["convert", "evaluate", "quantize"]
