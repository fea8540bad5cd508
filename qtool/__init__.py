"""qtool: take a language model from the Hub to production.

``from qtool import LLM, SamplingParams`` works and loads torch only then; ``import qtool`` loads
nothing heavy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from qtool.runtime.async_llm import AsyncEngineArgs, AsyncLLMEngine
    from qtool.runtime.engine.sampling_params import SamplingParams, StructuredOutputsParams
    from qtool.runtime.engine.sequence import LoRARequest
    from qtool.runtime.llama import Llama
    from qtool.runtime.llm import LLM
    from qtool.runtime.outputs import CompletionOutput, RequestOutput

__all__ = [
    "LLM",
    "AsyncEngineArgs",
    "AsyncLLMEngine",
    "CompletionOutput",
    "Llama",
    "LoRARequest",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "__version__",
]

# What is loaded on first use, and from where.
_LAZY = {
    "LLM": "qtool.runtime.llm",
    "AsyncEngineArgs": "qtool.runtime.async_llm",
    "AsyncLLMEngine": "qtool.runtime.async_llm",
    "CompletionOutput": "qtool.runtime.outputs",
    "Llama": "qtool.runtime.llama",
    "LoRARequest": "qtool.runtime.engine.sequence",
    "RequestOutput": "qtool.runtime.outputs",
    "SamplingParams": "qtool.runtime.engine.sampling_params",
    "StructuredOutputsParams": "qtool.runtime.engine.sampling_params",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'qtool' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
