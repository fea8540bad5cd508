"""vLLM's engine arguments, as Python callers write them, made into an `EngineConfig`.

Names that this engine has are its own fields. Others that are often written along are accepted
where leaving them out comes to the same, and refused by name where it would not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from qtool.errors import UnknownName, UsageError
from qtool.runtime.config import EngineConfig

DTYPE_ALIASES = {"half": "float16", "float": "float32"}

# Values that change nothing here. None: any value, since the thing is decided by the model's files
# or does not exist in this engine.
HARMLESS: Mapping[str, tuple[object, ...] | None] = {
    "quantization": None,
    "disable_log_stats": None,
    "disable_log_requests": None,
    "swap_space": None,
    "max_loras": None,
    "max_lora_rank": None,
    "max_logprobs": None,
    "skip_tokenizer_init": (False,),
    "tokenizer": (None,),
    "tokenizer_mode": ("auto",),
    "trust_remote_code": (False,),
    "pipeline_parallel_size": (1,),
    "data_parallel_size": (1,),
    "load_format": ("auto",),
    "enable_chunked_prefill": (True, None),
}


def engine_config(model: str, options: Mapping[str, Any]) -> EngineConfig:
    """The config that the options ask for; UsageError names the one that cannot be honoured."""
    known = {field.name for field in fields(EngineConfig)} - {"model"}
    chosen: dict[str, Any] = {}
    for name, value in options.items():
        if name in known:
            chosen[name] = value
        elif name not in HARMLESS:
            raise UnknownName("engine argument", name, known | set(HARMLESS))
        elif (neutral := HARMLESS[name]) is not None and value not in neutral:
            raise UsageError(f"{name} is {value!r}, which this engine does not offer")
    if "dtype" in chosen:
        chosen["dtype"] = DTYPE_ALIASES.get(chosen["dtype"], chosen["dtype"])
    return EngineConfig(model, **chosen)
